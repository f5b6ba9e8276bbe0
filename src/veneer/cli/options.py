"""The flags of `veneer train`: one table, from which the command's signature and the recipe's values come."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from veneer.train.tasks import TASKS

__all__ = ["FLAGS", "Flag", "as_typed", "with_flags"]


@dataclass(frozen=True)
class Flag:
    """``--name`` on the command line is ``key`` (sections joined by ``__``) in the recipe."""

    name: str
    key: str
    kind: type
    help: str
    panel: str


_MAIN, _ADAPTER, _TRAIN, _DATA = "Run", "Adapter", "Training", "Data"

FLAGS = (
    Flag("base", "base__name", str, "Base model: a bundled name, a folder, a .gguf file or a hub id.", _MAIN),
    Flag("task", "task", str, f"What to train for: {', '.join(TASKS)}.", _MAIN),
    Flag("out", "out", str, "Folder to write; it must not exist yet.", _MAIN),
    Flag("seed", "seed", int, "Random seed.", _MAIN),
    Flag("dtype", "base__dtype", str, "Base weights: float32, bfloat16 or float16.", _MAIN),
    Flag("merge", "merge", bool, "Write a merged model too.", _MAIN),
    Flag("overwrite", "overwrite", bool, "Replace a run that is already in the folder.", _MAIN),
    Flag("data", "data__train", str, "Training rows: JSONL, JSON, CSV, Parquet or CoNLL.", _DATA),
    Flag("test", "data__test", str, "Held-out rows, scored before and after.", _DATA),
    Flag("split", "data__split", float, "Share of the training rows to hold out instead.", _DATA),
    Flag("text-column", "data__text", str, "Column with plain text.", _DATA),
    Flag("messages-column", "data__messages", str, "Column with chat messages.", _DATA),
    Flag("prompt-column", "data__prompt", str, "Column with the prompt.", _DATA),
    Flag("completion-column", "data__completion", str, "Column with the answer to it.", _DATA),
    Flag("max-length", "data__max_length", int, "Longest row, in tokens.", _DATA),
    Flag("method", "adapter__method", str, "Adapter method, such as lora.", _ADAPTER),
    Flag("r", "adapter__r", int, "Rank.", _ADAPTER),
    Flag("lora-alpha", "adapter__lora_alpha", int, "LoRA's alpha: the delta is scaled by alpha / r.", _ADAPTER),
    Flag(
        "target-modules",
        "adapter__target_modules",
        str,
        "Layers to adapt: all-linear, a suffix or a regex.",
        _ADAPTER,
    ),
    Flag("lr", "train__learning_rate", float, "Peak learning rate.", _TRAIN),
    Flag("epochs", "train__num_train_epochs", float, "Passes over the data.", _TRAIN),
    Flag("max-steps", "train__max_steps", int, "Stop after this many steps.", _TRAIN),
    Flag("batch-size", "train__per_device_train_batch_size", int, "Rows per step and device.", _TRAIN),
    Flag("grad-accum", "train__gradient_accumulation_steps", int, "Batches per optimizer step.", _TRAIN),
    Flag("warmup-steps", "train__warmup_steps", float, "Steps (or share of steps below 1) of warm-up.", _TRAIN),
)


def as_typed(place: str) -> str:
    """A recipe reader's ``--learning_rate`` as the flag that was typed, ``--lr``; another place as it is."""
    typed = {f"--{flag.key.rpartition('__')[2]}": f"--{flag.name}" for flag in FLAGS}
    return typed.get(place, place)


def _parameter(flag: Flag) -> inspect.Parameter:
    option = typer.Option(f"--{flag.name}", help=flag.help, rich_help_panel=flag.panel, show_default=False)
    kind: Any = flag.kind
    return inspect.Parameter(
        flag.name.replace("-", "_"),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command(..., flags)`` one option for each row of FLAGS.

    ``flags`` is filled with the options that were given, by recipe key.
    """
    keys = {flag.name.replace("-", "_"): flag.key for flag in FLAGS}

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        flags = {key: given.pop(name) for name, key in keys.items()}
        command(**given, flags={key: value for key, value in flags.items() if value is not None})

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "flags"]
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + [_parameter(f) for f in FLAGS]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    del wrapper.__wrapped__  # type: ignore[attr-defined]  # or its signature would be read instead
    return wrapper
