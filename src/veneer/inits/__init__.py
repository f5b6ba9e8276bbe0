"""LoRA's initial values, one file each: `fill(A, B, weight, scaling)` writes A (r, inp, *kernel) and B in place and
returns the base's new weight, or None where the base stays."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import AdapterError
from .settings import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, settle

if TYPE_CHECKING:
    from ..view import View

__all__ = ["CordaConfig", "EvaConfig", "LoftQConfig", "LoraGAConfig", "changes_base", "initial", "settle"]

# name -> does it change the base's weight
INITS = {
    "default": False,
    "random": False,
    "gaussian": False,
    "orthogonal": False,
    "pissa": True,
    "olora": True,
    "loftq": True,
    "eva": False,
    "corda": True,
    "lora_ga": True,
}


def _name(cfg: Any) -> str:
    """The file that an init_lora_weights value means."""
    value = cfg.init_lora_weights
    if isinstance(value, bool):
        return "default" if value else "random"
    name = str(value).lower()
    if re.fullmatch(r"pissa_niter_\d+", name):
        return "pissa"
    if name not in INITS or name in ("default", "random"):
        choices = [k for k in INITS if k not in ("default", "random")]
        near = get_close_matches(name, choices, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"Unknown initialization init_lora_weights={value!r}; use True, False, {', '.join(map(repr, choices))} "
            f"or 'pissa_niter_[number of iters]'{hint}"
        )
    return name


# what their papers call them
TITLES = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ"}


def title(cfg: Any) -> str:
    """The paper's name of a config's initial values."""
    name = _name(cfg)
    return TITLES.get(name, name)


def changes_base(cfg: Any) -> bool:
    return INITS[_name(cfg)]


def _draw_as_peft(A: Tensor, B: Tensor, p: View, cfg: Any) -> None:
    """Take from the global generator what peft takes before it sets the initial values: the numbers with which its
    modules come to life. With one seed, both libraries then start from the same A and shuffle the data alike."""
    import_module("veneer.inits.random").fill(A, B, lambda: A, p, cfg)
    if cfg.lora_bias:
        p.lora_B_bias.uniform_()


def initial(p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
    """Fill an adapter's A and B as init_lora_weights says; an embedding starts from its default whatever the name, as
    the files of such adapters expect of the base."""
    name, keys = _name(cfg), ("lora_A", "lora_B")
    if p.site.kind == "embedding":
        name, keys = "default" if name != "random" else name, ("lora_embedding_A", "lora_embedding_B")
    fill = import_module(f"veneer.inits.{name}").fill
    A, B = (getattr(*p.where[k]) for k in keys)
    try:
        with torch.no_grad():
            if name != "random":
                _draw_as_peft(A, B, p, cfg)
            if cfg.lora_bias:
                p.fill("lora_B_bias", torch.zeros_like(p.lora_B_bias))
            return fill(A, B, weight, p, cfg)
    except ValueError as e:
        raise AdapterError(f"{e} ({p.site!r}, init_lora_weights={cfg.init_lora_weights!r})") from e


def split_base(A: Tensor, B: Tensor, new_A: Tensor, new_B: Tensor, W: Tensor, p: View) -> Tensor:
    """Write factors that hold a part of the weight and return the rest: W - scaling * B A, in W's shape.

    new_A (r, columns), new_B (out, r). The rest is computed from the factors as stored, so that base plus adapter
    is the old weight up to one rounding.
    """
    A.copy_(new_A.reshape(A.shape))
    B.copy_(new_B.reshape(B.shape))
    part = B.flatten(1).float() @ A.flatten(1).float()
    return (W.flatten(1).float() - p.scaling * part).reshape(W.shape).to(W.dtype)


def matrix(W: Tensor, p: View) -> Tensor:
    """The weight as a float32 matrix (out, columns); refuses layers whose weight is not one matrix."""
    if p.site.experts > 1:
        raise ValueError("this initial value needs one matrix, not a stack of experts")
    if p.site.groups > 1:
        raise ValueError("this initial value needs a convolution without groups")
    if not W.is_floating_point():
        raise ValueError(f"this initial value needs a floating point weight, not {W.dtype}")
    if p.cfg.r > min(W.flatten(1).shape):
        raise ValueError(f"r={p.cfg.r} is more than the rank of a {tuple(W.flatten(1).shape)} weight")
    return W.flatten(1).float()
