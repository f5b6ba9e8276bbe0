"""The base's sizes that a prompt needs, read from its config."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..errors import AdapterError


def encoder_decoder(base: nn.Module) -> bool:
    return bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))


def backbone(base: Any) -> nn.Module:
    """The model under the task head; the model itself where it has none."""
    prefix = getattr(base, "base_model_prefix", "")
    return getattr(base, prefix) if prefix and prefix in base._modules else base


def accepts(module: nn.Module, name: str) -> bool:
    """Whether the module's forward has an argument of this name."""
    return name in inspect.signature(module.forward).parameters


def first_position(base: nn.Module) -> int:
    """The number of a sequence's first position: RoBERTa and its like keep those up to the padding's for it."""
    tables = (m for name, m in base.named_modules() if name.rpartition(".")[2] == "position_embeddings")
    kept = next((m.padding_idx for m in tables if isinstance(m, nn.Embedding)), None)
    return 0 if kept is None else kept + 1


def causal(base: nn.Module) -> bool:
    """Whether tokens see only those before them."""
    flags = {m.is_causal for m in base.modules() if isinstance(getattr(m, "is_causal", None), bool)}
    return True in flags if flags else accepts(backbone(base), "past_key_values")


def _first(config: Any, *names: str) -> int | None:
    """The first of these config fields that holds a number."""
    values = (getattr(config, n, None) for n in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


def text_config(base: nn.Module) -> Any:
    config = getattr(base, "config", None)
    if config is None:
        raise AdapterError(
            f"{type(base).__name__} has no config, from which a prompt's sizes are read; prompt methods need "
            "a transformers model"
        )
    return config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config


def _cache_sizes(config: Any, both: bool) -> dict[str, int | None]:
    """Layers, key/value heads and width (heads * head width) of the cache; both: its decoder's. Raises AdapterError
    where layers differ in them."""
    as_dict = config.to_dict() if callable(getattr(config, "to_dict", None)) else vars(config)
    differing = as_dict.get("per_layer_config") or {}  # layer -> what is its own
    apart = {"head_dim", "num_key_value_heads"} & {key for values in differing.values() for key in values}
    if apart:
        raise AdapterError(
            f"{type(config).__name__}: layers differ in {', '.join(sorted(apart))}, and a prefix has one width for "
            "all of them; use a method on layers, such as LORA"
        )
    own = ("decoder_layers", "num_decoder_layers") if both else ()
    heads = _first(config, *(("decoder_attention_heads",) if both else ()), "num_attention_heads")
    head_dim = _first(config, "head_dim", "d_kv")
    if head_dim is None and heads:
        head_dim = config.hidden_size // heads
    grouped = _first(config, "num_key_value_heads")
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        grouped = 1
    kv = grouped or heads
    return {
        "num_layers": _first(config, *own, "num_hidden_layers"),
        "num_attention_heads": kv,
        "token_dim": kv * head_dim if kv and head_dim else None,
    }


def fill(cfg: Any, base: Any, name: str, gives: str) -> None:
    """Write the base's sizes into the config. Raises AdapterError where a size given there, by the user or by
    a file, is not the base's."""
    n = cfg.num_virtual_tokens
    if not isinstance(n, int) or n < 1:
        raise AdapterError(f"{name}: num_virtual_tokens={n!r} must be a whole number of at least 1")
    config, both = text_config(base), encoder_decoder(base)
    if cfg.num_transformer_submodules is None:
        task = getattr(cfg.task_type, "value", cfg.task_type)
        cfg.num_transformer_submodules = 2 if task == "SEQ_2_SEQ_LM" or (task is None and both) else 1
    found: dict[str, int | None]
    if gives == "cache":
        runs = type(base).forward is not nn.Module.forward
        if runs and not (accepts(base, "past_key_values") or accepts(backbone(base), "past_key_values")):
            raise AdapterError(
                f"{name} puts keys and values before those of each attention, and {type(base).__name__} "
                "takes no past_key_values; use PROMPT_TUNING or LORA"
            )
        found = _cache_sizes(config, both)
        fixed = tuple(found)
    else:
        found = {
            "num_layers": _first(config, "num_hidden_layers", "num_layers"),
            "num_attention_heads": _first(config, "num_attention_heads", "num_heads"),
            "token_dim": base.get_input_embeddings().weight.shape[1],
        }
        fixed = ("token_dim",)
    for key, value in found.items():
        _settle(cfg, base, name, key, value, key in fixed)


def _settle(cfg: Any, base: nn.Module, name: str, key: str, value: int | None, fixed: bool) -> None:
    """One size; fixed: it decides a shape, so config and base must agree."""
    given, kind = getattr(cfg, key), type(base).__name__
    if fixed and value is None and given is None:
        raise AdapterError(f"{name}: {kind}'s config does not say {key}; give it in the adapter's config")
    if fixed and value is not None and given is not None and given != value:
        raise AdapterError(
            f"{name}: the adapter's config has {key}={given}, {kind} has {value}; it was made for another "
            "base, or the value should be left out"
        )
    setattr(cfg, key, value if given is None else given)
