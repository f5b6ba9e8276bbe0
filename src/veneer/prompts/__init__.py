"""Prompt methods on a model: what PeftModel calls.

`peft_model.base_model` is the transformers model itself, `peft_model.prompt_encoder[adapter]` the method's
module. A call to the base is rewritten (prepend.py, cache.py); in `generate` a hook rewrites every step, so
that any search, beam width or growing cache of transformers works as without a prompt.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import registry
from ..errors import AdapterError
from ..kinds import Prompt
from ..storage import check_name
from . import cache, decoding, prepend, sizes

if TYPE_CHECKING:
    from ..model import PeftModel

Call = dict[str, Any]
Rewrite = Callable[[Call], Call]


def setup(peft_model: PeftModel, adapter_name: str, cfg: Any, fill: bool = True) -> None:
    """Fill in the config's sizes and make the adapter's encoder, beside the base's embedding, in float32.

    fill: False where a file's tensors follow. Raises AdapterError for sizes that are not the base's.
    """
    check_name(adapter_name)
    method, base = _method(cfg), peft_model.base_model
    sizes.fill(cfg, base, method.name, method.gives)
    if method.gives == "cache" and getattr(base, "get_input_embeddings", None) is None:  # it needs no words
        embedding, device = torch.nn.Module(), next(base.parameters()).device
    else:
        embedding = base.get_input_embeddings()
        device = embedding.weight.device
    made = method.encoder(cfg, embedding, fill and not cfg.inference_mode)
    peft_model.prompt_encoder[adapter_name] = made.to(device)


def forward(peft_model: PeftModel, cfg: Any, args: tuple, kwargs: Call) -> Any:
    """The base's output with the prompt in front.

    Virtual tokens (not a cache) are positions of the output, too: logits of tokens are (rows, n + length, k),
    of which the last `length` belong to the input. task_ids: one task number a row, for methods with several.
    """
    base = peft_model.base_model
    call = dict(zip(inspect.signature(base.forward).parameters, args, strict=False)) | kwargs
    method = _method(cfg)
    own = {name: call.pop(name, None) for name in method.takes}
    call = _rewriter(peft_model, cfg, call.pop("task_ids", None), _task(cfg))(call)
    with cache.kept_under_checkpointing(base, call) if method.gives == "cache" else nullcontext():
        return method.finish(cfg, call, own, base)


def generate(peft_model: PeftModel, cfg: Any, args: tuple, kwargs: Call) -> Any:
    """The base's generate with the prompt in front; the tokens returned are those without a prompt's."""
    base, method = peft_model.base_model, _method(cfg)
    kwargs = dict(zip(inspect.signature(base.generate).parameters, args, strict=False)) | kwargs
    tasks = kwargs.pop("task_ids", None)
    for name in method.takes:
        kwargs.pop(name, None)
    if cache.checkpointed(base):
        raise AdapterError("generate in training mode under gradient checkpointing has no cache; call model.eval()")
    rewrite = _rewriter(peft_model, cfg, tasks, None)
    before_encoder = sizes.encoder_decoder(base) and method.gives == "prompt"
    if before_encoder:
        kwargs = _encoder_input(base, kwargs, rewrite)  # generate runs the encoder by itself
    n = 0 if before_encoder else cfg.num_virtual_tokens
    with decoding.prompted(base, n, rewrite, kwargs.get("past_key_values")):
        return base.generate(**decoding.make_room(base, kwargs, n))


def get_prompt(peft_model: PeftModel, batch_size: int, task_ids: Tensor | None = None) -> Any:
    """The active adapter's prompt for a batch: (rows, n, width), or a cache that holds it."""
    cfg = peft_model.active_peft_config
    method, encoder = _method(cfg), peft_model.prompt_encoder[peft_model.active_adapters[0]]
    base = peft_model.base_model
    if method.gives == "cache":
        made = cache.fresh(sizes.encoder_decoder(base))
        return cache.put(made, method.cache(encoder, cfg), batch_size, base.dtype)
    return _expanded(method.prompt(encoder, cfg, _per_row(task_ids, batch_size)), batch_size)


def saved_tensors(peft_model: PeftModel, adapter: str, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What the adapter's file holds: "prompt_embeddings" (n, width), finished, and the method's own. given: a state
    dict of the model, gathered from shards, say, whose tensors stand in for the encoder's own."""
    cfg, encoder = peft_model.peft_config[adapter], peft_model.prompt_encoder[adapter]
    if given is not None:
        encoder = _with(encoder, given, f"prompt_encoder.{adapter}.")
    training = encoder.training
    encoder.eval()  # a file holds the prompt as it is used, without dropout
    try:
        with torch.no_grad():
            saved = _method(cfg).saved(encoder, cfg)
    finally:
        encoder.train(training)
    return {name: t.detach() for name, t in saved.items()}


def _with(encoder: torch.nn.Module, given: Mapping[str, Tensor], start: str) -> torch.nn.Module:
    """A copy of the encoder that holds the tensors under `start`. Raises AdapterError where some are missing."""
    own = {k.removeprefix(start): t.detach() for k, t in given.items() if k.startswith(start)}
    missing = [k for k in encoder.state_dict() if k not in own]
    if missing:
        raise AdapterError(f"the state dict given to save has no {start}{missing[0]} ({len(missing)} are missing)")
    out = copy.deepcopy(encoder)
    out.load_state_dict(own, assign=True)
    return out


def trained(peft_model: PeftModel, adapter: str) -> list[torch.nn.Parameter]:
    """The adapter's parameters that training changes."""
    return _method(peft_model.peft_config[adapter]).trained(peft_model.prompt_encoder[adapter])


def load_tensors(peft_model: PeftModel, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Put a file's tensors into the adapter. Raises AdapterError for a shape that does not fit."""
    cfg, old = peft_model.peft_config[adapter], peft_model.prompt_encoder[adapter]
    if any(p.is_meta for p in old.parameters()):  # the base's weights come after the adapter's
        old.to_empty(device="cpu")
    new = _method(cfg).loaded(old, cfg, tensors)
    if new is not old:
        trains = any(p.requires_grad for p in old.parameters())
        peft_model.prompt_encoder[adapter] = new.requires_grad_(trains).train(old.training)


def _method(cfg: Any) -> Prompt:
    made = registry.method_of(cfg)
    assert isinstance(made, Prompt)  # PeftModel sends prompt configs alone here
    return made


def _task(cfg: Any) -> str | None:
    return None if cfg.task_type is None else str(getattr(cfg.task_type, "value", cfg.task_type))


def _expanded(prompt: Tensor, rows: int) -> Tensor:
    return prompt.expand(rows, -1, -1) if len(prompt) == 1 else prompt


def _per_row(tasks: Tensor | None, rows: int) -> Tensor | None:
    """Task numbers for a batch that a search has widened."""
    if tasks is None or len(tasks) == rows:
        return tasks
    if not len(tasks) or rows % len(tasks):
        raise AdapterError(f"task_ids has {len(tasks)} entries and the batch {rows} rows; give one task number a row")
    return tasks.repeat_interleave(rows // len(tasks))


def _rewriter(peft_model: PeftModel, cfg: Any, tasks: Tensor | None, task: str | None) -> Rewrite:
    """A call's arguments -> the base's, the prompt in front."""
    method, encoder = _method(cfg), peft_model.prompt_encoder[peft_model.active_adapters[0]]
    base = peft_model.base_model
    if method.gives == "cache":
        return lambda call: cache.rewrite(base, method.cache(encoder, cfg), call)
    n = cfg.num_virtual_tokens  # an encoder-decoder's other half, for the decoder, is stored and not read

    def make(rows: int) -> Tensor:
        return _expanded(method.prompt(encoder, cfg, _per_row(tasks, rows)), rows)[:, :n]

    return lambda call: prepend.rewrite(base, make, n, call, task)


def _encoder_input(base: Any, kwargs: Call, rewrite: Rewrite) -> Call:
    """generate's arguments with the encoder's input as embeddings, the prompt in front."""
    ids = kwargs.pop("inputs", None)
    ids = kwargs.get("input_ids") if ids is None else ids
    pad = base.config.pad_token_id
    if kwargs.get("attention_mask") is None and ids is not None and pad is not None:
        kwargs["attention_mask"] = (ids != pad).long()
    call = {"input_ids": ids, "inputs_embeds": kwargs.get("inputs_embeds")}
    new = rewrite({**call, "attention_mask": kwargs.get("attention_mask")})
    kwargs.pop("input_ids", None)
    return {**kwargs, **{k: v for k, v in new.items() if v is not None}}
