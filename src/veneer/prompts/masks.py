"""Masks and positions of an input that grows by n virtual tokens in front."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import AdapterError


def front(values: Tensor, n: int, fill: float) -> Tensor:
    """(rows, length) -> (rows, n + length), the new columns filled."""
    return torch.cat([values.new_full((len(values), n), fill), values], dim=1)


def cover(mask: Tensor | None, n: int, total: int, what: str = "attention_mask") -> Tensor | None:
    """The mask over all `total` positions: one that leaves out the n virtual tokens gets ones in front."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise AdapterError(
            f"{what} of shape {tuple(mask.shape)}: a prompt method needs it as (rows, length), to put the "
            "virtual tokens' columns in front"
        )
    if mask.shape[1] not in (total, total - n):
        raise AdapterError(
            f"{what} of shape {tuple(mask.shape)} fits neither the {total - n} tokens of the input nor the "
            f"{total} with the {n} virtual ones in front"
        )
    return mask if mask.shape[1] == total else front(mask, n, 1)


def after_padding(mask: Tensor | None, n: int) -> Tensor | None:
    """Positions that go on from the prompt at each row's first real token; None where no row is padded on the
    left, since the model then counts the same by itself.

    mask: (rows, length) without the prompt's columns. Returns (rows, length), n for the first real token.
    """
    if mask is None or mask.dim() != 2 or not mask.shape[1] or bool((mask[:, 0] != 0).all()):
        return None
    first = (mask != 0).int().argmax(dim=1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - first).clamp_min(0) + n


def shifted(positions: Tensor, n: int, prompt: bool, first: int = 0) -> Tensor:
    """The caller's positions (..., length) moved by n; prompt: the virtual tokens' own in front, from `first` on."""
    moved = positions + n
    if not prompt:
        return moved
    own = torch.arange(first, first + n, device=positions.device, dtype=positions.dtype)
    return torch.cat([own.expand(*positions.shape[:-1], n), moved], dim=-1)


def pads_first(mask: Tensor) -> Tensor | None:
    """(rows, length) indices that move padding on the right to the front; None where there is none."""
    trailing = (mask != 0).int().flip(1).argmax(dim=1, keepdim=True)
    if not bool(trailing.any()):
        return None
    return (torch.arange(mask.shape[1], device=mask.device) - trailing) % mask.shape[1]
