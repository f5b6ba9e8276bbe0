"""Activations that backward makes again instead of keeping: a norm's output, a gated activation.

    y = remember(y, make, *sources)     # y equals make(*sources), which costs little
    keep_sources(z)                     # z's node saved y: from here on it keeps how y is made, not y

A layer behind a norm keeps its input for its own gradient, though that follows from the norm's input, which is kept
anyway. What is made again has the same numbers to the bit, and its place in the graph, so gradients of gradients follow
too. Where other hooks on saved tensors are at work (checkpointing, offloading) theirs act alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Remade", "keep_sources", "remember"]

_MADE: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> how it is made


class Remade:
    """How a tensor is made. Several nodes may keep it: made when the first of them asks, it is held until each has
    had it. A source may itself be one to make."""

    __slots__ = ("left", "make", "sources", "users", "value", "version", "versions")

    def __init__(self, y: Tensor, make: Callable[..., Tensor], sources: tuple[Tensor, ...]):
        self.make, self.version = make, y._version
        self.sources: list[Tensor | Remade] = [remade_of(x) or x.detach() for x in sources]
        self.versions = [x._version if isinstance(x, Tensor) else 0 for x in self.sources]
        self.users = self.left = 0
        self.value: Tensor | None = None

    def use(self) -> Remade:
        """Say that one more will ask."""
        if not self.users:
            for x in self.sources:
                if isinstance(x, Remade):
                    x.use()
        self.users += 1
        return self

    def again(self) -> Tensor:
        """The tensor. Raises RuntimeError where a source was changed in place since."""
        if self.value is None:
            for x, version in zip(self.sources, self.versions, strict=True):
                if isinstance(x, Tensor) and x._version != version:
                    raise RuntimeError(
                        f"a tensor {tuple(x.shape)} from which backward computes an activation again was modified in "
                        "place after the forward pass; modify a copy, or train without base_kernels"
                    )
            with torch.no_grad():
                self.value = self.make(*(x.again() if isinstance(x, Remade) else x for x in self.sources))
            self.left = self.users
        value, self.left = self.value, self.left - 1
        if self.left <= 0:
            self.value = None
        return value


def remember(y: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """y itself, marked: it equals `make(*sources)`, called without gradients."""
    if y.requires_grad:
        _MADE[y] = Remade(y, make, sources)
    return y


def remade_of(x: Tensor) -> Remade | None:
    """How x is made, where it is marked and was not written into since."""
    found: Remade | None = _MADE.get(x)
    return found if found is not None and found.version == x._version else None


def keep_sources(y: Tensor, *inputs: Tensor) -> Tensor:
    """y itself. Its node is an autograd Function's that saved `inputs` first, in this order: of those that are marked
    it now keeps how they are made."""
    marked = [(place, made) for place, x in enumerate(inputs) if (made := remade_of(x)) is not None]
    if marked and _hooks_are_free():
        saved: Any = y.grad_fn._raw_saved_tensors  # type: ignore[union-attr]
        for place, made in marked:
            saved[place].register_hooks(lambda _, made=made: made.use(), Remade.again)
    return y


def _hooks_are_free() -> bool:
    autograd: Any = torch._C._autograd
    return autograd._saved_tensors_hooks_is_enabled() and autograd._top_saved_tensors_default_hooks(False) is None
