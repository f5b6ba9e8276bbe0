"""The base's own element-wise work, done in fewer passes: RMS norms, rotary embeddings, gated activations.

    with base_kernels(model):          # or base_kernels(model).on() for good
        ...                            # the same numbers to rounding, gradients too

transformers writes these as a dozen small operations each, and autograd keeps what every one of them needs. Here
each is one autograd node that keeps its inputs alone, and its output is made again for backward (remade.py) where an
adapter behind it would keep that. Only forwards are replaced, on this model's own modules;
weights, names and state dicts stay. A module is taken only if the replacement gives its own numbers on a random
input, so a norm that adds one to its weight, say, is left as it is.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from .kernels import plain_autograd
from .remade import keep_sources, remember

__all__ = ["BaseKernels", "base_kernels", "gated_silu", "rms_norm", "rotary"]


def _scaled(x: Tensor, w: Tensor, rstd: Tensor) -> Tensor:
    y = x * rstd
    return y.mul_(w) if y.dtype == x.dtype == w.dtype else w * y.to(x.dtype)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        work = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=work)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, w, rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.eps = eps
        return _scaled(x, w, rstd), rstd

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, rstd = ctx.saved_tensors
        graph = torch.is_grad_enabled()
        if graph:  # of the gradient: rstd must follow from x
            rstd = (x.to(rstd.dtype).square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        gw = (g * w).to(rstd.dtype)
        x = x.to(rstd.dtype)
        gx = dw = None
        if ctx.needs_input_grad[1]:
            dw = (g * (x * rstd)).reshape(-1, x.shape[-1]).sum(0).to(w.dtype)
        if ctx.needs_input_grad[0]:
            c = torch.linalg.vecdot(gw, x).unsqueeze(-1) * rstd.pow(3) / x.shape[-1]
            gx = torch.addcmul(gw * rstd, x, c, value=-1) if graph else gw.mul_(rstd).addcmul_(x, c, value=-1)
            gx = gx.to(g.dtype)
        return gx, dw, None


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """w * x / sqrt(mean(x^2) + eps) over the last axis, the mean in float32 at least."""
    y, rstd = _RMSNorm.apply(x, w, eps)  # type: ignore[misc]
    return remember(y, _scaled, x, w, rstd)


class _Rotary(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        half = g.shape[-1] // 2
        gx = g * cos
        gx[..., :half].addcmul_(g[..., half:], sin[..., half:])
        gx[..., half:].addcmul_(g[..., :half], sin[..., :half], value=-1)
        return gx, None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-x2, x1) sin, x = (x1, x2) halves of the last axis. cos, sin broadcast against x, no gradient."""
    return _Rotary.apply(x, cos, sin)  # type: ignore[no-any-return]


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


class _GatedSilu(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradient is wanted
            s = torch.sigmoid(gate)
            return g * up * s * (1 + gate * (1 - s)), gate * s * g
        ggate = g * up
        torch.ops.aten.silu_backward.grad_input(ggate, gate, grad_input=ggate)
        return ggate, F.silu(gate).mul_(g)


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up"""
    y: Tensor = _GatedSilu.apply(gate, up)  # type: ignore[assignment]
    return remember(keep_sources(y, gate, up), _gated, gate, up)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def _norm_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """A replacement for an RMS norm's forward, or None where the module is something else."""
    weight: Any = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if "RMSNorm" not in type(module).__name__ or weight is None or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if set(module._parameters) - {"weight"} or module._modules or weight.is_meta:
        return None
    original = module.forward

    def forward(hidden_states: Tensor) -> Tensor:
        if not plain_autograd(hidden_states):
            return original(hidden_states)
        return rms_norm(hidden_states, module.weight, eps)  # type: ignore[arg-type]

    x = _probe(3, len(weight), weight)
    with torch.no_grad():
        return forward if _same(forward(x), original(x)) else None


def _kept_as_call(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), marked as made by that call, which draws the same numbers again."""
    if not any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in layer.modules()):
        return remember(layer(x), layer, x)
    states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if x.is_cuda else []

    def again(x: Tensor) -> Tensor:
        with torch.random.fork_rng(enabled=True, devices=range(len(states[1]))):
            torch.set_rng_state(states[0])
            torch.cuda.set_rng_state_all(states[1])
            y: Tensor = layer(x)
            return y

    return remember(layer(x), again, x)


def _gate_forward(module: nn.Module, recompute: bool = False) -> Callable[..., Tensor] | None:
    """A replacement for down(silu(gate(x)) * up(x)), or None where the module is something else. `recompute`: gate(x)
    and up(x) are not kept."""
    if not {"gate_proj", "up_proj", "down_proj"} <= set(module._modules):
        return None
    act = getattr(module, "act_fn", None)
    if not isinstance(act, nn.SiLU) and type(act).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    original, m = module.forward, cast(Any, module)
    if list(inspect.signature(original).parameters) not in (["x"], ["hidden_state"], ["hidden_states"]):
        return None

    def forward(x: Tensor) -> Tensor:
        if not plain_autograd(x):
            return original(x)
        call = _kept_as_call if recompute and torch.is_grad_enabled() else nn.Module.__call__
        gate, up = call(m.gate_proj, x), call(m.up_proj, x)
        return m.down_proj(gated_silu(gate, up))

    weight = getattr(m.gate_proj, "weight", None)  # an HQQ layer's has another name
    if weight is None or weight.is_meta or not weight.is_floating_point():
        return None
    x = _probe(2, weight.shape[1], weight)
    training = module.training
    try:  # dropout off, so that both see the same
        module.eval()
        with torch.no_grad():
            return forward if _same(forward(x), original(x)) else None
    finally:
        module.train(training)


def _probe(rows: int, width: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, rows, width, generator=generator).to(like.device, like.dtype)


_ROTARY = ["q", "k", "cos", "sin", "unsqueeze_dim"]


def _rotary_function(original: Callable[..., Any]) -> Callable[..., Any] | None:
    """A replacement for a modeling file's apply_rotary_pos_emb, or None where it does something else."""
    if list(inspect.signature(original).parameters) != _ROTARY:
        return None

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        whole = q.shape[-1] == cos.shape[-1] == k.shape[-1] and q.dtype == cos.dtype
        if not whole or cos.requires_grad or not plain_autograd(q):
            return original(q, k, cos, sin, unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return rotary(q, cos, sin), rotary(k, cos, sin)

    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 3, 8, generator=g), torch.randn(2, 2, 3, 8, generator=g)
    cos, sin = torch.randn(2, 3, 8, generator=g), torch.randn(2, 3, 8, generator=g)
    theirs, mine = original(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin)
    return apply_rotary_pos_emb if all(map(_same, mine, theirs)) else None


class BaseKernels:
    """What `base_kernels` found in a model; on() and off() switch it, `with` does both."""

    def __init__(self, model: nn.Module, mlp_checkpointing: bool = False):
        self.gates = 0
        self.forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        self.functions: list[tuple[ModuleType, Callable[..., Any], Callable[..., Any]]] = []
        files: dict[str, ModuleType] = {}
        for module in model.modules():
            if "forward" in module.__dict__:  # somebody else's already
                continue
            gate = _gate_forward(module, mlp_checkpointing)
            found = gate or _norm_forward(module)
            if found is not None:
                self.forwards.append((module, found))
                self.gates += gate is not None
            name = type(module).__module__
            if name.startswith("transformers.models."):
                files[name] = sys.modules[name]
        for file in files.values():
            theirs: Callable[..., Any] | None = getattr(file, "apply_rotary_pos_emb", None)
            mine = None if theirs is None else _rotary_function(theirs)
            if theirs is not None and mine is not None:
                self.functions.append((file, theirs, mine))

    def on(self) -> BaseKernels:
        for module, forward in self.forwards:
            module.__dict__["forward"] = forward
        for file, _, mine in self.functions:
            file.apply_rotary_pos_emb = mine  # type: ignore[attr-defined]
        return self

    def off(self) -> None:
        for module, forward in self.forwards:
            if module.__dict__.get("forward") is forward:
                del module.__dict__["forward"]
        for file, theirs, _ in self.functions:
            file.apply_rotary_pos_emb = theirs  # type: ignore[attr-defined]

    def __enter__(self) -> BaseKernels:
        return self.on()

    def __exit__(self, *_: Any) -> None:
        self.off()

    def __repr__(self) -> str:
        return f"BaseKernels({len(self.forwards)} modules, {len(self.functions)} rotary functions)"


def base_kernels(model: nn.Module, mlp_checkpointing: bool = False) -> BaseKernels:
    """Find what can be replaced in `model`; nothing changes before `on()` or `with`.

    mlp_checkpointing: of a gated feed-forward part nothing is kept, its gate and up projections are done again for
    backward. About half of the memory that a step keeps, for a sixth of its products more.
    """
    return BaseKernels(model, mlp_checkpointing)
