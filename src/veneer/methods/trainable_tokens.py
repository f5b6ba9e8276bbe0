"""Trainable tokens: chosen rows of an embedding are trained, the rest of the table stays as it is.

    W'[token_indices] = trainable_tokens_delta

    trainable_tokens_delta (tokens, width)   the finished rows, not their change; ordered as token_indices

On a linear layer (an output head) the rows are outputs. The look-up replaces what it found, so the table is
never copied. Merges exactly. Where a head is tied to the embedding it uses the same rows (tokens.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import PeftConfig
from ..errors import AdapterError
from ..kinds import Reweight, Spec, Weights
from ..site import Site
from ..view import View


@dataclass
class TrainableTokensConfig(PeftConfig):
    """token_indices: the rows to train. target_modules: the embeddings, None for the model's input embedding.
    init_weights: True starts from the rows as they are, False from random ones."""

    token_indices: list[int] = field(default_factory=list)
    target_modules: list[str] | str | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "TRAINABLE_TOKENS"

    def for_layer(self, name: str) -> TrainableTokensConfig:
        return self


def input_embedding(model: nn.Module) -> str | None:
    """The path of a model's input embedding, or None where the model does not say."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        found = None if get is None else get()
    except NotImplementedError:  # transformers' answer for models without one
        return None
    return next((path for path, m in model.named_modules() if m is found), None) if found is not None else None


def _rows(site: Site) -> int:
    return site.inp if site.kind == "embedding" else site.out


def _original(p: View) -> Tensor:
    """The base's own rows of the trained ids, (tokens, width)."""
    W = p.site.weight().detach()
    table = W.T if p.site.kind == "embedding" else W
    return table[torch.tensor(p.cfg.token_indices, dtype=torch.int64, device=W.device)]


class TrainableTokens(Reweight):
    Config = TrainableTokensConfig
    derived: ClassVar[dict[str, Callable[[View], Any]]] = {"trainable_tokens_original": _original}
    sites = frozenset({"embedding", "linear"})
    prefix = "trainable_tokens_"
    example: ClassVar[dict[str, Any]] = {"target_modules": ["embed_tokens"], "token_indices": [5, 6, 7]}

    def prepare(self, cfg: Any, model: nn.Module, model_type: str | None) -> None:
        if cfg.target_modules is None:
            cfg.target_modules = input_embedding(model)
        if cfg.target_modules is None:
            raise AdapterError(
                f"Target modules embed_tokens not found in the base model. {type(model).__name__} names no input "
                "embedding; set target_modules to the layer's name"
            )

    def check(self, cfg: Any, site: Site) -> None:
        ids, rows = cfg.token_indices, _rows(site)
        bad = [i for i in ids if not 0 <= i < rows]
        if bad:
            raise IndexError(
                f"token_indices {bad[:5]} are out of range for {site!r}, which has {rows} rows "
                f"(0 to {rows - 1}); resize the embedding first, or correct them"
            )
        if len(set(ids)) < len(ids):
            twice = sorted({i for i in ids if ids.count(i) > 1})
            raise AdapterError(f"token_indices names {twice[:5]} more than once ({site!r}); one row has one value")

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        ids = torch.tensor(cfg.token_indices, dtype=torch.int64)
        in_order, slot = ids.sort()
        kept: dict[str, Any] = {"train": False, "save": False, "raw": True}
        width = site.out if site.kind == "embedding" else site.inp
        return {
            "trainable_tokens_delta": Spec((len(ids), width)),
            "trainable_tokens_sorted": Spec(tuple(ids.shape), value=in_order, **kept),
            "trainable_tokens_slot": Spec(tuple(ids.shape), value=slot, **kept),
        }

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        rows = _original(p)
        p.fill("trainable_tokens_delta", rows if cfg.init_weights else torch.randn_like(rows))
        return None

    def weight(self, p: View, W: Tensor) -> Tensor:
        rows = p.trainable_tokens_delta.to(W.dtype)[p.trainable_tokens_slot]
        if p.site.kind == "embedding":
            return W.index_copy(1, p.trainable_tokens_sorted, rows.T)
        return W.index_copy(0, p.trainable_tokens_sorted, rows)

    chained = True

    def merged(self, ps: Sequence[View], W: Tensor, b: Tensor | None) -> Weights:
        _disjoint(ps)
        return super().merged(ps, W, b)

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        _disjoint(ps)
        y = base(x, *args, **kwargs)
        for p in ps:
            if p.cfg.token_indices:
                y = _looked_up(p, x, y) if p.site.kind == "embedding" else _scored(p, x, y, base.bias())
        return y


def _looked_up(p: View, x: Tensor, y: Tensor) -> Tensor:
    """y with the rows of trained ids in their places. x: ids, any shape; y (*x.shape, width)."""
    known = p.trainable_tokens_sorted
    at = torch.searchsorted(known, x.to(known.dtype)).clamp_max(len(known) - 1)
    rows = F.embedding(p.trainable_tokens_slot[at], p.trainable_tokens_delta)
    return torch.where((known[at] == x).unsqueeze(-1), p.site.scale(rows).to(y.dtype), y)  # type: ignore[attr-defined]


def _scored(p: View, x: Tensor, y: Tensor, b: Tensor | None) -> Tensor:
    """y with the outputs of trained rows in their places; in place: logits are large and nothing keeps
    them."""
    known = p.trainable_tokens_sorted
    rows = p.trainable_tokens_delta[p.trainable_tokens_slot]
    if p.site.quantised:  # computes in its own way, and may hand out a view, which autograd does not let change
        change = F.linear(x.to(rows.dtype), rows - p.site.weight()[known].to(rows.dtype))
        return y.index_add(-1, known, change.to(y.dtype))
    part = F.linear(x.to(rows.dtype), rows, None if b is None else b[known].to(rows.dtype))
    return y.index_copy_(-1, known, part.to(y.dtype))


def _disjoint(ps: Sequence[View]) -> None:
    if len(ps) < 2:
        return
    seen: dict[int, str] = {}
    for p in ps:
        for i in p.cfg.token_indices:
            if i in seen:
                raise ValueError(
                    f"Token indices of adapter {p.name} are already defined and would result in undefined "
                    f"merging behavior: row {i} of {p.site!r} is also trained by adapter {seen[i]}. Only "
                    "disjoint token "
                    "indices can be active together"
                )
            seen[i] = p.name
