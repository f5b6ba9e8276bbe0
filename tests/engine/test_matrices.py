"""matrices(): names, factors, and every number against the delta formed in full."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import veneer
from veneer import get_peft_model
from veneer.errors import AdapterError
from veneer.inspection import inspect_adapter
from veneer.layer_matrices import Matrices, effective_rank, matrices
from veneer.methods.ia3 import IA3Config
from veneer.methods.loha import LoHaConfig
from veneer.methods.lora import LoraConfig
from veneer.methods.vera import VeraConfig
from veneer.tuner import Tuner


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 12)
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(12, 12)}) for _ in range(2))
        self.conv = nn.Conv1d(12, 8, 3, padding=1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = torch.relu(layer["q"](x))
        return self.conv(x.mT)


NAMES = ["emb", "layers.0.q", "layers.1.q", "conv"]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(
        **{
            "target_modules": ["emb", "q", "conv"],
            "r": 3,
            "lora_alpha": 5,
            "init_lora_weights": False,
            **more,
        }
    )


CONFIGS = {
    "lora": lora(),
    "rslora": lora(use_rslora=True, rank_pattern={"layers.1.q": 5}),
    "dora": lora(use_dora=True),
    "vera": VeraConfig(target_modules=["q"], r=4, init_weights=False),
    "loha": LoHaConfig(target_modules=["q", "conv"], r=2, init_weights=False),
    "ia3": IA3Config(target_modules=["q"], feedforward_modules=[], init_ia3_weights=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_equal_the_full_delta(name: str) -> None:
    t = Tuner(net(), CONFIGS[name])
    torch.manual_seed(1)
    for p in t.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p))
    found = matrices(t)
    assert list(found) == [path for path, _ in t.adapted_layers()]
    assert set(found) <= set(NAMES)
    for path, m in found.items():
        layer = dict(t.adapted_layers())[path]
        with torch.no_grad():
            delta = layer.merged_weights(["default"])[0] - layer.site.weight()
        assert m.shape == tuple(delta.shape)
        torch.testing.assert_close(m.delta(), delta, atol=1e-4, rtol=1e-4)
        wanted = torch.linalg.svdvals(delta.flatten(1).double())
        got = m.singular_values()
        torch.testing.assert_close(got, wanted[: len(got)], atol=1e-4, rtol=1e-4)
        assert wanted[len(got) :].sum() < 1e-4
        assert m.norm() == pytest.approx(float(delta.norm()), rel=1e-4)
        assert m.effective_rank() == pytest.approx(effective_rank(wanted), rel=1e-2)
        low = name in ("lora", "rslora", "vera")
        assert (m.A is not None) == (m.B is not None) == low
        if m.A is not None and m.B is not None:
            torch.testing.assert_close(
                (m.scaling * m.B @ m.A).reshape(m.shape), delta, atol=1e-4, rtol=1e-4, check_dtype=False
            )


def test_names_are_the_base_models_whatever_wraps_it() -> None:
    base = net()
    model = get_peft_model(base, lora())
    assert list(matrices(model)) == list(matrices(model.base_model)) == list(matrices(base)) == NAMES
    assert isinstance(veneer.matrices(model)["conv"], Matrices)
    assert veneer.matrices(model)["conv"].shape == (8, 12, 3)


def test_factors_are_the_trained_tensors() -> None:
    t = Tuner(net(), lora())
    m = matrices(t)["layers.0.q"]
    layer = t.model.layers[0]["q"]
    assert m.A is not None
    assert m.A.data_ptr() == layer.lora_A["default"].weight.data_ptr()
    before = m.norm()
    with torch.no_grad():
        m.A.mul_(2)
    assert m.norm() == pytest.approx(2 * before)


def test_the_adapter_meant() -> None:
    t = Tuner(net(), lora(), "a")
    t.add_adapter("b", lora(target_modules=["conv"], r=2))
    assert list(matrices(t)) == NAMES
    assert list(matrices(t, "b")) == ["conv"]
    t.set_adapter(["a", "b"])
    with pytest.raises(AdapterError, match="2 adapters are active; name one of 'a', 'b'"):
        matrices(t)
    with pytest.raises(AdapterError, match="'c' not found on any layer; there are: 'a', 'b'"):
        matrices(t, "c")
    with pytest.raises(AdapterError, match="no adapted layers"):
        matrices(net())


def test_numbers_stay_while_merged() -> None:
    t = Tuner(net(), lora())
    before = {k: m.norm() for k, m in matrices(t).items()}
    t.merge_adapter()
    assert {k: m.norm() for k, m in matrices(t).items()} == before
    other = Tuner(net(), CONFIGS["dora"])
    other.merge_adapter()
    with pytest.raises(AdapterError, match="call unmerge_adapter"):
        matrices(other)["conv"].delta()


def test_the_report_uses_the_same_numbers() -> None:
    t = Tuner(net(), lora())
    for row, (path, m) in zip(inspect_adapter(t), matrices(t).items(), strict=True):
        weight = dict(t.adapted_layers())[path].site.weight()
        assert (row.name, row.r) == (path, 3)
        assert row.shape == (m.shape[0], weight.flatten(1).shape[1])
        assert row.delta_norm == pytest.approx(m.norm())
        assert row.effective_rank == pytest.approx(m.effective_rank())
        assert row.base_norm == pytest.approx(float(weight.norm()))
    full = inspect_adapter(Tuner(net(), CONFIGS["dora"]))
    assert [row.r for row in full] == [9, 12, 12, 8]
    assert inspect_adapter(net()) == []
