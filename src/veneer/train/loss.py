"""The training loss: the model's own, with a language model's head applied only where there is a label.

A head over 50,000 words is a large part of a small model's work, and most tokens of a prompt have no label.
The reference is `own_loss`; `labelled_loss` equals it to rounding and falls back to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from veneer.train.encode import IGNORE
from veneer.train.head_loss import LogitsChange, chunked_head

__all__ = ["base_of", "labelled_logits", "labelled_loss", "own_loss", "takes_labelled_rows"]

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
    base = base_of(model)
    if not takes_labelled_rows(base) or _method_has_a_loss(model):
        return own_loss(model, batch, items, shifted=True)
    targets = batch["labels"][:, 1:]
    wanted = targets != IGNORE
    more: dict[str, Any] = {} if items is None else {"num_items_in_batch": items}
    with _only(base.get_output_embeddings(), wanted, batch["labels"].shape[1]):
        try:
            with chunked_head(base):
                return model(**batch, shift_labels=targets[wanted].unsqueeze(0), **more).loss
        except LogitsChange:
            return model(**batch, shift_labels=targets[wanted].unsqueeze(0), **more).loss


def labelled_logits(model: torch.nn.Module, batch: Batch, shifted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of the labelled tokens alone, (labelled, vocabulary), and their labels, row after row.

    ``shifted`` says that a label is predicted one place earlier.
    """
    rest = {key: value for key, value in batch.items() if key != "labels"}
    labels, base = batch["labels"], base_of(model)
    targets = labels[:, 1:] if shifted else labels
    wanted = targets != IGNORE
    if _has_head(base):
        with _only(base.get_output_embeddings(), wanted, labels.shape[1]):
            return model(**rest).logits.squeeze(0), targets[wanted]
    logits = model(**rest).logits[:, -labels.shape[1] :]
    return (logits[:, :-1] if shifted else logits)[wanted], targets[wanted]


@contextmanager
def _only(head: torch.nn.Module, wanted: torch.Tensor, length: int) -> Iterator[None]:
    """Inside, ``head`` gets the hidden states of the wanted places alone, as one row.

    ``wanted`` is (rows, length), or (rows, length - 1) where the last place is never asked for.
    """

    def select(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0][:, -length:][:, : wanted.shape[1]]  # virtual tokens of a prompt method come first
        return (hidden[wanted].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _has_head(base: Any) -> bool:
    """Whether a model without a decoder of its own ends in a linear layer over the vocabulary."""
    from transformers import PreTrainedModel

    if not isinstance(base, PreTrainedModel) or base.config.is_encoder_decoder:
        return False
    return isinstance(base.get_output_embeddings(), torch.nn.Module)


def takes_labelled_rows(base: torch.nn.Module) -> bool:
    """Whether a model is a decoder with a head, the usual causal loss and a forward that passes options."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    if not _has_head(base) or base.loss_function is not ForCausalLMLoss:  # type: ignore[comparison-overlap]
        return False
    kinds = [parameter.kind for parameter in inspect.signature(type(base).forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def _method_has_a_loss(model: torch.nn.Module) -> bool:
    """Whether the active adapter's method makes the output's loss from all logits (CPT, Shadow)."""
    from accelerate.utils import extract_model_from_parallel

    from veneer import PeftModel, registry
    from veneer.kinds import Attach, Prompt

    inner = extract_model_from_parallel(model)
    if not isinstance(inner, PeftModel) or not inner.active_adapters:
        return False
    method = registry.method_of(inner.active_peft_config)
    return isinstance(method, Prompt | Attach) and type(method).finish not in (Prompt.finish, Attach.finish)


def base_of(model: torch.nn.Module) -> Any:
    """The base of an adapted model, wrapped by accelerate or not; another model itself."""
    from accelerate.utils import extract_model_from_parallel

    from veneer import PeftModel

    inner = extract_model_from_parallel(model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner
