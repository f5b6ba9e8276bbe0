"""What the methods' options do, and what users are told where they do not fit."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from veneer.context import Rows
from veneer.errors import AdapterError, CannotMerge
from veneer.methods.ia3 import IA3Config
from veneer.methods.ln_tuning import LNTuningConfig
from veneer.methods.loha import LoHaConfig
from veneer.methods.oft import OFTConfig, cayley, cayley_neumann, skew
from veneer.methods.vera import VeraConfig
from veneer.tuner import Tuner


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(3)


def alone(module: nn.Module) -> nn.Module:
    """A model of one layer, named "layer"."""
    model = nn.Sequential()
    model.add_module("layer", module)
    return model.eval()


def randomised(tuner: Tuner, size: float = 0.3) -> Tuner:
    for p in tuner.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * size)
    return tuner


def identity(n: int) -> nn.Linear:
    layer = nn.Linear(n, n, bias=False)
    layer.weight.data.copy_(torch.eye(n))
    return layer


# -- OFT ----------------------------------------------------------------------------------------------------
def test_cayley_is_orthogonal_and_the_series_nears_its_transpose() -> None:
    Q = skew(torch.randn(3, 10, dtype=torch.float64) * 0.05, 5)
    C = cayley(Q)
    assert torch.allclose(C @ C.mT, torch.eye(5, dtype=C.dtype).expand_as(C))
    errors = [(cayley_neumann(Q, n) - C.mT).abs().max().item() for n in (2, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8


def test_exact_rotation_keeps_the_weights_norm() -> None:
    conv = nn.Conv2d(4, 6, 3)
    length = conv.weight.detach().flatten(1).norm(dim=1)
    cfg = OFTConfig(target_modules=["layer"], oft_block_size=6, use_cayley_neumann=False)
    tuner = randomised(Tuner(alone(conv), cfg))
    tuner.merge_adapter()
    assert torch.allclose(tuner.model.layer.base_layer.weight.flatten(1).norm(dim=1), length, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Conv2d(12, 8, 3, groups=4, dilation=2), torch.randn(2, 12, 7, 8)),
        (nn.Conv1d(12, 8, 3, padding=2, padding_mode="circular"), torch.randn(2, 12, 7)),
        (nn.Conv3d(4, 6, 2, stride=2), torch.randn(2, 4, 4, 5, 6)),
    ],
    ids=["groups", "conv1d", "conv3d"],
)
def test_oft_on_convolutions_is_its_merged_weight(module: nn.Module, x: Tensor) -> None:
    base = module(x)
    cfg = OFTConfig(target_modules=["layer"], oft_block_size=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 3 does not divide every patch
        tuner = Tuner(alone(copy.deepcopy(module)), cfg)
        tuner.add_adapter("b", copy.deepcopy(cfg))
    assert torch.allclose(tuner(x), base, atol=1e-6)
    tuner.set_adapter(["default", "b"])
    randomised(tuner)
    y = tuner(x)
    assert (y - base).abs().max() > 1e-2
    tuner.merge_adapter()
    assert torch.allclose(tuner(x), y, atol=1e-5)
    tuner.unmerge_adapter()
    each = []
    for name in ("default", "b"):
        tuner.set_adapter(name)
        each.append(tuner(x))
    with tuner.host.call(rows=Rows.of(["b", "default"])):
        mixed = tuner(x)
    assert torch.allclose(mixed, torch.stack([each[1][0], each[0][1]]), atol=1e-5)


def test_oft_module_dropout_leaves_blocks_out_in_training_only() -> None:
    cfg = OFTConfig(target_modules=["layer"], oft_block_size=4, module_dropout=0.5)
    tuner = randomised(Tuner(alone(identity(16)), cfg))
    eye, whole = torch.eye(16), tuner(torch.eye(16)).detach()
    tuner.train()
    seen = set()
    for _ in range(40):
        y = tuner(eye).detach()
        for n in range(4):
            part = (slice(4 * n, 4 * n + 4),) * 2
            kept, left = torch.allclose(y[part], whole[part]), torch.allclose(y[part], eye[part])
            assert kept != left
            seen.add((n, kept))
    assert seen == {(n, kept) for n in range(4) for kept in (True, False)}
    tuner.merge_adapter()  # in training mode, too, the merged weight is whole
    assert torch.allclose(tuner(eye), whole, atol=1e-6)


@pytest.mark.parametrize("share", [False, True])
def test_coft_draws_the_stored_tensor_back_in_training(share: bool) -> None:
    kwargs: dict[str, Any] = {"oft_block_size": 4, "coft": True, "eps": 0.2, "block_share": share}
    base = alone(nn.Linear(12, 6))
    x, start = torch.randn(3, 12), torch.randn(1 if share else 3, 6) * 0.02
    start[0] += 1  # one block outside, the others inside
    ours = Tuner(copy.deepcopy(base), OFTConfig(target_modules=["layer"], **kwargs))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.OFTConfig(target_modules=["layer"], **kwargs))
    mine, yours = (t.model.layer.oft_R["default"].weight for t in (ours, theirs.base_model))
    mine.data.copy_(start)
    yours.data.copy_(start)
    with torch.no_grad():
        want = theirs.eval()(x)
        assert torch.allclose(ours.eval()(x), want, atol=1e-6)
    assert torch.equal(mine, start)
    ours.train()(x).sum().backward()
    assert torch.allclose(mine, yours, atol=1e-7)
    assert mine[0].norm() < start[0].norm() / 5
    assert mine.grad is not None
    assert mine.grad[0].abs().max() > 0


def test_oft_block_size_that_does_not_divide() -> None:
    with pytest.warns(UserWarning, match=r"layer \(6x12\): oft_block_size=5 does not divide .* oft_block_size=4"):
        Tuner(alone(nn.Linear(12, 6)), OFTConfig(target_modules=["layer"], oft_block_size=5))
    with pytest.raises(AdapterError, match="blocks of one feature"):
        Tuner(alone(nn.Linear(7, 6)), OFTConfig(target_modules=["layer"], oft_block_size=2))


# -- LoHa ---------------------------------------------------------------------------------------------------
def test_loha_rank_dropout_leaves_rows_out_and_scales_the_rest() -> None:
    layer = nn.Linear(8, 5, bias=False)
    layer.weight.data.zero_()
    tuner = Tuner(alone(layer), LoHaConfig(target_modules=["layer"], r=3, rank_dropout=0.5, init_weights=False))
    whole = tuner(torch.eye(8)).detach().T
    tuner.train()
    kept = set()
    for _ in range(200):
        rows = (tuner(torch.eye(8)).detach().T / whole).mean(dim=1)
        n = int((rows > 0).sum())
        kept.add(n)
        assert torch.allclose(rows[rows > 0], torch.full((n,), 5 / max(n, 1)), atol=1e-4)
    assert kept == set(range(6))  # none left, too: zero, not NaN


def test_loha_module_dropout_is_all_or_nothing() -> None:
    layer = nn.Linear(8, 5)
    x = torch.randn(4, 8)
    base = layer(x)
    cfg = LoHaConfig(target_modules=["layer"], r=3, module_dropout=0.5, init_weights=False)
    tuner = Tuner(alone(layer), cfg)
    whole = tuner(x).detach()
    tuner.train()
    seen = [torch.allclose(tuner(x), whole, atol=1e-6) for _ in range(40)]
    assert set(seen) == {True, False}
    off = next(y for y in (tuner(x) for _ in range(100)) if not torch.allclose(y, whole, atol=1e-6))
    assert torch.allclose(off, base, atol=1e-6)


def test_loha_rank_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"`r` should be a positive integer .* 0 \(layer \(6x8\)\)"):
        Tuner(alone(nn.Linear(8, 6)), LoHaConfig(target_modules=["layer"], r=0))


# -- VeRA ---------------------------------------------------------------------------------------------------
def test_vera_adapters_with_keys_and_ranks_of_their_own() -> None:
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 10)).eval()
    x = torch.randn(3, 8)
    cfgs = {
        "a": VeraConfig(target_modules=["0", "1"], r=4, init_weights=False),
        "b": VeraConfig(target_modules=["0"], r=7, projection_prng_key=9, init_weights=False),
    }
    both = Tuner(copy.deepcopy(base), copy.deepcopy(cfgs))
    single = {n: Tuner(copy.deepcopy(base), {n: copy.deepcopy(c)}) for n, c in cfgs.items()}
    for name, model in single.items():
        for key, t in model.named_parameters():
            if f".{name}" in key:
                both.get_parameter(key).data.copy_(t)
        both.set_adapter(name)
        assert torch.equal(both(x), model(x))
    both.set_adapter(["a", "b"])
    y = both(x)
    both.merge_adapter()
    assert torch.allclose(both(x), y, atol=1e-4)


def test_vera_without_projections_in_the_file_draws_them_again() -> None:
    cfg = VeraConfig(target_modules=["layer"], r=4, save_projection=False, projection_prng_key=11)
    one, two = (Tuner(alone(nn.Linear(8, 6)), copy.deepcopy(cfg)) for _ in range(2))
    assert not any(spec.save for _, key, spec, _, _ in one.tensor_names("default") if key in ("vera_A", "vera_B"))
    assert torch.equal(one.vera_A["default"], two.vera_A["default"])
    other = Tuner(alone(nn.Linear(8, 6)), VeraConfig(target_modules=["layer"], r=4, projection_prng_key=12))
    assert not torch.equal(one.vera_A["default"], other.vera_A["default"])


# -- IA3 ----------------------------------------------------------------------------------------------------
def test_ia3_must_know_its_feedforward_modules() -> None:
    with pytest.raises(ValueError, match="specify `feedforward_modules`"):
        Tuner(alone(nn.Linear(8, 6)), IA3Config(target_modules=["layer"]))
    with pytest.raises(AdapterError, match="embedding"):
        Tuner(alone(nn.Embedding(8, 6)), IA3Config(target_modules=["layer"], feedforward_modules=["layer"]))


def test_ia3_by_architecture() -> None:
    block = nn.ModuleDict({n: nn.Linear(4, 4) for n in ("k_proj", "v_proj", "down_proj")})
    model = nn.ModuleDict({"block": block})
    model.config = {"model_type": "llama"}  # type: ignore[assignment]
    tuner = Tuner(model, IA3Config())
    shapes = {n.split(".")[-3]: tuple(p.shape) for n, p in tuner.named_parameters() if "ia3_l" in n}
    assert shapes == {"k_proj": (4, 1), "v_proj": (4, 1), "down_proj": (1, 4)}


@pytest.mark.parametrize(
    ("module", "x"),
    [(nn.Conv1d(4, 6, 3), torch.randn(2, 4, 7)), (nn.Embedding(9, 6), torch.arange(9))],
    ids=["conv1d", "embedding"],
)
def test_ia3_beyond_peft(module: nn.Module, x: Tensor) -> None:
    tuner = randomised(Tuner(alone(module), IA3Config(target_modules=["layer"], feedforward_modules=[])))
    y = tuner(x)
    tuner.merge_adapter()
    assert torch.allclose(tuner(x), y, atol=1e-6)


# -- LN tuning ----------------------------------------------------------------------------------------------
def test_ln_tuning_merges_the_copy_itself() -> None:
    tuner = randomised(Tuner(alone(nn.LayerNorm(6)), LNTuningConfig(target_modules=["layer"])))
    layer = tuner.model.layer
    tuner.merge_adapter()
    assert torch.equal(layer.base_layer.weight, layer.ln_tuning_layers["default"].weight)
    assert torch.equal(layer.base_layer.bias, layer.ln_tuning_layers["default"].bias)


def test_ln_tuning_runs_the_last_active_copy() -> None:
    tuner = randomised(Tuner(alone(nn.LayerNorm(6)), LNTuningConfig(target_modules=["layer"])))
    tuner.add_adapter("b", LNTuningConfig(target_modules=["layer"]))
    x = torch.randn(2, 6)
    tuner.set_adapter("b")
    randomised(tuner)
    want = tuner(x)
    tuner.set_adapter(["default", "b"])
    assert torch.equal(tuner(x), want)


def test_ln_tuning_says_what_it_cannot_copy() -> None:
    with pytest.raises(AdapterError, match="no parameters to train"):
        Tuner(alone(nn.ReLU()), LNTuningConfig(target_modules=["layer"]))
    with pytest.raises(AdapterError, match="modules with parameters of their own"):
        Tuner(alone(nn.Sequential(nn.LayerNorm(3))), LNTuningConfig(target_modules=["layer"]))


def test_ln_tuning_does_not_merge_statistics_away() -> None:
    tuner = Tuner(alone(nn.BatchNorm1d(6)), LNTuningConfig(target_modules=["layer"]))
    tuner.train()(torch.randn(8, 6) + 3)
    assert torch.equal(tuner.model.layer.base_layer.running_mean, torch.zeros(6))
    with pytest.raises(CannotMerge, match="statistics"):
        tuner.merge_adapter()
