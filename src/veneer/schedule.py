"""What a method does after each optimizer step (AdaLoRA's and AdaMSS's budgets), and the state that it keeps.

A schedule runs by itself: whenever an optimizer that holds an active adapter's tensors has stepped, in any training
loop, the method's `on_step` is called with the number of steps so far, gradients still in place. A loop that calls
`update_and_allocate(step)` itself, as for peft, takes the schedule over from its first call on: what ran by itself
before is forgotten and nothing runs by itself after.

The state goes into the adapter's folder (schedule.safetensors) with every save during training, and comes back where
the adapter is loaded for training, so that a resumed run goes on exactly. Inference never reads it.
"""

from __future__ import annotations

import json
import os
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import registry
from .errors import AdapterError

if TYPE_CHECKING:
    from .tuner import Tuner
    from .view import View

FILE = "schedule.safetensors"
TENSOR = "tensor."  # before the file keys of adapter tensors that the adapter's own file holds in another form


@dataclass
class Schedule:
    """step: optimizer steps so far. by_hand: the training loop calls. memory: what the method keeps, by name."""

    step: int = 0
    by_hand: bool = False
    memory: dict[str, Tensor] = field(default_factory=dict)


_watched: weakref.WeakSet[Tuner] = weakref.WeakSet()
_hooks: list[Any] = []


def names(tuner: Tuner) -> list[str]:
    """The active adapters that have a schedule and train."""
    known = tuner.methods
    return [n for n in tuner.host.active if n in known and known[n].scheduled(tuner.peft_config[n])]


def watch(tuner: Tuner) -> None:
    """Run the tuner's schedules after its optimizer's steps."""
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_stepped))
    _watched.add(tuner)


def _stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for tuner in list(_watched):
        for name in names(tuner):
            kept = tuner.schedules.setdefault(name, Schedule())
            if not kept.by_hand and _holds(optimizer, tuner, name):
                _run(tuner, name, kept, kept.step + 1)


def _holds(optimizer: torch.optim.Optimizer, tuner: Tuner, name: str) -> bool:
    """Whether the optimizer trains this adapter: it holds the first of its tensors."""
    first = next(
        (p for _, layer in tuner.adapted_layers() if name in layer.entries for p in layer.parameters_of(name)), None
    )
    return any(p is first for group in optimizer.param_groups for p in group["params"])


def _run(tuner: Tuner, name: str, kept: Schedule, step: int) -> None:
    kept.step = step
    cfg = tuner.peft_config[name]
    with torch.no_grad():
        registry.method_of(cfg).on_step(cfg, views(tuner, name), step, kept.memory)


def views(tuner: Tuner, name: str) -> dict[str, View]:
    """Layer path -> the adapter's view there."""
    return {path: layer.view(name) for path, layer in tuner.adapted_layers() if name in layer.entries}


def by_hand(tuner: Tuner, step: int) -> None:
    """One step of the active adapters' schedules, asked for by the training loop after its optimizer's step."""
    for name in names(tuner):
        kept = tuner.schedules.setdefault(name, Schedule())
        if not kept.by_hand:
            kept.by_hand = True
            kept.memory.clear()
        _run(tuner, name, kept, step)


def add_loss(tuner: Tuner, out: Any, kwargs: dict[str, Any]) -> None:
    """Put what these methods add to a loss into the model's own output, weighed by the batch's part of the step."""
    loss = out.get("loss") if hasattr(out, "get") else None
    if loss is None:
        return
    for name in names(tuner):
        method = registry.method_of(tuner.peft_config[name])
        extra = method.output_loss(list(views(tuner, name).values()))
        if extra is not None:
            out["loss"] = loss = loss + extra * _part(kwargs)


def _part(kwargs: dict[str, Any]) -> Any:
    """Of the labels that an optimizer step averages over, the part in this batch: 1 without accumulation."""
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
    if items is None:
        return 1.0
    labels = kwargs["labels"][..., 1:] if labels is None and "labels" in kwargs else labels
    return 1.0 if labels is None else (labels != -100).sum() / items


# -- files ---------------------------------------------------------------------------------------------------
def save(tuner: Tuner, name: str, folder: str, written: dict[str, Tensor]) -> None:
    """Write the state beside an adapter's file, where training has begun. written: what that file holds."""
    from .files import write_tensors
    from .state import places

    path, kept = os.path.join(folder, FILE), tuner.schedules.get(name)
    if kept is None or not kept.step:
        if os.path.exists(path):
            os.remove(path)  # another adapter's
        return
    out = dict(kept.memory)
    for p in places(tuner, name):
        if p.saved and (p.key not in written or written[p.key].shape != p.get().shape):
            out[TENSOR + p.key] = p.get().detach()
    cfg = tuner.peft_config[name]
    fields = {k: getattr(cfg, k) for k in registry.method_of(cfg).schedule_fields}
    said = {"step": kept.step, "by_hand": kept.by_hand, "config": fields}
    write_tensors(path, out, {"veneer_schedule": json.dumps(said)})


def load(tuner: Tuner, name: str, path: str) -> None:
    """Go on where a saved state left off. Raises AdapterError for a file that holds none."""
    from safetensors import safe_open

    from .state import places

    with safe_open(path, framework="pt") as f:
        said = (f.metadata() or {}).get("veneer_schedule")
        if said is None:
            raise AdapterError(f"{path} holds no schedule's state; delete it to begin the schedule anew")
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    kept, cfg = json.loads(said), tuner.peft_config[name]
    at = {TENSOR + p.key: p.get() for p in places(tuner, name)}
    for key, value in list(tensors.items()):
        if key.startswith(TENSOR):
            del tensors[key]
            if key in at and at[key].shape == value.shape:
                at[key].data.copy_(value)
    for key, value in kept["config"].items():
        setattr(cfg, key, value)
    tuner.schedules[name] = Schedule(kept["step"], kept["by_hand"], tensors)
    with torch.no_grad():
        registry.method_of(cfg).on_resume(cfg, views(tuner, name), tensors)
