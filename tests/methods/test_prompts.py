"""Prompt tuning and prefix tuning: the same as peft, and the settings."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from prompt_zoo import (
    CACHES,
    CLOSE,
    HEADS,
    LM,
    METHODS,
    N,
    adapted,
    batch,
    cases,
    config,
    main_output,
    make,
    peft_has,
    twin,
)
from safetensors.torch import load_file, save_file

from veneer.errors import AdapterError, PeftWarning
from veneer.methods.prefix_tuning import PrefixTuningConfig
from veneer.methods.prompt_tuning import PromptTuningConfig
from veneer.model import PeftModel, get_peft_model

# -- the same as peft --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "arch", "task"), filter(peft_has, cases(LM + HEADS)))
def test_output_and_loss_equal_peft(method: str, arch: str, task: str) -> None:
    ours, theirs = adapted(method, arch, task), twin(method, arch, task)
    per_token = method not in CACHES and task in ("TOKEN_CLS", "QUESTION_ANS")  # peft's labels miss the prompt
    pad = None if task == "SEQ_CLS" and arch != "bert" else "right"
    data = batch(task, pad, not per_token, method)
    with torch.no_grad():
        a, b = ours(**data), theirs(**data)
    torch.testing.assert_close(main_output(a), main_output(b), **CLOSE)
    if not per_token and task != "FEATURE_EXTRACTION":
        torch.testing.assert_close(a.loss, b.loss, **CLOSE)


@pytest.mark.parametrize(("method", "arch", "task"), cases(LM))
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generated_tokens_equal_peft(method: str, arch: str, task: str, search: dict) -> None:
    ours, theirs = adapted(method, arch, task), twin(method, arch, task)
    data = batch(task, None if arch != "t5" else "right", False, method)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **search}
    assert ours.generate(**data, **settings).tolist() == theirs.generate(**data, **settings).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_sampled_tokens_equal_peft(method: str) -> None:
    ours, theirs = adapted(method, "llama", "CAUSAL_LM"), twin(method, "llama", "CAUSAL_LM")
    data, out = batch("CAUSAL_LM", None, False, method), []
    for model in (ours, theirs):
        torch.manual_seed(5)
        out.append(model.generate(**data, max_new_tokens=6, do_sample=True, num_return_sequences=2).tolist())
    assert out[0] == out[1]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "cpt"])
def test_token_types_and_embeddings_equal_peft(method: str) -> None:
    ours, theirs = adapted(method, "bert", "SEQ_CLS"), twin(method, "bert", "SEQ_CLS")
    data = batch("SEQ_CLS", method=method)
    types = data | {"token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1]]).expand(2, 6)}
    with torch.no_grad():
        torch.testing.assert_close(ours(**types).loss, theirs(**types).loss, **CLOSE)
        ids = data.pop("input_ids")
        given = data | {"inputs_embeds": ours.get_input_embeddings()(ids)}
        torch.testing.assert_close(ours(**given).loss, theirs(**given).loss, **CLOSE)
        torch.testing.assert_close(ours(ids, **data).loss, theirs(ids, **data).loss, **CLOSE)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("prompt", {}),
        ("prompt", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
        ("prefix", {}),
        ("prefix", {"prefix_projection": True}),
        ("prefix", {"prefix_projection": True, "encoder_hidden_size": 20}),
        ("prefix", {"init_weights": "zero"}),
        ("prefix", {"init_weights": "zero", "prefix_projection": True}),
    ],
)
@pytest.mark.parametrize(("arch", "task"), [("llama", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bert", "SEQ_CLS")])
def test_sizes_names_and_initial_values_equal_peft(method: str, settings: dict, arch: str, task: str) -> None:
    ours, theirs = adapted(method, arch, task, **settings), twin(method, arch, task, **settings)
    a, b = ours.prompt_encoder.state_dict(), theirs.prompt_encoder.state_dict()
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    random_again = settings.get("init_weights") == "zero" and method == "prefix" and "prefix_projection" in settings
    for key in [] if random_again else a:
        torch.testing.assert_close(a[key], b[key], atol=0, rtol=0)
    sizes = ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
    mine, other = ours.active_peft_config, theirs.active_peft_config
    assert [getattr(mine, s) for s in sizes] == [getattr(other, s) for s in sizes]
    saved = ours.get_prompt_embedding_to_save("default")
    assert saved.shape == theirs.get_prompt_embedding_to_save("default").shape
    names = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert names[0] == names[1]


@pytest.mark.parametrize(("layers", "arch"), [(3, "t5"), (3, "bart"), (4, "t5")])
def test_which_pair_each_decoder_layer_reads_equals_peft(layers: int, arch: str) -> None:
    changes = {
        "num_layers": layers,
        "num_decoder_layers": layers,
        "encoder_layers": layers,
        "decoder_layers": layers,
    }
    ours, theirs = (f("prefix", arch, "SEQ_2_SEQ_LM", changes) for f in (adapted, twin))
    data = batch("SEQ_2_SEQ_LM")
    with torch.no_grad():
        torch.testing.assert_close(ours(**data).logits, theirs(**data).logits, **CLOSE)


@pytest.mark.parametrize(
    ("method", "arch", "task"),
    filter(peft_has, cases([("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("t5", "SEQ_2_SEQ_LM")])),
)
def test_files_go_both_ways(method: str, arch: str, task: str, tmp_path: Any) -> None:
    settings = {"prefix_projection": True} if method == "prefix" else {}
    ours, theirs = adapted(method, arch, task, **settings), twin(method, arch, task, **settings)
    data = batch(task, method=method)
    for p in [*ours.prompt_encoder.parameters(), *theirs.prompt_encoder.parameters()]:
        p.data.add_(0.3)
    ours.save_pretrained(str(tmp_path / "ours"))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")]
    assert {k: v.shape for k, v in files[0].items()} == {k: v.shape for k, v in files[1].items()}
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    heads = [set(c.pop("modules_to_save") or ()) for c in configs]  # peft lists heads that are not there, twice
    assert configs[0] == configs[1]
    assert heads[0] <= heads[1]
    there = peft.PeftModel.from_pretrained(make(arch, task), str(tmp_path / "ours")).eval()
    here = PeftModel.from_pretrained(make(arch, task), str(tmp_path / "theirs")).eval()
    with torch.no_grad():
        torch.testing.assert_close(there(**data).logits, ours(**data).logits, **CLOSE)
        torch.testing.assert_close(here(**data).logits, theirs(**data).logits, **CLOSE)


def test_grouped_heads_of_their_own_width_equal_peft() -> None:
    changes = {"head_dim": 16, "num_key_value_heads": 2}
    ours, theirs = (f("prefix", "llama", "CAUSAL_LM", changes) for f in (adapted, twin))
    assert ours.active_peft_config.token_dim == theirs.active_peft_config.token_dim == 32
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch("CAUSAL_LM")).logits, theirs(**batch("CAUSAL_LM")).logits, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_base_keeps_float32_prompts(method: str) -> None:
    ours, theirs = adapted(method, "llama", "CAUSAL_LM"), twin(method, "llama", "CAUSAL_LM")
    ours.base_model.bfloat16()
    theirs.base_model.bfloat16()
    assert {p.dtype for p in ours.prompt_encoder.parameters()} == {torch.float32}
    with torch.no_grad():
        data = batch("CAUSAL_LM", method=method)
        a, b = ours(**data).logits, theirs(**data).logits
    assert a.dtype == b.dtype == torch.bfloat16
    torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)


# -- initial text ------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: Any) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "classify", "the", "tweet", "as", "good", "or", "bad"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(str(tmp_path / "tok"))
    return str(tmp_path / "tok")


def from_text(text: str, tokenizer: str, **more: Any) -> PromptTuningConfig:
    words = {"prompt_tuning_init_text": text, "tokenizer_name_or_path": tokenizer}
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, prompt_tuning_init="TEXT", **words, **more)


def test_a_file_loads_without_the_tokenizer_of_its_text(tokenizer: str, tmp_path: Any) -> None:
    model = get_peft_model(make("llama", "CAUSAL_LM"), from_text("good bad", tokenizer)).eval()
    model.save_pretrained(str(tmp_path / "adapter"))
    shutil.rmtree(tokenizer)
    for trainable in (False, True):
        again = PeftModel.from_pretrained(make("llama", "CAUSAL_LM"), str(tmp_path / "adapter"), is_trainable=trainable)
        torch.testing.assert_close(again(**batch("CAUSAL_LM")).loss, model(**batch("CAUSAL_LM")).loss, **CLOSE)


@pytest.mark.parametrize("n", [3, 7, 10, 16])
def test_text_is_cut_or_repeated_as_in_peft(n: int, tokenizer: str) -> None:
    settings = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "classify the tweet as good or bad",
        "tokenizer_name_or_path": tokenizer,
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": n,
    }
    ours = get_peft_model(make("llama", "CAUSAL_LM"), PromptTuningConfig(**settings))
    theirs = peft.get_peft_model(make("llama", "CAUSAL_LM"), peft.PromptTuningConfig(**settings))
    a, b = ours.prompt_encoder["default"].embedding.weight, theirs.prompt_encoder["default"].embedding.weight
    torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_a_tokenizers_own_code_is_never_run(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    asked, real = [], transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: asked.append(k) or real(*a, **k))
    cfg = from_text("good", tokenizer, tokenizer_kwargs={"trust_remote_code": True})
    with pytest.warns(PeftWarning, match="trust_remote_code"):
        get_peft_model(make("llama", "CAUSAL_LM"), cfg)
    assert [k["trust_remote_code"] for k in asked] == [False]


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("prompt", {"num_virtual_tokens": None}, "num_virtual_tokens=None"),
        ("prompt", {"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        ("prompt", {"token_dim": 16}, "token_dim=16, LlamaForCausalLM has 32"),
        ("prefix", {"num_layers": 5}, "num_layers=5, LlamaForCausalLM has 2"),
        ("prompt", {"prompt_tuning_init": "TXT"}, "'TXT' is not one of TEXT, SAMPLE_VOCAB, RANDOM"),
        ("prompt", {"prompt_tuning_init": "TEXT"}, "tokenizer_name_or_path can't be None"),
        ("prompt", {"tokenizer_kwargs": {"a": 1}}, "only valid when"),
        ("prefix", {"init_weights": "zeros"}, 'use "zero"'),
    ],
)
def test_settings_that_do_not_fit(method: str, settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        get_peft_model(
            make("llama", "CAUSAL_LM"),
            config(method, "CAUSAL_LM", **settings),
        )


def test_text_beyond_the_vocabulary(tokenizer: str) -> None:
    cfg = from_text("good bad", tokenizer)
    with pytest.raises(AdapterError, match="token 7, and the base has 5"):
        get_peft_model(make("llama", "CAUSAL_LM", vocab_size=5), cfg)


def test_prefix_before_a_model_without_a_cache() -> None:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    base = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=60, dim=32, n_layers=2, n_heads=4))
    with pytest.raises(AdapterError, match="takes no past_key_values"):
        get_peft_model(base, PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=N))


def test_prefix_before_layers_of_unlike_widths() -> None:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    more = {"num_hidden_layers": 2, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    base = Gemma4ForCausalLM(Gemma4TextConfig(**sizes, **more))
    with pytest.raises(AdapterError, match="layers differ in head_dim, and a prefix has one width"):
        get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_a_prefix_takes_its_sizes_from_a_config_of_ones_own() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
            self.embed = torch.nn.Embedding(9, 32)

        def get_input_embeddings(self) -> torch.nn.Module:
            return self.embed

        def forward(self, input_ids: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
            return self.embed(input_ids)

    model = get_peft_model(Own(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    cfg: Any = model.active_peft_config
    assert (cfg.num_layers, cfg.num_attention_heads, cfg.token_dim) == (2, 4, 32)


def test_calls_that_do_not_fit() -> None:
    tokens, prefix = adapted("prompt", "llama", "CAUSAL_LM"), adapted("prefix", "llama", "CAUSAL_LM")
    ids = batch("CAUSAL_LM")["input_ids"]
    for model in (tokens, prefix):
        with pytest.raises(AdapterError, match="give input_ids or inputs_embeds"):
            model(attention_mask=torch.ones(2, 6))
        with pytest.raises(AdapterError, match=r"attention_mask of shape \(2, 4\)"):
            model(ids, attention_mask=torch.ones(2, 4))
        with pytest.raises(AdapterError, match=r"needs it as \(rows, length\)"):
            model(ids, attention_mask=torch.ones(2, 1, 6, 6))


def test_a_file_of_another_shape(tmp_path: Any) -> None:
    adapted("prompt", "llama", "CAUSAL_LM").save_pretrained(str(tmp_path))
    save_file({"prompt_embeddings": torch.zeros(N + 1, 32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"\(4, 32\).*\(3, 32\)"):
        PeftModel.from_pretrained(make("llama", "CAUSAL_LM"), str(tmp_path))
