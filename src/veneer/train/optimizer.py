"""The recipe's own optimizers: `train: {optimizer: loraplus, loraplus_lr_ratio: 16}`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

__all__ = ["OptimizerOptions", "make_optimizer", "optimizer_options", "without_optimizer"]


@dataclass
class OptimizerOptions:
    """optimizer: one made for LoRA, in the place of `optim`. loraplus_lr_ratio: B's learning rate over A's.
    loraplus_lr_embedding: that of embedding factors. riemannian_reg: added to the metric's diagonal."""

    optimizer: Literal["loraplus", "lorafa", "riemannian"] | None = None
    loraplus_lr_ratio: float | int | None = None
    loraplus_lr_embedding: float = 1e-6
    riemannian_reg: float = 1e-2

    def __post_init__(self) -> None:
        ratio = self.loraplus_lr_ratio
        if self.optimizer == "loraplus" and ratio is None:
            raise ValueError("optimizer: loraplus needs loraplus_lr_ratio; the paper uses 16")
        if self.optimizer != "loraplus" and ratio is not None:
            raise ValueError("loraplus_lr_ratio is read with `optimizer: loraplus` only")
        if ratio is not None and not ratio > 0:
            raise ValueError(f"loraplus_lr_ratio must be above 0, got {ratio}")
        if not self.riemannian_reg > 0:
            raise ValueError(f"riemannian_reg must be above 0, got {self.riemannian_reg}")


def _names() -> set[str]:
    return {f.name for f in fields(OptimizerOptions)}


def optimizer_options(train: dict[str, Any]) -> OptimizerOptions:
    """The optimizer's part of a recipe's `train` section. Raises ValueError for values that do not fit together."""
    return OptimizerOptions(**{k: v for k, v in train.items() if k in _names()})


def without_optimizer(train: dict[str, Any]) -> dict[str, Any]:
    """The rest of the section, which transformers' TrainingArguments takes."""
    return {k: v for k, v in train.items() if k not in _names()}


def make_optimizer(model: Any, args: Any, options: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimizer over a model's trained parameters, with the betas, epsilon and weight decay of `args`."""
    from veneer import optimizers

    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if options.optimizer == "lorafa":
        config = model.active_peft_config
        alpha = getattr(config, "lora_alpha", 1)
        return optimizers.create_lorafa_optimizer(
            model, getattr(config, "r", 1), alpha, args.learning_rate, weight_decay=args.weight_decay
        )
    if options.optimizer == "riemannian":
        return optimizers.create_riemannian_optimizer(
            model, torch.optim.AdamW, lr=args.learning_rate, reg=options.riemannian_reg,
            weight_decay=args.weight_decay, **adam,
        )  # fmt: skip
    assert options.loraplus_lr_ratio is not None
    return optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=args.learning_rate, loraplus_lr_ratio=options.loraplus_lr_ratio,
        loraplus_lr_embedding=options.loraplus_lr_embedding, loraplus_weight_decay=args.weight_decay, **adam,
    )  # fmt: skip
