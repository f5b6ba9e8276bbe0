"""Adapters turned into LoRA, weighted sums, intruder dimensions: against peft, and against what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from law_cases import CASES, Case
from lawlib import Net, config, exempt, randomize
from peft.tuners.lora.intruders import reduce_intruder_dimension as peft_reduce
from torch import Tensor, nn

import veneer
from veneer import registry
from veneer.errors import AdapterError
from veneer.kinds import Replace


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(24, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


X = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


def made(package: Any, name: str, scale: float = 0.2, **options: Any) -> Any:
    """A model with one adapter; both packages get the same tensors."""
    model = package.get_peft_model(Two(), getattr(package, name)(target_modules=["up", "down"], **options))
    g = torch.Generator().manual_seed(3)
    for name_of_p, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
        value = torch.randn(p.shape, generator=g) * scale
        p.data.copy_(p.data + value if "magnitude" in name_of_p else value)
    return model.eval()


def convertible(case: Case) -> bool:
    method: Any = registry.method(case.method_name)
    return not isinstance(method, Replace) and method.mergeable


LINEAR = [c for c in CASES if c.site_name == "Linear" and convertible(c)]


@pytest.mark.parametrize("case", LINEAR, ids=[c.id for c in LINEAR])
def test_every_method_with_a_delta_becomes_lora(case: Case) -> None:
    """At full rank the LoRA adapter does what the method did; at a lower one the error is what was reported."""
    exempt(case, "forward == merged")
    model = veneer.get_peft_model(Net(case.make_module), config(case))
    randomize(model.base_model)
    model.eval()
    torch.manual_seed(5)
    x = case.make_input()
    layer = next(m for _, m in model.base_model.adapted_layers())
    full = min(layer.site.out, layer.site.inp)
    if layer.view("default").method.changes_base(layer.view("default").cfg):
        with pytest.raises(AdapterError, match="changed the base's weights"):
            veneer.convert_to_lora(model, full)
        return
    done = veneer.convert_to_lora(model, full)
    assert done.worst < 1e-4
    settings, tensors = done
    loaded = veneer.get_peft_model(Net(case.make_module), settings)
    assert veneer.set_peft_model_state_dict(loaded, tensors).ok
    torch.testing.assert_close(loaded.eval()(x), model(x), atol=1e-4, rtol=1e-3)
    low = veneer.convert_to_lora(model, 2)
    for name, m in model.base_model.adapted_layers():
        D = m.delta("default").flatten(1)
        B, A = (low[1][f"base_model.model.{name}.lora_{k}.weight"].flatten(1) for k in "BA")
        if float(D.norm()) > 0:
            assert float((D - B @ A).norm() / D.norm()) == pytest.approx(low.errors[name], abs=1e-4)


@pytest.mark.parametrize("rank", [3, 0.5, 0.9])
@pytest.mark.parametrize(
    ("name", "options"),
    [("LoraConfig", {"r": 5}), ("VeraConfig", {"r": 6})],
)
def test_conversion_equals_peft(rank: float, name: str, options: dict[str, Any]) -> None:
    theirs, ours = (made(p, name, **options) for p in (peft, veneer))
    torch.testing.assert_close(ours(X), theirs(X), atol=1e-5, rtol=1e-4)
    (config_a, a), (config_b, b) = peft.convert_to_lora(theirs, rank), veneer.convert_to_lora(ours, rank)
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    for key in [k for k in a if "lora_A" in k]:
        other = key.replace("lora_A", "lora_B")
        torch.testing.assert_close(b[other] @ b[key], a[other] @ a[key], atol=1e-5, rtol=1e-3)
    for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"):
        assert getattr(config_b, field) == getattr(config_a, field), field


def test_saved_conversion_loads_in_both(tmp_path: Path) -> None:
    ours = made(veneer, "LoHaConfig", r=4, modules_to_save=None)
    done = veneer.save_as_lora(str(tmp_path), ours, 1.0)
    assert done.worst < 1e-5
    for package in (veneer, peft):
        loaded = package.PeftModel.from_pretrained(Two(), str(tmp_path))
        torch.testing.assert_close(loaded(X), ours(X), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("rank", "said"), [(0, "at least 1"), (1.5, "share of the energy"), (0.0, "share"), (13, "up|down"), (True, "rank")]
)
def test_ranks_that_do_not_fit(rank: Any, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        veneer.convert_to_lora(made(veneer, "LoraConfig", r=4), rank)


def test_adapters_that_no_lora_can_stand_in_for(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="sets bias=all, this is not supported"):
        veneer.save_as_lora(str(tmp_path / "x"), made(veneer, "LoraConfig", r=4, bias="all"), 2)
    with pytest.raises(AdapterError, match="trains whole modules"):
        veneer.convert_to_lora(made(veneer, "LNTuningConfig"), 2)
    assert not (tmp_path / "x").exists()


# -- intruder dimensions -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [{}, {"threshold_epsilon": 0.9}, {"top_k": 3, "mitigation_lambda": 0.5}, {"mitigation_lambda": 0.0}],
    ids=str,
)
def test_intruders_equal_peft(options: dict[str, Any]) -> None:
    theirs, ours = (made(p, "LoraConfig", scale=0.6, r=4, lora_alpha=8) for p in (peft, veneer))
    lines: list[str] = []
    peft_reduce(theirs, logging_sink=lines.append, **options)
    own: list[str] = []
    found = veneer.reduce_intruder_dimension(ours, logging_sink=own.append, **options)
    assert sum(found.values()) > 0
    assert [x.removeprefix("base_model.model.") for x in lines] == own
    assert ours.active_adapter == theirs.active_adapter == "intruder_reduced"
    torch.testing.assert_close(ours(X), theirs(X), atol=1e-4, rtol=1e-3)
    ours.set_adapter("default")
    theirs.set_adapter("default")
    torch.testing.assert_close(ours(X), theirs(X), atol=1e-5, rtol=1e-3)


def test_what_cannot_be_reduced() -> None:
    with pytest.raises(AdapterError, match="plain LoRA"):
        veneer.reduce_intruder_dimension(made(veneer, "LoraConfig", r=4, use_dora=True))
    with pytest.raises(AdapterError, match="top_k=0"):
        veneer.reduce_intruder_dimension(made(veneer, "LoraConfig", r=4), top_k=0)


# -- weighted sums -----------------------------------------------------------------------------------------------
DENSE = {"svd": {}, "linear": {}, "cat": {}, "ties": {"density": 0.6}, "ties_svd": {"density": 0.6},
         "magnitude_prune": {"density": 0.6}, "magnitude_prune_svd": {"density": 0.6}}  # fmt: skip


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.filterwarnings("ignore:combination_type='linear'")
def test_weighted_sums_equal_peft(kind: str) -> None:
    """Without rsLoRA and negative weights, where peft is right, each type that draws nothing gives peft's model."""
    outs = []
    for package in (peft, veneer):
        model = made(package, "LoraConfig", r=4, lora_alpha=8)
        model.add_adapter("b", package.LoraConfig(r=4, lora_alpha=4, target_modules=["up", "down"]))
        g = torch.Generator().manual_seed(8)
        for n, p in sorted(model.named_parameters()):
            if ".b." in n:
                p.data.copy_(torch.randn(p.shape, generator=g) * 0.2)
        add = model.base_model.add_weighted_adapter
        add(["default", "b"], [0.7, 0.4], "sum", kind, **DENSE[kind])
        model.set_adapter("sum")
        outs.append(model(X))
    torch.testing.assert_close(outs[1], outs[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
@pytest.mark.filterwarnings("ignore:combination_type='linear'")
def test_dare_keeps_everything_at_density_one(kind: str) -> None:
    model = made(veneer, "LoraConfig", r=4, lora_alpha=8)
    model.base_model.add_weighted_adapter(["default"], [1.0], "sum", kind, density=1.0)
    want = model(X)
    model.set_adapter("sum")
    torch.testing.assert_close(model(X), want, atol=1e-5, rtol=1e-4)


def test_dora_is_refused_with_the_reason() -> None:
    model = made(veneer, "LoraConfig", r=4, use_dora=True)
    with pytest.raises(AdapterError, match="DoRA rescales the whole weight"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum", "cat")
