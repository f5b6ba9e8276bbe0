"""bitsandbytes: Linear4bit (NF4, FP4, with or without double quantisation) and Linear8bitLt (LLM.int8).

Dettmers et al. 2023, arXiv:2305.14314; Dettmers et al. 2022, arXiv:2208.07339.
"""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as F
from torch import Tensor, nn

from ..errors import AdapterError, PeftWarning
from ..site import Site
from .quantised import QuantisedSite


def _reordered(state: Any) -> bool:
    """Whether a call in eval mode has put the codes in another order, as bitsandbytes does on some CPUs."""
    return getattr(state, "packing_format_for_cpu", False)


@cache
def _cpu_reads_back(inp: int, blocksize: int, quant_type: str) -> bool:
    """Whether rows of `inp` numbers come back as they were packed: some versions mix up blocks that cross rows."""
    W = torch.linspace(-1.0, 1.0, 64 * inp).reshape(64, inp)
    got = F.dequantize_4bit(*F.quantize_4bit(W, blocksize=blocksize, quant_type=quant_type))
    return bool((got - W).norm() < 0.2 * W.norm())


class FourBitSite(QuantisedSite):
    library = "bitsandbytes 4-bit"

    def check(self, dropout: float) -> None:
        state = self.state
        if self.device.type == "cpu" and not _cpu_reads_back(self.inp, state.blocksize, state.quant_type):
            warnings.warn(
                f"{self!r}: this version of bitsandbytes reads 4-bit weights of {self.inp} inputs wrongly on CPUs, "
                f"where blocks of {state.blocksize} do not fit a row; the layer is much further from its original than "
                "4 bits need be. Leave it unquantised (llm_int8_skip_modules) or use another way of quantising",
                PeftWarning,
                stacklevel=2,
            )

    @property
    def state(self) -> Any:
        weight: Any = self.module.weight
        state = weight.quant_state if weight.quant_state is not None else getattr(self.module, "quant_state", None)
        if state is None:
            raise AdapterError(
                f"{self!r}: this Linear4bit is not quantised yet; move the model to its device first (`model.to(...)`)"
            )
        return state

    @property
    def dtype(self) -> torch.dtype:
        return self.state.original_dtype if _reordered(self.state) else self.state.dtype

    def weight(self) -> Tensor:
        weight: Any = self.module.weight
        data, state = weight.data, self.state
        if _reordered(state):
            state = copy.copy(state)  # undoing the order writes to it
            scales, state.original_nested = state.absmax.T.reshape(-1).float(), False
            data, state = F._convert_weight_packed_for_cpu_inverse(data, state)
            state.absmax = scales
        return F.dequantize_4bit(data, state)

    def requantise(self, W: Tensor) -> None:
        module: Any = self.module
        old, state = module.weight, self.state
        new = type(old)(
            W.contiguous(),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=state.original_nested if _reordered(state) else state.nested,
            quant_type=state.quant_type,
            quant_storage=old.quant_storage,
            module=module,
        ).to(W.device)
        new.quant_state.dtype = self.dtype
        module.weight, module.quant_state = new, new.quant_state

    def packed(self) -> tuple[Any, Any]:
        return self.module.weight, self.state

    def restore(self, packed: Any) -> None:
        module: Any = self.module
        weight, state = packed
        if weight.device != self.device:
            weight = weight.to(self.device)
            state = weight.quant_state
        module.weight, module.quant_state = weight, state


class _Codes(NamedTuple):
    """Where Linear8bitLt keeps its codes and scales: on the weight before its first call, in its state after."""

    weight: Any
    own: tuple[Any, Any]
    state: tuple[Any, Any]


class EightBitSite(QuantisedSite):
    library = "bitsandbytes 8-bit"

    @property
    def dtype(self) -> torch.dtype:
        """Of the dequantised weight: the layer rounds its input to float16, whatever that comes in."""
        return torch.float32

    def weight(self) -> Tensor:
        module: Any = self.module
        scales = module.weight.SCB if getattr(module.weight, "SCB", None) is not None else module.state.SCB
        codes = module.weight.data
        return codes.float() * (scales.to(codes.device).float() / 127.0).unsqueeze(1)

    def requantise(self, W: Tensor) -> None:
        module: Any = self.module
        device = module.weight.device
        module.weight = type(module.weight)(W.cpu().contiguous(), requires_grad=False, has_fp16_weights=False).to(
            device
        )
        module.state.CB = module.state.SCB = None  # the next call takes both from the weight

    def packed(self) -> _Codes:
        module: Any = self.module
        w = module.weight
        return _Codes(w, (w.CB, w.SCB), (module.state.CB, module.state.SCB))

    def restore(self, packed: Any) -> None:
        module: Any = self.module
        device = self.device
        weight = packed.weight if packed.weight.device == device else packed.weight.to(device)
        weight.CB, weight.SCB = (_at(t, device) for t in packed.own)
        module.state.CB, module.state.SCB = (_at(t, device) for t in packed.state)
        module.weight = weight


def _at(t: Any, device: torch.device) -> Any:
    return None if t is None else t.to(device)


def site_of(module: nn.Module, name: str) -> Site | None:
    if isinstance(module, bnb.nn.Linear4bit):
        return FourBitSite(module, name)
    if isinstance(module, bnb.nn.Linear8bitLt) and module.weight.dtype == torch.int8:
        return EightBitSite(module, name)  # with has_fp16_weights the weight is an ordinary one
    return None
