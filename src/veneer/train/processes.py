"""A run in several processes, each with a model of its own: who writes, who reads which rows, what all of them know.

`torchrun` (or another launcher that sets WORLD_SIZE and RANK) starts the processes. In a single one every function here
gives back what it was given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from veneer.train.recipe import Recipe

__all__ = ["begin", "check_launch", "end", "from_main", "is_main", "main_first", "merged", "mine", "several", "sharing"]
__all__ += ["summed", "wait"]

T = TypeVar("T")
_sharing: list[bool] = []
#: launchers' words for a model that lies in parts
_PARTS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron",
}


def several() -> int:
    """How many processes a launcher has started, 1 without one (some clusters set WORLD_SIZE for jobs of theirs)."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return several() == 1 or int(os.environ.get("RANK", "0")) == 0


def check_launch(recipe: Recipe) -> None:
    """Raise RecipeError where several processes are to share what they cannot."""
    if several() == 1:
        return
    hint = "Start it without, as `torchrun --nproc-per-node 2 -m veneer train recipe.yaml`."
    for name, what in _PARTS.items():
        if os.environ.get(name, "false").lower() in ("1", "true", "yes"):
            raise recipe.error(
                problem=f"`veneer train` keeps a whole model in each process, not {what}'s parts", hint=hint
            )
    for key in ("fsdp", "deepspeed"):
        if recipe.train.get(key):
            problem = "`veneer train` keeps a whole model in each process"
            raise recipe.error("train", key, problem=problem, hint="Leave it out.")


def begin() -> bool:
    """Connect to the other processes, if there are any and that has not been done; whether it was done here."""
    if several() == 1:
        return False
    import torch
    from accelerate import PartialState

    if torch.distributed.is_initialized():
        return False

    PartialState(cpu=not torch.accelerator.is_available())
    return True


def end() -> None:
    """Part from the other processes."""
    if several() > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


def wait() -> None:
    """Go on once every process has come here."""
    if several() > 1:
        from torch import distributed

        distributed.barrier()


def from_main(value: T) -> T:
    """The main process's value, which must pickle."""
    if several() == 1:
        return value
    from torch import distributed

    held = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def main_first(make: Callable[[], T]) -> T:
    """What ``make`` gives; the main process makes its own before the others, which may find what it kept.

    A RecipeError of the main process is raised in all.
    """
    from veneer.train.errors import RecipeError

    failed: RecipeError | None = None
    if is_main():
        try:
            made = make()
        except RecipeError as error:
            from_main(error)
            raise
        from_main(failed)
        return made
    failed = from_main(failed)
    if failed is not None:
        raise failed
    return make()


@contextmanager
def sharing() -> Iterator[None]:
    """Inside, `mine` is this process's share."""
    _sharing.append(several() > 1)
    try:
        yield
    finally:
        _sharing.pop()


def _gather(value: T) -> list[T]:
    from torch import distributed

    out: list[Any] = [None] * several()
    distributed.all_gather_object(out, value)
    return out


def mine(parts: Sequence[T]) -> Sequence[T]:
    """Of parts of work, those of this process; all of them outside of `sharing`."""
    if not _sharing or not _sharing[-1]:
        return parts
    from torch import distributed

    return parts[distributed.get_rank() :: several()]


def merged(rows: Sequence[T | None]) -> list[T]:
    """One entry a row, each from the process that has one (the others have None there)."""
    if not _sharing or not _sharing[-1]:
        return list(rows)  # type: ignore[arg-type]
    every = _gather({number: row for number, row in enumerate(rows) if row is not None})
    whole = {number: row for found in every for number, row in found.items()}
    return [whole[number] for number in range(len(rows))]


def summed(*numbers: float) -> tuple[float, ...]:
    """Each number, all processes' together; as they are outside of `sharing`."""
    if not _sharing or not _sharing[-1]:
        return numbers
    return tuple(sum(values) for values in zip(*_gather(numbers), strict=True))
