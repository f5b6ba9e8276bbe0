"""DoRA: the weight's direction by LoRA, its length trained. Liu et al. 2024, arXiv:2402.09353, equations 5 and 11.

    W' = m * V / ||V||,   V = W + s B A;   ||V|| per output (per channel of a convolution), held constant in backward

    lora_A, lora_B           as LoRA's
    lora_magnitude_vector    (out,), (1, out, 1, ...) on a convolution; starts as ||W||

Reached by LoraConfig(use_dora=True). Merges; on a convolution with groups > 1 it does not: A reads every channel, so V
is the weight of a convolution without groups, and its length that one's. With two DoRA adapters active the changes
W' - W are added, in the forward pass as in the merged weight.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import inits
from ..kinds import Reweight, Spec, Weights
from ..scaled_kernels import rescaled_low_rank
from ..site import Site, spread
from ..view import View
from .lora import DENSE, LoraConfig, lora_check, lora_factors, lora_scaling, lora_tensors


def _factors(p: View) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, inp * kernel); B of a layer with groups is zero between groups."""
    B, A = lora_factors(p)
    return spread(B, p.site.groups).flatten(1), A.flatten(1)


def _length(W: Tensor, p: View) -> Tensor:
    """Norm of W + s B A for each output (an embedding's: of each column of its table), (out,), no matrix formed:
    |w + s b A|^2 = |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T."""
    B, A = _factors(p)
    work = torch.promote_types(W.dtype, torch.float32)
    W, B, A = p.site.ungrouped(W).flatten(1).to(work), B.to(work) * p.scaling, A.to(work)
    square = torch.linalg.vector_norm(W, dim=1).square() + (B * (2 * (W @ A.mT) + B @ (A @ A.mT))).sum(1)
    return square.clamp(min=torch.finfo(work).tiny).sqrt()


class DoraCaching:
    """While on, and in eval, each DoRA layer keeps its ratio m / ||V|| from its first call: changes to the adapter's
    tensors are not seen before it ends. A context manager, a decorator, or DoraCaching(True) ... DoraCaching(False).
    """

    on: ClassVar[bool] = False
    kept: ClassVar[weakref.WeakKeyDictionary[Any, dict[str, Tensor]]] = weakref.WeakKeyDictionary()

    def __init__(self, enabled: bool = True):
        self.enabled, self.before = enabled, DoraCaching.on
        self._set(enabled)

    @staticmethod
    def _set(on: bool) -> None:
        DoraCaching.on = on
        DoraCaching.kept.clear()

    def __enter__(self) -> DoraCaching:
        self._set(self.enabled)
        return self

    def __exit__(self, *_: Any) -> None:
        self._set(self.before)

    def __call__(self, f: Callable[..., Any] | None = None, *, enabled: bool | None = None) -> Any:
        if f is None:
            self._set(self.enabled if enabled is None else enabled)
            return self
        self._set(self.before)  # a decorator is on during its function's calls alone

        @functools.wraps(f)
        def within(*args: Any, **kwargs: Any) -> Any:
            with DoraCaching(self.enabled):
                return f(*args, **kwargs)

        return within


class DoRA(Reweight):
    Config = LoraConfig
    sites = DENSE
    prefix = "lora_"
    example: ClassVar[dict[str, Any]] = {"use_dora": True}
    dropout = "lora_dropout"
    exempt: ClassVar[dict[str, str]] = {
        "gradcheck": "the norm counts as a constant in the gradient (section 4.3); "
        "test_dora_gradient_with_the_norm_constant checks that one instead",
        "forward == merged with groups": "A reads every channel and a grouped kernel does not, so merging is refused",
    }

    def check(self, cfg: Any, site: Site) -> None:
        lora_check(cfg, site)

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        shape = (1, site.out, *(1 for _ in site.kernel)) if site.kernel else (site.out,)
        magnitude = Spec(shape, file="lora_magnitude_vector")
        return {**lora_tensors(cfg, site), "lora_magnitude_vector.weight": magnitude}

    def scaling(self, cfg: Any) -> float:
        return lora_scaling(cfg)

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        base = inits.initial(p, cfg, weight)
        W = weight() if base is None else base
        with torch.no_grad():
            p.fill("lora_magnitude_vector", _length(W, p).reshape(p.lora_magnitude_vector.shape))
        return base

    def changes_base(self, cfg: Any) -> bool:
        return inits.changes_base(cfg)

    def ratio(self, p: View, W: Tensor) -> Tensor:
        """m / ||V||, (out,), in float32 at least; the norm counts as a constant."""
        caching = DoraCaching.on and not p.training and isinstance(p, View)  # not a row of a mixed batch
        kept = DoraCaching.kept.setdefault(p.layer, {}) if caching else {}
        found = kept.get(p.name) if caching else None
        if found is None:
            with torch.no_grad():
                length = _length(W, p)
            found = p.lora_magnitude_vector.reshape(-1).to(length.dtype) / length
            if caching:
                kept[p.name] = found = found.detach()
        return found

    def weight(self, p: View, W: Tensor) -> Tensor:
        B, A = _factors(p)
        V = W + (B @ A).reshape(W.shape).to(W.dtype) * p.scaling
        return V * self.ratio(p, W).to(W.dtype).reshape(-1, *[1] * (V.dim() - 1))

    def merged(self, ps: Sequence[View], W: Tensor, b: Tensor | None) -> Weights:
        return super().merged(ps, ps[0].site.ungrouped(W), b)

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        """y = b + base + sum over adapters of (c - 1) base + c s B A x, where base = W x and c is the ratio."""
        W, b, site = base.weight(), base.bias(), ps[0].site
        if len(ps) == 1 and not args and not kwargs and not ps[0].dropping and base.plain(x):
            (B, A), c = lora_factors(ps[0]), self.ratio(ps[0], W)
            return rescaled_low_rank(x, W, b, A, B, c.to(x.dtype), ps[0].scaling)
        y = base(x, *args, **kwargs)
        if b is not None:
            y = y - site.per_feature(b)
        if len(ps) == 1 and (seen := ps[0].drop(x)) is x:
            (B, A), c = lora_factors(ps[0]), self.ratio(ps[0], W)
            new = site.accumulate(y, site.down(x, A), B, ps[0].scaling) * site.per_feature(c).to(y.dtype)
            return new if b is None else new + site.per_feature(b)
        new = y if b is None else y + site.per_feature(b)
        for p in ps:
            (B, A), c = lora_factors(p), site.per_feature(self.ratio(p, W))
            seen = p.drop(x)
            plain = y if seen is x else site.op(seen, W, None)
            side = site.up(site.down(seen, A), B * p.scaling)
            new = new + plain * (c - 1).to(y.dtype) + side.to(y.dtype) * c.to(y.dtype)
        return new
