"""Adapters whose tensors lie in parts on several processes (FSDP's `fully_shard`, tensor parallelism)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterError
from .site import Site

__all__ = ["full", "is_sharded", "like", "main_here", "refuse", "whole", "whole_weight"]


def _kind() -> Any:
    """DTensor, if anything has imported it: nothing can be sharded before."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor holds one process's part of its values."""
    kind = _kind()
    return kind is not None and isinstance(t, kind)


def full(t: Tensor) -> Tensor:
    """The tensor with all its values, gathered where it lies in parts: every process must ask."""
    part: Any = t
    return part.full_tensor() if is_sharded(t) else t  # type: ignore[no-any-return]


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`full` of each, in this order."""
    return {key: full(t) for key, t in tensors.items()}


def whole_weight(site: Site) -> Callable[[], Tensor]:
    """What reads a layer's weight. It raises AdapterError where that lies in parts."""

    def weight() -> Tensor:
        if is_sharded(site.stored):
            raise AdapterError(
                f"{site!r}: this adapter's tensors follow from the layer's weight, which lies in parts on several "
                "processes; load the adapter before fully_shard"
            )
        return site.weight()

    return weight


def refuse(t: Tensor, method: str, why: str) -> None:
    """Raise AdapterError where a method needs more of a tensor than this process's part."""
    if is_sharded(t):
        raise AdapterError(
            f"{method} does not train under fully_shard: {why}; use DistributedDataParallel, or another method"
        )


def like(value: Tensor, old: Tensor) -> Tensor:
    """``value``, whole on every process, cut as ``old`` is."""
    if not is_sharded(old) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    cut: Any = old
    return distribute_tensor(value, cut.device_mesh, cut.placements, src_data_rank=None)


def main_here() -> bool:
    """Whether this process writes what all of them hold."""
    return torch.distributed.get_rank() == 0
