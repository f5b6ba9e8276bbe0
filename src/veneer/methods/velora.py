"""VeLoRA: A's gradient from a rank-1 sketch of the input, so that the input itself is not kept. Miles et al. 2024,
arXiv:2405.17991, sections 3.1 and 3.2.

    y = W x + s B A x;   kept for backward: c = X v,  X the token cut into num_groups rows;  dA from scale * c v^T

    lora_A.weight (r, inp)   lora_B.weight (out, r)
    lora_velora_embed (ceil(inp / num_groups),)   v, frozen, of length 1: the mean sub-token of the batch, or random
Merges. In eval, and where nothing is recorded, it is plain LoRA; the gradients of B and x are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import inits
from ..kinds import Spec
from ..site import Site
from ..view import View
from .lora import LoraFactors, lora_tensors


class _Sketched(torch.autograd.Function):
    """x A^T; keeps one number a sub-token of x in place of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, v: Tensor, scale: float) -> Tensor:
        groups = -(-x.shape[-1] // len(v))
        padded = F.pad(x, (0, groups * len(v) - x.shape[-1])) if x.shape[-1] % len(v) else x
        sketch = padded.reshape(-1, groups, len(v)) @ v  # (tokens, groups)
        ctx.save_for_backward(sketch, A, v)
        ctx.scale = scale
        return F.linear(x, A)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        sketch, A, v = ctx.saved_tensors
        g = g.to(A.dtype)
        gx = g @ A if ctx.needs_input_grad[0] else None
        by_group = g.reshape(-1, len(A)).mT @ sketch.to(A.dtype)  # (r, groups)
        gA = (by_group[..., None] * (v * ctx.scale)).flatten(1)[:, : A.shape[1]]
        return gx, gA, None, None


class VeLoRA(LoraFactors):
    sites = frozenset({"linear"})
    example: ClassVar[dict[str, Any]] = {"velora_config": {"num_groups": 8}}

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        size = -(-site.inp // cfg.velora_config.num_groups)
        return {**lora_tensors(cfg, site), "lora_velora_embed": Spec((size,), train=False)}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        v = torch.zeros_like(p.lora_velora_embed)
        if cfg.velora_config.init_type == "random":
            v = F.normalize(torch.randn_like(v), dim=0)
        p.fill("lora_velora_embed", v)
        return inits.initial(p, cfg, weight)

    def read(self, p: View, x: Tensor, A: Tensor) -> Tensor:
        if not p.training or not torch.is_grad_enabled() or not A.requires_grad:
            return p.site.down(x, A)
        return _Sketched.apply(x, A, self.direction(p, x).to(x.dtype), p.cfg.velora_config.scale)

    def direction(self, p: View, x: Tensor) -> Tensor:
        """v for this batch, (ceil(inp / num_groups),); a new one is written into the layer."""
        v, kind = p.lora_velora_embed, p.cfg.velora_config.init_type
        if kind == "random" or (kind == "batch_average_once" and bool(v.any())):
            return v.clone()
        with torch.no_grad():
            token = x.reshape(-1, x.shape[-1]).mean(0, dtype=torch.promote_types(x.dtype, torch.float32))
            token = F.pad(token, (0, -len(token) % len(v)))
            mean = token.reshape(-1, len(v)).mean(0)
            length = mean.norm()
            new = torch.where(length > 0, mean / length.clamp(min=1e-30), len(v) ** -0.5)
        p.fill("lora_velora_embed", new)
        return new
