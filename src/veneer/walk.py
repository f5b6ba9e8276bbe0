"""One pass over a model's modules that stays out of the adapters' own containers, so that its cost is that of the base
model, however many adapters it holds."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["walk"]


def walk(model: nn.Module) -> list[tuple[str, Any]]:
    """(path, module) as named_modules gives them, without what wrappers of layers hold beside their base layer.

    A module that stands in several places is listed under its first path.
    """
    found: list[tuple[str, Any]] = []
    _into("", model, found, set())
    return found


def _into(path: str, module: nn.Module, found: list[tuple[str, Any]], seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    found.append((path, module))
    children = module._modules
    if not children:
        return
    stem = f"{path}." if path else ""
    if getattr(type(module), "adapts_a_layer", False):
        _into(f"{stem}base_layer", children["base_layer"], found, seen)  # type: ignore[arg-type]
        return
    for name, child in children.items():
        if child is not None:
            _into(stem + name, child, found, seen)
