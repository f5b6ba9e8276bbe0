"""What a run will need, found before its weights are loaded: memory, time and disk, each with its basis."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from veneer.train.meta_pass import Need, count

if TYPE_CHECKING:
    from veneer.train.prepare import Parts
    from veneer.train.recipe import Recipe

__all__ = ["Estimate", "Speed", "batches_of", "estimate", "kernels_of", "machine_speed"]

#: what the C library's heap holds for each byte of a step that is asked of it (benchmarks/plan_memory.py)
HEAP = 1.15
#: bytes of an optimizer's state for each trained parameter, float32, by the start of its name
STATES = {"adamw": 8, "adam": 8, "sgd": 0, "adafactor": 1, "rmsprop": 4, "adagrad": 4, "lion": 4, "loraplus": 8,
          "lorafa": 8, "riemannian": 8}  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """This machine's, measured in a moment: arithmetic of a matrix product, and bytes a second of a sum."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds of training, without the scores before and after.

    ``weights`` is the model, ``states`` the adapter's gradients and the optimizer's state, ``step`` what a forward and
    backward of the largest batch holds at its fullest. ``largest`` is that batch's (rows, tokens), ``usual`` a
    middling one's. ``disk`` is the adapter's file.
    """

    weights: int
    states: int
    step: int
    disk: int
    largest: tuple[int, int]
    usual: tuple[int, int]
    need: Need
    speed: Speed
    steps: int
    seconds_a_step: float

    @property
    def memory(self) -> int:
        """All bytes together, beside what the process holds before it has a model."""
        return self.weights + self.states + self.step

    @property
    def seconds(self) -> float:
        return self.steps * self.seconds_a_step


def machine_speed(device: torch.device, dtype: torch.dtype, size: int = 576, rows: int = 512) -> Speed:
    """Time a matrix product as a model of that width does it, and a sum of large arrays."""
    a = torch.randn(rows, size, device=device).to(dtype)
    b = torch.randn(size, 2 * size, device=device).to(dtype)
    big = torch.zeros(1 << 23, device=device)
    flops = 2 * a.numel() * b.shape[1] / _timed(lambda: a @ b, device)
    out = torch.empty_like(big)  # freed memory is kept while a model trains
    moved = 3 * big.numel() * big.element_size() / _timed(lambda: torch.add(big, big, out=out), device)
    return Speed(flops, moved)


def _timed(act: Callable[[], Any], device: torch.device, seconds: float = 0.15) -> float:
    """The median time of ``act``."""
    times: list[float] = []
    act()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        before = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - before)
    return sorted(times)[len(times) // 2]


def batches_of(parts: Parts, seed: int) -> list[list[int]]:
    """The lengths of the rows of each batch of the first pass, in the order of training where that is by length."""
    from veneer.train.sampler import LengthBatches

    args, lengths = parts.args, list(parts.plan.train["length"])
    size = args.train_batch_size
    order: list[int] = list(range(len(lengths)))
    if args.train_sampling_strategy == "group_by_length":
        together = size * args.gradient_accumulation_steps * args.world_size
        streamed = parts.plan.stream is not None  # then its first rows are here, as its buffer will hold them
        order = sorted(order, key=lengths.__getitem__) if streamed else list(LengthBatches(lengths, together, seed))
    return [[lengths[row] for row in order[first : first + size]] for first in range(0, len(order), size)]


@contextmanager
def _constant_weights(model: nn.Module) -> Iterator[None]:
    """Inside, a model on the meta device has weights that can be computed with and take no memory."""
    kept = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None and p.is_meta]
    for module, name, p in kept:
        one = torch.full((), 0.01, dtype=p.dtype).expand(p.shape)
        module._parameters[name] = nn.Parameter(one, requires_grad=False)
    try:
        yield
    finally:
        for module, name, p in kept:
            module._parameters[name] = p


def kernels_of(base: nn.Module, recipe: Recipe) -> Any:
    """What `base_kernels` would replace in a base that has no weights yet; use it as a context."""
    from veneer.fused import base_kernels
    from veneer.train.memory import memory_options

    if not recipe.base.kernels:
        return nullcontext()
    with _constant_weights(base):
        return base_kernels(base, memory_options(recipe.train).mlp_checkpointing)


def estimate(recipe: Recipe, parts: Parts, model: Any, kernels: Any, speed: Speed | None = None) -> Estimate:
    """What training ``model``, an adapted model on the meta device, needs. ``kernels``: see `kernels_of`."""
    args, device = parts.args, parts.args.device
    batches = [(len(batch), max(batch)) for batch in batches_of(parts, recipe.seed)]
    largest = max(batches, key=lambda shape: shape[0] * shape[1])
    rows = max(shape[0] for shape in batches)
    usual = (rows, max(1, round(sum(r * t for r, t in batches) / sum(r for r, _ in batches))))
    model.train()
    labelled = _labelled(parts)
    with kernels:
        most = count(model, parts.task.meta_loss(model, *largest, labelled), device.type)
        middle = most if usual == largest else count(model, parts.task.meta_loss(model, *usual, labelled), device.type)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    heap = HEAP if device.type == "cpu" and not recipe.train.get("return_memory") else 1.0
    kept = gradients if not recipe.train.get("optimizer_in_backward") else max(p.nbytes for p in trained)
    name = str(recipe.train.get("optimizer") or getattr(args.optim, "value", args.optim))
    state = next((size for start, size in STATES.items() if name.startswith(start)), 8)
    speed = speed or machine_speed(device, next(model.parameters()).dtype)
    tensors = [*dict.fromkeys(model.parameters()), *dict.fromkeys(model.buffers())]
    a_batch = middle.flops / speed.flops + middle.moved / speed.bytes
    return Estimate(
        weights=sum(t.numel() * t.element_size() for t in tensors),
        states=kept + state * sum(p.numel() for p in trained),
        step=max(0, round(heap * (most.peak - gradients))),
        disk=gradients,
        largest=largest,
        usual=usual,
        need=middle,
        speed=speed,
        steps=steps_of(args, math.ceil(len(batches) / args.world_size)),
        seconds_a_step=a_batch * min(args.gradient_accumulation_steps, len(batches)),
    )


def steps_of(args: Any, batches: int) -> int:
    """Optimizer steps of a run with so many batches a pass."""
    if args.max_steps > 0:
        return int(args.max_steps)
    return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)


def _labelled(parts: Parts) -> float:
    """The share of tokens that have a label, 1 where labels are not a token's."""
    train = parts.plan.train
    name = next((name for name in ("labels", "chosen_labels") if name in train.column_names), None)
    if name is None or not isinstance(train[0][name], list):
        return 1.0
    some = train[: min(len(train), 500)][name]
    return sum(label != -100 for row in some for label in row) / max(sum(map(len, some)), 1)
