"""Virtual tokens in front of the input embeddings: one call's arguments rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from . import masks, sizes

IGNORE = -100  # the label that the loss leaves out
Call = dict[str, Any]


def past_length(call: Call) -> int:
    """Positions in the call's cache."""
    past = call.get("past_key_values")
    return 0 if past is None else int(past.get_seq_length())


def embeds(base: Any, call: Call) -> Tensor:
    """The call's input embeddings (rows, length, width), its input_ids taken out."""
    given, ids = call.pop("inputs_embeds", None), call.pop("input_ids", None)
    if given is not None:
        return given
    if ids is None:
        raise AdapterError("a prompt goes in front of the input: give input_ids or inputs_embeds")
    return base.get_input_embeddings()(ids)


def rewrite(base: Any, make: Callable[[int], Tensor], n: int, call: Call, task: str | None = None) -> Call:
    """The call with n virtual tokens in front. make(rows) -> (rows, n, width). A call that goes on from a
    cache has them in there already, and only its mask and positions grow."""
    call = dict(call)
    call.pop("cache_position", None)  # counts without the prompt; the model counts right by itself
    past = 0 if sizes.encoder_decoder(base) else past_length(call)
    if sizes.encoder_decoder(base) and call.get("encoder_outputs") is not None:
        total = call["encoder_outputs"][0].shape[1]
        return {**call, "attention_mask": masks.cover(call.get("attention_mask"), n, total)}
    if past:
        tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        call["attention_mask"] = masks.cover(call.get("attention_mask"), n, past + tokens.shape[1])
        if call.get("position_ids") is not None:
            call["position_ids"] = masks.shifted(call["position_ids"], n, prompt=False)
        return call
    tokens = embeds(base, call)
    rows, length = tokens.shape[:2]
    _positions(base, call, n)
    prompt = make(rows).to(tokens)
    call["inputs_embeds"] = torch.cat([prompt, tokens], dim=1)
    call["attention_mask"] = masks.cover(call.get("attention_mask"), n, n + length)
    if call.get("token_type_ids") is not None:
        call["token_type_ids"] = masks.front(call["token_type_ids"], n, 0)
    _labels(base, call, n, task)
    if task == "SEQ_CLS" and sizes.causal(base) and not sizes.encoder_decoder(base):
        _last_real_token_last(base, call)
    return call


def _positions(base: nn.Module, call: Call, n: int) -> None:
    given = call.get("position_ids")
    if given is not None:
        call["position_ids"] = masks.shifted(given, n, True, sizes.first_position(base))
    elif sizes.accepts(base, "position_ids"):
        counted = masks.after_padding(call.get("attention_mask"), 0)
        if counted is not None:
            first = sizes.first_position(base)
            call["position_ids"] = masks.shifted(counted + first, n, True, first)


def _labels(base: nn.Module, call: Call, n: int, task: str | None) -> None:
    """Labels of tokens get n ignored ones in front, answer positions move by n."""
    labels = call.get("labels")
    per_token = task in ("CAUSAL_LM", "TOKEN_CLS") or (task is None and not sizes.encoder_decoder(base))
    if per_token and labels is not None and labels.dim() == 2:
        call["labels"] = masks.front(labels, n, IGNORE)
    for key in ("start_positions", "end_positions"):
        if call.get(key) is not None:
            call[key] = call[key].clamp_min(0) + n


def _last_real_token_last(base: nn.Module, call: Call) -> None:
    """A decoder's classifier reads the last position of embeddings, so padding goes to the front."""
    mask = call.get("attention_mask")
    index = None if mask is None else masks.pads_first(mask)
    if mask is None or index is None:
        return
    rows, total = index.shape
    if sizes.accepts(base, "position_ids"):
        counted = call.get("position_ids")
        if counted is None:
            counted = torch.arange(total, device=index.device).expand(rows, total)
        call["position_ids"] = counted.expand(rows, total).gather(1, index)
    call["attention_mask"] = mask.gather(1, index)
    if call.get("token_type_ids") is not None:
        call["token_type_ids"] = call["token_type_ids"].gather(1, index)
    x = call["inputs_embeds"]
    call["inputs_embeds"] = x.gather(1, index[..., None].expand(rows, total, x.shape[-1]))
