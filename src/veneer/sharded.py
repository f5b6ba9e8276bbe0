"""Adapters whose tensors lie in parts on several processes (FSDP's `fully_shard`, tensor parallelism)."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_sharded", "like", "main_here", "whole"]


def _kind() -> Any:
    """DTensor, if anything has imported it: nothing can be sharded before."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor holds one process's part of its values."""
    kind = _kind()
    return kind is not None and isinstance(t, kind)


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with all their values, gathered where they lie in parts: every process must ask, in this order."""
    found: dict[str, Any] = dict(tensors)
    return {key: t.full_tensor() if is_sharded(t) else t for key, t in found.items()}


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
