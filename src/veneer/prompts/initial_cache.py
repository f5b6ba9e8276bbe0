"""A trained prefix that starts from a text's own keys and values, and prefixes joined one after the other."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError
from ..files import BIN_NAME, SAFE_NAME, write_bin, write_json, write_tensors

KINDS = ("CARTRIDGE", "PREFIX_TUNING")
SAME = ("num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules")


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first tokens of a cache as a stored prefix, (num_virtual_tokens, 2 * layers * heads * head width).

    past_key_values: a transformers cache of one sequence, or (keys, values) pairs, each (1, heads, length, head width).
    Raises TypeError for another type, ValueError for more sequences or fewer tokens.
    """
    if num_virtual_tokens < 1:
        raise ValueError(f"num_virtual_tokens={num_virtual_tokens} must be at least 1")
    pairs = _pairs(past_key_values)
    rows, _, length, _ = pairs[0][0].shape
    if rows != 1:
        raise ValueError(
            f"This helper expects `past_key_values` from a single-sequence prefill (batch=1). Got batch={rows}."
        )
    if length < num_virtual_tokens:
        raise ValueError(f"Need at least {num_virtual_tokens} cached tokens, got {length}.")
    kept = [t[0, :, :num_virtual_tokens].transpose(0, 1).flatten(1) for pair in pairs for t in pair]
    return torch.cat(kept, dim=1).detach()


def _pairs(past: Any) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) a layer, of a transformers cache or a legacy tuple."""
    own = getattr(past, "self_attention_cache", past)
    layers = getattr(own, "layers", own)
    if isinstance(layers, list | tuple):
        found = [(x[0], x[1]) if isinstance(x, list | tuple) else (x.keys, x.values) for x in layers]
        if found and all(torch.is_tensor(k) and torch.is_tensor(v) for k, v in found):
            return found
    raise TypeError(
        f"Unsupported `past_key_values` of type {type(past).__name__}: give a filled transformers cache or a list of "
        "(keys, values) pairs, one a layer."
    )


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Start a CARTRIDGE or PREFIX_TUNING adapter (default: the active one) from the first tokens of a cache.

    num_virtual_tokens must be the adapter's own, where it is given. Returns the stored prefix.
    """
    from . import load_tensors

    name, cfg = _prefix_adapter(model, adapter_name)
    n = cfg.num_virtual_tokens if num_virtual_tokens is None else num_virtual_tokens
    if n != cfg.num_virtual_tokens:
        raise ValueError(
            f"Invalid `prompt_embeddings` shape. Expected ({cfg.num_virtual_tokens}, hidden), got {n} virtual tokens; "
            f"adapter {name!r} has {cfg.num_virtual_tokens}."
        )
    prefix = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=n)
    load_tensors(model, name, {"prompt_embeddings": prefix})
    return prefix


def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Start a CARTRIDGE or PREFIX_TUNING adapter from the base's own cache of a text's first tokens.

    use_chat_template: the text as a system message, where the tokenizer has a template. max_length: cut the text to so
    many tokens before the base reads it. Returns the stored prefix; raises ValueError for a text that is too short.
    """
    name, cfg = _prefix_adapter(model, adapter_name)
    ids = _ids(tokenizer, text, use_chat_template, max_length)
    if ids.shape[1] < cfg.num_virtual_tokens:
        raise ValueError(
            f"Need at least {cfg.num_virtual_tokens} cached tokens, got {ids.shape[1]}; give a longer text."
        )
    base = model.get_base_model()
    ids = ids.to(base.get_input_embeddings().weight.device)
    with _evaluating(base), torch.no_grad():
        past = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    return initialize_kv_prefix_from_past_key_values(
        model, adapter_name=name, past_key_values=past, num_virtual_tokens=num_virtual_tokens
    )


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | os.PathLike], *, output_path: str | os.PathLike, safe_serialization: bool = True
) -> None:
    """Join saved cartridges, in this order, into one of all their tokens; only the first's frozen tokens stay frozen.

    Raises ValueError for fewer than two, for other methods' adapters and for sizes that differ.
    """
    from ..config import CONFIG_NAME, PeftConfig
    from ..state import read

    if len(adapter_paths) < 2:
        raise ValueError("Need at least 2 adapters to compose.")
    configs = [PeftConfig.from_pretrained(p) for p in adapter_paths]
    for path, cfg in zip(adapter_paths, configs, strict=True):
        if cfg.peft_type != "CARTRIDGE":
            raise ValueError(f"Adapter at {str(path)!r} is not a CARTRIDGE adapter (got {cfg.peft_type}).")
        for key in SAME:
            if getattr(cfg, key) != getattr(configs[0], key):
                raise ValueError(
                    f"Incompatible CARTRIDGE configs for attribute {key!r}: {getattr(configs[0], key)} in "
                    f"{str(adapter_paths[0])!r}, {getattr(cfg, key)} in {str(path)!r}."
                )
    joined = torch.cat([read(p)[0]["prompt_embeddings"] for p in adapter_paths])
    out = copy.copy(configs[0])
    out.num_virtual_tokens, out.inference_mode = len(joined), True
    folder = os.fspath(output_path)
    if safe_serialization:
        write_tensors(os.path.join(folder, SAFE_NAME), {"prompt_embeddings": joined})
    else:
        write_bin(os.path.join(folder, BIN_NAME), {"prompt_embeddings": joined})
    write_json(os.path.join(folder, CONFIG_NAME), out.to_file_dict())


def _prefix_adapter(model: Any, adapter_name: str | None) -> tuple[str, Any]:
    """The adapter's name and config, if it can start from a cache."""
    name = model.active_adapters[0] if adapter_name is None else model.known(adapter_name)[0]
    cfg = model.peft_config[name]
    if str(getattr(cfg.peft_type, "value", cfg.peft_type)) not in KINDS:
        raise ValueError(f"Adapter {name!r} must be a CARTRIDGE or PREFIX_TUNING adapter (got {cfg.peft_type}).")
    if getattr(cfg, "prefix_projection", False):
        raise ValueError(
            "Initialization from KV cache is not supported for prefix tuning with `prefix_projection=True`."
        )
    if cfg.num_transformer_submodules != 1:
        raise AdapterError("an encoder-decoder's layers read some stored pairs twice, so a cache cannot start them")
    return name, cfg


def _ids(tokenizer: Any, text: str, chat: bool, max_length: int | None) -> Tensor:
    """(1, length) token ids."""
    if chat and getattr(tokenizer, "chat_template", None):
        message = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(
            message, tokenize=True, add_generation_prompt=False, return_dict=False, return_tensors="pt"
        )
        return ids[:, :max_length]
    return tokenizer(text, return_tensors="pt", truncation=max_length is not None, max_length=max_length)["input_ids"]


@contextmanager
def _evaluating(base: Any) -> Iterator[None]:
    training = base.training
    base.eval()
    try:
        yield
    finally:
        base.train(training)
