"""The laws of prompt methods that peft keeps only in part: training, padding, caches, several adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prompt_zoo import (
    CACHES,
    CLOSE,
    DECODERS,
    HEADS,
    LM,
    METHODS,
    ZOO,
    N,
    adapted,
    batch,
    cases,
    config,
    main_output,
    make,
    own,
    trained,
)

from veneer import registry
from veneer.errors import AdapterError
from veneer.kinds import Prompt
from veneer.methods.prompt_tuning import PromptTuningConfig
from veneer.model import PeftModel, get_peft_model
from veneer.prompts.table import Table

# -- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "arch", "task"), cases(LM + [h for h in HEADS if h[1] != "FEATURE_EXTRACTION"]))
def test_training_lowers_the_loss_and_leaves_the_base(method: str, arch: str, task: str) -> None:
    model = adapted(method, arch, task).train()
    before = {n: p.detach().clone() for n, p in model.base_model.named_parameters() if not p.requires_grad}
    data, losses = batch(task, method=method), []
    best = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        best.zero_grad()
        loss = model(**data).loss
        loss.backward()
        read = trained(model).grad
        assert read is not None
        assert read.abs().max() > 0
        best.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = dict(model.base_model.named_parameters())
    assert before
    assert all(torch.equal(before[n], after[n]) and after[n].grad is None for n in before)


@pytest.mark.parametrize(
    ("method", "arch", "task"), cases([("gpt2", "CAUSAL_LM"), ("bart", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS")])
)
def test_prompt_gradient_equals_finite_differences(method: str, arch: str, task: str) -> None:
    model = adapted(method, arch, task).double()
    weight, data = trained(model), batch(task, method=method)
    torch.manual_seed(0)
    way = torch.randn_like(weight)

    def value() -> torch.Tensor:
        return model(**data).logits.square().mean()

    (grad,) = torch.autograd.grad(value(), weight)
    sides = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            weight.add_(way * step)
            sides.append(value())
    torch.testing.assert_close((grad * way).sum(), (sides[0] - sides[1]) / 2e-5, atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize(("method", "arch", "task"), cases([*LM, ("bert", "SEQ_CLS")]))
def test_gradient_checkpointing_changes_nothing(method: str, arch: str, task: str) -> None:
    """Departure: peft refuses prefix tuning under gradient checkpointing."""
    grads, losses = [], []
    for on in (False, True):
        model = adapted(method, arch, task).train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**batch(task, method=method)).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append(trained(model).grad)
    torch.testing.assert_close(losses[0], losses[1], **CLOSE)
    torch.testing.assert_close(grads[0], grads[1], **CLOSE)


def test_reentrant_checkpointing_of_a_prefix_is_refused() -> None:
    model = adapted("prefix", "llama", "CAUSAL_LM").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(AdapterError, match="reentrant gradient checkpointing gives a prefix no gradient"):
        model(**batch("CAUSAL_LM"))
    with pytest.raises(AdapterError, match=r"call model\.eval\(\)"):
        model.generate(**batch("CAUSAL_LM", labels=False))


# -- padding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize(
    ("method", "arch", "task"),
    cases(
        [(a, "CAUSAL_LM") for a in DECODERS[:4]]
        + [
            ("llama", "SEQ_CLS"),
            ("gpt2", "SEQ_CLS"),
            ("opt", "SEQ_CLS"),
            ("bloom", "SEQ_CLS"),
            ("bert", "SEQ_CLS"),
        ]
        + [("bert", "TOKEN_CLS"), ("roberta", "TOKEN_CLS"), ("gpt2", "QUESTION_ANS"), ("llama", "FEATURE_EXTRACTION")]
    ),
)
def test_padded_row_equals_the_row_alone(method: str, pad: str, arch: str, task: str) -> None:
    """Departure: peft counts positions through the padding between prompt and tokens, and classifies a
    decoder's row by its last position, padding or not."""
    if method in CACHES and (pad, arch, task) == ("left", "bert", "SEQ_CLS"):
        return  # BERT itself classifies by the first position, here padding
    model, data = adapted(method, arch, task), batch(task, pad, labels=False, method=method)
    real = data["attention_mask"][1].bool()
    with torch.no_grad():
        together = main_output(model(**data))[..., 1:2, :] if task == "SEQ_CLS" else main_output(model(**data))
        alone = main_output(model(input_ids=data["input_ids"][1:, real], **own(method)))
    if task == "SEQ_CLS":
        torch.testing.assert_close(together, alone, **CLOSE)
        return
    axis = -1 if task == "QUESTION_ANS" else -2
    seen = torch.cat([torch.ones(0 if method in CACHES else N, dtype=torch.bool), real])
    row = together.select(together.dim() + axis - 1, 1)
    kept = row.index_select(row.dim() + axis, seen.nonzero().squeeze(1))
    torch.testing.assert_close(kept, alone.select(alone.dim() + axis - 1, 0), **CLOSE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", DECODERS[:4])
@pytest.mark.parametrize("beams", [1, 2])
def test_left_padded_row_generates_as_alone(method: str, arch: str, beams: int) -> None:
    model, data = adapted(method, arch, "CAUSAL_LM"), batch("CAUSAL_LM", "left", False, method)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    together = model.generate(**data, **settings)
    assert together.shape == (2, 11)
    alone = model.generate(input_ids=data["input_ids"][1:, 2:], **own(method), **settings)
    assert together[1, 6:].tolist() == alone[0, 4:].tolist()


def test_positions_given_by_the_caller_count() -> None:
    """Departure: peft drops position_ids with a warning."""
    model, data = adapted("prompt", "gpt2", "CAUSAL_LM"), batch("CAUSAL_LM", None)
    with torch.no_grad():
        plain = model(**data).logits
        same = model(**data, position_ids=torch.arange(6)[None]).logits
        moved = model(**data, position_ids=torch.arange(6)[None] + 9).logits
    torch.testing.assert_close(same, plain, **CLOSE)
    assert (moved - plain).abs().max() > 1e-3


def test_labels_of_tokens_line_up() -> None:
    """Departure: with a prompt peft fails on token labels and reads answer positions n tokens early."""
    from torch.nn.functional import cross_entropy

    data = batch("TOKEN_CLS")
    out = adapted("prompt", "bert", "TOKEN_CLS")(**data)
    assert out.logits.shape == (2, N + 6, 3)
    by_hand = cross_entropy(out.logits[:, N:].flatten(0, 1), data["labels"].flatten())
    torch.testing.assert_close(out.loss, by_hand, **CLOSE)
    data = batch("QUESTION_ANS")
    for arch in ("bert", "gpt2"):
        out = adapted("prompt", arch, "QUESTION_ANS")(**data)
        by_hand = sum(cross_entropy(out[f"{side}_logits"], data[f"{side}_positions"] + N) for side in ("start", "end"))
        torch.testing.assert_close(out.loss, by_hand / 2, **CLOSE)


# -- decoding by hand, several adapters, switching off -----------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", DECODERS[:4])
def test_decoding_by_hand_with_a_cache(method: str, arch: str) -> None:
    model, data = adapted(method, arch, "CAUSAL_LM"), batch("CAUSAL_LM", None, labels=False)
    tasks = own(method, 2)
    ids, mask = data["input_ids"], data["attention_mask"]
    with torch.no_grad():
        whole = model(**data, **tasks).logits[:, -2:]
        first = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True, **tasks)
        rest = model(input_ids=ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values, **tasks)
    torch.testing.assert_close(rest.logits, whole, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_cache_generates_the_same(method: str) -> None:
    model, data = adapted(method, "llama", "CAUSAL_LM"), batch("CAUSAL_LM", "left", False, method)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**data, **settings)
    assert model.generate(**data, **settings, use_cache=False).tolist() == cached.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_several_adapters_and_none(method: str) -> None:
    model, data = adapted(method, "llama", "CAUSAL_LM"), batch("CAUSAL_LM", None, method=method)
    more = {k: [3, 4, 5, 6, 8] for k in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask") if method == "cpt"}
    base = make("llama", "CAUSAL_LM")
    with torch.no_grad():
        first = model(**data).loss
        model.add_adapter("b", config(method, "CAUSAL_LM", num_virtual_tokens=5, **more))
        torch.testing.assert_close(model(**data).loss, first, atol=0, rtol=0)
        model.set_adapter("b")
        assert model.get_prompt_embedding_to_save("b").shape[0] == 5
        assert (model(**data).loss - first).abs() > 1e-4
        with model.disable_adapter():
            plain = {k: v for k, v in data.items() if k != "task_ids"}
            torch.testing.assert_close(model(**plain).logits, base(**plain).logits, **CLOSE)
        model.set_adapter("default")
        torch.testing.assert_close(model(**data).loss, first, atol=0, rtol=0)


def test_get_prompt() -> None:
    tokens = adapted("prompt", "t5", "SEQ_2_SEQ_LM")
    assert tokens.get_prompt(2).shape == (2, 2 * N, 32)
    cache = adapted("prefix", "llama", "CAUSAL_LM").get_prompt(2)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 2, N, 8)] * 2
    both = adapted("prefix", "bart", "SEQ_2_SEQ_LM").get_prompt(2)
    assert (both.self_attention_cache.get_seq_length(), both.cross_attention_cache.get_seq_length()) == (N, 0)


def test_decoder_of_other_sizes_than_its_encoder() -> None:
    """Departure: peft sizes an encoder-decoder's prefix by the encoder and fails."""
    data = batch("SEQ_2_SEQ_LM")
    for arch, changes in (
        ("t5", {"num_decoder_layers": 3}),
        ("t5", {"d_kv": 4}),
        ("bart", {"decoder_layers": 3, "decoder_attention_heads": 2}),
    ):
        model = adapted("prefix", arch, "SEQ_2_SEQ_LM", changes)
        model(**data).loss.backward()
        assert model.prompt_encoder["default"].embedding.weight.grad.abs().max() > 0
        if "num_decoder_layers" not in changes:  # transformers' own generate fails there, without any adapter
            assert model.generate(**batch("SEQ_2_SEQ_LM", labels=False), max_new_tokens=3).shape[0] == 2


def test_training_goes_on_from_a_file(tmp_path: Any) -> None:
    """Departure: peft does not train a loaded prompt."""
    model, data = adapted("prefix", "llama", "CAUSAL_LM", prefix_projection=True), batch("CAUSAL_LM")
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(make("llama", "CAUSAL_LM"), str(tmp_path), is_trainable=True)
    torch.testing.assert_close(again(**data).loss, model(**data).loss, **CLOSE)
    again(**data).loss.backward()
    (trained,) = [p for p in again.parameters() if p.requires_grad]
    assert trained.grad.abs().max() > 0


def test_every_registered_prompt_method_is_here() -> None:
    named = {n for n in registry.types() if isinstance(registry.method(n), Prompt)}
    assert named == {config(m, "CAUSAL_LM").peft_type for m in ZOO}


class PerTask(Prompt):
    """A prompt for each of two tasks, as a method outside the registry would be written."""

    Config = PromptTuningConfig

    def encoder(self, cfg: Any, embedding: torch.nn.Module, fill: bool) -> torch.nn.Module:
        return Table(2 * cfg.num_virtual_tokens, cfg.token_dim)

    def prompt(self, encoder: torch.nn.Module, cfg: Any, tasks: torch.Tensor | None) -> torch.Tensor:
        return encoder().view(2, cfg.num_virtual_tokens, -1)[tasks]


def test_a_method_with_a_prompt_for_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    method = PerTask()
    monkeypatch.setattr(registry, "method_of", lambda cfg: method)
    model, data = adapted("prompt", "llama", "CAUSAL_LM"), batch("CAUSAL_LM", None, labels=False)
    data["input_ids"] = data["input_ids"][:1].expand(2, 6)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2, "do_sample": False}
    with torch.no_grad():
        both = model(**data, task_ids=torch.tensor([0, 1])).logits
        assert (both[0] - both[1]).abs().max() > 1e-2
        for task in (0, 1):
            tasks = torch.tensor([task, task])
            torch.testing.assert_close(model(**data, task_ids=tasks).logits[0], both[task], **CLOSE)
            alone = model.generate(**data, task_ids=tasks, **settings)[0]
            assert model.generate(**data, task_ids=torch.tensor([0, 1]), **settings)[task].equal(alone)
    assert model.get_prompt(2, torch.tensor([1, 0])).shape == (2, N, 32)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_task_type(method: str) -> None:
    """Departure: peft fails where task_type is left out."""
    named, plain = adapted(method, "llama", "CAUSAL_LM"), adapted(method, "llama", "CAUSAL_LM")
    plain.active_peft_config.task_type = None
    data = batch("CAUSAL_LM", method=method)
    torch.testing.assert_close(plain(**data).loss, named(**data).loss, atol=0, rtol=0)
    if method == "cpt":  # which is for causal language models alone
        return
    cfg = config(method, None)
    assert get_peft_model(make("t5", "SEQ_2_SEQ_LM"), cfg)(**batch("SEQ_2_SEQ_LM", method=method)).loss.requires_grad
    assert cfg.num_transformer_submodules == 2
