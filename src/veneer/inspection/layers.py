"""What an adapter learned, layer by layer: size, relative size and effective rank of each delta.

How the singular values are found without forming a low-rank delta: see layer_matrices.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..layer_matrices import effective_rank, matrices, named_layers

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["LayerDelta", "TensorInfo", "inspect_adapter", "inspect_tensors", "split_name"]

NOTHING = 1e-7
"""A change below this share of the base weight is less than float32 keeps when it is added."""


def split_name(name: str) -> tuple[int | None, str]:
    """(block, the rest): ``model.layers.3.self_attn.q_proj`` -> (3, ``self_attn.q_proj``)."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if re.fullmatch(r"\d+", part)]
    tail = parts[numbered[0] + 1 :] if numbered else parts
    return (int(parts[numbered[0]]) if numbered else None), ".".join(tail) or parts[-1]


@dataclass(frozen=True)
class LayerDelta:
    """One adapted layer: ``delta`` has shape (out, in), of rank at most ``r``. Norms are Frobenius norms.

    base_norm is nan where the base is not at hand. a_norm, b_norm: those of the factors, None without any.
    """

    name: str
    shape: tuple[int, int]
    r: int
    delta_norm: float
    base_norm: float
    effective_rank: float
    singular_values: tuple[float, ...]
    a_norm: float | None = None
    b_norm: float | None = None
    scaling: float = 1.0

    @property
    def relative_norm(self) -> float:
        """Norm of the delta over that of the frozen weight; nan where that is not known."""
        if math.isnan(self.base_norm):
            return math.nan
        return self.delta_norm / self.base_norm if self.base_norm > 0 else 0.0

    @property
    def block(self) -> int | None:
        """Index of the block the layer belongs to: the first number among the parts of its name."""
        return split_name(self.name)[0]

    @property
    def module(self) -> str:
        """The layer's name inside its block, such as ``q_proj`` or ``attention.output.dense``."""
        return split_name(self.name)[1]

    @property
    def learned_nothing(self) -> bool:
        """Whether the change is zero, or too small to change the weight."""
        return self.delta_norm == 0 or self.relative_norm < NOTHING

    def error_at(self, rank: int) -> float:
        """||delta - its best approximation of this rank|| / ||delta|| (Eckart and Young 1936); 0 for a zero delta."""
        total = math.fsum(s * s for s in self.singular_values)
        return math.sqrt(math.fsum(s * s for s in self.singular_values[rank:]) / total) if total > 0 else 0.0

    def rank_for(self, error: float) -> int:
        """The smallest rank whose best approximation is within ``error`` (a share of the delta's norm)."""
        return next(
            (k for k in range(len(self.singular_values)) if self.error_at(k) <= error), len(self.singular_values)
        )


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of an adapter's file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: float
    zero: bool


LARGEST_DENSE = 1024  # a delta without factors needs a full SVD, whose cost is cubic in the smaller side


def inspect_adapter(model: nn.Module, adapter: str = "default") -> list[LayerDelta]:
    """Measure the delta of ``adapter`` on every layer of ``model``, in model order.

    Left out: layers whose change depends on the input, and those of methods without low-rank factors whose
    smaller side exceeds ``LARGEST_DENSE``. A model without adapted layers (prompt methods) gives an empty
    list.
    """
    import torch

    if not any(True for _ in named_layers(model)):
        return []
    layers = []
    with torch.no_grad():
        for name, m in matrices(model, adapter).items():
            rows, columns = m.shape[0], math.prod(m.shape[1:])
            if m.A is None and (min(rows, columns) > LARGEST_DENSE or not m.layer.entries[adapter].method.mergeable):
                continue
            values = m.singular_values()
            site = m.layer.site
            known = not site.stored.is_meta
            layers.append(
                LayerDelta(
                    name=name,
                    shape=(rows, columns),
                    r=min(rows, columns) if m.A is None else m.A.shape[0],
                    delta_norm=float(values.square().sum().sqrt()),
                    base_norm=float(torch.linalg.vector_norm(site.weight().detach().float())) if known else math.nan,
                    effective_rank=effective_rank(values),
                    singular_values=tuple(values.tolist()),
                    a_norm=None if m.A is None else _norm(m.A),
                    b_norm=None if m.B is None else _norm(m.B),
                    scaling=m.scaling,
                )
            )
    return layers


def inspect_tensors(tensors: Mapping[str, Tensor]) -> list[TensorInfo]:
    """The tensors of an adapter's file, of any method, in the file's order."""
    return [
        TensorInfo(k, tuple(t.shape), str(t.dtype).removeprefix("torch."), _norm(t), not bool(t.any()))
        for k, t in tensors.items()
    ]


def _norm(t: Tensor) -> float:
    return float(t.detach().double().square().sum().sqrt())
