"""Switches of a recipe's `train` section that trade time for memory.

train:
  activation_checkpointing: true     # transformers' own: a layer's activations are computed again for backward
  activation_offload: true           # what backward needs waits in the machine's memory, not the accelerator's
  mlp_checkpointing: true            # a gated feed-forward part's alone
  return_memory: true                # on a CPU: what is freed goes back to the system at once
  optimizer_in_backward: true        # each parameter steps as soon as its gradient is there, which is then freed
  max_grad_norm: 0
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from veneer.train.recipe import Recipe

__all__ = ["MemoryOptions", "check_memory", "memory_options", "offloaded", "step_in_backward", "without_memory"]


@dataclass
class MemoryOptions:
    """activation_offload: keep saved activations in the machine's memory. The others: see module."""

    activation_offload: bool = False
    mlp_checkpointing: bool = False
    return_memory: bool = False
    optimizer_in_backward: bool = False


def memory_options(train: dict[str, Any]) -> MemoryOptions:
    """Their part of a recipe's `train` section."""
    return MemoryOptions(**{f.name: train[f.name] for f in fields(MemoryOptions) if f.name in train})


def without_memory(train: dict[str, Any]) -> dict[str, Any]:
    """The rest of the section."""
    names = {f.name for f in fields(MemoryOptions)}
    return {key: value for key, value in train.items() if key not in names}


def check_memory(recipe: Recipe, args: TrainingArguments) -> None:
    """Raise RecipeError where a switch cannot do what it says with the rest of the recipe, on this machine."""
    chosen = memory_options(recipe.train)
    if chosen.activation_offload and args.device.type == "cpu":
        problem = "training runs on the CPU, whose memory is where activations would be moved to"
        hint = "Use `activation_checkpointing: true`, which holds fewer of them, or a smaller batch."
        raise recipe.error("train", "activation_offload", problem=problem, hint=hint)
    if chosen.mlp_checkpointing and not recipe.base.kernels:
        problem = "it is `base.kernels` that computes the feed-forward part again, and that is off"
        raise recipe.error("train", "mlp_checkpointing", problem=problem, hint="Leave `base.kernels` on.")
    if chosen.optimizer_in_backward:
        _check_steps(recipe, args)


def _check_steps(recipe: Recipe, args: TrainingArguments) -> None:
    """Of `optimizer_in_backward`, which needs each gradient whole and alone."""
    from veneer import registry
    from veneer.kinds import Method

    method = registry.method_of(registry.config_class(recipe.adapter.method)(**recipe.adapter.options))
    scheduled = isinstance(method, Method) and type(method).scheduled is not Method.scheduled
    options = args.activation_checkpointing_kwargs
    conflicts = {
        "gradient_accumulation_steps": (
            args.gradient_accumulation_steps > 1,
            "a step needs the gradients of several batches, and each is gone when its batch is done",
            "Leave it at 1 and make the batch larger.",
        ),
        "max_grad_norm": (
            args.max_grad_norm > 0,
            f"clipping to {args.max_grad_norm:g} needs all gradients at once (1 is the default)",
            "Set `max_grad_norm: 0`, or leave out `optimizer_in_backward`.",
        ),
        "optimizer": (
            recipe.train.get("optimizer") in ("lorafa", "riemannian"),
            f"{recipe.train.get('optimizer')} steps A and B together",
            "Use `loraplus`, or an `optim` of transformers.",
        ),
        "fp16": (bool(args.fp16), "a loss scale is taken out of all gradients at once", "Use `bf16: true`."),
        "activation_checkpointing_kwargs": (
            isinstance(options, dict) and bool(options.get("use_reentrant")),
            "with use_reentrant a gradient comes in parts",
            "Set `use_reentrant: false`.",
        ),
        "optimizer_in_backward": (
            args.world_size > 1 or args.n_gpu > 1,
            f"gradients are summed over {max(args.world_size, args.n_gpu)} devices before a step",
            "Train on one device, or leave it out.",
        ),
    }
    for key, (wrong, problem, hint) in conflicts.items():
        if wrong:
            raise recipe.error("train", key, problem=f"with `optimizer_in_backward`, {problem}", hint=hint)
    if scheduled:
        problem = f"{recipe.adapter.method} reads the gradients after each step, where `optimizer_in_backward` has none"
        raise recipe.error("train", "optimizer_in_backward", problem=problem, hint="Leave it out.")


def offloaded(on: bool) -> AbstractContextManager[Any]:
    """Inside, tensors that autograd saves are moved to the machine's memory and come back when backward asks."""
    return torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()) if on else nullcontext()


def step_in_backward(optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
    """Let each parameter take its step, with its group's settings of the moment and the optimizer's own state for it,
    when its gradient is whole; the gradient is then freed. Remove the handles to end it.

    Equal to a step after backward for optimizers that look at each parameter alone (SGD, Adam and kin).
    """
    of = {p: number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    return [p.register_post_accumulate_grad_hook(_stepper(optimizer, number)) for p, number in of.items()]


def _stepper(optimizer: torch.optim.Optimizer, number: int) -> Callable[[Tensor], None]:
    step = type(optimizer).step  # not the instance's, whose calls a learning rate schedule counts

    def hook(p: Tensor) -> None:
        groups = optimizer.param_groups  # asked for each time: loading a state makes new ones
        group, params = groups[number], groups[number]["params"]
        try:
            optimizer.param_groups, group["params"] = [group], [p]
            step(optimizer)
        finally:
            optimizer.param_groups, group["params"] = groups, params
        p.grad = None

    return hook
