"""Scaling for a while, targets by condition number, hot swap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import peft.helpers
import pytest
import torch
from test_routed import X, apart, llama, moved
from torch import nn

import veneer
from veneer import helpers
from veneer.errors import PeftWarning
from veneer.hotswap import hotswap_adapter
from veneer.hotswap_room import prepare_model_for_compiled_hotswap


def lora(folder: Path | None = None, seed: int = 1, package: Any = veneer, **changes: Any) -> Any:
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "r": 4, **changes}
    m = moved(package.get_peft_model(llama(), package.LoraConfig(**settings)), seed).eval()
    if folder is not None:
        m.save_pretrained(str(folder))
    return m


def test_rescaling_for_a_while(tmp_path: Path) -> None:
    ours = lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    y = ours(input_ids=X).logits
    with helpers.rescale_adapter_scale(ours, 0.3), peft.helpers.rescale_adapter_scale(theirs, 0.3):
        assert apart(ours(input_ids=X).logits, theirs(input_ids=X).logits) < 1e-5
        assert apart(ours(input_ids=X).logits, y) > 1e-3
    assert torch.equal(ours(input_ids=X).logits, y)
    with pytest.raises(RuntimeError, match="mine"), helpers.rescale_adapter_scale(ours, 0.1):
        raise RuntimeError("mine")
    assert torch.equal(ours(input_ids=X).logits, y)
    for wrong in ("a", None):
        with pytest.raises(TypeError, match="multiplier"), helpers.rescale_adapter_scale(ours, wrong):  # type: ignore[arg-type]
            pass
    with pytest.raises(ValueError, match="no adapters"), helpers.rescale_adapter_scale(llama(), 0.5):
        pass
    ours.merge_adapter()
    with pytest.raises(ValueError, match="merged"), helpers.rescale_adapter_scale(ours, 0.5):
        pass


def test_is_it_an_adapter(tmp_path: Path) -> None:
    lora(tmp_path / "a")
    assert helpers.check_if_peft_model(tmp_path / "a")
    assert not helpers.check_if_peft_model(tmp_path)
    assert not helpers.check_if_peft_model(str(tmp_path / "nowhere"))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 8, 6)), nn.Parameter(torch.randn(3, 6, 4))
        self.router = nn.Linear(8, 8)


@pytest.mark.parametrize("top_p", [0.01, 0.2, 0.5, 1.0])
def test_kappa_targets_are_pefts(top_p: float) -> None:
    torch.manual_seed(0)
    for model in (llama(), nn.Sequential(Experts(), Experts())):
        for kwargs in ({}, {"max_dim_size_to_analyze": 20}, {"moe_param_suffixes": ("down_proj",)}):
            ours = helpers.find_kappa_target_modules(model, top_p, show_progress=False, **kwargs)
            assert ours == peft.helpers.find_kappa_target_modules(model, top_p, show_progress=False, **kwargs)
    veneer.get_peft_model(llama(), veneer.LoraConfig(**helpers.find_kappa_target_modules(llama(), show_progress=False)))


def test_kappa_selector() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4), nn.Linear(5, 5))
    ours, theirs = (h.KappaTuneSelector(model, show_progress=False) for h in (helpers, peft.helpers))
    for kwargs in ({}, {"num_modules": 2}, {"threshold": 20.0}, {"threshold": 0.0}, {"top_p": 0.5, "num_modules": 3}):
        assert ours.get_best_targets(**kwargs) == theirs.get_best_targets(**kwargs)
    with pytest.raises(ValueError, match="top_p"):
        ours.get_best_targets(top_p=0.0)


def test_hot_swap_changes_rank_scaling_and_layers(tmp_path: Path) -> None:
    lora(tmp_path / "small", 2, r=2, lora_alpha=7)
    lora(tmp_path / "wide", 3, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.0.self_attn.q_proj": 6})
    m = veneer.PeftModel.from_pretrained(llama(), tmp_path / "wide")
    for name in ("small", "wide"):
        hotswap_adapter(m, tmp_path / name, "default")
        y = veneer.PeftModel.from_pretrained(llama(), tmp_path / name)(input_ids=X).logits
        assert apart(m(input_ids=X).logits, y) < 1e-6
        m.save_pretrained(str(tmp_path / "again"))
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
        assert apart(theirs(input_ids=X).logits, y) < 1e-5


def test_hot_swap_refuses_and_leaves_all_as_it_was(tmp_path: Path) -> None:
    lora(tmp_path / "more", 2, target_modules=["q_proj", "v_proj"])
    lora(tmp_path / "dora", 2, use_dora=True)
    lora(tmp_path / "bias", 2, lora_bias=True)
    veneer.get_peft_model(llama(), veneer.LoHaConfig(target_modules=["q_proj"])).save_pretrained(str(tmp_path / "loha"))
    m = lora()
    y = m(input_ids=X).logits
    for name, error, message in (
        ("more", RuntimeError, "unexpected keys found: .*v_proj"),
        ("dora", ValueError, "use_dora, False != True"),
        ("bias", ValueError, "lora_bias, False != True"),
        ("loha", ValueError, "Incompatible PEFT types found: LORA and LOHA"),
    ):
        with pytest.raises(error, match=message):
            hotswap_adapter(m, tmp_path / name, "default")
        assert torch.equal(m(input_ids=X).logits, y)
    lora(tmp_path / "same", 2)
    with pytest.raises(ValueError, match="'nope' not found"):
        hotswap_adapter(m, tmp_path / "same", "nope")
    m.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        hotswap_adapter(m, tmp_path / "same", "default")


def test_hot_swap_of_a_prompt(tmp_path: Path) -> None:
    def prompt(seed: int) -> Any:
        cfg = veneer.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        return moved(veneer.get_peft_model(llama(), cfg), seed).eval()

    m, other = prompt(1), prompt(2)
    other.save_pretrained(str(tmp_path))
    assert apart(m(input_ids=X).logits, other(input_ids=X).logits) > 1e-4
    hotswap_adapter(m, tmp_path, "default")
    assert torch.equal(m(input_ids=X).logits, other(input_ids=X).logits)


@torch.no_grad()
def test_hot_swap_in_a_compiled_model(tmp_path: Path) -> None:
    """Other ranks and scalings, and nothing is compiled again."""
    from torch._dynamo.utils import counters

    settings: dict[str, dict[str, Any]] = {
        "same": {},
        "larger": {"r": 8},
        "alpha": {"lora_alpha": 32},
        "pattern": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}},
    }
    for i, (name, changes) in enumerate(settings.items()):
        lora(tmp_path / name, 10 + i, **changes)
    m = lora()
    y = m(input_ids=X).logits
    prepare_model_for_compiled_hotswap(m, target_rank=8)
    assert apart(m(input_ids=X).logits, y) < 1e-6
    torch._dynamo.reset()
    compiled = torch.compile(m, backend="eager")
    assert apart(compiled(input_ids=X).logits, y) < 1e-6
    before = counters["stats"]["unique_graphs"]
    for name in settings:
        hotswap_adapter(compiled, tmp_path / name, "default")
        expected = veneer.PeftModel.from_pretrained(llama(), tmp_path / name)(input_ids=X).logits
        assert apart(compiled(input_ids=X).logits, expected) < 1e-6
    assert counters["stats"]["unique_graphs"] == before
    m.save_pretrained(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "saved").eval()
    assert apart(again(input_ids=X).logits, expected) < 1e-5
    with pytest.raises(ValueError, match=r"\*before\* compiling"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(UserWarning, match="already compiled"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")


def test_preparing_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No adapter layers found"):
        prepare_model_for_compiled_hotswap(llama(), target_rank=8)
    with pytest.raises(ValueError, match="original rank is larger"):
        prepare_model_for_compiled_hotswap(lora(), target_rank=2)
    with pytest.raises(ValueError, match="'error', 'warn', or 'ignore'"):
        prepare_model_for_compiled_hotswap(lora(), check_compiled="no")  # type: ignore[arg-type]
    lora(tmp_path, 3, r=8)
    m = lora()
    prepare_model_for_compiled_hotswap(m, target_rank=4)
    with pytest.warns(PeftWarning, match="larger than"):
        hotswap_adapter(m, tmp_path, "default")
    y = veneer.PeftModel.from_pretrained(llama(), tmp_path)(input_ids=X).logits
    assert apart(m(input_ids=X).logits, y) < 1e-6
