"""What an adapter learned, layer by layer: size, relative size and effective rank of each delta.

How the singular values are found without forming a low-rank delta: see layer_matrices.py.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .layer_matrices import delta_singular_values, effective_rank, matrices, named_layers

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LayerDelta", "delta_singular_values", "effective_rank", "inspect_adapter"]


@dataclass(frozen=True)
class LayerDelta:
    """One adapted layer: ``delta`` has shape (out, in), of rank at most ``r``."""

    name: str
    shape: tuple[int, int]
    r: int
    delta_norm: float
    base_norm: float
    effective_rank: float
    singular_values: tuple[float, ...]

    @property
    def relative_norm(self) -> float:
        """Frobenius norm of the delta over that of the frozen weight."""
        return self.delta_norm / self.base_norm if self.base_norm > 0 else 0.0

    @property
    def block(self) -> int | None:
        """Index of the block the layer belongs to: the first number among the parts of its name."""
        numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", self.name)
        return int(numbers[0]) if numbers else None

    @property
    def module(self) -> str:
        """The layer's name inside its block, such as ``q_proj`` or ``attention.output.dense``."""
        parts = self.name.split(".")
        numbered = [i for i, part in enumerate(parts) if part.isdigit()]
        tail = parts[numbered[0] + 1 :] if numbered else parts
        return ".".join(tail) or parts[-1]


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
            weight = m.layer.site.weight().detach().float()
            layers.append(
                LayerDelta(
                    name=name,
                    shape=(rows, columns),
                    r=min(rows, columns) if m.A is None else m.A.shape[0],
                    delta_norm=float(values.square().sum().sqrt()),
                    base_norm=float(torch.linalg.vector_norm(weight)),
                    effective_rank=effective_rank(values),
                    singular_values=tuple(values.tolist()),
                )
            )
    return layers
