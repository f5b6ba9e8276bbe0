"""LoKr, C3A, FourierFT, WaveFT, SHiRA, GraLoRA, BEFT, MiSS: shapes, seeded places, options and errors as peft has them,
and fast paths equal to plain ones."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.base_calls import Base
from veneer.methods import c3a, waveft
from veneer.methods.lokr import factorization
from veneer.tuner import Tuner


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(3)


def ours(layer: nn.Module, cfg: Any) -> tuple[Tuner, Any]:
    """A tuner over one layer, and the adapted layer."""
    cfg.target_modules = {"0"}
    t = Tuner(nn.Sequential(layer).eval(), cfg)
    return t, t.model[0]  # type: ignore[index]


def theirs(layer: nn.Module, cfg: Any) -> Any:
    """peft's adapted layer."""
    cfg.target_modules = {"0"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(nn.Sequential(layer), cfg).eval().base_model.model[0]


def random_(layer: Any, seed: int = 1, size: float = 0.3) -> None:
    """The same random numbers in every trained tensor, veneer's layer or peft's."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(layer.named_parameters()):
        if not name.startswith("base_layer."):
            p.data.copy_(torch.randn(p.shape, generator=generator) * size)


def trained_shapes(model: Any, package: Any) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in package.get_peft_model_state_dict(model).items()}


# -- errors ---------------------------------------------------------------------------------------------------
BAD: list[tuple[str, dict[str, Any]]] = [
    ("LoKrConfig", {"r": 0}),
    ("LoKrConfig", {"layers_pattern": "h"}),
    ("C3AConfig", {"block_size": 7}),
    ("C3AConfig", {"block_size": 0}),
    ("C3AConfig", {"block_size": 4, "init_weights": "zeros"}),
    ("C3AConfig", {"block_size": 4, "bias": "some"}),
    ("FourierFTConfig", {"n_frequency": 0}),
    ("FourierFTConfig", {"n_frequency": 865}),
    ("FourierFTConfig", {"n_frequency": 4, "n_frequency_pattern": {"0": 865}}),
    ("WaveFTConfig", {"n_frequency": -1}),
    ("WaveFTConfig", {"n_frequency": 865}),
    ("WaveFTConfig", {"n_frequency": 4, "wavelet_family": "db39"}),
    ("ShiraConfig", {"r": 0}),
    ("ShiraConfig", {"r": 100}),
    ("GraloraConfig", {"r": 0}),
    ("GraloraConfig", {"r": 3}),
    ("GraloraConfig", {"r": 4, "hybrid_r": -1}),
    ("GraloraConfig", {"r": 4, "gralora_k": 0}),
    ("GraloraConfig", {"r": 5, "gralora_k": 5}),
    ("MissConfig", {"r": 0}),
    ("MissConfig", {"r": 25}),
    ("MissConfig", {"r": 5, "init_weights": "bat"}),
    ("MissConfig", {"r": 4, "mini_r": 5, "init_weights": "mini"}),
    ("MissConfig", {"r": 4, "bias": "some"}),
]


def made(package: Any, name: str, kwargs: dict[str, Any]) -> Any:
    cfg = getattr(package, name)(target_modules=["0"], **kwargs)
    return package.get_peft_model(nn.Sequential(nn.Linear(24, 36)), cfg)


@pytest.mark.parametrize(("name", "kwargs"), BAD, ids=[f"{n}-{k}" for n, k in BAD])
def test_bad_settings_are_pefts_errors(name: str, kwargs: dict[str, Any]) -> None:
    kinds = []
    for package in (peft, veneer):
        with pytest.raises((ValueError, NotImplementedError)) as e:
            made(package, name, kwargs)
        kinds.append(e.type)
    assert issubclass(kinds[1], kinds[0])


def test_errors_that_peft_does_not_have() -> None:
    with pytest.raises(ValueError, match="mini_r=0"):
        ours(nn.Linear(8, 8), veneer.MissConfig(r=4, mini_r=0, init_weights="mini"))
    with pytest.raises(ValueError, match="Unknown init_weights"):
        veneer.MissConfig(init_weights="bone")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown init_weights"):
        veneer.LoKrConfig(init_weights="gaussian")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="random_loc_seed"):
        veneer.FourierFTConfig(random_loc_seed=None)
    with pytest.raises(ValueError, match="mask_fn"):
        ours(nn.Linear(8, 8), veneer.ShiraConfig(r=1, mask_type="top"))  # type: ignore[arg-type]


# -- LoKr -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("factor", [-1, 1, 3, 4, 6, 100])
@pytest.mark.parametrize("options", [{}, {"decompose_both": True}, {"use_effective_conv2d": True}], ids=str)
def test_lokr_shapes(factor: int, options: dict[str, bool]) -> None:
    def model() -> nn.Module:
        sizes = [(1, 7), (24, 24), (30, 48), (127, 100), (168, 80)]
        layers = [nn.Linear(i, o) for i, o in sizes]
        convolutions = [nn.Conv2d(24, 32, 3), nn.Conv2d(24, 32, 1), nn.Conv1d(12, 20, 3), nn.Conv1d(6, 4, 1)]
        return nn.Sequential(*layers, *convolutions)

    targets = [str(i) for i in range(9)]
    for r in (1, 4, 7):
        shapes = [
            trained_shapes(
                p.get_peft_model(
                    model(), p.LoKrConfig(target_modules=targets, r=r, decompose_factor=factor, **options)
                ),
                p,
            )
            for p in (peft, veneer)
        ]
        assert shapes[1] == shapes[0]


def test_factors() -> None:
    assert factorization(128, -1) == (8, 16)
    assert factorization(12, 4) == (4, 3)
    assert factorization(360, 16) == (15, 24)
    assert factorization(7, 0) == (1, 7)


@pytest.mark.parametrize("init", [True, False, "lycoris"])
@pytest.mark.parametrize("r", [2, 64])
def test_lokr_starts_as_pefts(init: Any, r: int) -> None:
    kwargs = {"r": r, "decompose_both": True, "init_weights": init}
    mine = ours(nn.Linear(240, 360), veneer.LoKrConfig(**kwargs))[1]
    other = theirs(nn.Linear(240, 360), peft.LoKrConfig(**kwargs))
    for name, p in other.named_parameters():
        if "lokr" in name:
            q = mine.get_parameter(name)
            assert float(q.abs().max()) == pytest.approx(float(p.abs().max()), rel=0.1), name
            assert float(q.std()) == pytest.approx(float(p.std()), rel=0.25), name


def test_lokr_product_is_that_of_the_change() -> None:
    for out, inp in ((24, 48), (48, 6), (30, 7)):
        _, layer = ours(nn.Linear(inp, out), veneer.LoKrConfig(r=1, decompose_both=True))
        random_(layer)
        x = torch.randn(2, 3, inp)
        p = layer.view("default")
        assert torch.allclose(p.method.product(p, x), x @ p.method.delta(p).T, atol=1e-5)


def test_lokr_dropouts() -> None:
    x = torch.randn(2, 24)

    def ratios(**kwargs: Any) -> Tensor:
        t, layer = ours(nn.Linear(24, 64), veneer.LoKrConfig(r=64, init_weights=False, **kwargs))
        whole, base = t(x), layer.base_layer(x)
        t.train()
        return torch.stack([((t(x) - base) / (whole - base)).mean(0) for _ in range(60)])

    kept = ratios(rank_dropout=0.3)
    assert set(kept.round(decimals=2).abs().unique().tolist()) == {0.0, 1.0}
    assert float(kept.mean()) == pytest.approx(0.7, abs=0.05)
    scaled = ratios(rank_dropout=0.3, rank_dropout_scale=True)
    assert torch.allclose(scaled.mean(1), torch.ones(60), atol=1e-3)
    assert torch.equal(ratios(rank_dropout=1.0, rank_dropout_scale=True), torch.zeros(60, 64))
    whole = ratios(module_dropout=0.5).round(decimals=2)
    assert set(whole.abs().unique().tolist()) == {0.0, 1.0}
    assert torch.equal(whole, whole[:, :1].expand(-1, 64))


# -- C3A ------------------------------------------------------------------------------------------------------
def test_c3a_transforms_are_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    t, layer = ours(nn.Linear(24, 36), veneer.C3AConfig(block_size=6))
    t.double()
    random_(layer)
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    kernel = layer.c3a_kernel["default"]
    by_weight = t(x)
    gradients = torch.autograd.grad(by_weight.square().sum(), [x, kernel])
    monkeypatch.setattr(c3a, "TRANSFORMS_FROM", 0)
    by_transform = t(x)
    assert torch.allclose(by_transform, by_weight, atol=1e-12)
    assert not torch.equal(by_transform, by_weight), "the same path ran twice"
    for a, b in zip(torch.autograd.grad(by_transform.square().sum(), [x, kernel]), gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_c3a_gradient_of_the_input_is_that_of_the_merged_weight() -> None:
    mine = ours(nn.Linear(24, 16), veneer.C3AConfig(block_size=4))[1]
    other = theirs(nn.Linear(24, 16), peft.C3AConfig(block_size=4))
    errors = []
    for layer in (mine, other):
        random_(layer)
        x, g = torch.randn(3, 24, requires_grad=True), torch.randn(3, 16)
        (actual,) = torch.autograd.grad(layer(x), [x], g)
        W = layer.get_base_layer().weight + layer.get_delta_weight("default")
        errors.append(float((actual - g @ W).abs().max()))
    assert errors[0] < 1e-5
    assert errors[1] > 1e-3, "peft's gradient is right now: take the line out of docs/departures.md"


@pytest.mark.parametrize("init", [True, False, "gaussian", "kaiming_uniform", "xavier_uniform"])
def test_c3a_starts_as_pefts(init: Any) -> None:
    kwargs = {"block_size": 24, "init_weights": init}
    p = ours(nn.Linear(240, 480), veneer.C3AConfig(**kwargs))[1].c3a_kernel["default"]
    q = theirs(nn.Linear(240, 480), peft.C3AConfig(**kwargs)).c3a_kernel["default"]
    assert float(p.std()) == pytest.approx(float(q.std()), rel=0.05)
    assert init == "gaussian" or float(p.abs().max()) == pytest.approx(float(q.abs().max()), rel=0.02)


# -- FourierFT and WaveFT ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [777, 0, 3])
@pytest.mark.parametrize("name", ["FourierFT", "WaveFT"])
def test_places_are_pefts(name: str, seed: int) -> None:
    kwargs = {"n_frequency": 150, "random_loc_seed": seed}
    mine = ours(nn.Linear(24, 16), getattr(veneer, f"{name}Config")(**kwargs))[1]
    other = theirs(nn.Linear(24, 16), getattr(peft, f"{name}Config")(**kwargs))
    expected = other.indices if name == "FourierFT" else other.waveft_indices
    assert torch.equal(getattr(mine, f"{name.lower()}_indices")["default"], expected["default"])


@pytest.mark.parametrize(("out", "inp"), [(60, 80), (61, 81), (80, 61)])
def test_few_and_many_frequencies_are_the_transform(out: int, inp: int) -> None:
    for n, few in ((4, True), (3000, False)):
        t, layer = ours(nn.Linear(inp, out), veneer.FourierFTConfig(n_frequency=n))
        p = layer.view("default")
        assert p.method.dense(p) is not few
        F = torch.zeros(out, inp)
        F[tuple(p.fourierft_indices)] = p.fourierft_spectrum.detach()
        expected = torch.fft.ifft2(F).real * 150
        assert torch.allclose(p.method.delta(p), expected, atol=1e-5)
        x = torch.randn(3, inp)
        assert torch.allclose(t(x), layer.base_layer(x) + x @ expected.T, atol=1e-4)


@pytest.mark.parametrize("family", ["db1", "db2", "db3", "db7", "db10", "sym2", "sym5", "sym8", "coif1", "coif2"])
def test_wavelets_are_pefts(family: str) -> None:
    for out, inp in ((16, 24), (13, 9)):
        kwargs = {"n_frequency": 100, "wavelet_family": family, "scaling": 3.0}
        mine = ours(nn.Linear(inp, out), veneer.WaveFTConfig(**kwargs))[1]
        other = theirs(nn.Linear(inp, out), peft.WaveFTConfig(**kwargs))
        random_(mine), random_(other)
        assert torch.allclose(mine.get_delta_weight("default"), other.get_delta_weight("default"), atol=1e-5)


def test_every_filter_is_orthonormal() -> None:
    """What defines them: unit energy, orthogonal to their even shifts, and a sum of sqrt 2."""
    for family, taps in waveft.wavelets().items():
        f = torch.tensor(taps, dtype=torch.float64)
        assert float(f.sum()) == pytest.approx(2**0.5, abs=1e-8), family
        for shift in range(0, len(f), 2):
            product = float((f[shift:] * f[: len(f) - shift]).sum())
            assert product == pytest.approx(float(shift == 0), abs=1e-7), family


@pytest.mark.parametrize("family", ["db1", "db2", "sym4"])
def test_direct_patches_are_the_dense_transform(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for out, inp in ((40, 50), (41, 37)):
        deltas = []
        for direct in (True, False):
            monkeypatch.setattr(waveft.WaveFT, "direct", lambda *a, direct=direct: direct)
            _, layer = ours(nn.Linear(inp, out), veneer.WaveFTConfig(n_frequency=500, wavelet_family=family))
            random_(layer)
            assert ("waveft_reach" in layer._modules) is direct
            deltas.append(layer.get_delta_weight("default"))
        assert torch.allclose(*deltas, atol=1e-5)


def test_proportional_parameters() -> None:
    sizes = [(24, 16), (48, 16), (7, 5), (5, 30), (64, 64), (33, 21)]
    for n in (10, 25, 34):
        shapes = []
        for package in (peft, veneer):
            cfg = package.WaveFTConfig(
                target_modules=[str(i) for i in range(6)], n_frequency=n, proportional_parameters=True
            )
            model = package.get_peft_model(nn.Sequential(*(nn.Linear(i, o) for i, o in sizes)), cfg)
            shapes.append(trained_shapes(model, package))
        assert shapes[1] == shapes[0]


# -- SHiRA ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [0, 5, 123456])
def test_shira_mask_is_pefts(seed: int) -> None:
    kwargs = {"r": 2, "random_seed": seed}
    mine, other = (
        ours(nn.Linear(24, 16), veneer.ShiraConfig(**kwargs))[1],
        theirs(nn.Linear(24, 16), peft.ShiraConfig(**kwargs)),
    )
    a, b = mine.shira_indices["default"], other.shira_indices["default"]
    assert a.dtype == b.dtype
    assert torch.equal(a, b)


def test_a_mask_function_of_two_parameters_gets_no_seed() -> None:
    """As peft's own example of a mask is written."""

    def rows(base_layer: nn.Module, r: int) -> Tensor:
        mask = torch.zeros_like(base_layer.weight)  # type: ignore[arg-type]
        mask.view(-1)[: r * 40] = 1
        return mask

    found = []
    for package, wrap in ((veneer, ours), (peft, theirs)):
        cfg = package.ShiraConfig(r=2, mask_type="rows")
        cfg.mask_fn = rows
        made = wrap(nn.Linear(24, 16), cfg)
        found.append((made[1] if package is veneer else made).shira_indices["default"])
    assert torch.equal(*found)


def test_shira_takes_a_mask_function() -> None:
    def corner(base_layer: nn.Module, r: int, **kwargs: Any) -> Tensor:
        mask = torch.zeros_like(base_layer.weight)  # type: ignore[arg-type]
        mask.view(-1)[: r * 40] = 1
        return mask

    cfg = veneer.ShiraConfig(r=2, mask_type="corner")  # type: ignore[arg-type]
    cfg.mask_fn = corner
    _, layer = ours(nn.Linear(24, 16), cfg)
    random_(layer)
    assert int(layer.get_delta_weight("default").count_nonzero()) == 80
    assert int(layer.get_delta_weight("default")[4:].count_nonzero()) == 0
    cfg = veneer.ShiraConfig(r=1)
    cfg.mask_fn = lambda base_layer, r, **kwargs: torch.ones_like(base_layer.weight)
    with pytest.raises(ValueError, match=r"384 ones; r=1 asks for r \* \(out \+ in\) = 40"):
        ours(nn.Linear(24, 16), cfg)


# -- the weight's own product ---------------------------------------------------------------------------------------
SUMS = [
    veneer.C3AConfig(block_size=4),
    veneer.FourierFTConfig(n_frequency=50),
    veneer.WaveFTConfig(n_frequency=50),
    veneer.ShiraConfig(r=2),
]


@pytest.mark.parametrize("cfg", SUMS, ids=lambda c: c.peft_type)
def test_one_product_is_base_and_side(cfg: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    t, layer = ours(nn.Linear(24, 16), cfg)
    random_(layer)
    x = torch.randn(5, 8, 24)
    with torch.no_grad():  # FourierFT's training has a path of its own
        once = t(x)
        monkeypatch.setattr(Base, "exact_for", lambda self, x: False)
        assert torch.allclose(t(x), once, atol=1e-4)
        assert not torch.equal(t(x), once), "the same path ran twice"


@pytest.mark.parametrize("cfg", SUMS, ids=lambda c: c.peft_type)
def test_a_small_change_is_not_lost_in_bfloat16(cfg: Any) -> None:
    """Added to a large weight it would be rounded away; beside it, it acts."""
    base = nn.Linear(24, 16, bias=False)
    base.weight.data.fill_(1.0)
    t, layer = ours(base.bfloat16(), cfg)
    random_(layer, size=1e-3)
    for p in layer.parameters_of("default"):
        p.data.mul_(1e-3 / float(layer.delta("default").abs().max()))
    delta = layer.delta("default")
    x = torch.cat([torch.ones(1, 12), -torch.ones(1, 12)], 1).bfloat16()  # the base gives zero
    assert torch.equal(layer.base_layer(x).float(), torch.zeros(1, 16))
    assert torch.allclose(t(x).float(), x.float() @ delta.T, atol=1e-4)
    assert float(t(x).abs().max()) > 0


# -- BEFT and MiSS --------------------------------------------------------------------------------------------------
def test_beft_merges_where_there_is_no_bias() -> None:
    t, layer = ours(nn.Linear(24, 16, bias=False), veneer.BeftConfig(init_weights=False))
    x = torch.randn(3, 24)
    y = t(x)
    assert torch.allclose(y - layer.base_layer(x), layer.beft_bias["default"].expand(3, -1), atol=1e-5)
    t.merge_adapter()
    assert torch.allclose(t(x), y, atol=1e-5)
    t.unmerge_adapter()
    assert layer.base_layer.bias is None


def test_miss_variants_stand_side_by_side() -> None:
    model = veneer.get_peft_model(nn.Sequential(nn.Linear(24, 16)), veneer.MissConfig(target_modules=["0"], r=4))
    model.add_adapter("bat", veneer.MissConfig(target_modules=["0"], r=4, init_weights="bat"))
    model.add_adapter("mini", veneer.MissConfig(target_modules=["0"], r=4, mini_r=2, init_weights="mini"))
    layer = model.base_model.model[0]
    random_(layer)
    x, outputs = torch.randn(3, 24), []
    for name in ("default", "bat", "mini"):
        model.set_adapter(name)
        outputs.append(model(x))
        model.merge_adapter()
        assert torch.allclose(model(x), outputs[-1], atol=1e-5)
        model.unmerge_adapter()
    assert len({round(float(y.sum()), 3) for y in outputs}) == 3


def test_miss_dropout_acts_in_bat() -> None:
    t, layer = ours(nn.Linear(24, 16), veneer.MissConfig(r=4, init_weights="bat", miss_dropout=0.5))
    random_(layer)
    x = torch.randn(3, 24)
    y = t(x)
    t.train()
    assert not torch.equal(t(x), t(x))
    assert torch.allclose(torch.stack([t(x) for _ in range(1000)]).mean(0), y, atol=0.4)


@pytest.mark.parametrize(("name", "kwargs"), [("Beft", {}), ("FourierFT", {"n_frequency": 8}), ("Shira", {"r": 2})])
def test_default_targets_are_pefts(name: str, kwargs: dict[str, Any]) -> None:
    from transformers import BertConfig, BertModel

    sizes = BertConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    shapes = [
        trained_shapes(p.get_peft_model(BertModel(sizes), getattr(p, f"{name}Config")(**kwargs)), p)
        for p in (peft, veneer)
    ]
    assert shapes[1] == shapes[0]
