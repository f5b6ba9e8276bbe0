"""DEFT, FRoD, GLoRA, HiRA, OSF, PEANuT and SuperTuning: options that the laws do not vary, beside peft."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_gate_family import both, same
from torch import Tensor, nn

import veneer
from veneer.methods.frod import FrodConfig, group
from veneer.tuner import Tuner


def linear() -> nn.Module:
    return nn.Linear(24, 16)


CHOICES = [
    (a, c, d) for a in ("lora", "vector", "constant", "none") for c, d in (("lora", "vector"), ("vector", "none"))
]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("DeftConfig", {"r": 4, "decomposition_method": "qr"}),
    ("DeftConfig", {"r": 4, "decomposition_method": "qr", "alpha": 6}),
    ("DeftConfig", {"r": 4, "para": True}),
    ("DeftConfig", {"r": 4, "para": True, "alpha": 6, "decomposition_method": "qr"}),
    ("DeftConfig", {"r": 30, "alpha": 6}),
    ("DeftConfig", {"r": 4, "alpha": -1}),
    *[("GloraConfig", {"r": 3, "config_A_B": a, "config_C": c, "config_D_E": d}) for a, c, d in CHOICES],
    ("HiraConfig", {"r": 4, "rank_pattern": {"0": 2}}),
    ("OSFConfig", {}),
    ("OSFConfig", {"effective_rank": 0.33}),
    ("OSFConfig", {"effective_rank": 1.5}),
    ("OSFConfig", {"effective_rank": 4, "rank_pattern": {"0": 0.25}}),
    ("PeanutConfig", {"r": 4, "depth": 1}),
    ("PeanutConfig", {"r": 4, "depth": 3, "act_fn": "tanh", "scaling": 0.5}),
    ("PeanutConfig", {"r": 4, "act_fn": "prelu"}),
    ("SupertuningConfig", {"sparsity": 0.5, "select_top": False}),
    ("SupertuningConfig", {"sparsity": 0.77, "r": 4}),
]


@pytest.mark.parametrize(("config", "kwargs"), CASES, ids=str)
def test_options_are_pefts(config: str, kwargs: dict[str, Any]) -> None:
    """Equal outputs, gradients (OSF's projected ones too) and merged weights."""
    theirs, ours = both(linear, config, **kwargs)
    same(theirs, ours, torch.randn(3, 5, 24))


@pytest.mark.parametrize(
    ("config", "kwargs"),
    [
        ("DeftConfig", {"r": 0}),
        ("DeftConfig", {"decomposition_method": "svd"}),
        ("GloraConfig", {"config_A_B": "x"}),
        ("GloraConfig", {"config_C": "constant"}),
        ("GloraConfig", {"config_D_E": "lora"}),
        ("HiraConfig", {"r": 0}),
        ("HiraConfig", {"init_weights": "x"}),
        ("OSFConfig", {"effective_rank": 0}),
        ("OSFConfig", {"effective_rank": 0.01}),
        ("PeanutConfig", {"r": 0}),
        ("PeanutConfig", {"depth": -1}),
        ("PeanutConfig", {"act_fn": "softmax"}),
        ("SupertuningConfig", {"sparsity": 1.0}),
        ("SupertuningConfig", {"sparsity": 0.999999}),
        ("SupertuningConfig", {"r": 0}),
        ("SupertuningConfig", {"lora_alpha": 4.0}),
        ("FrodConfig", {"sparse_rate": 1.5}),
    ],
    ids=str,
)
def test_refuses_what_peft_refuses(config: str, kwargs: dict[str, Any]) -> None:
    for package in (peft, veneer):
        with pytest.raises(ValueError):
            package.get_peft_model(nn.Sequential(linear()), getattr(package, config)(target_modules=["0"], **kwargs))


def test_osf_gradient_is_the_projected_one() -> None:
    """The true gradients of U and V less their part along the large singular directions."""
    torch.manual_seed(0)
    base = linear().double()
    t = Tuner(nn.Sequential(copy.deepcopy(base)), veneer.OSFConfig(target_modules=["0"], effective_rank=4))
    layer = t.model[0]
    U, _, V = torch.linalg.svd(base.weight.detach(), full_matrices=False)
    slot = layer.osf_svd_params["default"]
    for p in slot.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    x, goal = torch.randn(5, 24).double(), torch.randn(5, 16).double()
    (t(x) * goal).sum().backward()
    u, s, v = (getattr(slot, n).detach().clone().requires_grad_() for n in ("U_low", "S_low", "V_low"))
    ((x @ ((u * s) @ v).T) * goal).sum().backward()
    torch.testing.assert_close(slot.U_low.grad, u.grad - U[:, :4] @ (U[:, :4].T @ u.grad))
    torch.testing.assert_close(slot.V_low.grad, v.grad - (v.grad @ V[:4].T) @ V[:4])
    torch.testing.assert_close(slot.S_low.grad, s.grad)
    assert (slot.U_low.grad - u.grad).abs().max() > 0.1


def test_osf_steps_stay_outside_the_large_directions() -> None:
    t = Tuner(nn.Sequential(linear()), veneer.OSFConfig(target_modules=["0"], effective_rank=4))
    slot, high = t.model[0].osf_svd_params["default"], t.model[0].osf_U_high["default"]
    optimizer = torch.optim.SGD(slot.parameters(), lr=0.1)
    start = slot.U_low.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        t(torch.randn(6, 24)).square().mean().backward()
        optimizer.step()
    assert (slot.U_low - start).abs().max() > 1e-3
    assert (high.T @ slot.U_low).abs().max() < 1e-5


def test_supertuning_indices_are_found_again(tmp_path: Path) -> None:
    """A file without places is complete, in both packages."""
    x = torch.randn(4, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = both(linear, "SupertuningConfig", sparsity=0.8, save_precomputed_indices=False)
        torch.manual_seed(0)
        base = nn.Sequential(linear())
        theirs.save_pretrained(tmp_path / "theirs")
        ours.save_pretrained(tmp_path / "ours")
        loaded = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").eval()
        back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert not [k for k in veneer.get_peft_model_state_dict(ours) if "indices" in k]
    torch.testing.assert_close(loaded(x), theirs(x))
    torch.testing.assert_close(back(x), theirs(x))


def test_supertuning_dropout_is_the_loras() -> None:
    t = Tuner(
        nn.Sequential(linear()), veneer.SupertuningConfig(sparsity=0.5, r=4, lora_dropout=0.9, target_modules=["0"])
    )
    t.model[0].supertuning_values["default"].data.normal_()
    x = torch.randn(4, 24)
    y = t.eval()(x)
    torch.testing.assert_close(t.train()(x), y)  # B is zero, so only the sparse part could differ
    t.model[0].supertuning_lora_B["default"].weight.data.normal_()
    assert not torch.equal(t(x), t(x))


def test_deft_alone_takes_the_subspace_out() -> None:
    """With qr and para the new weight has nothing in the span of P."""
    t = Tuner(
        nn.Sequential(linear()), veneer.DeftConfig(r=4, para=True, decomposition_method="qr", target_modules=["0"])
    )
    P = t.model[0].deft_P["default"].detach()
    W = t.model[0].merged_weights(["default"])[0]
    assert (torch.linalg.qr(P)[0].T @ W).abs().max() < 1e-6


class Blocks(nn.Module):
    """Layers that share bases (q, up, down), with more and with fewer rows than columns."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"q": (8, 8), "up": (8, 12), "down": (12, 8)}
        self.blocks = nn.ModuleList(nn.ModuleDict({k: nn.Linear(*s) for k, s in shapes.items()}) for _ in range(3))
        self.wide = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for b in self.blocks:
            x = b["q"](x)
            x = b["down"](b["up"](x))
        return self.wide(x)


TARGETS = ["q", "up", "down", "wide"]


def frod(package: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    cfg = package.FrodConfig(target_modules=TARGETS, progressbar=False, sparse_rate=0.1, **kwargs)
    return package.get_peft_model(Blocks(), cfg).eval()


@pytest.mark.parametrize("key", [0, 7])
def test_frod_is_found_as_peft_finds_it(key: int) -> None:
    """Bases, places, scale factors and the U of each layer, bit for bit."""
    theirs, ours = frod(peft, projection_prng_key=key), frod(veneer, projection_prng_key=key)
    want, got = peft.get_peft_model_state_dict(theirs), veneer.get_peft_model_state_dict(ours)
    assert want.keys() == got.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    for i in range(3):
        for name in ("q", "up", "down"):
            yours = theirs.base_model.model.blocks[i][name].frod_U["default"]
            assert torch.equal(ours.base_model.model.blocks[i][name].frod_U["default"], yours)


@pytest.mark.parametrize("saved", [True, False])
def test_frod_files_both_ways(saved: bool, tmp_path: Path) -> None:
    x = torch.randn(6, 8)
    for source, target in ((peft, veneer), (veneer, peft), (veneer, veneer)):
        model = frod(source, save_projection=saved, projection_prng_key=3)
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(0.1 * torch.randn_like(p))
        model.save_pretrained(tmp_path)
        torch.manual_seed(0)
        loaded = target.PeftModel.from_pretrained(Blocks(), tmp_path).eval()
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
        assert (loaded(x) - loaded.base_model.model.wide.bias).abs().max() > 1e-2


def test_frod_does_not_touch_the_global_random_state() -> None:
    net = Blocks()
    state = torch.get_rng_state()
    Tuner(net, FrodConfig(target_modules=TARGETS, progressbar=False))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("bert.encoder.layer.0.attention.self.query", "self_query"),
        ("bert.encoder.layer.0.attention.output.dense", "attention_output"),
        ("bert.encoder.layer.11.output.dense", "output_dense"),
        ("model.layers.3.mlp.up_proj", "mlp_up_proj"),
        ("blocks.0.sub.1.fc", "fc"),
        ("layers.3.mlp.7", "mlp_7"),
        ("lm_head", "lm_head"),
    ],
)
def test_frod_group_names_are_pefts(path: str, name: str) -> None:
    assert group(path) == name
    root = cursor = nn.Module()
    *parents, leaf = path.split(".")
    for part in parents:
        cursor.add_module(part, nn.Module())
        cursor = cursor.get_submodule(part)
    cursor.add_module(leaf, nn.Linear(4, 4))
    model = peft.get_peft_model(root, peft.FrodConfig(target_modules=[path], progressbar=False))
    assert f"base_model.frod_V.{name}" in peft.get_peft_model_state_dict(model)


def test_frod_refuses_one_basis_for_two_sizes() -> None:
    net = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(n, 8)}) for n in (8, 12))
    with pytest.raises(ValueError, match=r"'q' one basis.*8x12"):
        Tuner(net, FrodConfig(target_modules=["q"], progressbar=False))


@pytest.mark.parametrize("seed", [0, 1])
def test_hira_embedding_looks_its_change_up(seed: int) -> None:
    theirs, ours = both(lambda: nn.Embedding(11, 16), "HiraConfig", r=4)
    same(theirs, ours, torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("method", ["qr", "relu"])
def test_deft_gradcheck_with_qr_and_para(method: str) -> None:
    cfg = veneer.DeftConfig(r=3, decomposition_method=method, para=True, target_modules=["0"])
    t = Tuner(nn.Sequential(linear()), cfg).double()
    P = t.model[0].deft_P["default"]
    x = torch.randn(3, 24).double()
    f = lambda w: torch.func.functional_call(t, {"model.0.deft_P.default": w}, (x,))
    assert torch.autograd.gradcheck(f, (P.detach().clone().normal_().requires_grad_(),), fast_mode=True)
