"""Two adapters of one base, layer by layer: how alike their changes are, and the directions they use.

cosine: <D1, D2> / (||D1|| ||D2||) with the inner product of matrices as vectors.
overlap: ||U1^T U2||^2 / min(k1, k2), Frobenius, over orthonormal bases of the directions in use: 1 where the
smaller space lies in the larger, about k / width for spaces that know nothing of each other (Hu et al. 2021,
arXiv:2106.09685, section 7.2, equation 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import AdapterError
from ..layer_matrices import Matrices, matrices, one_adapter
from .layers import LARGEST_DENSE, split_name

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LayerDifference", "compare_adapters"]

USED = 1e-6
"""Directions with a singular value below this share of the largest count as not in use."""


@dataclass(frozen=True)
class LayerDifference:
    """One layer that both adapters change. norm_a, norm_b: of the two deltas; distance: of their difference, over
    the larger of the two. rank_a, rank_b: directions in use. overlap_out, overlap_in: of the output and input
    spaces. chance_out, chance_in: what random spaces of these sizes have."""

    name: str
    shape: tuple[int, int]
    norm_a: float
    norm_b: float
    cosine: float
    distance: float
    rank_a: int
    rank_b: int
    overlap_out: float
    overlap_in: float
    chance_out: float
    chance_in: float

    @property
    def block(self) -> int | None:
        return split_name(self.name)[0]

    @property
    def module(self) -> str:
        return split_name(self.name)[1]


@dataclass(frozen=True)
class Comparison:
    """layers: those of both, in the first's order. only_a, only_b: names of layers that one of them changes.
    skipped: layers too large for a dense comparison."""

    layers: list[LayerDifference]
    only_a: list[str]
    only_b: list[str]
    skipped: list[str]

    @property
    def cosine(self) -> float:
        """Of all shared layers together, as one long vector; nan without any change."""
        dot = math.fsum(d.cosine * d.norm_a * d.norm_b for d in self.layers if not math.isnan(d.cosine))
        a, b = (math.sqrt(math.fsum(x * x for x in v)) for v in _norms(self.layers))
        return dot / (a * b) if a and b else math.nan


def _norms(layers: list[LayerDifference]) -> tuple[list[float], list[float]]:
    return [d.norm_a for d in layers], [d.norm_b for d in layers]


@torch.no_grad()
def compare_adapters(
    a: nn.Module, b: nn.Module, adapter_a: str | None = None, adapter_b: str | None = None
) -> Comparison:
    """Compare an adapter of model a with one of model b (which may be the same model).

    By default the active adapters. Raises AdapterError where a shared layer differs in shape, or an adapter has
    no delta.
    """
    first, second = (matrices(m, one_adapter(m, n)) for m, n in ((a, adapter_a), (b, adapter_b)))
    shared = [n for n in first if n in second]
    layers, skipped = [], []
    for name in shared:
        x, y = first[name], second[name]
        if x.shape != y.shape:
            raise AdapterError(f"{name}: {tuple(x.shape)} in one adapter, {tuple(y.shape)} in the other: other bases")
        if (x.A is None or y.A is None) and min(x.shape[0], math.prod(x.shape[1:])) > LARGEST_DENSE:
            skipped.append(name)
            continue
        layers.append(_difference(name, x, y))
    only_a, only_b = ([n for n in p if n not in q] for p, q in ((first, second), (second, first)))
    return Comparison(layers, only_a, only_b, skipped)


def _spectrum(m: Matrices) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, Vh) of the delta, float64, the directions in use only."""
    from ..combine_math import decompose

    if m.A is None or m.B is None:
        U, S, Vh = torch.linalg.svd(m.delta().flatten(1).double().cpu(), full_matrices=False)
    else:
        U, S, Vh = decompose(m.B.detach().double().cpu() * m.scaling, m.A.detach().double().cpu())
    used = USED * S.max().clamp(min=torch.finfo(S.dtype).tiny) < S
    return U[:, used], S[used], Vh[used]


def _difference(name: str, x: Matrices, y: Matrices) -> LayerDifference:
    (U1, S1, V1), (U2, S2, V2) = _spectrum(x), _spectrum(y)
    norm_a, norm_b = float(S1.norm()), float(S2.norm())
    left, right = U1.mT @ U2, V1 @ V2.mT
    dot = float((S1[:, None] * left * right * S2).sum())
    k1, k2 = len(S1), len(S2)
    out, inp = x.shape[0], math.prod(x.shape[1:])
    both = norm_a > 0 and norm_b > 0
    apart = math.sqrt(max(norm_a**2 + norm_b**2 - 2 * dot, 0.0))
    small, large = min(k1, k2), max(k1, k2)
    share: Any = lambda M: float(M.square().sum()) / small if small else math.nan
    return LayerDifference(
        name=name,
        shape=(out, inp),
        norm_a=norm_a,
        norm_b=norm_b,
        cosine=max(-1.0, min(1.0, dot / (norm_a * norm_b))) if both else math.nan,
        distance=apart / max(norm_a, norm_b) if norm_a or norm_b else 0.0,
        rank_a=k1,
        rank_b=k2,
        overlap_out=share(left),
        overlap_in=share(right),
        chance_out=large / out if small else math.nan,
        chance_in=large / inp if small else math.nan,
    )
