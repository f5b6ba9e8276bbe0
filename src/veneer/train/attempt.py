"""A run that may have been cut short: the same command finds what an earlier attempt left and goes on from there.

All that a run writes lies in `.NAME.partial` beside `out` until the run is complete. In it, `.resume` says what was
asked for and holds the checkpoints that nobody asked for, and goes when the run is whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.files import write_json
from veneer.train import processes
from veneer.train.errors import RecipeError
from veneer.train.result import whole_folder

if TYPE_CHECKING:
    from veneer.train.recipe import Recipe
    from veneer.train.tasks import Outcome

__all__ = ["HIDDEN", "Attempt", "attempt"]

HIDDEN = ".resume"


@dataclass(frozen=True)
class Attempt:
    """``folder`` is where the run writes, ``checkpoints`` where its checkpoints go, ``last`` the whole one to go on
    from; ``notes`` what the user should know. ``automatic``: the recipe says nothing of checkpoints.
    """

    folder: Path
    checkpoints: Path
    last: Path | None
    automatic: bool
    notes: list[str]

    @property
    def hidden(self) -> Path:
        return self.folder / HIDDEN

    def load_before(self) -> Outcome | None:
        """The base's scores, where an earlier attempt has measured them."""
        from veneer.train.tasks import Outcome

        path = self.hidden / "before.json"
        return Outcome(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def save_before(self, outcome: Outcome) -> None:
        write_json(str(self.hidden / "before.json"), dataclasses.asdict(outcome))


@contextmanager
def attempt(recipe: Recipe) -> Iterator[Attempt]:
    """The folder to write a run into. It takes the name `recipe.out` at the end; where anything fails it stays, if
    it holds a whole checkpoint, and goes otherwise. Of several processes, the main one sees to that.

    Raises:
        RecipeError: another process is at it, or what is there belongs to another recipe.
    """
    told: Attempt | RecipeError | None = None
    if processes.is_main():
        with ExitStack() as stack:
            try:
                told = stack.enter_context(_attempt(recipe))
            except RecipeError as error:
                processes.from_main(error)
                raise
            yield processes.from_main(told)
    else:
        told = processes.from_main(told)
        if not isinstance(told, Attempt):
            raise told if told is not None else RuntimeError("the main process gave no folder")
        yield told
    processes.wait()


@contextmanager
def _attempt(recipe: Recipe) -> Iterator[Attempt]:
    from veneer.train.checkpoints import drop_unsealed, last_whole

    out = Path(recipe.out).absolute()
    automatic = not any(key.startswith("save_") or key == "load_best_model_at_end" for key in recipe.train)
    folder = out.with_name(f".{out.name}.partial")
    checkpoints = folder / HIDDEN / "checkpoints" if automatic else folder / "checkpoints"
    asked = _asked(recipe)
    notes: list[str] = []
    last = _left(recipe, folder, checkpoints, asked, notes)
    with whole_folder(out, keep=lambda: last_whole(checkpoints) is not None):
        hidden = folder / HIDDEN
        hidden.mkdir(exist_ok=True)
        write_json(str(hidden / "owner.json"), _myself())
        write_json(str(hidden / "asked.json"), asked)
        drop_unsealed(checkpoints)
        yield Attempt(folder, checkpoints, last, automatic, notes)
    shutil.rmtree(out / HIDDEN)


def _left(recipe: Recipe, folder: Path, checkpoints: Path, asked: dict[str, Any], notes: list[str]) -> Path | None:
    """The checkpoint to go on from; a folder that is of no use is removed."""
    from veneer.train.checkpoints import last_whole

    if not folder.exists():
        return None
    owner = _read(folder / HIDDEN / "owner.json")
    if owner and owner != _myself() and _alive(owner):
        hint = "Wait for it, end it, or name another folder."
        raise recipe.error("out", problem=f"process {owner['pid']} is training into {recipe.out}", hint=hint)
    before, last = _read(folder / HIDDEN / "asked.json"), last_whole(checkpoints)
    other = _differences(before, asked) if before else []
    if before and other and (last or last_whole(folder / "checkpoints") or last_whole(folder / HIDDEN / "checkpoints")):
        what = ", ".join(other[:5])
        if not recipe.overwrite:
            problem = f"{folder} holds an unfinished run that differs in {what}"
            hint = "Run it as it was to finish it, or give it up with `overwrite: true` (--overwrite)."
            raise recipe.error("out", problem=problem, hint=hint)
        notes.append(f"An unfinished run that differed in {what} was given up.")
    elif before and last:
        step = last.name.rpartition("-")[2]
        notes.append(f"Going on after step {step}, where an earlier attempt was cut short.")
        changed = [f"{name} {was} -> {asked['versions'][name]}" for name, was in before["versions"].items()
                   if was != asked["versions"][name]]  # fmt: skip
        if changed:
            notes.append(
                f"Versions have changed since ({', '.join(changed)}): numbers may differ in their last digits."
            )
        return last
    shutil.rmtree(folder)
    return None


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _myself() -> dict[str, Any]:
    import psutil

    return {"pid": os.getpid(), "started": psutil.Process().create_time()}


def _alive(owner: dict[str, Any]) -> bool:
    import psutil

    try:
        process = psutil.Process(owner["pid"])
        return process.create_time() == owner["started"] and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _asked(recipe: Recipe) -> dict[str, Any]:
    """What must be the same for a run to go on: the recipe, its data by content, its base by size and date."""
    import torch
    import transformers

    from veneer.train.bases import resolve_base
    from veneer.train.sources import parts_of
    from veneer.version import __version__

    splits = {split: parts_of(recipe.data, split) for split in ("train", "test", "validation")}
    exact = not recipe.data.streaming  # what is larger than memory takes too long to hash
    data = {split: [part.fingerprint(exact) for part in parts] for split, parts in splits.items() if parts}
    path = resolve_base(recipe.base).path
    files = [] if path is None else [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return {
        "recipe": recipe.model_dump(mode="json", exclude={"overwrite"}),
        "data": data,
        "base": {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in files},
        "processes": processes.several(),
        "versions": {"veneer": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__},
    }


def _differences(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The keys of the recipe that differ, or what else does."""
    words = {"data": "the rows", "base": "the base's files"}
    found = _keys(was["recipe"], now["recipe"])
    before, here = was.get("processes", 1), now["processes"]
    if before != here:
        found.append(f"the number of processes ({before}, now {here})")
    return found + [word for part, word in words.items() if was[part] != now[part] and not found]


def _keys(was: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(was, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*was, *now])
        return [found for key in keys for found in _keys(was.get(key), now.get(key), f"{path}.{key}".lstrip("."))]
    return [] if was == now else [path]
