"""Cross entropy of a frozen linear head in chunks of rows, so that the logits of a batch never exist at once.

    loss = sum_i  logsumexp(W h_i + b) - (W h_i + b)[t_i]

The gradient of h is known as soon as a chunk's logits are, so forward computes it and keeps it, (rows, width), in
place of the logits, (rows, vocabulary), which autograd would keep twice in float32.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from veneer.kernels import plain_autograd

__all__ = ["chunked_cross_entropy", "chunked_head", "cross_entropy_reference", "rows_at_once"]


def cross_entropy_reference(h: Tensor, W: Tensor, b: Tensor | None, targets: Tensor) -> Tensor:
    """What chunked_cross_entropy computes. h (rows, width), W (vocabulary, width), targets (rows,); a sum."""
    return F.cross_entropy(F.linear(h, W, b).float(), targets, reduction="sum")


def chunked_cross_entropy(h: Tensor, W: Tensor, b: Tensor | None, targets: Tensor, chunk: int | None = None) -> Tensor:
    """The sum over rows of the cross entropy of W h + b, in float32 at least. W and b get no gradient."""
    if torch.is_autocast_enabled(h.device.type):  # products into given memory are not cast by themselves
        cast = torch.get_autocast_dtype(h.device.type)
        h, W, b = h.to(cast), W.to(cast), b if b is None else b.to(cast)
    if chunk is None:
        chunk = rows_at_once(len(h), W.shape[0], h.device.type)
    return _ChunkedCrossEntropy.apply(h, W.detach(), b if b is None else b.detach(), targets, chunk)  # type: ignore[no-any-return]


def rows_at_once(rows: int, vocabulary: int, device: str) -> int:
    """The rows of a chunk, all chunks of a size: one more chunk is one more reading of W."""
    most = max(16, (1 << (24 if device == "cpu" else 27)) // vocabulary)
    chunks = max(1, -(-rows // most))
    return max(1, -(-rows // chunks))


class _ChunkedCrossEntropy(Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, b: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
        total = h.new_zeros((), dtype=torch.promote_types(h.dtype, torch.float32))
        gradient = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        place = h.new_empty(min(chunk, len(h)), len(W))  # one for all chunks
        for first in range(0, len(h), chunk):
            rows = slice(first, first + chunk)
            logits = torch.mm(h[rows], W.mT, out=place[: len(h[rows])])
            logits = (logits if b is None else logits.add_(b)).to(total.dtype)
            at = targets[rows].unsqueeze(1)
            highest = logits.amax(1, keepdim=True)
            wanted = logits.gather(1, at)
            sums = logits.sub_(highest).exp_().sum(1, keepdim=True)
            total += (sums.log() + (highest - wanted)).sum()
            if gradient is not None:
                p = logits.div_(sums)
                p.scatter_add_(1, at, p.new_full((), -1.0).expand(at.shape))
                torch.mm(p.to(h.dtype), W, out=gradient[rows])
        ctx.save_for_backward(gradient, h, W, b, targets)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradient, h, W, b, targets = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of the gradient is wanted: it must follow from h, whole
            p = F.linear(h, W, b).to(g.dtype).softmax(1) - F.one_hot(targets, len(W))
            gradient = p.to(h.dtype) @ W
        return gradient * g.to(gradient.dtype), None, None, None, None


_processed: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that change their logits after the head


class LogitsChange(Exception):
    """A model does more to its logits than its head: a scale, a soft cap."""


def _plain(head: Any) -> bool:
    """Whether a head is a frozen nn.Linear with no hooks that see its output."""
    weight: Any = getattr(head, "weight", None)
    bias: Any = getattr(head, "bias", None)
    return (
        type(head).forward is nn.Linear.forward
        and type(weight) is nn.Parameter
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and not (head._forward_hooks or head._backward_hooks or "forward" in head.__dict__)
        and plain_autograd(weight)
    )


@contextmanager
def chunked_head(model: Any) -> Iterator[bool]:
    """Inside, `model`'s own loss function is computed in chunks from what enters its head; yields whether it is.

    It is where the head is a frozen nn.Linear with no hooks that see its output, and the model hands the head's
    output to its loss as it is; where it turns out not to, LogitsChange leaves the block, and the next one yields
    False.
    """
    head = model.get_output_embeddings()
    if model in _processed or not _plain(head):
        yield False
        return
    weight, bias = head.weight, head.bias
    given: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        given[:] = [hidden]
        return hidden

    def loss(
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if not given or logits is not given[0] or shift_labels is None or vocab_size != weight.shape[0]:
            _processed.add(model)
            raise LogitsChange
        targets = shift_labels.reshape(-1)
        total = chunked_cross_entropy(logits.reshape(-1, logits.shape[-1]), weight, bias, targets)
        return total.float() / (len(targets) if num_items_in_batch is None else num_items_in_batch)

    before = model.__dict__.get("_loss_function")
    head.__dict__["forward"], model.loss_function = forward, loss
    try:
        yield True
    finally:
        del head.__dict__["forward"]
        if before is None:
            model.__dict__.pop("_loss_function", None)
        else:
            model.loss_function = before
