"""What each prompt method has of its own: its network, its tasks, its loss, its initial cache."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from prompt_zoo import CLOSE, METHODS, ZOO, N, adapted, batch, config, make, trained, twin
from safetensors.torch import load_file, save_file

import veneer
from veneer.errors import AdapterError, PeftWarning
from veneer.model import PeftModel, get_peft_model


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_train_as_in_peft(method: str) -> None:
    losses = []
    for model in (adapted(method, "llama", "CAUSAL_LM"), twin(method, "llama", "CAUSAL_LM")):
        best = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        data, seen = batch("CAUSAL_LM", method=method), []
        model.train()
        for _ in range(20):
            best.zero_grad()
            loss = model(**data).loss
            loss.backward()
            best.step()
            seen.append(loss.detach())
        losses.append(torch.stack(seen))
    torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("method", METHODS)
def test_names_shapes_and_initial_values_equal_peft(method: str) -> None:
    ours, theirs = adapted(method, "llama", "CAUSAL_LM"), twin(method, "llama", "CAUSAL_LM")
    a, b = ours.prompt_encoder.state_dict(), theirs.prompt_encoder.state_dict()
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    assert all(torch.equal(a[k], b[k]) for k in a)
    names = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert names[0] == names[1]


# -- p-tuning ----------------------------------------------------------------------------------------------


def test_the_file_of_an_lstm_prompt_has_no_dropout(tmp_path: Any) -> None:
    """Departure: peft saves a prompt drawn with dropout while the model is in training mode."""
    model = adapted("lstm", "llama", "CAUSAL_LM", encoder_dropout=0.5)
    expected = model.get_prompt_embedding_to_save("default")
    assert torch.equal(model.train().get_prompt_embedding_to_save("default"), expected)
    assert model.prompt_encoder.training


def test_p_tuning_settings() -> None:
    with pytest.raises(ValueError, match="'GRU' is not one of MLP, LSTM"):
        veneer.PromptEncoderConfig(encoder_reparameterization_type="GRU")
    sizes = {"num_virtual_tokens": 2, "token_dim": 4, "num_transformer_submodules": 1}
    with pytest.warns(PeftWarning, match="for MLP, the argument `encoder_num_layers` is ignored"):
        veneer.PromptEncoder(veneer.PromptEncoderConfig(encoder_num_layers=3, **sizes))


@pytest.mark.parametrize("method", ["prompt", "prefix", "mlp", "lstm"])
def test_encoders_take_token_numbers_as_in_peft(method: str) -> None:
    ours, theirs = (f(method, "llama", "CAUSAL_LM").prompt_encoder["default"] for f in (adapted, twin))
    ids = torch.arange(N).expand(2, N)
    torch.testing.assert_close(ours(ids), theirs(ids), **CLOSE)


# -- several tasks -----------------------------------------------------------------------------------------


def test_rows_of_different_tasks_equal_peft() -> None:
    ours, theirs = adapted("multitask", "llama", "CAUSAL_LM"), twin("multitask", "llama", "CAUSAL_LM")
    data = batch("CAUSAL_LM") | {"task_ids": torch.tensor([2, 0])}
    for p in [*ours.prompt_encoder.parameters(), *theirs.prompt_encoder.parameters()]:
        p.data.add_(0.3)
    with torch.no_grad():
        torch.testing.assert_close(ours(**data).logits, theirs(**data).logits, **CLOSE)
    plain = batch("CAUSAL_LM", None, labels=False) | {"task_ids": torch.tensor([2, 0])}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert ours.generate(**plain, **settings).equal(theirs.generate(**plain, **settings))
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        ours(**batch("CAUSAL_LM"))
    with pytest.raises(AdapterError, match="tasks 0 to 2"):
        ours(**batch("CAUSAL_LM"), task_ids=torch.tensor([3, 0]))
    with pytest.raises(AdapterError, match="3 entries and the batch 2 rows"):
        ours(**batch("CAUSAL_LM"), task_ids=torch.tensor([0, 0, 0]))


@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_new_task_starts_from_the_old_as_in_peft(init: str, ending: str, tmp_path: Any) -> None:
    source = adapted("multitask", "llama", "CAUSAL_LM")
    source.save_pretrained(str(tmp_path), safe_serialization=ending == "safetensors")
    settings = {
        "num_tasks": 1,
        "prompt_tuning_init": init,
        "prompt_tuning_init_state_dict_path": str(tmp_path / f"adapter_model.{ending}"),
        "prompt_tuning_init_task": 2,
    }
    ours, theirs = (f("multitask", "llama", "CAUSAL_LM", **settings).prompt_encoder for f in (adapted, twin))
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(a["default.embedding.weight"], source.prompt_encoder["default"].embedding.weight)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_tasks": 2}, "num_tasks=2.*use num_tasks=1"),
        ({"prompt_tuning_init_task": 3}, "tasks 0 to 2"),
        ({"prompt_tuning_init_state_dict_path": None}, "needs to be specified"),
        ({"num_ranks": 5}, r"prefix_task_cols have shape \(1, 3, 2\).*\(1, 3, 5\)"),
        ({"prompt_tuning_init": "MEAN"}, "'MEAN' is not one of"),
        ({"num_ranks": 0}, "num_ranks=0"),
        ({"prompt_tuning_init": "TEXT"}, "tokenizer_name_or_path can't be None"),
    ],
)
def test_source_tasks_that_do_not_fit(settings: dict, said: str, tmp_path: Any) -> None:
    adapted("multitask", "llama", "CAUSAL_LM").save_pretrained(str(tmp_path))
    path = str(tmp_path / "adapter_model.safetensors")
    given = {
        "num_tasks": 1,
        "prompt_tuning_init": "EXACT_SOURCE_TASK",
        "prompt_tuning_init_state_dict_path": path,
        **settings,
    }
    with pytest.raises(ValueError, match=said):
        adapted("multitask", "llama", "CAUSAL_LM", **given)


def test_a_file_without_a_tensor_is_refused(tmp_path: Any) -> None:
    adapted("multitask", "llama", "CAUSAL_LM").save_pretrained(str(tmp_path))
    held = load_file(tmp_path / "adapter_model.safetensors")
    held.pop("prefix_task_rows")
    save_file(held, tmp_path / "adapter_model.safetensors")
    with pytest.raises(veneer.LoadError, match="prefix_task_rows"):
        PeftModel.from_pretrained(make("llama", "CAUSAL_LM"), str(tmp_path))


# -- context-aware prompts ---------------------------------------------------------------------------------

EXAMPLES = {
    "cpt_token_ids": list(range(3, 15)),
    "cpt_mask": [1] * 12,
    "cpt_tokens_type_mask": [1, 2, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8],
}


@pytest.mark.parametrize("weighting", ["none", "decay"])
def test_context_loss_equals_peft(weighting: str) -> None:
    settings = {**EXAMPLES, "opt_weighted_loss_type": weighting, "opt_loss_decay_factor": 0.6}
    ours, theirs = (f("cpt", "llama", "CAUSAL_LM", **settings) for f in (adapted, twin))
    data = batch("CAUSAL_LM")
    types = torch.tensor([[1, 2, 2, 3, 4, 4], [1, 2, 3, 4, 0, 0]])
    for more in ({}, {"input_type_mask": types}):
        torch.testing.assert_close(ours(**data, **more).loss, theirs(**data, **more).loss, **CLOSE)
    assert (ours(**data).loss - ours(**data, input_type_mask=types).loss).abs() > 1e-3
    whole, parts = ours(**data), ours(**data, return_dict=False)
    assert next(iter(whole)) == "loss"
    assert torch.equal(parts[0], whole.loss)
    with pytest.raises(AdapterError, match=r"\(2, 3\), the input has \(2, 6\)"):
        ours(**data, input_type_mask=types[:, :3])


def test_calculate_loss_equals_peft() -> None:
    torch.manual_seed(0)
    types = torch.tensor([[1, 4, 12, 12, 4, 8, 2, 4], [4, 4, 4, 8, 0, 0, 8, 1]])
    logits, labels = torch.randn(2, 8, 5), torch.randint(0, 5, (2, 8)).masked_fill(types == 2, -100)
    cfg = config("cpt", "CAUSAL_LM", opt_loss_decay_factor=0.3)

    def loss(kind: Any) -> torch.Tensor:
        out = SimpleNamespace(logits=logits, loss=torch.zeros(()))
        return kind.calculate_loss(out, labels, types, cfg).loss

    torch.testing.assert_close(loss(veneer.CPTEmbedding), loss(peft.CPTEmbedding), **CLOSE)


def test_context_tokens_stay_in_their_balls_as_in_peft() -> None:
    settings = {**EXAMPLES, "opt_projection_epsilon": 0.2, "opt_projection_format_epsilon": 0.3}
    ours, theirs = (f("cpt", "llama", "CAUSAL_LM", **settings).prompt_encoder["default"] for f in (adapted, twin))
    torch.manual_seed(0)
    moved = torch.randn(12, 32) * torch.linspace(1e-4, 1e-1, 12)[:, None]
    for e in (ours, theirs):
        e.delta_embedding.weight.data.copy_(moved)
    torch.testing.assert_close(ours(), theirs(torch.arange(12)), **CLOSE)
    far = (ours() - ours.embedding.weight).norm(dim=1)
    assert (far <= ours.limits + 1e-6).all()
    assert (far[4], far[8]) == (0, 0)
    assert far[0] > 0


def test_a_context_that_ends_before_its_label() -> None:
    """Departure: peft counts the input's types on from the context's last one, and loses the labels where that is
    not a label's."""
    cut = {k: v[:7] for k, v in EXAMPLES.items()}  # up to the second example's input
    model = adapted("cpt", "llama", "CAUSAL_LM", **{**cut, "opt_weighted_loss_type": "none"})
    data = batch("CAUSAL_LM", None)
    logits = model(**data).logits
    context = torch.full((2, 7), -100)
    context[:, 4] = 7
    labels = torch.cat([context, data["labels"]], 1)
    by_hand = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(model(**data).loss, by_hand, **CLOSE)


def test_context_settings() -> None:
    ours, theirs = veneer.CPTConfig(task_type="CAUSAL_LM"), peft.CPTConfig(task_type="CAUSAL_LM")
    assert {**ours.to_dict(), "allow_unmatched": None} == {**theirs.to_dict(), "allow_unmatched": None}
    with pytest.raises(ValueError, match="only supports task_type = CAUSAL_LM"):
        veneer.CPTConfig(task_type="SEQ_CLS")
    with pytest.raises(ValueError, match="same length"):
        veneer.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1])
    with pytest.raises(AdapterError, match="the base has 60"):
        adapted("cpt", "llama", "CAUSAL_LM", cpt_token_ids=[1, 2, 60])


# -- cartridges --------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of numbers."""

    chat_template: str | None = None

    def __call__(self, text: str, return_tensors: str, truncation: bool, max_length: int | None) -> Any:
        return {"input_ids": torch.tensor([[int(w) for w in text.split()][:max_length]])}

    def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> torch.Tensor:
        assert messages[0]["role"] == "system"
        return torch.tensor([[1, *(int(w) for w in messages[0]["content"].split()), 2]])


@pytest.mark.parametrize("method", ["cartridge", "prefix"])
@pytest.mark.parametrize("template", [None, "system"])
def test_a_cache_that_starts_from_a_text(method: str, template: str | None) -> None:
    ours, theirs = adapted(method, "llama", "CAUSAL_LM"), twin(method, "llama", "CAUSAL_LM")
    words = Words()
    words.chat_template = template
    settings = {"text": "5 6 7 8 9", "use_chat_template": template is not None}
    a = veneer.initialize_kv_prefix_from_text(ours.train(), words, **settings)
    b = peft.initialize_kv_prefix_from_text(theirs, words, **settings)
    torch.testing.assert_close(a, b, **CLOSE)
    assert ours.training
    torch.testing.assert_close(ours.eval()(**batch("CAUSAL_LM")).loss, theirs(**batch("CAUSAL_LM")).loss, **CLOSE)
    read = make("llama", "CAUSAL_LM")
    ids = torch.tensor([[1, 5, 6] if template else [5, 6, 7]])
    with torch.no_grad():  # the prefix is what the model itself would have in its cache
        tail = batch("CAUSAL_LM", None, labels=False)["input_ids"][:1]
        whole = read(torch.cat([ids, tail], 1)).logits[:, 3:]
        torch.testing.assert_close(ours(tail).logits, whole, **CLOSE)


def test_a_cache_that_does_not_fit() -> None:
    model = adapted("cartridge", "llama", "CAUSAL_LM")
    base, ids = make("llama", "CAUSAL_LM"), torch.arange(3, 9)[None]
    past = base(ids, use_cache=True).past_key_values
    pairs = [(layer.keys, layer.values) for layer in past.layers]
    from_cache = veneer.initialize_kv_prefix_from_past_key_values
    assert torch.equal(
        veneer.prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=4),
        peft.prompt_embeddings_from_past_key_values(past, num_virtual_tokens=4),
    )
    assert trained(model).shape == (N - 1, 64)
    for past_key_values, more, said in [
        (past, {"num_virtual_tokens": 2}, r"Expected \(3, hidden\)"),
        (past, {"adapter_name": "b"}, "'b' not found"),
        (base(ids[:, :2], use_cache=True).past_key_values, {}, "Need at least 3 cached tokens, got 2"),
        (base(ids.expand(2, 6), use_cache=True).past_key_values, {}, "batch=2"),
        (make("gpt2", "CAUSAL_LM")(ids, use_cache=True).past_key_values, {}, r"\(3, 128\).*\(3, 64\)"),
    ]:
        with pytest.raises(ValueError, match=said):
            from_cache(model, past_key_values=past_key_values, **more)
    with pytest.raises(TypeError, match="of type int"):
        from_cache(model, past_key_values=3)
    with pytest.raises(ValueError, match="must be a CARTRIDGE or PREFIX_TUNING"):
        from_cache(adapted("prompt", "llama", "CAUSAL_LM"), past_key_values=past)
    with pytest.raises(ValueError, match="not supported for prefix tuning with"):
        from_cache(adapted("prefix", "llama", "CAUSAL_LM", prefix_projection=True), past_key_values=past)
    with pytest.raises(ValueError, match="give a longer text"):
        veneer.initialize_kv_prefix_from_text(model, Words(), text="5 6")
    with pytest.raises(AdapterError, match="encoder-decoder"):
        from_cache(adapted("cartridge", "t5", "SEQ_2_SEQ_LM"), past_key_values=past)


def test_cartridges_joined_as_in_peft(tmp_path: Any) -> None:
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for path, n in zip(paths, (3, 4), strict=True):
        adapted("cartridge", "llama", "CAUSAL_LM", num_virtual_tokens=n, num_frozen_tokens=2).save_pretrained(path)
    veneer.compose_cartridge_adapters(paths, output_path=tmp_path / "ours")
    peft.compose_cartridge_adapters(paths, output_path=tmp_path / "theirs")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert torch.equal(a["prompt_embeddings"], b["prompt_embeddings"])
    x, y = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    assert x == y
    model = PeftModel.from_pretrained(make("llama", "CAUSAL_LM"), str(tmp_path / "ours"), is_trainable=True)
    assert trained(model).shape == (5, 64)
    with pytest.raises(ValueError, match="at least 2"):
        veneer.compose_cartridge_adapters(paths[:1], output_path=tmp_path / "no")
    adapted("prompt", "llama", "CAUSAL_LM").save_pretrained(str(tmp_path / "p"))
    with pytest.raises(ValueError, match="is not a CARTRIDGE adapter"):
        veneer.compose_cartridge_adapters([paths[0], str(tmp_path / "p")], output_path=tmp_path / "no")
    adapted("cartridge", "gpt2", "CAUSAL_LM").save_pretrained(str(tmp_path / "g"))
    with pytest.raises(ValueError, match="Incompatible CARTRIDGE configs"):
        veneer.compose_cartridge_adapters([paths[0], str(tmp_path / "g")], output_path=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_frozen_tokens() -> None:
    model = adapted("cartridge", "llama", "CAUSAL_LM", num_frozen_tokens=2).train()
    encoder = model.prompt_encoder["default"]
    model(**batch("CAUSAL_LM")).loss.backward()
    assert encoder.frozen_embedding.grad is None
    assert encoder.trainable_embedding.grad.abs().max() > 0
    model.set_requires_grad("default", True)
    assert not encoder.frozen_embedding.requires_grad
    assert adapted("cartridge", "llama", "CAUSAL_LM", num_frozen_tokens=0).prompt_encoder["default"]().shape == (N, 64)
    for frozen in (-1, N + 1):
        with pytest.raises(ValueError, match="num_frozen_tokens"):
            adapted("cartridge", "llama", "CAUSAL_LM", num_frozen_tokens=frozen)


def test_every_config_has_pefts_fields() -> None:
    for name in {name for name, _ in ZOO.values()}:
        settings = {"task_type": "CAUSAL_LM"}
        ours, theirs = (getattr(package, name)(**settings).to_dict() for package in (veneer, peft))
        assert {k: v for k, v in ours.items() if k != "allow_unmatched"} == theirs
    model = get_peft_model(make("llama", "CAUSAL_LM"), config("prompt", "CAUSAL_LM"))
    assert isinstance(model.prompt_encoder["default"], veneer.PromptEmbedding)


def test_one_task_needs_no_ids() -> None:
    model, data = adapted("multitask", "llama", "CAUSAL_LM", num_tasks=1), batch("CAUSAL_LM")
    given = model(**data, task_ids=torch.zeros(2, dtype=torch.long)).logits
    assert torch.equal(model(**data).logits, given)
    ids = data["input_ids"]
    want = model.generate(ids, task_ids=torch.zeros(2, dtype=torch.long), max_new_tokens=3, num_beams=2)
    assert torch.equal(model.generate(ids, max_new_tokens=3, num_beams=2), want)
