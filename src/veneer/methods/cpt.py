"""Context-aware prompt tuning: the examples of a context as virtual tokens, each kept near its word.
Blau et al. 2024, arXiv:2410.17222, section 3.

    y = model([E + D; embed(x)])     D <- D * min(1, eps / |D|) row by row, before it is used

    prompt_embeddings (n, token_dim)   E + D; E (embedding) are the context's words, D (delta_embedding) is trained

cpt_tokens_type_mask says what each of the n context tokens is, modulo 4: 1 and 3 the template around input and output,
2 input, 0 a label (0 itself: padding), and each further example counts on by 4. Labels and padding stay as they are;
eps is opt_projection_format_epsilon for templates, opt_projection_epsilon for inputs, times sqrt(token_dim / 2048).

The loss is the mean cross entropy of every label, those in the context and the input's, where `input_type_mask`
(rows, length) types the input's tokens (default: all labels). With opt_weighted_loss_type="decay" a label counts
opt_loss_decay_factor times for each further example that follows it in the row. It does not merge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..config import PromptLearningConfig
from ..errors import AdapterError
from ..kinds import Prompt
from ..prompts.prepend import IGNORE
from ..prompts.table import fits
from ..sharded import full, like

REFERENCE_DIM = 2048  # the width at which the epsilons are meant as they are given


@dataclass
class CPTConfig(PromptLearningConfig):
    """cpt_token_ids: the context. cpt_mask: its attention mask, stored and not read. cpt_tokens_type_mask: see above.

    opt_projection_epsilon, opt_projection_format_epsilon: how far an input's, a template's token may move.
    opt_weighted_loss_type: "none" or "decay", with opt_loss_decay_factor. tokenizer_name_or_path: for the record.
    num_virtual_tokens is the context's length, whatever is given. task_type must be CAUSAL_LM.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "CPT"
        if str(getattr(self.task_type, "value", self.task_type)) != "CAUSAL_LM":
            raise ValueError("CPTConfig only supports task_type = CAUSAL_LM.")
        if self.opt_weighted_loss_type not in ("none", "decay"):
            raise ValueError(f'opt_weighted_loss_type={self.opt_weighted_loss_type!r}: use "none" or "decay"')
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        n = len(self.cpt_token_ids)
        self.cpt_mask = [1] * n if self.cpt_mask is None else self.cpt_mask
        self.cpt_tokens_type_mask = [1] * n if self.cpt_tokens_type_mask is None else self.cpt_tokens_type_mask
        if not n == len(self.cpt_mask) == len(self.cpt_tokens_type_mask):
            raise ValueError("cpt_token_ids, cpt_mask and cpt_tokens_type_mask must have the same length.")
        self.num_virtual_tokens, self.num_transformer_submodules = n, 1


class CPTEmbedding(nn.Module):
    """embedding.weight (n, width), frozen; delta_embedding.weight (n, width), trained, drawn back into its balls by
    each call; limits (n,) their radii, 0 where a token stays as it is. The call returns (n, width)."""

    limits: Tensor

    def __init__(self, config: Any):
        super().__init__()
        n, width = config.num_virtual_tokens, config.token_dim
        self.embedding, self.delta_embedding = nn.Embedding(n, width), nn.Embedding(n, width)
        self.embedding.requires_grad_(False)
        nn.init.zeros_(self.delta_embedding.weight)
        kinds = torch.tensor(config.cpt_tokens_type_mask) % 4
        form, word = config.opt_projection_format_epsilon, config.opt_projection_epsilon
        limits = torch.tensor([0.0, form, word, form])[kinds] * (width / REFERENCE_DIM) ** 0.5
        self.register_buffer("limits", limits, persistent=False)

    def forward(self, indices: Tensor | None = None) -> Tensor:
        held, limits = self.delta_embedding.weight, self.limits[:, None]
        with torch.no_grad():
            delta = full(held)
            norms = delta.norm(dim=1, keepdim=True)
            held.copy_(like(torch.where(norms > limits, delta * (limits / norms), delta), held))
        out = full(self.embedding.weight) + full(held) * (limits > 0)
        return out if indices is None else out[indices]

    def get_epsilon(self) -> Tensor:
        """(n,) the radii of the balls; 1e-10 where a token stays."""
        return self.limits.clamp(min=1e-10)

    def get_projection(self) -> Tensor:
        """(n, width) the trained change, drawn back into its balls."""
        self()
        return full(self.delta_embedding.weight) * (self.limits[:, None] > 0)

    @staticmethod
    def calculate_loss(base_model_output: Any, labels: Tensor, cpt_type_mask: Tensor, config: Any) -> Any:
        """The output with the loss in it. labels, cpt_type_mask: (rows, length), of context and input."""
        base_model_output.loss = weighted_loss(config, base_model_output.logits, labels, cpt_type_mask)
        return base_model_output


class CPT(Prompt):
    Config = CPTConfig
    takes = ("input_type_mask",)

    def encoder(self, cfg: Any, embedding: nn.Module, fill: bool) -> nn.Module:
        made = CPTEmbedding(cfg)
        if fill:
            weight: Any = embedding.weight
            ids = torch.tensor(cfg.cpt_token_ids, device=weight.device)
            if not 0 <= int(ids.min()) <= int(ids.max()) < len(weight):
                raise AdapterError(
                    f"cpt_token_ids go from {int(ids.min())} to {int(ids.max())}; the base has {len(weight)}"
                )
            made.to(weight.device)
            with torch.no_grad():
                made.embedding.weight.copy_(embedding(ids))
        return made

    def trained(self, encoder: Any) -> list[nn.Parameter]:
        return [encoder.delta_embedding.weight]

    def loaded(self, encoder: Any, cfg: Any, tensors: dict[str, Tensor]) -> nn.Module:
        value = tensors["prompt_embeddings"]
        fits(self.name, "prompt_embeddings", value, tuple(encoder.embedding.weight.shape))
        with torch.no_grad():
            encoder.embedding.weight.copy_(like(value, encoder.embedding.weight))
            encoder.delta_embedding.weight.zero_()
        return encoder

    def finish(self, cfg: Any, call: dict[str, Any], own: dict[str, Any], run: Callable[..., Any]) -> Any:
        labels = call.pop("labels", None)
        out = run(**call)
        if labels is None:
            return out
        types, labels = mark(cfg, labels, own["input_type_mask"])
        logits = out[0] if isinstance(out, tuple) else out["logits"]
        loss = weighted_loss(cfg, logits, labels, types)
        return (loss, *out) if isinstance(out, tuple) else type(out)(**{**out, "loss": loss})


def mark(cfg: Any, labels: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Types and labels (rows, n + length) of context and input. labels: (rows, n + length), the context's IGNOREd;
    given: types of the input's tokens, counted from 1, 0 for padding."""
    n = cfg.num_virtual_tokens
    rows, length = len(labels), labels.shape[1] - n
    if given is None:
        given = torch.full((rows, length), 4, device=labels.device)
    if tuple(given.shape) != (rows, length):
        raise AdapterError(f"input_type_mask has shape {tuple(given.shape)}, the input has {(rows, length)}")
    own = torch.tensor(cfg.cpt_tokens_type_mask, device=labels.device)
    examples = -(-int(own.max()) // 4)  # the input is the example after them
    types = torch.cat([own.expand(rows, n), torch.where(given > 0, given.to(labels.device) + 4 * examples, 0)], dim=1)
    context = torch.tensor(cfg.cpt_token_ids, device=labels.device).expand(rows, n)
    labels = torch.cat([context, labels[:, n:]], dim=1)
    return types, labels.masked_fill((types <= 0) | (types % 4 != 0), IGNORE)


def weighted_loss(cfg: Any, logits: Tensor, labels: Tensor, types: Tensor) -> Tensor:
    """Mean over all labels of weight * cross entropy; logits (rows, length, words), labels and types (rows, length)."""
    each = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none")
    counted = (labels[:, 1:] != IGNORE).flatten()
    if cfg.opt_weighted_loss_type == "decay":
        each = each * decay(types[:, 1:], cfg.opt_loss_decay_factor).flatten().to(each)
    return each[counted].mean()


def decay(types: Tensor, factor: float) -> Tensor:
    """(rows, length): factor to the power of how many further examples' labels a row has; 1 for other tokens."""
    label = (types > 0) & (types % 4 == 0)
    out = torch.ones(types.shape, device=types.device)
    for row, is_label, into in zip(types, label, out, strict=True):
        kinds, index = row[is_label].unique(return_inverse=True)
        into[is_label] = float(factor) ** (len(kinds) - 1 - index).float()
    return out
