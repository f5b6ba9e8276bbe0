"""Ways to generate that count a cache's positions themselves: they count tokens, and the prompt stands apart.

To the model a cache is as long as it is. To generate, which cuts the input, the mask and drafts by that length, it is
as long as the tokens are, without the n of the prompt: so a search may go on from a cache, roll back a draft of
speculative decoding, or fill a cache of a fixed size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..errors import AdapterError
from . import sizes
from .prepend import Call

GROWING = (None, "dynamic", "offloaded")
OWN = "get_seq_length"


def shorter(cache: Any, n: int, layer_idx: int = 0) -> int:
    """The cache's length without n positions of a prompt, which are there as soon as anything is."""
    held = int(getattr(type(cache), OWN)(cache, layer_idx))
    return held - n if held else 0


@contextmanager
def prompted(base: Any, n: int, rewrite: Callable[[Call], Call], given: Any = None) -> Iterator[None]:
    """Every call of the base inside is rewritten, and its cache hides n positions between calls.

    given: a cache to go on from. Afterwards every cache has its own length again.
    """
    seen: dict[int, Any] = {}

    def hide(cache: Any) -> None:
        if n and cache is not None:
            seen[id(cache)] = cache
            cache.__dict__[OWN] = partial(shorter, cache, n)

    def show(cache: Any) -> None:
        if cache is not None:
            cache.__dict__.pop(OWN, None)

    def before(_: Any, args: tuple, call: Call) -> tuple[tuple, Call]:
        show(call.get("past_key_values"))
        return args, _as_long_as_the_cache(base, rewrite(call))

    def after(_: Any, args: tuple, call: Call, out: Any) -> None:
        hide(call.get("past_key_values"))
        hide(getattr(out, "past_key_values", None))

    hooks = [
        base.register_forward_pre_hook(before, with_kwargs=True),
        base.register_forward_hook(after, with_kwargs=True),
    ]
    masks = base.__dict__.get("create_masks_for_generate")
    base.create_masks_for_generate = _mask_as_given  # for caches of a fixed size: the prompt's columns are to come
    hide(given)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        del base.create_masks_for_generate
        if masks is not None:
            base.create_masks_for_generate = masks
        for cache in seen.values():
            show(cache)


def _mask_as_given(attention_mask: Tensor | None = None, **others: Any) -> Tensor | None:
    return attention_mask


def _as_long_as_the_cache(base: Any, call: Call) -> Call:
    """A model without positions (BLOOM) reads distances off the mask, which covers a cache of a fixed size whole."""
    past, mask = call.get("past_key_values"), call.get("attention_mask")
    if sizes.encoder_decoder(base) or sizes.accepts(base, "position_ids"):
        return call
    if past is None or mask is None or not past.is_compileable:
        return call
    ahead = past.get_max_length() - mask.shape[1]
    return {**call, "attention_mask": nn.functional.pad(mask, (0, ahead))} if ahead > 0 else call


def make_room(base: Any, kwargs: Call, n: int) -> Call:
    """generate's arguments with n more positions in a cache of a fixed size. Raises AdapterError for a kind of cache
    that has no place for a prompt."""
    configs = [c for c in (kwargs.get("generation_config"), base.generation_config) if c is not None]

    def asked(key: str) -> Any:
        return next((v for v in (kwargs.get(key), *(getattr(c, key, None) for c in configs)) if v is not None), None)

    kind = asked("cache_implementation")
    if kind == "quantized":
        raise AdapterError('generate(cache_implementation="quantized") has no place for a prompt; leave it out')
    if kind in GROWING:
        return kwargs
    made = {"disable_compile": True, **kwargs}  # calls are rewritten in Python, one by one
    if n:
        made["max_cache_len"] = max(asked("max_cache_len") or 0, _longest(base, kwargs, asked) + n)
    return made


def _longest(base: Any, kwargs: Call, asked: Callable[[str], Any]) -> int:
    """Tokens of input and output together, at most."""
    name = "decoder_input_ids" if sizes.encoder_decoder(base) else "input_ids"
    given = [t.shape[1] for key in (name, "inputs", "inputs_embeds") if (t := kwargs.get(key)) is not None]
    start = max(given, default=1)
    new = asked("max_new_tokens")
    return start + (max(20, int(asked("max_length") or 0)) if new is None else int(new))
