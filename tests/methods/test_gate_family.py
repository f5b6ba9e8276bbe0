"""BOFT, HRA and RoAd: options that the laws do not vary, beside peft and beside their formulas."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import peft.tuners.boft.layer as peft_boft
import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer import registry
from veneer.methods.hra import HRAConfig
from veneer.tuner import Tuner


class BlockDiagonal:
    """What peft's compiled extension computes, so that its several factors run here."""

    @staticmethod
    def forward(x: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*blocks) for blocks in x.detach()])]

    @staticmethod
    def backward(grad: Tensor, x: Tensor) -> list[Tensor]:
        b = x.shape[-1]
        at = [slice(i * b, (i + 1) * b) for i in range(x.shape[1])]
        return [torch.stack([torch.stack([g[i, i] for i in at]) for g in grad])]


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: BlockDiagonal)


def both(make: Any, config: str, moved: bool = True, **kwargs: Any) -> tuple[Any, Any]:
    """peft's model and veneer's, of one base and with peft's tensors."""
    torch.manual_seed(0)
    net = nn.Sequential(make()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(net), getattr(peft, config)(target_modules=["0"], **kwargs)).eval()
        ours = veneer.get_peft_model(net, getattr(veneer, config)(target_modules=["0"], **kwargs)).eval()
    for p in theirs.parameters():
        if p.requires_grad and moved:
            p.data.add_(0.3 * torch.randn_like(p))
    veneer.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return theirs, ours


def same(theirs: Any, ours: Any, x: Tensor) -> None:
    y, z = theirs(x), ours(x)
    torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-5)
    goal = torch.randn_like(y)
    (y * goal).sum().backward()
    (z * goal).sum().backward()
    grads = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    mine = {n.replace(".default", ""): p.grad for n, p in ours.named_parameters() if p.requires_grad}
    mine = {n.replace("coder_", "coders."): grad for n, grad in mine.items()}
    assert grads.keys() == mine.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(mine[name], grad, rtol=1e-3, atol=1e-4)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), y, rtol=1e-4, atol=1e-5)


BOFTS: list[dict[str, Any]] = [
    {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    {"boft_block_size": 2, "boft_n_butterfly_factor": 4},
    {"boft_block_size": 4, "boft_n_butterfly_factor": 4},
    {"boft_block_size": 0, "boft_block_num": 8, "boft_n_butterfly_factor": 3},
    {"boft_block_size": 0, "boft_block_num": 8},
]


@pytest.mark.usefixtures("factors")
@pytest.mark.parametrize("kwargs", BOFTS, ids=str)
def test_butterfly_factors_are_pefts(kwargs: dict[str, Any]) -> None:
    theirs, ours = both(lambda: nn.Linear(32, 12), "BOFTConfig", **kwargs)
    same(theirs, ours, torch.randn(3, 5, 32))


@pytest.mark.usefixtures("factors")
def test_butterfly_factors_on_a_convolution_are_pefts() -> None:
    theirs, ours = both(
        lambda: nn.Conv2d(12, 8, 2, padding=1), "BOFTConfig", boft_block_size=4, boft_n_butterfly_factor=3
    )
    same(theirs, ours, torch.randn(2, 12, 4, 5))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"boft_block_size": 0, "boft_block_num": 0},
        {"boft_block_size": 4, "boft_block_num": 4},
        {"boft_block_size": 5},
        {"boft_block_size": 0, "boft_block_num": 5},
        {"boft_n_butterfly_factor": 0},
        {"boft_block_size": 3, "boft_n_butterfly_factor": 2},
        {"boft_block_size": 8, "boft_n_butterfly_factor": 2},
        {"boft_block_size": 4, "boft_n_butterfly_factor": 9},
    ],
    ids=str,
)
@pytest.mark.usefixtures("factors")
def test_boft_refuses_what_peft_refuses(kwargs: dict[str, Any]) -> None:
    for package in (peft, veneer):
        with pytest.raises(ValueError):
            package.get_peft_model(nn.Sequential(nn.Linear(24, 8)), package.BOFTConfig(target_modules=["0"], **kwargs))


def test_boft_dropout_leaves_blocks_out_in_training_alone() -> None:
    t = Tuner(nn.Sequential(nn.Linear(24, 8)), veneer.BOFTConfig(target_modules=["0"], boft_dropout=0.5)).eval()
    for p in t.parameters():
        if p.requires_grad:
            p.data.add_(0.5 * torch.randn_like(p))
    x = torch.randn(4, 24)
    y = t(x)
    assert torch.equal(t(x), y)
    t.train()
    assert not torch.equal(t(x), t(x))
    t.merge_adapter()
    torch.testing.assert_close(t(x), y)


@pytest.mark.parametrize(("config", "kwargs"), [("BOFTConfig", {"boft_block_size": 9}), ("HRAConfig", {"r": 4})])
def test_a_grouped_convolution_rotates_each_groups_inputs(config: str, kwargs: dict[str, Any]) -> None:
    """One rotation for all groups: the merged weight is the forward pass, and rows keep their length."""
    net = nn.Sequential(nn.Conv2d(12, 8, 3, groups=4))
    t = Tuner(net, getattr(veneer, config)(target_modules=["0"], init_weights=False, **kwargs)).eval()
    if config == "BOFTConfig":
        t.model[0].boft_s["default"].data.fill_(1.0)
    x = torch.randn(2, 12, 5, 4)
    y, before = t(x), net[0].base_layer.weight.flatten(1)
    assert not torch.allclose(y, net[0].base_layer(x), atol=1e-2)
    t.merge_adapter()
    torch.testing.assert_close(t(x), y)
    after = net[0].base_layer.weight.flatten(1)
    torch.testing.assert_close(after.norm(dim=1), before.norm(dim=1))


@pytest.mark.parametrize("kwargs", [{"r": 4, "apply_GS": True}, {"r": 3}, {"r": 30}], ids=str)
def test_hra_is_pefts(kwargs: dict[str, Any]) -> None:
    if kwargs["r"] == 30:
        kwargs = {**kwargs, "init_weights": False}
    theirs, ours = both(lambda: nn.Linear(24, 16), "HRAConfig", **kwargs)
    same(theirs, ours, torch.randn(3, 5, 24))


def test_hra_chain_is_the_product_of_reflections() -> None:
    t = Tuner(nn.Sequential(nn.Linear(20, 8, bias=False)), HRAConfig(r=6, init_weights=False, target_modules=["0"]))
    t = t.double()
    u = t.model[0].hra_u["default"].detach()
    Q = torch.eye(20, dtype=torch.float64)
    for v in (u / u.norm(dim=0)).T:
        Q = Q @ (torch.eye(20, dtype=torch.float64) - 2 * torch.outer(v, v))
    V, M = registry.method("HRA").chain(t.model[0].view("default"))
    torch.testing.assert_close(torch.eye(20, dtype=torch.float64) - V @ M, Q)


def test_hra_gram_schmidt_starts_finite() -> None:
    """peft starts from pairs of equal columns, which have one direction: its output is NaN or noise."""
    x = torch.randn(4, 24)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 16))
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.HRAConfig(r=4, apply_GS=True, target_modules=["0"]))
    ours = Tuner(net, HRAConfig(r=4, apply_GS=True, target_modules=["0"]))
    u = theirs.base_model.model[0].hra_u["default"]
    assert torch.equal(u[:, 0], u[:, 1])
    assert torch.linalg.matrix_rank(ours.model[0].hra_u["default"]) == 4
    y = ours(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="apply_GS"):
        Tuner(nn.Sequential(nn.Linear(4, 16)), HRAConfig(r=6, apply_GS=True, target_modules=["0"]))


def test_hra_warns_of_an_odd_number() -> None:
    with pytest.warns(UserWarning, match="odd"):
        Tuner(nn.Sequential(nn.Linear(4, 6)), HRAConfig(r=3, target_modules=["0"]))


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("group_size", [2, 8, 16])
def test_road_is_pefts(variant: str, group_size: int) -> None:
    theirs, ours = both(lambda: nn.Linear(24, 16), "RoadConfig", variant=variant, group_size=group_size)
    same(theirs, ours, torch.randn(3, 5, 24))


@pytest.mark.parametrize("kwargs", [{"variant": "road_3"}, {"group_size": 7}, {"group_size": 0}, {"group_size": 64}])
def test_road_refuses_what_peft_refuses(kwargs: dict[str, Any]) -> None:
    for package in (peft, veneer):
        with pytest.raises(ValueError):
            package.get_peft_model(nn.Sequential(nn.Linear(24, 16)), package.RoadConfig(target_modules=["0"], **kwargs))


def test_road_refuses_pairs_across_groups() -> None:
    with pytest.raises(ValueError, match="different groups"):
        Tuner(nn.Sequential(nn.Conv2d(12, 8, 3, groups=4)), veneer.RoadConfig(target_modules=["0"], group_size=8))
