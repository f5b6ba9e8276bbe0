"""peft's constants and tables, from the registry and from veneer's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..config import PeftType
from ..kinds import Prompt
from ..targets import ALL_LINEAR
from . import kinds

INCLUDE_LINEAR_LAYERS_SHORTHAND = ALL_LINEAR
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
DUMMY_TARGET_MODULES = "dummy-target-modules"
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = tuple(n for n in dir(torch) if n.startswith("float8_") and isinstance(getattr(torch, n), torch.dtype))


def _is_prompt(name: str) -> bool:
    return isinstance(registry.method(name), Prompt)


def _prefix(name: str) -> str:
    method = registry.method(name)
    return f"{name.lower()}_" if isinstance(method, Prompt) or not method.prefix else method.prefix


PEFT_TYPE_TO_PREFIX_MAPPING: dict[Any, str] = {PeftType[n]: _prefix(n) for n in registry.types()}
PEFT_TYPE_TO_TUNER_MAPPING: dict[Any, type] = {
    PeftType[n]: kinds.model_class(n) for n in registry.types() if not _is_prompt(n)
}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = dict(PEFT_TYPE_TO_TUNER_MAPPING)  # every method on layers can be mixed


def bloom_model_postprocess_past_key_value(past_key_values: tuple[Tensor, ...]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Prefixes in the cache layout of old BLOOM models, to peft's numbers.

    past_key_values: tensors (2, batch, heads, n, width), of which together the first half are the keys; returns a pair
    a layer: keys (batch * heads, width, n), values (batch * heads, n, width).
    """
    both = torch.cat(past_key_values)
    layers, batch, heads, n, width = both.shape
    keys, values = both[: layers // 2], both[layers // 2 :]
    rows = batch * heads
    keys = keys.transpose(2, 3).reshape(-1, rows, width, n)
    return tuple(zip(keys, values.reshape(-1, rows, n, width)))


def starcoder_model_postprocess_past_key_value(past_key_values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Prefixes in the cache layout of old multi-query GPTBigCode models: (batch, n, keys and values side by side), of
    the first head of (2, batch, heads, n, width)."""
    return tuple(pair[:, :, 0].permute(1, 2, 0, 3).flatten(2) for pair in past_key_values)


TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}  # no model needs one any more
