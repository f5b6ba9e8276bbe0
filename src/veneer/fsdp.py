"""Which modules FSDP shards by themselves."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from torch import nn


def no_split_modules(model: nn.Module) -> set[str]:
    """Class names that transformers says must stay on one device, of the model and of the models inside it."""
    found: set[str] = set()
    for module in model.modules():
        found.update(getattr(module, "_no_split_modules", None) or ())
    return found


def _trains_alone(module: nn.Module) -> bool:
    """A leaf with a trained weight: FSDP wants what trains apart from what is frozen."""
    weight = getattr(module, "weight", None)
    return not list(module.children()) and weight is not None and weight.requires_grad


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """A policy for FSDP: the prompt encoders, the blocks (FSDP_TRANSFORMER_CLS_TO_WRAP, else those that must not be
    split) and every trained leaf.

    Raises ValueError for a block class that the model does not have.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    from .methods.p_tuning import PromptEncoder
    from .methods.prefix_tuning import PrefixEncoder
    from .methods.prompt_tuning import PromptEmbedding

    asked = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(sorted(no_split_modules(model))))
    classes: set[Any] = {PrefixEncoder, PromptEncoder, PromptEmbedding}
    present = {type(m).__name__: type(m) for m in model.modules()}
    for name in filter(None, asked.split(",")):
        if name not in present:
            raise ValueError(
                f"Could not find the transformer layer class {name} to wrap in the model; set "
                "FSDP_TRANSFORMER_CLS_TO_WRAP to the names of its blocks"
            )
        classes.add(present[name])
    by_leaf = functools.partial(lambda_auto_wrap_policy, lambda_fn=_trains_alone)
    by_class = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=classes)
    return functools.partial(_or_policy, policies=[by_leaf, by_class])
