"""adapter_names: an adapter for each row of a batch, in calls and in generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from api_zoo import adapted, logits, lora, moved, t5, tokens

import veneer


def test_adapter_names_by_row() -> None:
    model = adapted("default", "b", "c")
    x = tokens(4)
    alone = []
    for i, name in enumerate(["c", "__base__", "default", "b"]):
        model.set_adapter("default" if name == "__base__" else name)
        if name == "__base__":
            with model.disable_adapter():
                alone.append(logits(model, x[i : i + 1]))
        else:
            alone.append(logits(model, x[i : i + 1]))
    y = logits(model, x, adapter_names=["c", "__base__", "default", "b"])
    torch.testing.assert_close(y, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_adapter_names_are_checked() -> None:
    model = adapted("default", "b")
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nope in adapter_names; .* has: default, b"):
        logits(model, adapter_names=["default", "nope", "b"])
    with pytest.raises(ValueError, match="give one name a row"):
        logits(model, adapter_names=["default", "b"])
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        logits(model.train(), adapter_names=["default"] * 3)


@pytest.mark.parametrize(
    "search",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "top_k": 1}],
    ids=str,
)
def test_generate_with_adapter_names(search: dict[str, Any]) -> None:
    model, x = adapted("default", "b"), tokens(3)
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, **search}
    n = search.get("num_return_sequences", 1)
    mixed = model.generate(input_ids=x, adapter_names=["b", "__base__", "default"], **options)
    for i, name in enumerate(["b", None, "default"]):
        if name is None:
            with model.disable_adapter():
                alone = model.generate(input_ids=x[i : i + 1], **options)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=x[i : i + 1], **options)
        assert torch.equal(mixed[i * n : (i + 1) * n], alone), name


def test_generate_with_adapter_names_and_sampled_sequences() -> None:
    """Several sampled sequences a prompt widen the batch; the names follow."""
    model, x = adapted("default", "b"), tokens(2)
    options = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": None, "do_sample": True, "top_k": 1}
    y = model.generate(input_ids=x, adapter_names=["b", "default"], num_return_sequences=2, **options)
    model.set_adapter("b")
    assert torch.equal(y[:1], model.generate(input_ids=x[:1], **options))
    assert torch.equal(y[0], y[1])


def test_generate_with_adapter_names_on_an_encoder_decoder() -> None:
    model = veneer.get_peft_model(t5(), lora(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    model.add_adapter("b", lora(target_modules=["q", "wi"], task_type="SEQ_2_SEQ_LM"))
    for i, name in enumerate(["default", "b"]):
        model.set_adapter(name)
        moved(model, seed=i, scale=0.5)
    x = tokens(2)
    for beams in (1, 3):
        options = {"max_new_tokens": 5, "num_beams": beams, "eos_token_id": None}
        y = model.generate(input_ids=x, adapter_names=["b", "default"], **options)
        for i, name in enumerate(["b", "default"]):
            model.set_adapter(name)
            assert torch.equal(y[i : i + 1], model.generate(input_ids=x[i : i + 1], **options)), (beams, name)
