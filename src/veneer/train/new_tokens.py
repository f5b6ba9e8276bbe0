"""`tokens: ["<ACT>"]`: new tokens whose rows of the embedding and the head train, and nothing else of them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.train.recipe import Recipe

__all__ = ["add_tokens", "check_tokens", "make_rows", "train_rows"]


def check_tokens(recipe: Recipe, cls: type) -> None:
    """Check what can be told without a tokenizer. Raises RecipeError."""
    tokens = recipe.tokens
    for number, token in enumerate(tokens):
        if not token.strip() or token != token.strip():
            problem = f"{token!r} is empty, or begins or ends with a space"
            raise recipe.error("tokens", problem=problem, hint="Give the token's text alone, such as <ACT>.")
        if token in tokens[:number]:
            raise recipe.error("tokens", problem=f"{token!r} is named twice", hint="Name it once.")
    if tokens and not {"trainable_token_indices", "token_indices"} & {f.name for f in dataclasses.fields(cls)}:
        problem = f"{recipe.adapter.method} cannot train the rows of new tokens"
        raise recipe.error("tokens", problem=problem, hint="Set `adapter.method` to lora or trainable_tokens.")


def add_tokens(recipe: Recipe, tokenizer: Any) -> list[int]:
    """Add the recipe's tokens to a tokenizer; returns their ids, in their order.

    Each is one token wherever its text stands, and an answer shows it like any other text.

    Raises:
        RecipeError: one is in the vocabulary already.
    """
    from transformers import AddedToken

    if not recipe.tokens:
        return []
    known = tokenizer.get_vocab()
    for token in recipe.tokens:
        if token in known:
            hint = f"Leave it out, or train its row: `adapter.trainable_token_indices: [{known[token]}]`."
            raise recipe.error("tokens", problem=f"{token!r} is token {known[token]} already", hint=hint)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in recipe.tokens])
    ids: list[int] = tokenizer.convert_tokens_to_ids(recipe.tokens)
    return ids


def make_rows(model: Any, ids: list[int]) -> None:
    """Rows for new tokens in a model, all at the mean of the rows of the tokens before them."""
    from veneer.grow import grow, set_to_mean

    if ids:
        grow(model, max(ids) + 1)
        set_to_mean(model, ids, min(ids))  # a table may have had spare rows, which hold anything


def train_rows(config: Any, model: Any, ids: list[int]) -> None:
    """Tell an adapter's config to train these rows, of the head too where it has a table of its own."""
    from veneer.grow import path_of, vocabulary_modules

    if not ids:
        return
    modules = {id(module.weight): module for module in reversed(vocabulary_modules(model))}  # tied: the embedding
    paths = [path_of(model, module) for module in reversed(modules.values())]
    if "token_indices" in {field.name for field in dataclasses.fields(config)}:
        config.token_indices = [*config.token_indices, *(i for i in ids if i not in config.token_indices)]
        config.target_modules = config.target_modules or paths
        return
    asked = config.trainable_token_indices or []
    if isinstance(asked, dict):
        config.trainable_token_indices = {**{path: [] for path in paths}, **asked}
    else:
        config.trainable_token_indices = {path: list(asked) if number == 0 else [] for number, path in enumerate(paths)}
    for path in paths:
        rows = config.trainable_token_indices[path]
        config.trainable_token_indices[path] = [*rows, *(i for i in ids if i not in rows)]
