"""A trained prefix of keys and values: one call's arguments rewritten, on transformers' own caches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from . import masks, sizes
from .prepend import Call

Pair = tuple[Tensor, Tensor]
Pairs = list[Pair]


def split(prefix: Tensor, cfg: Any) -> Pairs:
    """A stored prefix (n, 2 * layers * width), keys of a layer, values, the next -> one pair a layer, each
    (1, heads, n, head width). In an encoder-decoder, layer i reads the pair 2i modulo the number of layers."""
    layers, heads = cfg.num_layers, cfg.num_attention_heads
    slots = prefix.view(1, len(prefix), 2 * layers, heads, cfg.token_dim // heads).permute(2, 0, 3, 1, 4)
    read = [cfg.num_transformer_submodules * i % layers for i in range(layers)]
    return [(slots[2 * i], slots[2 * i + 1]) for i in read]


def put(cache: Any, pairs: Pairs, rows: int, dtype: torch.dtype) -> Any:
    """Write the prefix into an empty cache, once for every row; in an encoder-decoder before the decoder's
    tokens, not before the encoder's output."""
    own = getattr(cache, "self_attention_cache", cache)
    for layer, (keys, values) in enumerate(pairs):
        wide = (rows, -1, -1, -1)
        own.update(keys.to(dtype).expand(wide), values.to(dtype).expand(wide), layer)
    return cache


def fresh(both: bool) -> Any:
    """An empty cache; both: of an encoder-decoder."""
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if both else DynamicCache()


def rewrite(base: Any, pairs: Pairs, call: Call) -> Call:
    """The call with the prefix in its cache. A cache that holds anything holds the prefix already."""
    call = dict(call)
    call.pop("cache_position", None)  # counts without the prefix; the model counts right by itself
    both, n = sizes.encoder_decoder(base), pairs[0][0].shape[2]
    rows, length = _shape(call, both)
    past = call.get("past_key_values")
    start = 0 if past is None else int(past.get_seq_length())
    side = "decoder_" if both else ""
    given = call.get(f"{side}attention_mask")
    if start == 0:
        if past is None:
            keeps = call.get("use_cache") is not False and not checkpointed(base)
            past = fresh(both) if keeps else _read_only(len(pairs), both)
        call["past_key_values"] = put(past, pairs, rows, base.dtype)
    position = f"{side}position_ids"
    if call.get(position) is not None:
        call[position] = masks.shifted(call[position], n, prompt=False)
    elif start == 0 and sizes.accepts(base, position):
        counted = masks.after_padding(given, n)
        if counted is not None:
            call[position] = counted + sizes.first_position(base)
    call[f"{side}attention_mask"] = masks.cover(given, n, (start or n) + length, f"{side}attention_mask")
    return call


def _shape(call: Call, both: bool) -> tuple[int, int]:
    """(rows, length) of the tokens that follow the prefix."""
    side = "decoder_" if both else ""
    for key in (f"{side}input_ids", f"{side}inputs_embeds", "labels" if both else "", "input_ids"):
        if call.get(key) is not None:
            return tuple(call[key].shape[:2])
    raise AdapterError("a prefix goes before the input: give input_ids or inputs_embeds")


# -- gradient checkpointing: the layers run twice, so nothing they do may be remembered ---------------------


def checkpointed(base: nn.Module) -> bool:
    """Whether this call runs under gradient checkpointing."""
    return base.training and any(getattr(m, "gradient_checkpointing", False) for m in base.modules())


def _read_only(layers: int, both: bool) -> Any:
    """A cache whose layers hand out prefix + new, and keep the prefix alone."""
    from transformers import DynamicCache, EncoderDecoderCache
    from transformers.cache_utils import DynamicLayer

    class PrefixLayer(DynamicLayer):
        reads = 0

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
            if self.keys is None or self.values is None:
                return super().update(key_states, value_states, *args, **kwargs)
            self.reads += 1
            pairs = ((self.keys, key_states), (self.values, value_states))
            keys, values = (torch.cat(pair, dim=-2) for pair in pairs)
            return keys, values

    class PassingLayer(DynamicLayer):
        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Pair:
            return key_states, value_states

    class Forgetful(dict):
        def __setitem__(self, key: Any, value: Any) -> None:
            """Nothing is kept: the second run of a layer must see what the first saw."""

    def made(kind: type) -> Any:
        cache = DynamicCache()
        cache.layers = [kind() for _ in range(layers)]
        return cache

    if not both:
        return made(PrefixLayer)
    cache = EncoderDecoderCache(made(PrefixLayer), made(PassingLayer))
    cache.is_updated = Forgetful(dict.fromkeys(range(layers), False))
    return cache


@contextmanager
def kept_under_checkpointing(base: nn.Module, call: Call) -> Iterator[None]:
    """Lets checkpointed layers read the call's cache, which transformers takes from them otherwise.

    Raises AdapterError for a model or a setting under which the prefix would be lost or get no gradient.
    """
    if not checkpointed(base):
        yield
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    past = call["past_key_values"]
    layers: list[Any] = [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]
    used = [m._gradient_checkpointing_func for m in layers if m.gradient_checkpointing]
    if any(getattr(f, "keywords", {}).get("use_reentrant") for f in used):
        raise AdapterError(
            "reentrant gradient checkpointing gives a prefix no gradient; use gradient_checkpointing_enable("
            '{"use_reentrant": False})'
        )
    hooks = []
    for m in layers:
        m._can_checkpoint_with_cache = True  # it may read, and ours keeps nothing
        if not sizes.encoder_decoder(base) and sizes.accepts(m, "past_key_values"):
            hooks.append(m.register_forward_pre_hook(_giving(past), with_kwargs=True))
    try:
        yield
    finally:
        for m in layers:
            del m._can_checkpoint_with_cache
        for hook in hooks:
            hook.remove()
    own: Any = getattr(past, "self_attention_cache", past)
    if not all(layer.reads for layer in own.layers):
        raise AdapterError(
            f"{type(base).__name__} drops the cache under gradient checkpointing, and with it the prefix; "
            "call gradient_checkpointing_disable(), or train with PROMPT_TUNING"
        )


def _giving(past: Any) -> Callable[[nn.Module, tuple, Call], tuple[tuple, Call]]:
    """A pre-hook that hands a layer the cache where its model left it out."""

    def hook(module: nn.Module, args: tuple, kwargs: Call) -> tuple[tuple, Call]:
        at = list(inspect.signature(module.forward).parameters).index("past_key_values")
        if at < len(args):
            return (*args[:at], past, *args[at + 1 :]), kwargs
        return args, {**kwargs, "past_key_values": past}

    return hook
