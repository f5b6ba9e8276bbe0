"""peft.utils.merge_utils over veneer's sums of task tensors: lists of tensors of one shape, one weight each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..combine_math import Settings, drop_and_rescale, keep_largest, mix

Majority = Literal["total", "frequency"]


def _mixed(kind: str, tensors: Sequence[Tensor], weights: Tensor, density: float, sign: Majority = "total") -> Tensor:
    return mix(tensors, [float(w) for w in weights], kind, Settings(kind, density=density, majority_sign_method=sign))


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum."""
    stack = torch.stack(task_tensors)
    return (stack * weights.reshape(-1, *[1] * (stack.dim() - 1)).to(stack)).sum(0)


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of each tensor's largest entries."""
    return _mixed("magnitude_prune", task_tensors, weights, density)


def ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: Majority = "total"
) -> Tensor:
    """TIES: prune, elect a sign for each entry, average those that agree."""
    return _mixed("ties", task_tensors, weights, density, majority_sign_method)


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """DARE: drop entries at random, rescale, add up."""
    return _mixed("dare_linear", task_tensors, weights, density)


def dare_ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: Majority = "total"
) -> Tensor:
    """DARE's drop, then TIES's election."""
    return _mixed("dare_ties", task_tensors, weights, density, majority_sign_method)


def prune(tensor: Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False) -> Tensor:
    """Keep a share `density` of the entries: the largest, or random ones. Raises ValueError for another method or a
    density outside [0, 1]."""
    if density >= 1:
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return keep_largest(tensor, density)
    if method != "random":
        raise ValueError(f"Unknown method {method}; use 'magnitude' or 'random'")
    kept = drop_and_rescale(tensor, density)
    return kept if rescale else kept * density
