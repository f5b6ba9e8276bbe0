"""torchao: nn.Linear whose weight is one of torchao's quantised tensors. Every one can be adapted; merging needs its
way of quantising to be known here: int8, int4 (IntxWeightOnlyConfig) and float8, weight only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CannotMerge, PeftWarning
from ..site import Site
from .quantised import QuantisedSite


def _granularity(q: Any) -> Any:
    from torchao.quantization import PerGroup, PerRow, PerTensor

    rows, columns = q.block_size
    if rows == q.shape[0] and columns == q.shape[1] and rows > 1:
        return PerTensor()
    return PerRow() if columns == q.shape[1] else PerGroup(columns)


def _int8(q: Any, W: Tensor) -> Tensor:
    return type(q).from_hp(W, granularity=_granularity(q))


def _intx(q: Any, W: Tensor) -> Tensor:
    from torchao.quantization.quant_primitives import MappingType

    mapping = MappingType.SYMMETRIC if not q.zero_point.any() else MappingType.ASYMMETRIC
    return type(q).from_hp(W, q.block_size, q.target_dtype, mapping_type=mapping)


def _float8(q: Any, W: Tensor) -> Tensor:
    return type(q).from_hp(W, float8_dtype=q.qdata.dtype, granularity=_granularity(q))


#: class of the tensor -> its quantisation anew
WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Float8Tensor": _float8,
}


def _rounds_input(q: Any) -> bool:
    return getattr(q, "act_quant_kwargs", None) is not None or getattr(q, "activation_quantization", None) is not None


class TorchaoSite(QuantisedSite):
    library = "torchao"

    def check(self, dropout: float) -> None:
        if _rounds_input(self.stored):
            warnings.warn(
                f"{self!r}: this torchao configuration quantises the input, too, and gives it no gradient: layers "
                "before this one do not learn through it. Train on a weight-only configuration",
                PeftWarning,
                stacklevel=2,
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def weight(self) -> Tensor:
        stored: Any = self.stored
        return stored.dequantize()

    def requantise(self, W: Tensor) -> None:
        stored: Any = self.stored
        kind = type(stored).__name__
        if kind not in WAYS or _rounds_input(stored):
            raise CannotMerge(
                f"{self!r}: quantising a merged weight anew as torchao's {kind}"
                f"{' with quantised inputs' if kind in WAYS else ''} is not known here ({', '.join(WAYS)} are); keep "
                "the adapter unmerged, or merge it into the original weights (`veneer merge --merge-into original`)"
            )
        new = WAYS[kind](stored, W.to(stored.dtype))
        self.module._parameters["weight"] = nn.Parameter(new, requires_grad=False)

    def packed(self) -> Any:
        return self.stored

    def restore(self, packed: Any) -> None:
        moved = packed.device != self.stored.device
        self.module._parameters["weight"] = packed.to(self.stored.device) if moved else packed


def site_of(module: nn.Module, name: str) -> Site | None:
    if not isinstance(module, nn.Linear):
        return None
    weight: Any = module._parameters.get("weight")
    ours = weight is not None and type(weight).__module__.startswith("torchao.") and hasattr(weight, "dequantize")
    return TorchaoSite(module, name) if ours else None
