"""A batch as one row, in which the tokens that all its rows begin with are computed once and nothing is padded.

Rows of one system prompt repeat it; their hidden states there are the same, for no token sees a later one. A batch

    s s a b      becomes      s s a b c d e     positions  0 1 2 3 2 3 4
    s s c d e

for all of the model but its attention, which gets its rows back, (rows, longest), and hands out one row again. Loss
and gradients are those of the padded batch (with dropout, rows share what is drawn for the shared part).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from veneer.train.encode import IGNORE
from veneer.train.generate import evaluating
from veneer.train.loss import base_of, labelled_logits

__all__ = ["Rows", "join_batch", "shared_prefix"]

Batch = dict[str, Any]

#: what a model raises that was not written for such a batch
_REFUSED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)

#: attention by batches; the others ask for a mask of their own
_KERNELS = ("sdpa", "flash_attention_2", "flash_attention_3")

#: the share of a batch's places that must go, or laying it out costs more than it saves
LEAST = 1 / 32


@dataclass(frozen=True)
class Rows:
    """Where a joined row's tokens are in its batch.

    ``shared`` tokens come first in each of ``number`` rows of ``length`` places; ``spread`` (number * length) is the
    joined token of each place, ``joined`` (tokens) the place of each joined token, in row 0 for the shared ones.
    """

    number: int
    length: int
    shared: int
    spread: Tensor
    joined: Tensor

    def apart(self, x: Tensor) -> Tensor:
        """(1, heads, tokens, width) to (number, heads, length, width)."""
        flat: Tensor = _Apart.apply(x[0].transpose(0, 1), self)  # type: ignore[assignment]
        return flat.view(self.number, self.length, *flat.shape[1:]).transpose(1, 2)

    def together(self, x: Tensor) -> Tensor:
        """(number, length, heads, width) to (1, tokens, heads, width)."""
        return _Together.apply(x.flatten(0, 1), self)[None]  # type: ignore[index]


class _Apart(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        return x.index_select(0, rows.spread)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        rows: Rows = ctx.rows
        gx = g.index_select(0, rows.joined)
        if rows.shared:
            gx[: rows.shared] = g.view(rows.number, rows.length, *g.shape[1:])[:, : rows.shared].sum(0)
        return gx, None


class _Together(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows) -> Tensor:
        ctx.rows, ctx.places = rows, len(x)
        return x.index_select(0, rows.joined)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return g.new_zeros(ctx.places, *g.shape[1:]).index_copy(0, ctx.rows.joined, g), None


def join_batch(batch: Batch) -> Batch:
    """`input_ids`, `attention_mask`, `labels` (rows, length), padded on the right, to (1, tokens), with
    `position_ids` and `joined_rows`; a batch that gets hardly smaller, or holds other columns, comes back as it is.

    A label is read at the place before it, so a row ends before its last label's own token; the last row keeps it.
    The shared part ends before any row's first prediction.
    """
    if set(batch) != {"input_ids", "attention_mask", "labels"} or len(batch["input_ids"]) < 2:
        return batch
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    learned = [[place for place, label in enumerate(row) if place and label != IGNORE] for row in labels]
    if not all(learned):
        return batch
    most = min(places[0] for places in learned) - 1
    shared = next((n for n in range(most) if any(row[n] != ids[0][n] for row in ids)), most)
    ends = [places[-1] for places in learned]
    ends[-1] += 1
    if shared + sum(end - shared for end in ends) > (1 - LEAST) * batch["input_ids"].numel():
        return batch
    return _lay_out(ids, labels, shared, ends, batch["input_ids"].device)


def _lay_out(ids: list[list[int]], labels: list[list[int]], shared: int, ends: Sequence[int], device: Any) -> Batch:
    length = max(ends)
    flat, places, joined, spread = ids[0][:shared], list(range(shared)), list(range(shared)), []
    targets = [IGNORE] * shared
    for row, end in enumerate(ends):
        first = len(flat)
        flat += ids[row][shared:end]
        places += range(shared, end)
        joined += range(row * length + shared, row * length + end)
        spread += [*range(shared), *range(first, first + end - shared), *[0] * (length - end)]
        targets += [*labels[row][shared + 1 : end + 1], *[IGNORE] * (end + 1 - len(labels[row]))]
    found = {"input_ids": flat, "position_ids": places, "labels": [IGNORE, *targets[:-1]]}
    columns: Batch = {name: torch.tensor(values, device=device)[None] for name, values in found.items()}
    columns["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)  # taken as a finished mask
    at = [torch.tensor(values, device=device) for values in (spread, joined)]
    return columns | {"joined_rows": Rows(len(ends), length, shared, *at)}


@contextmanager
def shared_prefix(model: Any, batch: Batch, longest: int) -> Iterator[Callable[[Batch], Batch] | None]:
    """Inside, ``model`` reads joined batches: yields what makes them, or None where it cannot.

    It is asked: two rows of ``batch`` must be scored alike both ways, with an adapter that does something.
    ``longest`` is the longest row there is, in tokens: a window that it exceeds would be lost with the model's mask.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    kernel, window = getattr(config, "_attn_implementation", None), getattr(config, "sliding_window", None)
    if (
        kernel not in _KERNELS
        or base.config.is_encoder_decoder
        or getattr(config, "output_router_logits", False)  # a loss over tokens, however often they occur
        or (window is not None and longest > window)
        or "position_ids" not in inspect.signature(type(base).forward).parameters
    ):
        yield None
        return
    config._attn_implementation = _registered(str(kernel))
    try:
        yield join_batch if _alike(model, {name: values[:2] for name, values in batch.items()}) else None
    finally:
        config._attn_implementation = kernel


def _registered(kernel: str) -> str:
    """The name of transformers' attention ``kernel`` for joined batches and, as it is, for others."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    name, inner = f"veneer_{kernel}", ALL_ATTENTION_FUNCTIONS[kernel]

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, *args: Any, **more: Any) -> Any:
        rows: Rows | None = more.pop("joined_rows", None)
        if rows is None:
            return inner(module, q, k, v, mask, *args, **more)
        more = {key: value for key, value in more.items() if key not in ("position_ids", "is_causal")}
        out, weights = inner(module, *map(rows.apart, (q, k, v)), None, *args, is_causal=True, **more)
        return rows.together(out), weights

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    return name


def _alike(model: nn.Module, batch: Batch) -> bool:
    batch = batch | {"labels": _ends(batch["labels"])}
    joined = join_batch(batch)
    if joined is batch:
        return False
    with evaluating(model), _moved(model):
        padded, _ = labelled_logits(model, batch, shifted=True)
        try:
            found, _ = labelled_logits(model, joined, shifted=True)
        except _REFUSED:
            return False
    exact = 1e-4 if padded.dtype == torch.float32 else 5e-2
    return found.shape == padded.shape and float((found - padded).abs().max()) <= exact * float(padded.abs().max())


def _ends(labels: Tensor, kept: int = 8) -> Tensor:
    """``labels`` with the first and the last few of each row: scores of all would be the largest tensors of a run."""
    learned = labels != IGNORE
    place = learned.cumsum(1)
    return labels.where(learned & ((place <= kept) | (place > place[:, -1:] - kept)), IGNORE)


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """Inside, what is trained is off its initial values, at which many an adapter does nothing."""
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    drawn = torch.Generator().manual_seed(0)
    for p in trained:
        p.add_(torch.randn(p.shape, generator=drawn).to(p), alpha=0.02)
    try:
        yield
    finally:
        for p, value in zip(trained, before, strict=True):
            p.copy_(value)
