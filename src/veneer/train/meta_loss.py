"""The losses of the tasks on tensors without data: the same work and the same memory, no values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from veneer.train.head_loss import rows_at_once

__all__ = ["decoder_loss", "outputs_loss", "vocabulary_loss"]

Loss = Callable[[], torch.Tensor]


def _inputs(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def outputs_loss(model: Any, rows: int, tokens: int) -> Loss:
    """The sum of what the model puts out: logits, or hidden states."""

    def loss() -> torch.Tensor:
        out = model(**_inputs(rows, tokens))
        floats = [x for x in out.to_tuple() if isinstance(x, torch.Tensor) and x.requires_grad]
        return torch.stack([x.float().sum() for x in floats]).sum()

    return loss


def decoder_loss(model: Any, rows: int, tokens: int) -> Loss:
    """An encoder-decoder's own loss, source and target equally long."""
    labels = torch.zeros(rows, tokens, dtype=torch.long, device="meta")
    return lambda: model(**_inputs(rows, tokens), labels=labels).loss


def _entropy(_: Any, args: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor:
    targets = torch.zeros(logits.shape[-2], dtype=torch.long, device="meta")
    return torch.nn.functional.cross_entropy(logits[0].float(), targets, reduction="none")


def vocabulary_loss(
    model: Any, rows: int, tokens: int, labelled: float, chunked: bool, reference: bool = False
) -> Loss:
    """Cross entropy of the labelled share of the tokens under the model's head.

    ``chunked`` never holds all logits at once; ``reference`` runs the base first, without gradients.
    """
    from veneer.train.loss import base_of

    head = base_of(model).get_output_embeddings()
    if head is None:
        return outputs_loss(model, rows, tokens)
    wanted = max(1, round(labelled * rows * tokens))

    def select(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].flatten(0, 1)[:wanted].unsqueeze(0), *args[1:])

    def in_chunks(hidden: torch.Tensor) -> torch.Tensor:
        weight = head.weight
        rows_of = rows_at_once(wanted, weight.shape[0], "cpu")
        gradient = torch.empty_like(hidden)
        with torch.no_grad():
            place = hidden.new_empty(min(rows_of, wanted), weight.shape[0])
            for _ in range(0, wanted, rows_of):
                part = min(rows_of, wanted)
                logits = torch.mm(hidden[0, :part], weight.mT, out=place[:part])
                torch.mm(logits.float().exp_().to(hidden.dtype), weight)
        return (hidden * gradient).sum(-1)

    def once() -> torch.Tensor:
        handles = [head.register_forward_pre_hook(select)]
        if chunked:
            head.forward = in_chunks
        else:
            handles.append(head.register_forward_hook(_entropy))
        try:
            return model(**_inputs(rows, tokens)).logits.sum()
        finally:
            head.__dict__.pop("forward", None)
            for handle in handles:
                handle.remove()

    def loss() -> torch.Tensor:
        if reference:
            with torch.no_grad(), model.disable_adapter():
                once()
        return once()

    return loss
