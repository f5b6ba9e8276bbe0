"""C3A: the change is made of circulant blocks, each the circular convolution with a trained kernel. Chen et al. 2024,
arXiv:2407.19342, section 3.

    y_m = (W x)_m + (1 / inp) sum_n irfft(rfft(x_n) conj(rfft(w_mn)))

    c3a_kernel (out / b, inp / b, b)    b = block_size

x_n and y_m are runs of b features. A plain linear layer transforms activations (circulant_kernels.py); with short
runs, and elsewhere on small layers, the blocks are added to the weight. Merges. Gradients agree with finite differences
(peft's hand-written ones are off). Beyond peft: transformers' Conv1D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..circulant_kernels import circulant_linear
from ..config import AdapterConfig, veneer_field
from ..kinds import Additive, Spec
from ..site import Site
from ..view import View

INITS = (True, False, "gaussian", "kaiming_uniform", "xavier_uniform")
TRANSFORMS_FROM = 512  # features (the harmonic mean of both sizes, halved) from which on transforms are cheaper
LONG_RUNS = 16  # block sizes from which on the node of transforms is cheaper than adding blocks to the weight


@dataclass
class C3AConfig(AdapterConfig):
    """block_size: a common divisor of the layer's sizes; the number of trained numbers is out * inp / block_size.
    block_size_pattern: {layer name or regex: value}. bias: "none", "all" or "c3a_only".

    init_weights: "xavier_uniform" (also False), "kaiming_uniform", "gaussian", or True: zeros, which leave the
    model as it was.
    """

    block_size: int = 256
    bias: str = "none"
    block_size_pattern: dict | None = field(default_factory=dict)
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] | None = "xavier_uniform"
    exclude_modules: list[str] | str | None = veneer_field()

    PATTERNS: ClassVar[tuple[tuple[str, str], ...]] = (("block_size_pattern", "block_size"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "C3A"


class C3A(Additive):
    Config = C3AConfig
    prefix = "c3a_"
    defaults = "c3a"
    example: ClassVar[dict[str, Any]] = {"block_size": 64}
    by_weight = True

    def check(self, cfg: Any, site: Site) -> None:
        b = cfg.block_size
        if b <= 0:
            raise ValueError(f"`block_size` should be a positive integer value but the value passed is {b} ({site!r})")
        for name, size in (("input", site.inp), ("output", site.out)):
            if size % b:
                raise ValueError(
                    f"The block size should be a factor of the {name} size. However, the {name} size is {size} and "
                    f"the block size is {b} ({site!r}); their common divisors divide {math.gcd(site.inp, site.out)}"
                )
        if cfg.init_weights not in INITS:
            raise ValueError(f"Unknown init_weights: {cfg.init_weights!r}; one of {', '.join(map(repr, INITS))}")

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        b = cfg.block_size
        return {"c3a_kernel": Spec((site.out // b, site.inp // b, b), raw=True)}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        value, how = torch.zeros_like(p.c3a_kernel, dtype=torch.float32), cfg.init_weights
        fan_in, fans = p.site.inp, p.site.inp + p.site.out
        bound = {"kaiming_uniform": math.sqrt(1 / fan_in), "xavier_uniform": math.sqrt(6 / fans)}
        if how == "gaussian":
            nn.init.normal_(value)
        elif how is not True:
            nn.init.uniform_(value, -(limit := bound[how or "xavier_uniform"]), limit)
        p.fill("c3a_kernel", value)
        return None

    def dense(self, p: View) -> bool:
        return p.site.out * p.site.inp <= TRANSFORMS_FROM * (p.site.out + p.site.inp)

    def kernel(self, p: View) -> Tensor:
        w = p.c3a_kernel
        return w.to(torch.promote_types(w.dtype, torch.float32)) * (p.scaling / p.site.inp)

    def delta(self, p: View) -> Tensor:
        w = self.kernel(p)
        b = w.shape[-1]
        i = torch.arange(b, device=w.device)
        blocks = w.index_select(-1, ((i - i[:, None]) % b).flatten()).unflatten(-1, (b, b))
        return blocks.transpose(1, 2).reshape(p.site.out, p.site.inp).to(p.dtype or w.dtype)

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        if len(ps) == 1 and not args and not kwargs and ps[0].c3a_kernel.shape[-1] >= LONG_RUNS:
            w = self.kernel(ps[0])
            if w.dtype == x.dtype and base.exact_for(x) and base.plain(x):
                return circulant_linear(x, base.weight(), base.bias(), w)
        return super().forward(ps, x, base, args, kwargs)

    def side(self, p: View, x: Tensor) -> Tensor:
        if self.dense(p) or x.dtype not in (torch.float32, torch.float64):
            return p.site.op(x, self.delta(p), None)
        w = self.kernel(p)
        b = w.shape[-1]
        X, K = torch.fft.rfft(x.unflatten(-1, (-1, b))), torch.fft.rfft(w).conj()
        return torch.fft.irfft(torch.einsum("...nf,mnf->...mf", X, K), n=b).flatten(-2).to(x.dtype)
