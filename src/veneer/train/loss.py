"""The training loss: the model's own, with a language model's head applied only where there is a label.

A head over 50,000 words is a large part of a small model's work, and most tokens of a prompt have no label.
The reference is `own_loss`; `labelled_loss` equals it to rounding and falls back to it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from veneer.train.encode import IGNORE

__all__ = ["labelled_loss", "own_loss", "takes_labelled_rows"]

Batch = dict[str, torch.Tensor]


def own_loss(model: torch.nn.Module, batch: Batch, items: torch.Tensor | float | None, shifted: bool) -> torch.Tensor:
    """The model's own loss of a batch, as a mean over its labels or as their sum divided by ``items``.

    ``shifted`` says that a label is predicted one place earlier, so that a row's first label is not counted.
    """
    loss = model(**batch).loss
    if items is None:
        return loss
    labels = batch["labels"][:, 1:] if shifted else batch["labels"]
    return loss * (labels != IGNORE).sum() / items


def labelled_loss(model: torch.nn.Module, batch: Batch, items: torch.Tensor | float | None) -> torch.Tensor:
    """The model's own causal loss from logits (labelled tokens, vocabulary), not (rows, length, vocabulary).

    The whole model runs as it is, adapters and all; only the hidden states that enter its head are replaced
    by those one place before a label, and the model's own loss function gets those labels.
    """
    base: Any = _base(model)
    if not takes_labelled_rows(base):
        return own_loss(model, batch, items, shifted=True)
    targets = batch["labels"][:, 1:]
    wanted = targets != IGNORE
    length = batch["labels"].shape[1]

    def select(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0][:, -length:][:, :-1]  # virtual tokens of a prompt method come first
        return (hidden[wanted].unsqueeze(0), *args[1:])

    head = base.get_output_embeddings()
    more: dict[str, Any] = {} if items is None else {"num_items_in_batch": items}
    handle = head.register_forward_pre_hook(select)
    try:
        return model(**batch, shift_labels=targets[wanted].unsqueeze(0), **more).loss
    finally:
        handle.remove()


def takes_labelled_rows(base: torch.nn.Module) -> bool:
    """Whether a model is a decoder with a head, the usual causal loss and a forward that passes options."""
    from transformers import PreTrainedModel
    from transformers.loss.loss_utils import ForCausalLMLoss

    if not isinstance(base, PreTrainedModel) or base.config.is_encoder_decoder:
        return False
    head = base.get_output_embeddings()
    if not isinstance(head, torch.nn.Module) or base.loss_function is not ForCausalLMLoss:
        return False
    kinds = [parameter.kind for parameter in inspect.signature(type(base).forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def _base(model: torch.nn.Module) -> torch.nn.Module:
    from accelerate.utils import extract_model_from_parallel

    from veneer import PeftModel

    inner = extract_model_from_parallel(model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner
