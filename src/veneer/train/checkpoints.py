"""Checkpoints that are whole or are not there: what training has changed, sealed with a list of its files.

A process may be killed, and a disk may fill, between any two bytes. A checkpoint counts once its seal is written, which
comes last and names every file with its size and hash; older ones go only after that.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer.errors import AdapterError
from veneer.files import read_tensors, sha256, write_json, write_tensors, write_text
from veneer.layer import adapted_layers
from veneer.train.errors import RecipeError
from veneer.train.processes import from_main

__all__ = ["SEAL", "Autosave", "Changes", "Progress", "cannot_write", "drop_unsealed", "last_whole", "seal"]

SEAL = "whole.json"
TENSORS = "trained.safetensors"
PROGRESS = "progress.json"
#: what a file system that refuses to write comes out as
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)


def seal(folder: Path) -> None:
    """Flush every file of a checkpoint to the disk, then write the list that makes it whole."""
    listed: dict[str, list[Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != SEAL:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            listed[path.relative_to(folder).as_posix()] = [path.stat().st_size, sha256(path)]
    write_text(str(folder / SEAL), json.dumps(listed, indent=1))


def is_whole(folder: Path) -> bool:
    """Whether every file that the seal names is there, unchanged."""
    mark = folder / SEAL
    if not mark.is_file():
        return False
    listed = json.loads(mark.read_text(encoding="utf-8"))
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size and sha256(folder / name) == found
        for name, (size, found) in listed.items()
    )


def _by_step(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest first."""
    found = [(path.name.rpartition("-")[2], path) for path in folder.glob("checkpoint-*") if path.is_dir()]
    return [path for _, path in sorted(((int(step), path) for step, path in found if step.isdigit()), reverse=True)]


def last_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder, None where there is none."""
    return next((path for path in _by_step(folder) if is_whole(path)), None)


def drop_unsealed(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for path in _by_step(folder):
        if not is_whole(path):
            shutil.rmtree(path)


def cannot_write(folder: Path, error: Exception) -> RecipeError:
    """The error of a checkpoint that could not be written; what was written of it is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    last = last_whole(folder.parent)
    kept = "no earlier checkpoint is there" if last is None else f"{last.name} is whole and stays"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    hint = "Make room and run the same command: it goes on from there." if last else "Make room and run it again."
    return RecipeError(f"cannot write {folder.name} ({reason}); {kept}", file=folder.parent, hint=hint)


class Changes:
    """The tensors of a model that training has changed since this was made: those that train, and any other
    parameter or buffer that was written to or replaced (running statistics, a method's own memory).
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.before = {name: (weakref.ref(t), t._version) for name, t in _tensors(model).items()}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write them, bit for bit as they are in memory."""
        kept = {name: t for name, t in _tensors(model).items() if t.requires_grad or self._changed(name, t)}
        write_tensors(str(folder / TENSORS), kept)

    def _changed(self, name: str, tensor: torch.Tensor) -> bool:
        was = self.before.get(name)
        return was is None or was[0]() is not tensor or was[1] != tensor._version

    @staticmethod
    def load(model: torch.nn.Module, folder: Path) -> bool:
        """Put them back; False where the folder holds none. Raises AdapterError where they do not fit the model."""
        path = folder / TENSORS
        if not path.is_file():
            return False
        now = _tensors(model)
        with torch.no_grad():
            for name, value in read_tensors(path).items():
                if name not in now or now[name].shape != value.shape:
                    raise AdapterError(f"{path} holds {name} {tuple(value.shape)}, which the model does not have")
                now[name].copy_(value)
        for _, layer in adapted_layers(model):
            layer.changed()
        return True


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All but frozen packed weights, which do not change; torchao's do not move where a weak reference is held."""
    found: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: t for n, t in found.items() if t.requires_grad or not is_traceable_wrapper_subclass(t)}


def _progress_file(process: int) -> str:
    return f"progress-{process}.json" if process else PROGRESS


@dataclass(frozen=True)
class Progress:
    """How far a run has come: steps, tokens, seconds; the summed loss since the step that was ``logged`` last; whether
    training has stopped. Tokens and loss are one process's own.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    logged: int = 0
    stopped: bool = False

    def write(self, folder: Path, process: int = 0) -> None:
        write_json(str(folder / _progress_file(process)), dataclasses.asdict(self))

    @staticmethod
    def read(folder: Path, process: int = 0) -> Progress:
        path = folder / _progress_file(process)
        return Progress(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else Progress()


class Autosave(TrainerCallback):
    """Asks for a checkpoint every ``seconds``, or less often where writing one takes more than 1/20 of that."""

    SHARE = 20

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds, self.last, self.asked = seconds, time.monotonic(), 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.asked = time.monotonic()
        if from_main(self.asked - self.last >= self.seconds):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self.last = time.monotonic()
        self.seconds = max(self.seconds, self.SHARE * (self.last - self.asked))
