"""A look inside an adapter: what each layer learned, how two adapters differ, tables, pages and figures of it."""

from __future__ import annotations

from ..layer_matrices import delta_singular_values, effective_rank
from .compare import LayerDifference, compare_adapters
from .frames import to_frame
from .layers import LayerDelta, TensorInfo, inspect_adapter, inspect_tensors

__all__ = [
    "LayerDelta",
    "LayerDifference",
    "TensorInfo",
    "compare_adapters",
    "delta_singular_values",
    "effective_rank",
    "inspect_adapter",
    "inspect_tensors",
    "to_frame",
]
