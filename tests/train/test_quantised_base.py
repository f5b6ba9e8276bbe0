"""`base: {quantize: ...}`: the base is held in 4 or 8 bits while an adapter trains on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from veneer import PeftModel
from veneer.backends.loading import QUANTISED
from veneer.train import Recipe, RecipeError, run
from veneer.train.bases import load_base, resolve_base
from veneer.train.errors import BaseModelError
from veneer.train.recipe import BaseSpec

needs = {
    library: pytest.mark.skipif(
        importlib.util.find_spec(library) is None, reason=f"{library} is not installed: pip install veneer[quant]"
    )
    for library in set(QUANTISED.values())
}
NARROW = {
    n: library for n, library in QUANTISED.items() if n != "int4-torchao"
}  # the tiny model's inputs are 32 and 48
EVERY = [pytest.param(name, marks=needs[library]) for name, library in NARROW.items()]


@pytest.mark.parametrize("name", EVERY)
def test_a_base_loads_quantised(name: str, llama: Path) -> None:
    model, _ = load_base(resolve_base(BaseSpec(name=str(llama), quantize=name)), "causal-lm")
    layer: Any = model.model.layers[0].self_attn.q_proj
    head: Any = model.get_output_embeddings()
    assert type(head.weight) is torch.nn.Parameter
    packed = type(layer).__name__ != "Linear" or type(layer.weight).__module__.startswith("torchao.")
    assert packed
    plain = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        off = (model(ids).logits - plain(ids).logits).norm() / plain(ids).logits.norm()
    assert 0 < off < 1  # 2 layers whose weights are ten times as large as a model's usually are


@needs["torchao"]
def test_groups_that_do_not_fit_are_told(llama: Path) -> None:
    with pytest.raises(BaseModelError, match=r"cannot quantise .* as int4-torchao.*multiples of 32"):
        load_base(resolve_base(BaseSpec(name=str(llama), quantize="int4-torchao")), "causal-lm")


@pytest.mark.parametrize("name", [pytest.param("nf4", marks=needs["bitsandbytes"]), *[
    pytest.param(n, marks=[needs[QUANTISED[n]], pytest.mark.slow]) for n in NARROW if n != "nf4"
]])  # fmt: skip
def test_a_run_on_a_quantised_base(name: str, causal: Callable[..., Recipe], llama: Path) -> None:
    result = run(causal(merge=True, base__quantize=name, train__num_train_epochs=6, eval__generate=False))
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < 0.5 * losses[0]
    assert result.notes == [] or not any("Not merged" in note for note in result.notes)
    merged = AutoModelForCausalLM.from_pretrained(result.merged_dir, dtype=torch.float32).eval()
    assert not getattr(merged, "is_quantized", False)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, result.adapter_dir).eval()
    ids = torch.arange(12)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)


def test_an_unknown_or_missing_way_is_told_with_its_line(
    causal: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"base\.quantize.*'nf5' is not one of .*Did you mean `nf4`"):
        causal(base__quantize="nf5")
    recipe = causal(base__quantize="nf4")
    monkeypatch.setattr("veneer.train.prepare.has", lambda library: False)
    with pytest.raises(RecipeError, match=r"base\.quantize.*bitsandbytes.*pip install 'veneer\[quant\]'"):
        run(recipe)
    assert not Path(recipe.out).exists()
