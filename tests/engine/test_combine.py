"""add_weighted_adapter: each type against the sum it stands for, against peft, and through a file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from veneer import PeftModel, get_peft_model
from veneer.combine import Combined
from veneer.combine_checks import TYPES
from veneer.combine_math import drop_and_rescale, quantile
from veneer.errors import AdapterError, PeftWarning
from veneer.methods.lora import LoraConfig
from veneer.tuner import Tuner


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 12)
        self.lin0 = nn.Linear(12, 10)
        self.lin1 = nn.Linear(10, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.lin1(torch.relu(self.lin0(self.emb(ids)))))


IDS = torch.arange(8).reshape(2, 4)
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["lin0", "lin1"]},
    "b": {"r": 4, "lora_alpha": 2, "target_modules": ["lin0", "lin1"]},
    "rs": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["lin0", "lin1"]},
    "pat": {
        "r": 2,
        "rank_pattern": {"lin1": 5},
        "alpha_pattern": {"lin1": 1},
        "target_modules": ["lin0", "lin1"],
    },
    "one": {"r": 2, "target_modules": ["emb", "lin0"]},
}


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def config(name: str, **more: Any) -> LoraConfig:
    return LoraConfig(**{"init_lora_weights": False, **ADAPTERS[name], **more})


def tuner(*names: str, **more: Any) -> Tuner:
    made = Tuner(net(), config(names[0], **more), names[0])
    for name in names[1:]:
        made.add_adapter(name, config(name, **more))
    return made


def deltas(t: Tuner, adapter: str) -> dict[str, torch.Tensor]:
    return {path: layer.delta(adapter) for path, layer in t.adapted_layers() if adapter in layer.entries}


def weighted(t: Tuner, names: list[str], weights: list[float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for name, w in zip(names, weights, strict=True):
        for path, d in deltas(t, name).items():
            total[path] = total.get(path, torch.zeros_like(d)) + w * d
    return total


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tol: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], atol=tol, rtol=tol, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize(
    ("names", "weights"),
    [(["a", "b"], [0.7, 0.4]), (["a", "b"], [1.0, -0.6]), (["a", "rs", "pat", "one"], [0.3, -1.2, 0.5, 2.0])],
)
def test_sum_is_exact_where_the_rank_allows(kind: str, names: list[str], weights: list[float]) -> None:
    t = tuner(*names)
    done = t.add_weighted_adapter(names, weights, "sum", kind, **({"svd_rank": 10} if kind == "svd" else {}))
    same(deltas(t, "sum"), weighted(t, names, weights))
    assert isinstance(done, Combined)
    assert set(done.errors) == set(deltas(t, "sum"))
    assert done.worst < 1e-8
    assert all(layer.scaling["sum"] == 1.0 for _, layer in t.adapted_layers())


def test_svd_is_the_best_of_its_rank_and_reports_its_error() -> None:
    t = tuner("a", "b", "rs")
    names, weights = ["a", "b", "rs"], [0.5, -1.0, 0.8]
    done = t.add_weighted_adapter(names, weights, "sum", "svd", svd_rank=3)
    for path, target in weighted(t, names, weights).items():
        U, S, Vh = torch.linalg.svd(target)
        best = U[:, :3] * S[:3] @ Vh[:3]
        torch.testing.assert_close(deltas(t, "sum")[path], best, atol=1e-5, rtol=1e-4)
        wanted = float(S[3:].norm() / S.norm())
        assert done.errors[path] == pytest.approx(wanted, rel=1e-4)
        assert wanted > 0.1


def test_a_user_scale_counts() -> None:
    t = tuner("a", "b")
    for _, layer in t.adapted_layers():
        layer.set_scale("a", 0.25)
    t.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
    same(deltas(t, "sum"), weighted(t, ["a", "b"], [1.0, 1.0]))


def test_the_same_adapter_twice_with_linear_needs_its_sign_once() -> None:
    t = tuner("a", "b")
    with pytest.warns(PeftWarning, match="off by .* of the weighted sum"):
        t.add_weighted_adapter(["a", "b"], [0.5, -0.5], "lin", "linear")
    t.add_weighted_adapter(["a"], [-0.7], "neg", "linear")
    same(deltas(t, "neg"), weighted(t, ["a"], [-0.7]))


@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 1), (3, 2)])
def test_convolutions(kernel: int, groups: int) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, kernel, groups=groups, padding=1))
    x = torch.randn(2, 4, 5, 5)
    t = Tuner(base, LoraConfig(target_modules=["0"], r=2, init_lora_weights=False), "a")
    t.add_adapter("b", LoraConfig(target_modules=["0"], r=4, lora_alpha=3, init_lora_weights=False))
    for kind, more in (("cat", {}), ("svd", {"svd_rank": 6})):
        done = t.add_weighted_adapter(["a", "b"], [0.5, -2.0], kind, kind, **more)
        assert done.worst < 1e-7
        with t.disabled():
            y = t(x)
        out = {}
        for name in ("a", "b", kind):
            t.set_adapter(name)
            out[name] = t(x) - y
        torch.testing.assert_close(out[kind], 0.5 * out["a"] - 2.0 * out["b"], atol=1e-5, rtol=1e-4)
    if groups == 2:
        with pytest.raises(ValueError, match="multiple of the convolution's 2 groups"):
            t.add_weighted_adapter(["a", "b"], [1.0, 1.0], "odd", "svd", svd_rank=3)


def test_lora_bias_is_summed() -> None:
    t = tuner("a", "b", lora_bias=True)
    for p in t.parameters():
        if p.requires_grad or p.dim() == 1:
            p.data.normal_()
    y: dict[str, torch.Tensor] = {}
    layer = t.model.lin0
    t.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum", "svd", svd_rank=8)
    x = torch.randn(3, 12)
    for name in ("a", "b", "sum"):
        layer.set_adapter(name)
        y[name] = layer(x) - layer.base_layer(x)
    torch.testing.assert_close(y["sum"], 0.5 * y["a"] - 2.0 * y["b"], atol=1e-5, rtol=1e-4)
    with pytest.raises(AdapterError, match="lora_bias"):
        t.add_weighted_adapter(["a", "b"], [1.0, 1.0], "x", "ties", density=0.5)


# -- against peft --------------------------------------------------------------------------------------------
def both(**more: Any) -> tuple[Tuner, Any]:
    """The same two adapters here and in peft; peft's scaling is the same for both."""
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "init_lora_weights": False,
        "target_modules": ["lin0", "lin1"],
        **more,
    }
    mine = Tuner(net(), LoraConfig(**settings), "a")
    mine.add_adapter("b", LoraConfig(**settings))
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**settings), "a")
    theirs.add_adapter("b", peft.LoraConfig(**settings))
    for name in ("lin0", "lin1"):
        here, there = getattr(mine.model, name), getattr(theirs.base_model.model, name)
        for adapter in ("a", "b"):
            here.lora_A[adapter].weight.data.copy_(there.lora_A[adapter].weight)
            here.lora_B[adapter].weight.data.copy_(there.lora_B[adapter].weight)
    return mine, theirs


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {}),
        ("cat", {}),
        ("svd", {"svd_rank": 3}),
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.4, "majority_sign_method": "frequency"}),
        ("magnitude_prune", {"density": 0.4}),
        ("ties_svd", {"density": 0.4, "svd_rank": 3}),
        ("magnitude_prune_svd", {"density": 0.4, "svd_rank": 5}),
        ("dare_linear", {"density": 1.0}),
        ("dare_ties", {"density": 1.0}),
        ("dare_linear_svd", {"density": 1.0, "svd_rank": 3}),
        ("dare_ties_svd", {"density": 1.0, "svd_rank": 3}),
    ],
)
@pytest.mark.filterwarnings("ignore::veneer.errors.PeftWarning", "ignore:The density")
def test_equals_peft(kind: str, options: dict[str, Any]) -> None:
    mine, theirs = both()
    mine.add_weighted_adapter(["a", "b"], [0.7, 0.4], "sum", kind, **options)
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.4], "sum", combination_type=kind, **options)
    for name in ("lin0", "lin1"):
        wanted = getattr(theirs.base_model.model, name).get_delta_weight("sum")
        got = getattr(mine.model, name).get_delta_weight("sum")
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_departures_from_peft() -> None:
    """What the other tool makes of rsLoRA, and of a reload, measured, so that a change over there is
    noticed."""
    mine, theirs = both(use_rslora=True)
    mine.add_weighted_adapter(["a", "b"], [1.0, 0.5], "sum", "cat")
    theirs.add_weighted_adapter(["a", "b"], [1.0, 0.5], "sum", combination_type="cat")
    layer = theirs.base_model.model.lin0
    exact = layer.get_delta_weight("a") + 0.5 * layer.get_delta_weight("b")
    torch.testing.assert_close(mine.model.lin0.get_delta_weight("sum"), exact, atol=1e-5, rtol=1e-4)
    cfg = mine.peft_config["sum"]
    assert (cfg.r, cfg.lora_alpha, cfg.use_rslora) == (8, 8, False)
    assert theirs.peft_config["sum"].use_rslora  # a file of it is scaled by sqrt(r) once more


def test_svd_clamp_cuts_both_factors() -> None:
    mine, _ = both()
    mine.add_weighted_adapter(["a", "b"], [0.7, 0.4], "free", "svd", svd_rank=3)
    mine.add_weighted_adapter(["a", "b"], [0.7, 0.4], "cut", "svd", svd_rank=3, svd_clamp=0.9)
    layer = mine.model.lin0
    A, B = layer.lora_A["free"].weight, layer.lora_B["free"].weight
    entries = torch.cat([A.flatten(), B.flatten()])
    limit = torch.quantile(torch.cat([entries, -entries]), 0.9)
    torch.testing.assert_close(layer.lora_A["cut"].weight.abs(), A.clamp(-limit, limit).abs(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.lora_B["cut"].weight.abs(), B.clamp(-limit, limit).abs(), atol=1e-5, rtol=1e-4)


def test_quantile_and_dare() -> None:
    values = torch.randn(101, dtype=torch.float64)
    for q in (0.01, 0.37, 0.5, 0.995, 1.0):
        torch.testing.assert_close(quantile(values, q), torch.quantile(values, q))
    torch.manual_seed(0)
    dropped = drop_and_rescale(torch.ones(40_000), 0.25)
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert dropped.mean() == pytest.approx(1.0, abs=0.05)


def test_negative_weight_votes_against_its_adapter() -> None:
    """TIES with weights (1, -1) of one adapter: each entry has one vote for either sign, and a draw is
    positive. Votes without the weights' signs would be unanimous, and the sum zero."""
    t = tuner("a", "b")
    layer = t.model.lin0
    with torch.no_grad():
        layer.lora_A["b"].weight.copy_(layer.lora_A["a"].weight)
        layer.lora_B["b"].weight.copy_(layer.lora_B["a"].weight)
    layer.set_scale("b", 4)  # alpha 2 against 8: equal deltas
    t.add_weighted_adapter(["a", "b"], [1.0, -1.0], "sum", "ties_svd", density=1.0, svd_rank=10)
    d, plus = layer.delta("a"), layer.delta("sum")
    torch.testing.assert_close(plus, d.abs(), atol=1e-5, rtol=1e-4)


# -- files ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_a_saved_result_loads_here_and_in_peft(tmp_path: Path, kind: str) -> None:
    model = get_peft_model(net(), config("rs", modules_to_save=["head"]), "rs")
    model.add_adapter("pat", config("pat"))
    model.add_adapter("one", config("one"))
    model.base_model.model.head.modules_to_save["rs"].weight.data.normal_()
    names, weights = ["rs", "pat", "one"], [0.5, -1.5, 1.0]
    model.add_weighted_adapter(names, weights, "sum", kind)
    model.set_adapter("sum")
    y = model(IDS)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    saved = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert saved["use_rslora"] is False
    assert saved["rank_pattern"] == saved["alpha_pattern"] != {}
    assert saved["lora_alpha"] == saved["r"]
    for tool in (PeftModel, peft.PeftModel):
        again = tool.from_pretrained(net(), str(tmp_path / "sum"))
        torch.testing.assert_close(again(IDS), y, atol=1e-5, rtol=1e-4)


def test_names_that_would_match_too_much_become_a_pattern() -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"lin": nn.Linear(4, 4), "deep": nn.ModuleDict({"lin": nn.Linear(4, 4)})})
    t = Tuner(base, LoraConfig(target_modules="lin", r=2), "a")
    t.add_adapter("b", LoraConfig(target_modules="l.n", r=2))
    t.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
    assert t.targeted["sum"] == ["lin"]
    assert t.peft_config["sum"].target_modules == "lin"


# -- refusals ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"combination_type": "tie"}, "did you mean 'ties'"),
        ({"weights": [1.0]}, "2 adapters and 1 weights"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"adapters": ["a", "zz"]}, "Adapter 'zz' not found"),
        ({"adapters": [], "weights": []}, "at least one"),
        ({"combination_type": "ties"}, "density must be above 0"),
        ({"combination_type": "dare_linear_svd", "density": 1.5}, "got 1.5"),
        (
            {"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"},
            "'total' or 'frequency'",
        ),
        ({"svd_rank": 0}, "svd_rank=0"),
        ({"svd_clamp": 90}, "quantile"),
        ({"adapter_name": "a"}, "already exists"),
        ({"adapters": ["a", "rs"], "combination_type": "linear"}, "same r value .* lin0 .* 4, 3"),
    ],
)
def test_bad_settings_add_nothing(more: dict[str, Any], says: str) -> None:
    t = tuner("a", "b", "rs")
    before = copy.deepcopy({k: v.shape for k, v in t.state_dict().items()})
    args = {"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "sum", **more}
    with pytest.raises(ValueError, match=says):
        t.add_weighted_adapter(**args)
    assert {k: v.shape for k, v in t.state_dict().items()} == before
    assert list(t.peft_config) == ["a", "b", "rs"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"init_lora_weights": "pissa"}, "changed the base"),
        ({"bias": "all"}, "trained biases of the base"),
    ],
)
def test_adapters_that_cannot_be_summed(more: dict[str, Any], says: str) -> None:
    t = Tuner(net(), config("a", **more), "a")
    for kind in TYPES:
        with pytest.raises(AdapterError, match=says):
            t.add_weighted_adapter(["a"], [1.0], "sum", kind, density=0.5)


def test_one_place_for_a_saved_module() -> None:
    t = tuner("a", "b", modules_to_save=["head"])
    with pytest.raises(ValueError, match="head is held by 'a', 'b'"):
        t.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "cat")
