"""gradcheck, who gets gradients, what training may touch, recomputation, functional calls."""

from __future__ import annotations

import pytest
import torch
from law_cases import Case
from lawlib import base_state, build, data, distance, every_case, exempt, randomize, same, tensors
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


@every_case()
def test_gradcheck(case: Case) -> None:
    """Gradients to the adapter's tensors and to the input agree with finite differences in double precision."""
    exempt(case, "gradcheck")
    t = randomize(build(case).double())
    x = data(case)
    x = x[:2].double() if x.is_floating_point() else x[:2]
    named = {n: p for n, p in t.named_parameters() if p.requires_grad}
    assert named
    assert all(p.dtype == torch.float64 for p in named.values())
    free = [v.detach().clone().requires_grad_() for v in named.values()]
    inputs = [x.clone().requires_grad_()] if x.is_floating_point() else []

    def f(*args: torch.Tensor) -> torch.Tensor:
        values = dict(zip(named, args, strict=False))
        return functional_call(t, values, (args[-1] if inputs else x,))

    assert torch.autograd.gradcheck(f, (*free, *inputs), fast_mode=True, atol=1e-5, rtol=1e-3)


@every_case()
def test_training_touches_the_active_adapter_only(case: Case) -> None:
    """An optimizer step on all that is trainable changes the active adapter; the base and the other one stay."""
    x = data(case)
    t = randomize(build(case, adapters=2))
    t.set_adapter("a1")
    other = t(x).detach()
    kept = {k: v.detach().clone() for k, v in tensors(t, "a1", train=False)}
    t.set_adapter("a0")
    mine = {k: v.detach().clone() for k, v in tensors(t, "a0")}
    base = base_state(t)
    trained = [p for p in t.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for _, p in tensors(t, "a0")}
    t.train()
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    t(x).square().mean().backward()
    assert {id(p) for p in t.parameters() if p.grad is not None} == {id(p) for p in trained}
    optimizer.step()
    t.eval()
    moved = [k for k, v in tensors(t, "a0") if not torch.equal(v, mine[k])]
    assert moved == list(mine)
    assert same(base_state(t), base)
    assert same(dict(tensors(t, "a1", train=False)), kept)
    t.set_adapter("a1")
    assert torch.equal(t(x), other)


@every_case()
def test_fresh_adapter_learns(case: Case) -> None:
    """From its initial values, a few steps lower a loss: no tensor is stuck at a saddle."""
    x = data(case)
    t = build(case)
    goal = t(x).detach() + 0.1
    optimizer = torch.optim.Adam([p for p in t.parameters() if p.requires_grad], lr=0.004)
    losses = []
    for _ in range(12):
        loss = (t(x) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]


@every_case()
def test_checkpointed_gradients_are_equal(case: Case) -> None:
    t = randomize(build(case))
    x = data(case)
    plain = _gradients(t, t(x))
    again = _gradients(t, checkpoint(t, x, use_reentrant=False))
    assert same(plain, again)


def _gradients(t: torch.nn.Module, y: torch.Tensor) -> dict[str, torch.Tensor]:
    t.zero_grad()
    y.square().sum().backward()
    return {n: p.grad.clone() for n, p in t.named_parameters() if p.grad is not None}


@every_case()
def test_functional_call(case: Case) -> None:
    """Tensors handed in by name are those that act."""
    t, u = randomize(build(case)), randomize(build(case), seed=9)
    x = data(case)
    expected = u(x)
    assert distance(t(x), expected) > 1e-4
    given = {n: p.detach() for n, p in u.named_parameters()}
    assert distance(functional_call(t, given, (x,)), expected) < 1e-5  # plain tensors take the reference paths


@every_case(lambda c: c.kind in ("linear", "conv"))
def test_bf16_activations_are_not_kept_in_float32(case: Case) -> None:
    """Over a bf16 base the adapter is float32, and autograd keeps no float32 copy as large as an activation."""
    exempt(case, "bf16 activations")
    t = randomize(build(case, torch.bfloat16))
    for key, p in tensors(t, "a0"):
        assert p.dtype == torch.float32, key
    x = torch.cat([data(case, torch.bfloat16)] * 40)
    large = min(x.numel(), t(x).numel()) // 2
    assert large > 2 * max(p.numel() for p in t.parameters()), "activations must outgrow what weights need"
    kept: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        if saved.numel() > large:
            kept.append((saved.dtype, tuple(saved.shape)))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = t(x.requires_grad_())
    assert y.dtype == torch.bfloat16
    assert not [k for k in kept if k[0] in (torch.float32, torch.float64)], kept
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in tensors(t, "a0"))


@every_case()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapter_in_the_base_dtype_on_request(case: Case, dtype: torch.dtype) -> None:
    t = build(case, dtype, autocast_adapter_dtype=False)
    assert {p.dtype for _, p in tensors(t, "a0")} == {dtype}
    assert t(data(case, dtype)).dtype == dtype


@every_case()
def test_autocast_is_close(case: Case) -> None:
    t = randomize(build(case))
    x = data(case)
    with torch.autocast("cpu", torch.bfloat16):
        y = t(x)
    assert distance(y.float(), t(x)) < 0.05


@every_case(lambda c: c.method_name == "DORA" and not c.variant)
def test_dora_gradient_with_the_norm_constant(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA's gradient is that of its formula with the norms held (arXiv:2402.09353, section 4.3), and that one agrees
    with finite differences."""
    from veneer.methods import dora

    t = randomize(build(case).double())
    x = data(case)
    x = x.double() if x.is_floating_point() else x
    actual = _gradients(t, t(x))
    measure, lengths = dora._length, {}

    def held(V: torch.Tensor, site: object) -> torch.Tensor:
        return lengths.setdefault(id(site), measure(V, site).detach())

    monkeypatch.setattr(dora, "_length", held)
    assert not [k for k, g in _gradients(t, t(x)).items() if distance(g, actual[k]) > 1e-12]
    named = {n: p for n, p in t.named_parameters() if p.requires_grad}
    free = [v.detach().clone().requires_grad_() for v in named.values()]
    f = lambda *args: functional_call(t, dict(zip(named, args, strict=True)), (x,))
    assert torch.autograd.gradcheck(f, free, fast_mode=True, atol=1e-5, rtol=1e-3)
