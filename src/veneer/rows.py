"""A batch whose rows use different adapters, computed at once.

Rows are gathered by adapter: each tensor of a method is stacked over adapters and indexed by row, and the method's
own formula runs under vmap over the rows. Low-rank methods on linear layers need no vmap: two batched products over
factors padded to the largest rank. There is no loop over adapters; adapters whose tensors differ in shape (or whose
settings differ) fall into one group each such kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from . import row_cache
from .context import Rows, per_row
from .errors import AdapterError
from .kinds import Additive, Gate, LowRank, Method, Replace, Reweight

if TYPE_CHECKING:
    from .layer import Adapted
    from .view import View

# Settings that say where an adapter sits or how it began, not what its formula does.
_IRRELEVANT = frozenset(
    {
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "layers",
        "modules_to_save",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "task_type",
        "auto_mapping",
        "peft_version",
        "share",
        "handoff",
        "rank_pattern",
        "alpha_pattern",
        "r",
        "lora_alpha",
        "alpha",
        "init_lora_weights",
        "init_weights",
        "trainable_token_indices",
        "use_rslora",
        "peft_type",
        "bias",
    }
)


class RowView:
    """A view whose tensors are one row's slices of a stack; stands in for View inside vmap."""

    def __init__(self, view: View, tensors: dict[str, Tensor], scaling: Any, data: dict[str, Any] | None = None):
        self.of, self.tensors, self.scaling = view, tensors, scaling
        self.data = view.data if data is None else data

    def __getattr__(self, key: str) -> Any:
        tensors = self.__dict__["tensors"]
        return tensors[key] if key in tensors else getattr(self.__dict__["of"], key)


@dataclass
class Bucket:
    """Adapters that one batched computation serves, and the rows that use them."""

    method: Method
    views: list[View]
    where: Tensor | None  # rows of the batch, None: all
    slot: Tensor  # for each such row, which view
    size: int  # rows of the whole batch

    def take(self, x: Tensor) -> Tensor:
        return x if self.where is None else x[self.where]

    def put(self, y: Tensor, part: Tensor) -> Tensor:
        part = part.to(y.dtype)
        return part if self.where is None else y.index_put((self.where,), part)

    def add(self, y: Tensor, part: Tensor) -> Tensor:
        part = part.to(y.dtype)
        return y + part if self.where is None else y.index_add(0, self.where, part)

    def stacked(self) -> tuple[dict[str, Tensor], Tensor]:
        """Every tensor of the method, (views, *shape), and the scalings (views,)."""
        first = self.views[0]
        tensors = {k: torch.stack([getattr(v, k) for v in self.views]) for k in first.where}
        like = next(iter(tensors.values()))
        dtype = first.dtype or like.dtype
        return tensors, torch.tensor([v.scaling for v in self.views], dtype=dtype, device=like.device)

    def map(self, f: Callable[[Any, Tensor], Tensor], x: Tensor) -> Tensor:
        """f(p, x) for every row of the bucket."""
        tensors, scaling = self.stacked()
        tensors = {k: t[self.slot] for k, t in tensors.items()}
        first = self.views[0]
        data = {k: self.take(per_row(t, self.size)) for k, t in first.data.items() if k in self.method.reads}
        run = vmap(lambda t, s, d, v: f(RowView(first, t, s, first.data | d), v), randomness="different")
        return run(tensors, scaling[self.slot], data, x)


def forward(layer: Adapted, rows: Rows, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """The layer's output where row i of x uses adapter rows.names[rows.index[i]], or the base where it is -1."""
    if not args and not kwargs:
        fast = row_cache.product(layer, rows, x)
        if fast is not None:
            return fast
    buckets = _buckets(layer, rows, x)
    for b in buckets:
        if isinstance(b.method, Gate):
            site, gate = layer.site, b.method
            if gate.gates(b.views[0])[0] and not gate.by_weight(site):
                x = b.put(x, b.map(_before(gate, site), b.take(x)))
    y = layer.base_layer(x, *args, **kwargs)
    for b in buckets:
        y = _apply(b, layer, x, y)
    return y


def _before(gate: Gate, site: Any) -> Callable[[Any, Tensor], Tensor]:
    return lambda p, v: site.on_input(lambda u: gate.pre(p, u), v)


def _apply(b: Bucket, layer: Adapted, x: Tensor, y: Tensor) -> Tensor:
    method, site = b.method, layer.site
    if isinstance(method, Additive):
        return b.add(y, _additive(b, method, site, b.take(x)))
    if isinstance(method, Reweight) or (isinstance(method, Gate) and method.by_weight(site)):
        part = _reweight(b, method, layer, b.take(x))
        return b.add(y, part) if site.quantised else b.put(y, part)
    if isinstance(method, Gate):
        if not method.gates(b.views[0])[1]:
            return y
        bias = None if method.post_sees_bias else site.bias()
        shift = 0.0 if bias is None else site.per_feature(bias)
        part = b.map(lambda p, v: site.on_output(lambda u: method.post(p, u), v), b.take(y) - shift)
        return b.put(y, part + shift)
    if isinstance(method, Replace):
        return b.put(y, _replace(b, method, b.take(x)))
    raise AdapterError(f"{method.name} on {site!r} cannot serve a batch that mixes adapters")


def _additive(b: Bucket, method: Additive, site: Any, x: Tensor) -> Tensor:
    dropping = layer_trains(b) and any(v.drop(x) is not x for v in b.views)
    if site.kind == "linear" and type(method).side is LowRank.side and not dropping:
        part = _low_rank(b, x)
    else:
        part = b.map(lambda p, v: method.side(p, p.drop(v)), x)
    deltas = [method.bias_delta(v) for v in b.views]
    if any(d is not None for d in deltas):
        zero = torch.zeros(site.out, dtype=part.dtype, device=part.device)
        table = torch.stack([zero if d is None else d.to(part.dtype) for d in deltas])[b.slot]
        part = part + vmap(site.per_feature)(table).reshape(len(table), *_broadcast(site, part))
    return part if method.everywhere else part * _acting(b, method, x)


def _acting(b: Bucket, method: Any, x: Tensor) -> Tensor | float:
    """Where each row's adapter acts, for methods that act on some tokens: broadcasts over the change."""
    masks = [method.acts(v, x, b.take) for v in b.views]
    if any(m is None for m in masks):
        return 1.0
    return torch.stack(masks)[b.slot, torch.arange(len(x), device=x.device)]


def _broadcast(site: Any, part: Tensor) -> list[int]:
    """Shape of a per-feature row that broadcasts against (rows, ..., out) or (rows, out, *space)."""
    if site.kernel:
        return [site.out] + [1] * len(site.kernel)
    return [1] * (part.dim() - 2) + [site.out]


def layer_trains(b: Bucket) -> bool:
    return b.views[0].training


def _low_rank(b: Bucket, x: Tensor) -> Tensor:
    """Two batched products; factors of smaller rank are padded with zeros, which add nothing."""
    pairs = [b.method.factors(v) for v in b.views]  # type: ignore[attr-defined]
    k = max(A.shape[0] for _, A in pairs)
    down = torch.stack([F.pad(A, (0, 0, 0, k - A.shape[0])) for _, A in pairs])
    up = torch.stack([F.pad(B * v.scaling, (0, k - B.shape[1])) for v, (B, _) in zip(b.views, pairs, strict=True)])
    flat = x.reshape(len(x), -1, x.shape[-1])
    if flat.dtype != down.dtype:
        flat = flat.to(down.dtype)
    h = torch.bmm(flat, down[b.slot].mT)
    return torch.bmm(h, up[b.slot].mT).reshape(*x.shape[:-1], up.shape[1])


def _reweight(b: Bucket, method: Method, layer: Adapted, x: Tensor) -> Tensor:
    """The output with each row's weight; on a quantised base, what that adds to the base's own output."""
    W, bias = layer.site.weight(), layer.site.bias()
    less = layer.site.quantised
    if less:
        W, bias = W.to(x.dtype), None if bias is None else bias.to(x.dtype)
    tensors, scaling = b.stacked()
    first = b.views[0]

    def new(t: dict[str, Tensor], s: Tensor) -> tuple[Tensor, Tensor]:
        p: Any = RowView(first, t, s)
        new_W, nb = method.merged([p], W, bias)
        if less:
            new_W, nb = new_W - W, None if nb is None or bias is None else nb - bias
        return new_W, W.new_zeros(layer.site.out) if nb is None else nb

    Ws, bs = vmap(new)(tensors, scaling)
    none = bias is None
    site = layer.site
    run = vmap(lambda v, w, c: site.op(v, w, None if none else c), randomness="different")
    return run(x, Ws[b.slot], bs[b.slot])


def _replace(b: Bucket, method: Replace, x: Tensor) -> Tensor:
    copies: list[nn.Module] = [v.copy_of_module(method.container) for v in b.views]
    names = [n for n, _ in copies[0].named_parameters()]
    stack = {n: torch.stack([dict(c.named_parameters())[n] for c in copies])[b.slot] for n in names}
    return vmap(lambda t, v: functional_call(copies[0], t, (v,)), randomness="different")(stack, x)


def _buckets(layer: Adapted, rows: Rows, x: Tensor) -> list[Bucket]:
    index = rows.for_batch(len(x), layer.site)
    dtype = layer.compute_dtype(x)
    groups: dict[Any, list[int]] = {}
    views: dict[int, View] = {}
    for i, name in enumerate(rows.names):
        if name in layer.entries:
            views[i] = layer.view(name, dtype)
            groups.setdefault(_key(views[i]), []).append(i)
    out = []
    for members in groups.values():
        slot_of = torch.full((len(rows.names) + 1,), -1)
        slot_of[torch.tensor(members)] = torch.arange(len(members))
        slots = slot_of[index]  # index -1 reads the last entry, which stays -1
        where: Tensor | None = (slots >= 0).nonzero().squeeze(1)
        if where is None or not len(where):
            continue
        slots = slots[where].to(x.device)
        everyone = len(where) == len(index)
        out.append(
            Bucket(
                views[members[0]].method,
                [views[i] for i in members],
                None if everyone else where.to(x.device),
                slots,
                len(x),
            )
        )
    return out


def _key(view: View) -> Any:
    method, site = view.method, view.site
    if isinstance(method, LowRank) and site.kind == "linear" and type(method).side is LowRank.side:
        return (method.name,)
    shapes = tuple((k, tuple(getattr(h, leaf).shape)) for k, (h, leaf) in sorted(view.where.items()))
    hidden = _IRRELEVANT - method.settings
    settings = tuple((k, repr(v)) for k, v in sorted(vars(view.cfg).items()) if k not in hidden)
    return method.name, shapes, settings
