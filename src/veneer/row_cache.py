"""A batch whose rows use different low-rank adapters, while nothing trains: two batched products a layer over factors
that are stacked once for the adapters of a batch and kept for the next one (decoding asks for the same at each token).

The reference is rows.forward; it runs wherever this does not apply. What is kept is used again only inside one
`generate`, or by a call that goes on from a key/value cache, and only while the tensors behind it are the same objects,
at the same place in memory, with the same version counter and scaling. Any other call stacks anew: between two of them
code may write in ways that no counter sees (`p.data`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import plain_autograd
from .kinds import LowRank

if TYPE_CHECKING:
    from .context import Rows
    from .layer import Adapted
    from .view import View


class Kept:
    """One layer's stacks for the last batch; empty in copies and pickles of the layer."""

    def __init__(self) -> None:
        self.stacks: Stacks | None = None

    def __reduce__(self) -> Any:
        return Kept, ()


@dataclass
class Stacks:
    """down (n, k, inp), up (n, k, out), scaling included, of n adapters, padded to the largest rank k.

    place: for each row of the batch its place in a grid (n, most), None: row i is adapter i. where: the rows that
    have an adapter, None: all. behind: what it was made from, see `_fresh`. rows: of the call that it was made in.
    """

    key: Any
    rows: Rows
    down: Tensor | None
    up: Tensor | None
    place: Tensor | None
    where: Tensor | None
    most: int
    behind: list[tuple[dict[str, Any], str, Tensor, int, int]]
    scaling: dict[str, float]


def product(layer: Adapted, rows: Rows, x: Tensor) -> Tensor | None:
    """The layer's output for such a batch, or None where the reference has to run."""
    if torch.is_grad_enabled() or layer.training or layer.site.kind != "linear" or not plain_autograd(x):
        return None
    key = (rows.key, len(x), x.dtype, x.device)
    stacks = layer.kept.stacks
    if stacks is None or stacks.key != key or not (stacks.rows is rows or rows.goes_on) or not _fresh(stacks, layer):
        layer.kept.stacks = stacks = _stack(layer, rows, x, key)
        if stacks is None:
            return None
    y = layer.base_layer(x)
    return y if stacks.down is None else _add(stacks, x, y)


def _add(s: Stacks, x: Tensor, y: Tensor) -> Tensor:
    assert s.down is not None
    assert s.up is not None
    flat, rows = x.reshape(len(x), -1, x.shape[-1]), y.reshape(len(y), -1, y.shape[-1])
    if s.place is None:
        h = torch.bmm(flat, s.down.mT)
        if rows.dtype != h.dtype:  # a quantised base may answer in a dtype of its own
            return (rows + torch.bmm(h, s.up).to(rows.dtype)).view(y.shape)
        return torch.baddbmm(rows, h, s.up).view(y.shape)
    n, tokens = len(s.down), flat.shape[1]
    own = flat if s.where is None else flat[s.where]
    grid = flat.new_zeros(n * s.most, tokens, x.shape[-1]).index_copy_(0, s.place, own)
    change = torch.bmm(torch.bmm(grid.view(n, s.most * tokens, -1), s.down.mT), s.up)
    change = change.view(n * s.most, tokens, -1)[s.place].to(rows.dtype)
    added = rows + change if s.where is None else rows.index_add(0, s.where, change)
    return added.view(y.shape)


def _fresh(s: Stacks, layer: Adapted) -> bool:
    for name, value in s.scaling.items():
        now = layer.entries[name].scaling
        if now is not value and now != value:
            return False
    for held, leaf, tensor, version, pointer in s.behind:
        if held.get(leaf) is not tensor or tensor._version != version or tensor.data_ptr() != pointer:
            return False
    return True


def _stack(layer: Adapted, rows: Rows, x: Tensor, key: Any) -> Stacks | None:
    """The stacks of a batch; None where an adapter in it is of another kind."""
    index = rows.for_batch(len(x), layer.site)
    here = [i for i, name in enumerate(rows.names) if name in layer.entries]
    views = [layer.view(rows.names[i], layer.compute_dtype(x)) for i in here]
    if not all(_simple(v) for v in views):
        return None
    slot_of = torch.full((len(rows.names) + 1,), -1)  # index -1, the base, reads the last entry
    slot_of[torch.tensor(here, dtype=torch.long)] = torch.arange(len(here))
    slots = slot_of[index]
    used = slots >= 0
    if not bool(used.any()):
        return Stacks(key, rows, None, None, None, None, 0, [], {})
    own = slots[used]
    alone = bool(used.all()) and torch.equal(own, torch.arange(len(views)))
    most = int(own.bincount(minlength=len(views)).max())
    place = None if alone else own * most + _rank_in_group(own)
    down, up = _factors(views, x)
    behind = []
    for v in views:
        for holder, leaf in v.where.values():
            held = holder._parameters if leaf in holder._parameters else holder._buffers
            t = held[leaf]
            if t.is_inference():  # has no version counter
                return None
            behind.append((held, leaf, t, t._version, t.data_ptr()))
    where = None if bool(used.all()) else used.nonzero().squeeze(1).to(x.device)
    return Stacks(
        key, rows, down, up, None if place is None else place.to(x.device), where, most, behind,
        {v.name: v.scaling for v in views},
    )  # fmt: skip


def _simple(v: View) -> bool:
    """Whether the change is up(down(x)) with factors that follow from the tensors alone."""
    method = v.method
    if not isinstance(method, LowRank) or not method.steady:
        return False
    plain = type(method).side is LowRank.side and type(method).read is LowRank.read
    return plain and method.bias_delta(v) is None and isinstance(v.scaling, int | float)


def _factors(views: list[View], x: Tensor) -> tuple[Tensor, Tensor]:
    pairs = [v.method.factors(v) for v in views]  # type: ignore[attr-defined]
    k = max(A.shape[0] for _, A in pairs)
    down = torch.stack([F.pad(A, (0, 0, 0, k - A.shape[0])) for _, A in pairs])
    scaled = [B.mT * v.scaling for v, (B, _) in zip(views, pairs, strict=True)]
    up = torch.stack([F.pad(B, (0, 0, 0, k - B.shape[0])) for B in scaled])
    return down.to(x.dtype), up.to(x.dtype)


def _rank_in_group(own: Tensor) -> Tensor:
    """For each row how many rows before it have the same adapter."""
    order = own.argsort(stable=True)
    counts = own.bincount()
    begins = (counts.cumsum(0) - counts)[own[order]]
    out = torch.empty_like(own)
    out[order] = torch.arange(len(own)) - begins
    return out
