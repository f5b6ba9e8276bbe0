"""A vocabulary that an adapter extends: room for new tokens' rows in a base's embedding and head.

New rows start at the mean of the old ones, in which a new token is neither likely nor unlikely (Hewitt 2021,
"Initializing new word embeddings for pretrained language models").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .methods.trainable_tokens import TrainableTokensConfig

__all__ = ["grow", "make_room", "path_of", "rows_needed", "set_to_mean", "trains_rows", "vocabulary_modules"]


def vocabulary_modules(model: Any) -> list[nn.Module]:
    """The modules with one row a token: the input embedding and the output head, where the model has them."""
    get_in, get_out = (getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output"))
    try:
        found = [get() for get in (get_in, get_out) if get is not None]
    except NotImplementedError:  # transformers' word for a model without tokens (ResNet)
        return []
    return [module for module in found if module is not None]


def path_of(model: nn.Module, module: nn.Module) -> str:
    return next(path for path, m in model.named_modules() if m is module)


def grow(model: Any, rows: int) -> None:
    """Give the embedding and the head ``rows`` rows, the new ones at the mean of the old; never fewer than before."""
    old = model.get_input_embeddings().weight.shape[0]
    if rows > old:
        model.resize_token_embeddings(rows, mean_resizing=False)
        set_to_mean(model, range(old, rows), old)


def set_to_mean(model: Any, ids: Sequence[int], known: int) -> None:
    """Set the rows ``ids`` of the embedding and the head to the mean of the first ``known``, biases too."""
    done: set[int] = set()
    with torch.no_grad():
        for module in vocabulary_modules(model):
            for tensor in (module.weight, getattr(module, "bias", None)):
                if isinstance(tensor, Tensor) and id(tensor) not in done:
                    done.add(id(tensor))
                    tensor[list(ids)] = tensor[:known].float().mean(0).to(tensor.dtype)


def _asked(model: Any, config: Any) -> Iterator[tuple[str, Sequence[int]]]:
    """(module's path, its trained rows) as a config asks for them."""
    rows = getattr(config, "trainable_token_indices", None) or ()
    if isinstance(rows, dict):
        yield from rows.items()
    elif rows:
        yield path_of(model, model.get_input_embeddings()), rows
    if isinstance(config, TrainableTokensConfig) and config.token_indices:
        named = config.target_modules or path_of(model, model.get_input_embeddings())
        for path in [named] if isinstance(named, str) else named:
            yield path, config.token_indices


def rows_needed(model: Any, config: Any) -> int:
    """How many rows the vocabulary must have for the token rows that an adapter's config trains; 0 for none."""
    if getattr(model, "resize_token_embeddings", None) is None:
        return 0
    paths = [path_of(model, module) for module in vocabulary_modules(model)]
    asked = list(_asked(model, config))
    needed = [max(ids) + 1 for name, ids in asked if ids and any(f".{p}".endswith(f".{name}") for p in paths)]
    return max(needed, default=0)


def make_room(model: Any, config: Any) -> None:
    """Before an adapter with new tokens is loaded onto a base that does not know them: grow the base's vocabulary."""
    needed = rows_needed(model, config)
    if needed:
        grow(model, needed)


def trains_rows(module: Any, adapter: str, rows: Sequence[int]) -> bool:
    """Whether an adapter trains all of these rows of an embedding or a head."""
    layer = getattr(module, "token_adapter", module)
    entries = getattr(layer, "entries", {})
    cfg = layer.view(adapter).cfg if adapter in entries else None
    return isinstance(cfg, TrainableTokensConfig) and set(rows) <= set(cfg.token_indices)
