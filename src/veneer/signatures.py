"""A PeftModel's methods under the signatures of its base's, for tools that read arguments off them."""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import Any


def _update(model: Any, name: str) -> None:
    base = getattr(type(model.get_base_model()), name)
    own = getattr(type(model), name)

    @functools.wraps(own)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    called.__doc__ = base.__doc__
    called.__signature__ = inspect.signature(base)  # type: ignore[attr-defined]
    setattr(model, name, MethodType(called, model))


def update_forward_signature(model: Any) -> None:
    """Give model.forward the signature and docstring of the base's forward."""
    _update(model, "forward")


def update_generate_signature(model: Any) -> None:
    """The same for generate."""
    _update(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """method: "forward", "generate" or "all". Raises ValueError for another."""
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method {method!r} is not supported please choose one of 'forward', 'generate', 'all'")
    for name in ("forward", "generate") if method == "all" else (method,):
        _update(model, name)
