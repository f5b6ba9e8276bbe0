"""Layers that take no part in a task's loss, such as the pooler of a base whose hidden states are averaged."""

from __future__ import annotations

import dataclasses
import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from veneer.train.meta_pass import Tally

if TYPE_CHECKING:
    from veneer.train.recipe import Recipe
    from veneer.train.tasks import Task

__all__ = ["idle_layers", "leave_out_idle"]

TOKENS = 4


def leave_out_idle(recipe: Recipe, config: Any, model: nn.Module, task: Task) -> list[str]:
    """Exclude from an adapter's targets what would never get a gradient; returns what there is to say of it.

    Raises:
        RecipeError: nothing else is among the targets.
        ValueError: as injection does, where targets match nothing.
    """
    from veneer import registry
    from veneer.inject import find
    from veneer.kinds import Attach

    names = {field.name for field in dataclasses.fields(config)}
    if config.is_prompt_learning or not {"target_modules", "exclude_modules"} <= names:
        return []
    method: Any = registry.method_of(config)
    if isinstance(method, Attach):
        return []
    bare: Any = SimpleNamespace(model=model, model_type=getattr(model.config, "model_type", None))
    matches = find(bare, config, method)
    idle = idle_layers(model, task, {match.name: match.module for match in matches})
    if not idle:
        return []
    shown = ", ".join(idle[:4]) + (f" and {len(idle) - 4} more" if len(idle) > 4 else "")
    if len(idle) == len(matches):
        hint = "Name other layers, or `all-linear`."
        problem = f"{shown} {'takes' if len(idle) == 1 else 'take'} no part in the loss of {task.name}"
        raise recipe.error("adapter", "target_modules", problem=problem, hint=hint)
    asked = config.exclude_modules
    if isinstance(asked, str):
        config.exclude_modules = "|".join(f"(?:{pattern})" for pattern in (asked, *map(re.escape, idle)))
    else:
        config.exclude_modules = {*(asked or ()), *idle}
    return [f"Not adapted: {shown}; {'it takes' if len(idle) == 1 else 'they take'} no part in the loss."]


def idle_layers(model: nn.Module, task: Task, layers: dict[str, nn.Module]) -> list[str]:
    """Those of ``layers`` whose output nothing that the task reads depends on.

    Each gets a zero added to its output in a forward pass of a few tokens, and the gradient of that zero is looked at;
    the model may lie on the meta device. A layer that was not called counts too, unless it is one of several that are
    called by turns (an expert).
    """
    device = next(model.parameters()).device
    marks: dict[str, torch.Tensor] = {}
    called: set[nn.Module] = set()
    handles = [module.register_forward_pre_hook(lambda own, _: called.add(own)) for module in model.modules()]

    def marked(name: str) -> Any:
        def add(_: nn.Module, args: Any, out: Any) -> Any:
            if not isinstance(out, torch.Tensor) or not out.is_floating_point():
                return out
            marks.setdefault(name, torch.zeros((), device=device, dtype=out.dtype, requires_grad=True))
            return out + marks[name]

        return add

    handles += [module.register_forward_hook(marked(name)) for name, module in layers.items()]
    before = model.training
    model.eval()
    try:
        with Tally() if device.type == "meta" else nullcontext():  # which answers for tensors without data
            read = task.read(model, _inputs(model, device))
            total = torch.stack([out.float().sum() for out in read]).sum()
            found = torch.autograd.grad(total, list(marks.values()), allow_unused=True)
    finally:
        model.train(before)
        for handle in handles:
            handle.remove()
    idle = {name for name, gradient in zip(marks, found, strict=True) if gradient is None}
    never = {name for name, module in layers.items() if module not in called and not _by_turns(model, name, called)}
    return [name for name in layers if name in idle | never]


def _inputs(model: Any, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"labels": ids} if getattr(model.config, "is_encoder_decoder", False) else {})


def _by_turns(model: nn.Module, name: str, called: set[nn.Module]) -> bool:
    """Whether a layer lies in a part of a list of which another part was called."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        parent = model.get_submodule(".".join(parts[: depth - 1]))
        if isinstance(parent, nn.ModuleList | nn.ModuleDict) and any(child in called for child in parent.children()):
            return parent.get_submodule(parts[depth - 1]) not in called
    return False
