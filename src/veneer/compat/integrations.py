"""What peft.utils.integrations offers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import init_empty_weights
from torch import nn

__all__ = ["init_empty_weights"]


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers runs under DeepSpeed's ZeRO-3."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


@contextmanager
def gather_params_ctx(param: Any, modifier_rank: int | None = 0, fwd_module: nn.Module | None = None) -> Iterator[None]:
    """Parameters that ZeRO-3 has sharded are whole inside the block."""
    if not check_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed  # type: ignore[import-not-found]

    with deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module):
        yield


_REGISTER = nn.Module.register_parameter, nn.Module.register_buffer


def skip_init_on_device(func: Callable[..., Any]) -> Callable[..., Any]:
    """A function inside which `init_empty_weights` has no effect."""

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        now = nn.Module.register_parameter, nn.Module.register_buffer
        nn.Module.register_parameter, nn.Module.register_buffer = _REGISTER  # type: ignore[method-assign]
        try:
            return func(*args, **kwargs)
        finally:
            nn.Module.register_parameter, nn.Module.register_buffer = now  # type: ignore[method-assign]

    return wrapper


def get_layer_device_map(model: Any) -> dict[int, Any] | None:
    """Layer number -> device, where accelerate has spread the model's layers over several."""
    from ..patterns import layer_index

    spread = getattr(model, "hf_device_map", None)
    if not spread or len(spread) <= 1:
        return None
    found = {layer_index(f"{name}.x"): device for name, device in spread.items()}
    return {index: device for index, device in found.items() if index is not None} or None


def dequantize_module_weight(module: nn.Module) -> nn.Parameter:
    """The layer's weight as ordinary numbers."""
    from ..site import site_of

    site = site_of(module, "")
    if site is None:
        raise TypeError(f"{type(module).__name__} has no weight that can be read as a matrix")
    return nn.Parameter(site.from_canonical(site.weight()), requires_grad=False)
