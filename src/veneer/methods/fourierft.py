"""FourierFT: a few trained frequencies of the change's two-dimensional spectrum. Gao et al. 2024, arXiv:2405.03003,
section 3.

    W' = W + scaling Re(ifft2(F)),   F (out, inp) zero but for fourierft_spectrum at the chosen places

    fourierft_spectrum (n_frequency,)    real

The places are the first of a random permutation with random_loc_seed, so they are not saved. The real part of the
transform is a sum of cosines, the real part of fft2(F) / (out inp), half of which is computed; few frequencies against
the layer's size make a product of cosines and sines of low rank instead. Training never makes the change: it transforms
the activations (fourier_kernels.py). Merges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function

from ..config import AdapterConfig
from ..fourier_kernels import Halves, halves_of, spectral
from ..kinds import Additive, Spec
from ..site import Site
from ..sparse_kernels import sparse_fits
from ..view import View


@dataclass
class FourierFTConfig(AdapterConfig):
    """n_frequency: how many entries of the spectrum are trained. scaling: multiplies the change.

    random_loc_seed: chooses their places. n_frequency_pattern: {layer name or regex: value}. init_weights: True
    starts at zero, which leaves the model as it was; False (the default) draws from a normal distribution.
    bias: "none", "all" or "fourier_only".
    """

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    n_frequency_pattern: dict | None = field(default_factory=dict)
    init_weights: bool = False

    PATTERNS: ClassVar[tuple[tuple[str, str], ...]] = (("n_frequency_pattern", "n_frequency"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "FOURIERFT"
        if self.random_loc_seed is None:
            raise ValueError("random_loc_seed must be a number: the places are not saved and follow from it")


@lru_cache(maxsize=256)
def places(out: int, inp: int, n: int, seed: int) -> Tensor:
    """(2, n): rows and columns of the trained entries."""
    chosen = torch.randperm(out * inp, generator=torch.Generator().manual_seed(seed))[:n]
    return torch.stack([chosen // inp, chosen % inp])


def check_count(cfg: Any, site: Site) -> None:
    n, most = cfg.n_frequency, site.out * site.inp
    if n <= 0:
        raise ValueError(f"`n_frequency` should be a positive integer value but the value passed is {n} ({site!r})")
    if n > most:
        raise ValueError(
            "`n_frequency` should be less than or equal to the product of the input and output dimensions but the "
            f"value passed is {n} and the product is {most} ({site!r})"
        )


def cosines(F: Tensor) -> Tensor:
    """Re fft2(F) of real F (..., out, inp): half of it is computed, the rest are mirror images."""
    inp = F.shape[-1]
    half = torch.fft.rfft2(F).real
    mirrored = half[..., 1 : inp - half.shape[-1] + 1].flip(-1)
    return torch.cat([half, torch.cat([mirrored[..., :1, :], mirrored[..., 1:, :].flip(-2)], -2)], -1)


class Waves(Function):
    """cosines(F) of F (out, inp), zero but for s (n,) at rows u and columns v. The map is its own transpose, so the
    gradient is one transform, too, read at those places: no transform of complex numbers, no second half."""

    generate_vmap_rule = True

    @staticmethod
    def forward(s: Tensor, u: Tensor, v: Tensor, out: int, inp: int) -> Tensor:
        return cosines(s.new_zeros(out * inp).index_add(0, u * inp + v, s).reshape(out, inp))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:3])
        ctx.out, ctx.inp = inputs[3:]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (u, v), out, inp = ctx.saved_tensors, ctx.out, ctx.inp
        own = v < inp // 2 + 1
        found = torch.fft.rfft2(g).real[torch.where(own, u, -u % out), torch.where(own, v, -v % inp)]
        return found, None, None, None, None


class FourierFT(Additive):
    Config = FourierFTConfig
    prefix = "fourierft_"
    defaults = "fourierft"
    by_weight = True

    def check(self, cfg: Any, site: Site) -> None:
        check_count(cfg, site)

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        at = places(site.out, site.inp, cfg.n_frequency, cfg.random_loc_seed)
        return {
            "fourierft_spectrum": Spec((cfg.n_frequency,), raw=True),
            "fourierft_indices": Spec(tuple(at.shape), train=False, save=False, value=at),
        }

    def scaling(self, cfg: Any) -> float:
        return cfg.scaling

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        s = p.fourierft_spectrum
        p.fill("fourierft_spectrum", torch.zeros_like(s) if cfg.init_weights else torch.randn_like(s))
        return None

    def dense(self, p: View) -> bool:
        """False where the cosines and sines of the chosen places make a cheaper product than the dense change."""
        return 6 * p.fourierft_spectrum.shape[-1] * (p.site.out + p.site.inp) > p.site.out * p.site.inp

    def spectrum(self, p: View) -> Tensor:
        s = p.fourierft_spectrum
        return s.to(torch.promote_types(s.dtype, torch.float32)) * p.scaling

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        """(out, 2 n), (2 n, inp), whose product is the change."""
        s = self.spectrum(p) / (p.site.out * p.site.inp)
        rows, columns = p.fourierft_indices

        def waves(size: int, at: Tensor) -> tuple[Tensor, Tensor]:
            i = torch.arange(size, device=s.device)
            angles, turn = i.to(s.dtype) * (2 * math.pi / size), torch.outer(at, i) % size
            return angles.cos()[turn], angles.sin()[turn]

        (co, so), (ci, si) = waves(p.site.out, rows), waves(p.site.inp, columns)
        return torch.cat([co, -so]).mT, torch.cat([ci, si]) * s.repeat(2)[:, None]

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        if not all(self.by_rows(p, x) for p in ps):
            return super().forward(ps, x, base, args, kwargs)
        parts = [(s := self.spectrum(p) / (p.site.out * p.site.inp), self.halves(p, s.dtype)) for p in ps]
        if len(ps) == 1 and not args and not kwargs and base.plain(x):
            return spectral(x, *parts[0], base.weight(), base.bias())
        y = base(x, *args, **kwargs)
        for s, halves in parts:
            y = y + spectral(x, s, halves)
        return y

    def halves(self, p: View, dtype: torch.dtype) -> Halves:
        return halves_of(p.memory, p.fourierft_indices, p.site.out, p.site.inp, dtype)

    def by_rows(self, p: View, x: Tensor) -> bool:
        """Whether to transform activations: always while training, where the change's gradient would be a dense one,
        else for few of them."""
        few = 2 * x.numel() // p.site.inp < p.site.out + p.site.inp
        trains = torch.is_grad_enabled() and p.fourierft_spectrum.requires_grad
        return (few or trains) and self.dense(p) and sparse_fits(x, p.fourierft_spectrum)

    def delta(self, p: View) -> Tensor:
        if not self.dense(p):
            B, A = self.factors(p)
            return (B @ A).to(p.dtype or B.dtype)
        (out, inp), (u, v) = (p.site.out, p.site.inp), p.fourierft_indices
        s = self.spectrum(p) / (out * inp)
        change = Waves.apply(s, u, v, out, inp)
        return change.to(p.dtype or s.dtype)

    def side(self, p: View, x: Tensor) -> Tensor:
        if self.dense(p):
            return p.site.op(x, self.delta(p), None)
        B, A = self.factors(p)
        return p.site.up(p.site.down(x, A.to(x.dtype)), B.to(x.dtype))
