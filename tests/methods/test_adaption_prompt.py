"""Adaption prompts on llama, mistral, qwen2 and GPT-2: the same as peft, and through the usual calls of PeftModel."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers as tf
from prompt_zoo import CLOSE, IDS, batch, make

import veneer
from veneer.model import PeftModel, get_peft_model

LEN, LAYERS = 4, 2
ARCHS = ("llama", "mistral", "gpt2")


def base(arch: str) -> Any:
    if arch in ("llama", "gpt2"):
        return make(arch, "CAUSAL_LM")
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
    kind, model = {
        "mistral": (tf.MistralConfig, tf.MistralForCausalLM),
        "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM),
    }[arch]
    torch.manual_seed(0)
    return model(kind(num_key_value_heads=2, **sizes, **IDS)).eval()


def both(arch: str, layers: int = LAYERS, gate: float | None = 0.4) -> list[Any]:
    out = []
    for package in (veneer, peft):
        torch.manual_seed(3)
        cfg = package.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=LEN, adapter_layers=layers)
        out.append(package.get_peft_model(base(arch), cfg).eval())
        if gate is not None:
            open_gates(out[-1], gate)
    return out


def open_gates(model: Any, value: float) -> None:
    for i, p in enumerate(p for n, p in model.named_parameters() if "adaption_gate" in n):
        p.data.fill_(value + 0.1 * i)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("pad", [None, "left", "right"])
def test_equals_peft(arch: str, pad: str | None) -> None:
    ours, theirs = both(arch)
    data = batch("CAUSAL_LM", pad)
    a, b = ours(**data), theirs(**data)
    torch.testing.assert_close(a.logits, b.logits, **CLOSE)
    plain = base(arch)(**data)
    assert (a.logits - plain.logits).abs().max() > 1e-2
    with ours.disable_adapter():
        assert torch.equal(ours(**data).logits, plain.logits)
    assert torch.equal(both(arch, gate=None)[0](**data).logits, plain.logits)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generates_as_peft(arch: str, search: dict) -> None:
    ours, theirs = both(arch)
    data, settings = batch("CAUSAL_LM", None, labels=False), {"max_new_tokens": 6, "min_new_tokens": 6, **search}
    made = ours.generate(**data, **settings, do_sample=False)
    assert made.equal(theirs.generate(**data, **settings, do_sample=False))


@pytest.mark.parametrize("arch", ARCHS)
def test_trains_as_peft(arch: str) -> None:
    losses = []
    for model in both(arch, gate=None):
        best = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        model.train()
        seen = []
        for _ in range(20):
            best.zero_grad()
            loss = model(**batch("CAUSAL_LM")).loss
            loss.backward()
            best.step()
            seen.append(loss.detach())
        losses.append(torch.stack(seen))
    torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("arch", ARCHS)
def test_files_go_both_ways(arch: str, tmp_path: Any) -> None:
    ours, theirs = both(arch, layers=1)
    data = batch("CAUSAL_LM")
    ours.save_pretrained(str(tmp_path / "ours"))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    here = PeftModel.from_pretrained(base(arch), str(tmp_path / "theirs"))
    there = peft.PeftModel.from_pretrained(base(arch), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(here(**data).logits, theirs(**data).logits, **CLOSE)
    torch.testing.assert_close(there(**data).logits, ours(**data).logits, **CLOSE)
    a, b = (peft.PeftConfig.from_pretrained(str(tmp_path / who)).to_dict() for who in ("ours", "theirs"))
    assert a == b


@pytest.mark.parametrize("arch", [*ARCHS, "qwen2"])
def test_several_adapters_add_up_and_leave_no_trace(arch: str, tmp_path: Any) -> None:
    """Departure: peft runs one adaption prompt at a time."""
    plain, data = base(arch)(**batch("CAUSAL_LM")).logits, batch("CAUSAL_LM")
    cfg = {"task_type": "CAUSAL_LM", "adapter_len": LEN}
    model = get_peft_model(base(arch), veneer.AdaptionPromptConfig(adapter_layers=2, **cfg)).eval()
    model.add_adapter("b", veneer.AdaptionPromptConfig(adapter_layers=1, **cfg))
    assert torch.equal(model(**data).logits, plain)
    open_gates(model, 0.4)
    seen = {}
    for names in ("default", "b", ["default", "b"]):
        model.set_adapter(names) if isinstance(names, str) else model.base_model.set_adapter(names)
        seen[str(names)] = model(**data).logits
    assert len({round(float(v.sum()), 4) for v in (plain, *seen.values())}) == 4
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base(arch), str(tmp_path / "b"))
    torch.testing.assert_close(again(**data).logits, seen["b"], **CLOSE)
    with pytest.raises(NotImplementedError, match="ADAPTION_PROMPT"):
        model.merge_and_unload()
    model.delete_adapter("b")
    model.set_adapter("default")
    assert torch.equal(model(**data).logits, seen["default"])
    assert torch.equal(model.unload()(**data).logits, plain)


def test_gradient_checkpointing_changes_nothing() -> None:
    grads = []
    for on in (False, True):
        model = both("llama")[0].train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch("CAUSAL_LM")).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == 4
    torch.testing.assert_close(grads[0], grads[1], **CLOSE)


@pytest.mark.parametrize(
    ("arch", "settings", "said"),
    [
        ("opt", {}, "Unsupported model type for adaption prompt: 'opt'"),
        ("llama", {"adapter_layers": 3}, "more adapter layers '3' than the model has '2'"),
        ("llama", {"adapter_len": None}, "adapter_len=None"),
        ("llama", {"target_modules": "mlp"}, "not an attention"),
        ("llama", {"target_modules": "attn"}, "'0' modules named 'attn'"),
    ],
)
def test_settings_that_do_not_fit(arch: str, settings: dict, said: str) -> None:
    cfg = veneer.AdaptionPromptConfig(**{"task_type": "CAUSAL_LM", "adapter_len": 2, "adapter_layers": 1, **settings})
    with pytest.raises(ValueError, match=said):
        get_peft_model(make(arch, "CAUSAL_LM"), cfg)
