"""Merging on whole models: one and several adapters, safe merge, tied embeddings, what is left behind."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from api_zoo import adapted, bert, gpt2, llama, logits, lora, moved, saved, t5, tokens
from torch import nn
from transformers import LlamaForCausalLM

import veneer
from veneer import PeftWarning

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def base_tensors(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_merge_and_unmerge() -> None:
    model = adapted("default", "b")
    before, y = base_tensors(model), logits(model)
    model.merge_adapter()
    assert not equal(base_tensors(model), before)
    torch.testing.assert_close(logits(model), y, **CLOSE)
    model.unmerge_adapter()
    assert equal(base_tensors(model), before)
    assert torch.equal(logits(model), y)


def test_merge_by_name() -> None:
    model = adapted("default", "b")
    model.set_adapter("b")
    y = logits(model)
    model.set_adapter("default")
    model.merge_adapter(["b"])
    assert model.get_model_status().merged_adapters == ["b"]
    torch.testing.assert_close(logits(model), y, **CLOSE)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="'nope' not found"):
        model.merge_adapter(["nope"])
    assert model.get_model_status().merged_adapters == []


def test_an_adapter_that_is_merged_cannot_be_deleted() -> None:
    model = adapted("default", "b")
    model.set_adapter("b")
    y = logits(model)
    model.merge_adapter(["b"])
    with pytest.raises(ValueError, match="unmerge"):
        model.delete_adapter("b")
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    model.delete_adapter("b")
    assert list(model.peft_config) == ["default"]


def test_setting_another_adapter_unmerges() -> None:
    model = adapted("default", "b")
    model.set_adapter("b")
    y = logits(model)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(PeftWarning, match="Unmerging"):
        model.set_adapter("b")
    assert torch.equal(logits(model), y)


def test_a_model_cast_while_merged_unmerges_in_its_new_dtype() -> None:
    model = adapted("default")
    base = llama().to(torch.bfloat16)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model.unload()), logits(base))


def test_saved_while_merged(tmp_path: Path) -> None:
    model = adapted("default")
    y = logits(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(veneer.PeftModel.from_pretrained(llama(), tmp_path)), y)


def test_merge_and_unload_leaves_a_plain_model() -> None:
    model = adapted("default")
    y = logits(model)
    plain = model.merge_and_unload()
    assert type(plain) is LlamaForCausalLM
    assert {type(m) for m in plain.modules()} == {type(m) for m in llama().modules()}
    assert plain.state_dict().keys() == llama().state_dict().keys()
    torch.testing.assert_close(logits(plain), y, **CLOSE)


def test_merge_and_unload_of_some() -> None:
    model = adapted("default", "b")
    model.set_adapter("b")
    y = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload(adapter_names=["b"])), y, **CLOSE)


def test_unload_gives_the_base_back() -> None:
    model = adapted("default", "b")
    model.merge_adapter()
    plain = model.unload()
    assert torch.equal(logits(plain), logits(llama()))
    assert plain.state_dict().keys() == llama().state_dict().keys()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_safe_merge_refuses_and_leaves_the_base(bad: float) -> None:
    """Also where only the last layer is broken: the layers before it are not left merged."""
    model = adapted("default")
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    layers[-1].lora_B["default"].weight.data[0, 0] = bad
    before = base_tensors(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)
    assert equal(base_tensors(model), before)
    assert not any(m.merged for m in layers)
    layers[-1].lora_B["default"].weight.data[0, 0] = 0.0
    model.merge_adapter(safe_merge=True)
    assert all(m.merged for m in layers)


def test_merged_while_disabled() -> None:
    model = adapted("default")
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_unmerge_is_exact_in_half_precision(dtype: torch.dtype) -> None:
    model = veneer.get_peft_model(llama().to(dtype), lora(use_dora=True))
    moved(model)
    before = base_tensors(model)
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert equal(base_tensors(model), before)


def test_merged_weights_equal_peft() -> None:
    options = {"r": 4, "target_modules": "all-linear", "use_rslora": True, "task_type": "CAUSAL_LM"}
    ours = moved(veneer.get_peft_model(llama(), veneer.LoraConfig(**options)))
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**options))
    peft.set_peft_model_state_dict(theirs, veneer.get_peft_model_state_dict(ours))
    weights = [m.merge_and_unload().state_dict() for m in (ours, theirs)]
    assert weights[0].keys() == weights[1].keys()
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key], weights[1][key], atol=1e-6, rtol=1e-6)


def test_merged_gpt2_keeps_its_layout() -> None:
    model = moved(veneer.get_peft_model(gpt2(), lora(target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")))
    y = logits(model)
    plain = model.merge_and_unload()
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in gpt2().named_parameters()}
    torch.testing.assert_close(logits(plain), y, **CLOSE)


# -- tied embeddings --------------------------------------------------------------------------------------
TARGETS = [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], ["q_proj", "embed_tokens"]]


@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
@pytest.mark.parametrize("dora", [False, True])
def test_tied_embeddings(targets: list[str], dora: bool, tmp_path: Path) -> None:
    """forward == merged == the merged model written to disk and read again."""
    base = llama(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = moved(veneer.get_peft_model(base, lora(target_modules=targets, use_dora=dora, task_type="CAUSAL_LM")))
    y = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), y, **CLOSE)
    model.unmerge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plain = model.merge_and_unload()
    untied = any("Setting config.tie_word_embeddings to False" in str(w.message) for w in said)
    assert untied is not plain.config.tie_word_embeddings
    torch.testing.assert_close(logits(plain), y, **CLOSE)
    plain.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), y, **CLOSE)


def test_unloading_a_tied_model_leaves_it_tied() -> None:
    base = llama(tie_word_embeddings=True)
    model = moved(veneer.get_peft_model(base, lora(target_modules=["embed_tokens"])))
    model.merge_adapter()
    plain = model.unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert plain.config.tie_word_embeddings
    assert torch.equal(logits(plain), logits(llama(tie_word_embeddings=True)))


def test_merged_encoder_decoder(tmp_path: Path) -> None:
    model = moved(veneer.get_peft_model(t5(), lora(target_modules=["q", "wo", "lm_head"], task_type="SEQ_2_SEQ_LM")))
    x = tokens()
    y = model(input_ids=x, labels=x).logits
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(input_ids=x, labels=x).logits, y, **CLOSE)
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(input_ids=x, labels=x).logits, y, **CLOSE)


# -- initial values that change the base --------------------------------------------------------------------
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("package", [veneer, peft], ids=["veneer", "peft"])
def test_saved_against_the_initial_adapter(init: str, rslora: bool, package: Any, tmp_path: Path) -> None:
    """With path_initial_model_for_weight_conversion the file is an ordinary LoRA for the untouched base."""
    model = veneer.get_peft_model(llama(), lora(init_lora_weights=init, use_rslora=rslora, task_type="CAUSAL_LM"))
    torch.testing.assert_close(logits(model), logits(llama()), **CLOSE)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    moved(model)
    y = logits(model)
    model.save_pretrained(tmp_path / "final", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert torch.equal(logits(model), y)
    base = llama()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    loaded = package.PeftModel.from_pretrained(base, tmp_path / "final")
    torch.testing.assert_close(logits(loaded), y, **CLOSE)
    own = loaded.unload().state_dict()
    assert all(torch.equal(own[k], before[k]) for k in before)
    config = package.PeftConfig.from_pretrained(tmp_path / "final")
    assert (config.r, config.init_lora_weights) == (8, True)


def test_conversion_says_what_it_cannot_do(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "plain")
    model = adapted("default")
    with pytest.raises(ValueError, match="only works for"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(folder))
    assert not list((tmp_path / "out").glob("*.safetensors"))


# -- a merged layer on its own ---------------------------------------------------------------------------------
def test_base_bias_travels_with_a_merged_lora_bias() -> None:
    """lora_bias on a layer without a bias: merging gives it one and unmerging takes it away."""
    net = nn.Sequential(nn.Linear(8, 6, bias=False))
    model = moved(veneer.get_peft_model(net, lora(target_modules=["0"], lora_bias=True)))
    x = torch.randn(3, 8)
    y = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, **CLOSE)
    assert net[0].base_layer.bias is not None
    model.unmerge_adapter()
    assert net[0].base_layer.bias is None
    assert torch.equal(model(x), y)


def test_merging_bert_with_trained_biases() -> None:
    model = moved(veneer.get_peft_model(bert(), lora(target_modules=["query"], bias="all", task_type="TOKEN_CLS")))
    y = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), y, **CLOSE)
