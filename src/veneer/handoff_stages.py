"""Stages: the layers of one adapter trained one after another, with A handed on between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from .errors import AdapterError
from .handoff import handed_keys, receive
from .identity import broken_identity
from .layer import Adapted
from .layer_matrices import named_layers, one_adapter


def block_name(path: str) -> str:
    """The block a layer is in: its path up to the first number, or the path itself."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: number + 1])


class Stages:
    """An adapter's layers in stages: in each only that stage's tensors train, and A goes on to the next.

        stages = Stages(model)
        stages.begin()
        while True:
            train(...)                       # the optimizer holds all tensors of the adapter
            if not stages.advance():
                break
        stages.release()

    blocks_per_stage: how many blocks ("model.layers.3") train together. keep_training: earlier stages go on
    training. tensors: what is handed on, by default the method's A. `handed` lists (from, to) so far.
    """

    def __init__(
        self, model: nn.Module, adapter: str | None = None, *, blocks_per_stage: int = 1,
        keep_training: bool = False, tensors: Sequence[str] | None = None,
    ):  # fmt: skip
        if blocks_per_stage < 1:
            raise AdapterError(f"blocks_per_stage={blocks_per_stage}: must be at least 1")
        self.adapter = one_adapter(model, adapter)
        self.named = [(p, m) for p, m in named_layers(model) if self.adapter in m.entries]
        self.keep_training, self.tensors = keep_training, tensors
        blocks: dict[str, list[tuple[str, Adapted]]] = {}
        for path, layer in self.named:
            handed_keys(layer, self.adapter, tensors, path)
            blocks.setdefault(block_name(path), []).append((path, layer))
        runs = list(blocks.values())
        starts = range(0, len(runs), blocks_per_stage)
        self.stages = [[pair for run in runs[i : i + blocks_per_stage] for pair in run] for i in starts]
        self.current = 0
        self.handed: list[tuple[str, str]] = []
        self._refuse_shared()

    def __len__(self) -> int:
        return len(self.stages)

    def _refuse_shared(self) -> None:
        owner: dict[int, str] = {}
        for path, layer in self.named:
            for p in layer.parameters_of(self.adapter):
                first = owner.setdefault(id(p), path)
                if first != path:
                    raise AdapterError(f"{first} and {path} share a tensor (`share`), so they cannot train in turn")

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, layer in self.named:
            yield from layer.parameters_of(self.adapter)

    def begin(self, stage: int = 0) -> None:
        """Start at a stage, 0 or, to go on with an interrupted run, a later one. Raises AdapterError where a
        layer that is still to come already changes the output, since its A would be overwritten."""
        for path, layer in (pair for later in self.stages[stage + 1 :] for pair in later):
            if broken_identity(layer, self.adapter):
                raise AdapterError(
                    f"handoff: adapter {self.adapter!r} on {path} is trained already (or was made with "
                    "random B), and its A would be replaced. Start from a fresh adapter, whose B is zero."
                )
        self._enter(stage)

    def advance(self) -> bool:
        """End the stage: the next one's layers get their A and train. False where this was the last."""
        if self.current + 1 >= len(self.stages):
            return False
        for path, layer in self.stages[self.current + 1]:
            giver = receive(self.named, path, layer, self.adapter, [self.adapter], self.tensors)
            if giver is not None:
                self.handed.append((giver, path))
        self._enter(self.current + 1)
        return True

    def _enter(self, stage: int) -> None:
        self.current = stage
        for i, layers in enumerate(self.stages):
            on = i == stage or (self.keep_training and i < stage)
            for _, layer in layers:
                layer.require_grad(self.adapter, on)
                if not on:
                    for p in layer.parameters_of(self.adapter):
                        p.grad = None  # an optimizer skips a tensor without a gradient

    def release(self) -> None:
        """Make all the adapter's tensors trainable again."""
        for p in self.parameters():
            p.requires_grad_(True)
