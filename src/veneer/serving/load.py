"""A base model with all the adapters that a server is to answer with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import PeftConfig, PromptLearningConfig
from ..errors import AdapterError

__all__ = ["load_served"]


def load_served(base: str, adapters: Mapping[str, str], dtype: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer). adapters: name -> folder, of any methods that act on layers.

    Raises BaseModelError for the base, AdapterError for an adapter that cannot share a batch.
    """
    from ..mixed import PeftMixedModel
    from ..opened import adapter_folder
    from ..train.bases import BaseRef, load_base, resolve_base

    ref = resolve_base(base)
    if dtype is not None:
        ref = BaseRef(ref.kind, ref.name, ref.path, ref.revision, dtype, ref.trust_remote_code)
    model, tokenizer = load_base(ref, "causal-lm")
    served: Any = None
    for name, source in adapters.items():
        folder = str(adapter_folder(source))
        config = PeftConfig.from_pretrained(folder)
        if isinstance(config, PromptLearningConfig):
            raise AdapterError(
                f"{name} ({folder}): {config.peft_type} puts tokens before the input, and rows of one batch cannot "
                "differ in that; serve it alone, merged or in a server of its own"
            )
        if served is None:
            served = PeftMixedModel.from_pretrained(model, folder, name)
        else:
            served.load_adapter(folder, name)
    return (model if served is None else served).eval(), tokenizer
