"""What a model's forward and backward need, found without weights: run on tensors that have shapes only.

Every operation passes through `Tally`, which keeps count of the bytes alive, the arithmetic, and the bytes moved.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["Need", "Tally", "attend_fused", "count"]


@dataclass(frozen=True)
class Need:
    """``peak``: the most bytes alive at once, beside the model itself. ``flops``: of matrix products, 2 for a
    multiplication and an addition. ``moved``: bytes that the other operations read and write.
    """

    peak: float
    flops: float
    moved: float


class Tally(TorchDispatchMode):
    """Counts what the operations inside it make and do. Tensors that are there before it are not counted.

    Code that asks a tensor without data for its value is told no, or 0: a mask, for one, is taken to mask something.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, Any] = {}
        self.bytes = self.peak = self.flops = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return False if args[0].dtype == torch.bool else 0
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        known = {x.untyped_storage()._cdata for x in inputs}
        for x in results:
            if x.untyped_storage()._cdata not in known:  # not a view of something older
                self._made(x)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        elif "scaled_dot_product" in str(func):
            self._attended(func, args)
        elif any(x.untyped_storage()._cdata not in known for x in results) or "_." in str(func):
            self.moved += sum(x.numel() * x.element_size() for x in (*inputs, *results))
        return out

    def _made(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            if self.alive.pop(key, None) is not None:
                self.bytes -= size

        self.alive[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _attended(self, func: Any, args: Any) -> None:
        q, k = (x for x in args[1:3]) if "backward" in str(func) else args[:2]
        once = 2 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
        self.flops += once * (5 if "backward" in str(func) else 2)


class attend_fused(TorchFunctionMode):
    """Attention on tensors without data as the fused kernels do it, which keep no score of two tokens.

    ``drops``: whether they know dropout. Those of a CPU do not, and every score is held.
    """

    def __init__(self, drops: bool = False) -> None:
        super().__init__()
        self.drops = drops

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is not torch.nn.functional.scaled_dot_product_attention or args[0].device.type != "meta":
            return func(*args, **given)
        if given.get("dropout_p", 0.0) > 0 and not self.drops:
            return func(*args, **given)
        q, k, v = args[:3]
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mask = given.get("attn_mask")
        mask = mask.to(q.dtype) if mask is not None and mask.dtype == torch.bool else mask
        return kernel(q, k, v, given.get("dropout_p", 0.0), given.get("is_causal", False), attn_mask=mask)[0]


@contextlib.contextmanager
def _gradients_off(model: torch.nn.Module) -> Iterator[None]:
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)


def count(model: torch.nn.Module, loss: Callable[[], torch.Tensor], device: str = "cpu") -> Need:
    """What one forward and backward of ``loss`` needs on a type of device. The model and its inputs are on `meta`.

    Gradients of the trained tensors count as alive until the end.
    """
    with _gradients_off(model), attend_fused(drops=device == "cuda"), Tally() as tally:
        loss().backward()
    return Need(float(tally.peak), float(tally.flops), float(tally.moved))
