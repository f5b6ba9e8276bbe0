"""The methods' own autograd nodes equal their plain references: values, gradients, gradients of gradients, and the
layers take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import veneer
from veneer import (
    circulant_kernels,
    fourier_kernels,
    frod_kernels,
    hadamard_kernels,
    kernels,
    oft_kernels,
    osf_kernels,
    scaled_kernels,
)
from veneer.kernels import mask_like
from veneer.methods import c3a, dora, fourierft, frod, oft, osf, randlora, tinylora, vera
from veneer.methods.boft import rotate_blocks
from veneer.sparse_kernels import Pattern, pattern_of

AT = torch.tensor([[3, 0, 2, 4, 1], [1, 2, 0, 3, 4]])  # in no order


def normal(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def arguments(name: str, bias: bool) -> list[Any]:
    torch.manual_seed(0)
    x, W, b = normal(2, 3, 5), normal(4, 5), normal(4) if bias else None
    if name.startswith("vector_low_rank"):
        rate = 0.3 if name.endswith("dropout") else 0.0
        keep = mask_like(x, rate) if rate else None
        return [x, W, b, normal(2, 5, grad=False), normal(4, 2, grad=False), normal(2), normal(4), 1.7, keep, rate]
    if name == "rescaled_low_rank":
        return [x, W, b, normal(2, 5), normal(4, 2), normal(4), 1.7]
    if name == "modulated":
        parts = [normal(4, 2), normal(2, 5)] if bias else [None, None]
        return [W, normal(4, 5, grad=False), normal(4, 3), normal(3, 5), *parts, 1.7]
    if name == "hadamard":
        return [W, normal(4, 2), normal(2, 5), normal(4, 3), normal(3, 5), 1.7]
    if name == "circulant":
        n = 3 if bias else 2
        return [normal(2, 3, 2 * n), normal(3 * n, 2 * n), normal(3 * n) if bias else None, normal(3, 2, n)]
    if name == "low_rank_onto":
        return [x, W.detach(), b, normal(2, 3, 2), normal(4, 2), 1.7]
    if name == "scaled_bases":
        return [normal(3, 2), normal(3, 1, 5, grad=False), normal(2, 5)]
    frozen = [normal(4, 5, grad=False), normal(5, 5, grad=False)]
    if name == "factored":
        return [x, *frozen, normal(5), normal(5), b, Pattern(AT, 5, 5)]
    return [*frozen, normal(5), normal(5), Pattern(AT, 5, 5)]


NODES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "vector_low_rank": (scaled_kernels.vector_low_rank, scaled_kernels.vector_low_rank_reference),
    "vector_low_rank dropout": (scaled_kernels.vector_low_rank, scaled_kernels.vector_low_rank_reference),
    "rescaled_low_rank": (scaled_kernels.rescaled_low_rank, scaled_kernels.rescaled_low_rank_reference),
    "factored": (frod_kernels.factored, frod_kernels.factored_reference),
    "composed": (frod_kernels.composed, frod_kernels.composed_reference),
    "modulated": (hadamard_kernels.modulated, hadamard_kernels.modulated_reference),
    "hadamard": (hadamard_kernels.hadamard, hadamard_kernels.hadamard_reference),
    "circulant": (circulant_kernels.circulant_linear, circulant_kernels.circulant_reference),
    "low_rank_onto": (
        kernels.low_rank_onto,
        lambda x, W, b, h, B, s: nn.functional.linear(x, W, b) + nn.functional.linear(h, B) * s,
    ),
    "scaled_bases": (randlora.scaled_bases, randlora.scaled_bases_reference),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NODES)
def test_node_equals_reference(name: str, bias: bool) -> None:
    node, reference = NODES[name]
    args = arguments(name, bias)
    wanted, got = reference(*args), node(*args)
    torch.testing.assert_close(got, wanted)
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    g = torch.randn_like(wanted)
    for mine, theirs in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert gradcheck(lambda *_: node(*args), leaves)
    assert gradgradcheck(lambda *_: node(*args), leaves)


@pytest.mark.parametrize("bias", [False, True])
def test_singular(bias: bool) -> None:
    """The projected gradient is no derivative, so the reference's is the measure."""
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (4, 5))
    fixed = [U[:, :2], torch.rand(2, dtype=torch.float64), V[:2]]
    args = [normal(2, 3, 5), *fixed, normal(4, 2), normal(2), normal(2, 5), normal(4) if bias else None]
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    wanted, got = osf_kernels.singular_reference(*args), osf_kernels.singular(*args)
    torch.testing.assert_close(got, wanted)
    g = torch.randn_like(wanted)
    firsts = [torch.autograd.grad(y, leaves, g, create_graph=True) for y in (got, wanted)]
    for mine, theirs in zip(*firsts, strict=True):
        torch.testing.assert_close(mine, theirs)
    plain = torch.autograd.grad(osf_kernels.singular(*args), leaves, g)
    for mine, theirs in zip(plain, firsts[1], strict=True):
        torch.testing.assert_close(mine, theirs)
    seconds = [torch.autograd.grad(sum(t.square().sum() for t in f), leaves, allow_unused=True) for f in firsts]
    for mine, theirs in zip(*seconds, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("out", [1, 4, 5])
@pytest.mark.parametrize("inp", [1, 2, 6, 7])
def test_waves(out: int, inp: int) -> None:
    torch.manual_seed(0)
    full = torch.randn(out, inp, dtype=torch.float64)
    torch.testing.assert_close(fourierft.cosines(full), torch.fft.fft2(full).real)
    n = min(3, out * inp)
    u, v = fourierft.places(out, inp, n, 7)
    s = normal(n)
    assert gradcheck(lambda t: fourierft.Waves.apply(t, u, v, out, inp), (s,))
    assert gradgradcheck(lambda t: fourierft.Waves.apply(t, u, v, out, inp), (s,))


@pytest.mark.parametrize("out", [1, 4, 5])
@pytest.mark.parametrize("inp", [1, 2, 6, 7])
def test_spectral(out: int, inp: int) -> None:
    """Every place of the spectrum, those that are their own mirror images, too."""
    torch.manual_seed(0)
    at, memory, x = fourierft.places(out, inp, out * inp, 7), {}, normal(2, 3, inp)
    s = normal(out * inp)
    halves = fourier_kernels.halves_of(memory, at, out, inp, s.dtype)
    assert fourier_kernels.halves_of(memory, at, out, inp, s.dtype) is halves
    change = fourierft.cosines(torch.zeros(out, inp, dtype=s.dtype).index_put((at[0], at[1]), s))
    for node in (fourier_kernels.spectral, fourier_kernels.spectral_reference):
        torch.testing.assert_close(node(x, s, halves), x @ change.mT)
    assert gradcheck(lambda *a: fourier_kernels.spectral(*a, halves), (x, s))
    assert gradgradcheck(lambda *a: fourier_kernels.spectral(*a, halves), (x, s))


@pytest.mark.parametrize("size", [2, 4, 5])
def test_rotated(size: int) -> None:
    torch.manual_seed(0)
    x, w = normal(2, 3, 3 * size), normal(3, size * (size - 1) // 2)
    wanted = rotate_blocks(x, oft.cayley_neumann(oft.skew(w, size), 5))
    for node in (oft_kernels.rotated, oft_kernels.rotated_reference):
        torch.testing.assert_close(node(x, w, size), wanted)
    assert gradcheck(lambda *a: oft_kernels.rotated(*a, size), (x, w))
    assert gradgradcheck(lambda *a: oft_kernels.rotated(*a, size), (x, w))


def test_a_pattern_is_found_once_until_its_places_change() -> None:
    memory: dict[str, Any] = {}
    at = AT.clone()
    first = pattern_of(memory, at, 5, 5)
    assert pattern_of(memory, at, 5, 5) is first
    at.copy_(AT.flip(1))
    assert pattern_of(memory, at, 5, 5) is not first


TAKEN: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "VeRA": (vera, "vector_low_rank", "VeraConfig", {"r": 2, "init_weights": False}),
    "DoRA": (dora, "rescaled_low_rank", "LoraConfig", {"r": 2, "use_dora": True, "init_lora_weights": False}),
    "FRoD": (frod, "factored", "FrodConfig", {"sparse_rate": 0.1, "init_weights": False, "progressbar": False}),
    "OSF": (osf, "singular", "OSFConfig", {"effective_rank": 2, "init_weights": False}),
    "OFT": (oft, "rotated", "OFTConfig", {"oft_block_size": 3, "init_weights": False}),
    "FourierFT": (fourierft, "spectral", "FourierFTConfig", {"n_frequency": 9}),
    "C3A": (c3a, "circulant_linear", "C3AConfig", {"block_size": 6}),
    "TinyLoRA": (tinylora, "low_rank_onto", "TinyLoraConfig", {"u": 3, "init_weights": False}),
}
WEIGHTS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "LoHa": (hadamard_kernels._Hadamard, "LoHaConfig", {"r": 2, "init_weights": False}),
    "HiRA": (hadamard_kernels._Modulated, "HiraConfig", {"r": 2, "init_weights": False}),
    "GLoRA": (hadamard_kernels._Modulated, "GloraConfig", {"r": 2, "init_weights": False}),
    "RandLoRA": (randlora._ScaledBases, "RandLoraConfig", {"r": 2, "init_weights": False}),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_matrix_of_a_weights_making_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the new weight itself nothing of its size is saved, and the output is that of the merged weight."""
    node, config, settings = WEIGHTS[name]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96)).double()
    model: Any = veneer.get_peft_model(net, getattr(veneer, config)(target_modules=["0"], **settings))
    calls, real, own = [], node.apply, {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    monkeypatch.setattr(node, "apply", lambda *a: (calls.append(1), real(*a))[1])
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            saved[t.untyped_storage().data_ptr()] = t.numel()
        return t

    x = torch.randn(3, 64, dtype=torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    assert calls == [1]
    assert sum(n >= 64 * 64 for n in saved.values()) <= 1
    torch.testing.assert_close(y, nn.functional.linear(x, *model.base_model.model[0].effective()))


@pytest.mark.parametrize("how", ["plain", "func", "autocast", "hook"])
@pytest.mark.parametrize("name", TAKEN)
def test_layers_take_the_node_where_it_applies(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, node, config, settings = TAKEN[name]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12))
    model: Any = veneer.get_peft_model(net, getattr(veneer, config)(target_modules=["0"], **settings))
    layer, calls, real = model.base_model.model[0], [], getattr(module, node)
    monkeypatch.setattr(module, node, lambda *a: (calls.append(1), real(*a))[1])
    monkeypatch.setattr(c3a, "LONG_RUNS", 6)
    x = torch.randn(3, 6)
    wanted = nn.functional.linear(x, *layer.effective())
    if how == "plain":
        torch.testing.assert_close(model(x), wanted)
        assert calls == [1]
        return
    if how == "func":
        torch.testing.assert_close(torch.vmap(model)(x), wanted)
    elif how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x).float(), wanted, rtol=0.1, atol=0.1)
    else:
        layer.base_layer.register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model(x), wanted)
    beside = name in ("FRoD", "OSF", "OFT", "FourierFT")  # their nodes do not hold the product with the base's weight
    assert calls == [] or (beside and how == "hook")


@pytest.mark.parametrize("picked", [[0, 3, 4], []])
def test_a_change_at_some_rows_has_autograds_own_gradients(picked: list[int]) -> None:
    from veneer.row_kernels import add_rows, linear_and_rows

    torch.manual_seed(0)
    x, W, b = torch.randn(2, 3, 4).double(), torch.randn(5, 4).double(), torch.randn(5).double().requires_grad_()
    C, at = torch.randn(5, 4).double().requires_grad_(), torch.tensor(picked, dtype=torch.long)
    x.requires_grad_()

    def fast(x: torch.Tensor, b: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        y, rows = linear_and_rows(x, W, b, at)
        return add_rows(y, torch.tanh(rows @ C.mT), at).sin()

    def plain(x: torch.Tensor, b: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
        change = torch.tanh(x.flatten(0, 1)[at] @ C.mT)
        return ((x @ W.mT + b).flatten(0, 1).index_add(0, at, change)).view(2, 3, 5).sin()

    torch.testing.assert_close(fast(x, b, C), plain(x, b, C))
    assert gradcheck(fast, (x, b, C))
    assert gradgradcheck(fast, (x, b, C))
    for got, want in zip(
        torch.autograd.grad(fast(x, b, C).sum(), (x, b, C)),
        torch.autograd.grad(plain(x, b, C).sum(), (x, b, C)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_a_change_at_some_rows_keeps_no_input() -> None:
    from veneer.row_kernels import add_rows, linear_and_rows

    x, W = torch.randn(1000, 64, requires_grad=True), torch.randn(32, 64)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        y, rows = linear_and_rows(x, W, None, torch.tensor([7, 8]))
        add_rows(y, rows @ W.mT, torch.tensor([7, 8]))
    assert 0 < sum(kept) < x.nbytes / 4
