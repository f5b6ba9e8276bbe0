"""From a data file to a trained adapter: `load_recipe` checks a recipe, `run` trains it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.train.errors import BaseModelError, DataError, RecipeError
    from veneer.train.loop import run
    from veneer.train.recipe import Recipe, load_recipe
    from veneer.train.result import RunResult, Sample

__all__ = [
    "BaseModelError",
    "DataError",
    "Recipe",
    "RecipeError",
    "RunResult",
    "Sample",
    "load_recipe",
    "run",
]

_HOME = {
    "BaseModelError": "errors",
    "DataError": "errors",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "RunResult": "result",
    "Sample": "result",
    "load_recipe": "recipe",
    "run": "loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
