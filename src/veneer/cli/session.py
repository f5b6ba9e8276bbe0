"""One training run as a person follows it: progress, results, files written, what to try next."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli.quiet import quiet_libraries
from veneer.cli.show import show_files, show_metrics, show_next, show_samples

if TYPE_CHECKING:
    from rich.console import Console

    from veneer.train.recipe import Recipe
    from veneer.train.result import RunResult

__all__ = ["next_commands", "run_and_show"]


def run_and_show(recipe: Recipe, console: Console, example_rows: int = 0) -> RunResult:
    """Train, write the report and the model card, and print what came out.

    Args:
        example_rows: how many training rows to copy into the run's folder, for a newcomer to edit.
    """
    from veneer.train.card import write_card
    from veneer.train.data import locate
    from veneer.train.loop import run
    from veneer.train.processes import is_main
    from veneer.train.progress import ProgressCallback
    from veneer.train.record import LayerRecorder
    from veneer.train.report import write_report

    quiet_libraries()
    recorder = LayerRecorder()
    with ProgressCallback(console) as progress:
        result = run(recipe, callbacks=(progress, recorder), console=console)
    if not is_main():
        return result
    out = Path(result.out)
    write_report(result, out / "report.html", recorder.layers)
    write_card(result, Path(result.adapter_dir) / "README.md")
    example = copy_rows(locate(recipe.data.names[0], "train"), short(out), example_rows) if example_rows else None
    show_samples(console, result.samples)
    show_metrics(console, result.before, result.after)
    show_files(console, short(out))
    show_next(console, next_commands(result, example))
    return result


def short(path: Path) -> Path:
    """The path from the working directory, where it lies below it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def copy_rows(source: Path, folder: Path, count: int) -> Path:
    """Copy the first ``count`` rows of a JSONL file, or sentences of a CoNLL file, into ``folder``."""
    text = source.read_text(encoding="utf-8")
    separator = "\n" if source.suffix == ".jsonl" else "\n\n"
    rows = [row for row in text.split(separator) if row.strip()][:count]
    target = folder / f"example{source.suffix}"
    target.write_text(separator.join(rows) + "\n", encoding="utf-8")
    return target


def program() -> list[str]:
    """The words that start veneer in the shell this ran from: ``veneer`` where that finds this very one."""
    here = Path(sys.executable).parent
    found = shutil.which("veneer")
    if found is not None and Path(found).parent == here:
        return ["veneer"]
    if Path(sys.argv[0]).name == "veneer":
        return [sys.argv[0]]
    return [sys.executable, "-m", "veneer"]


def next_commands(result: RunResult, example: Path | None = None) -> list[tuple[str, str]]:
    """(what it is for, the command as it can be pasted into a shell)."""
    from veneer.train.tasks import task_class

    adapter, out = short(Path(result.adapter_dir)), short(Path(result.out))
    commands: list[tuple[str, list[object]]] = []
    writes = task_class(result.task).writes
    if writes:
        commands.append(("talk to it", ["chat", adapter]))
    if result.samples and (writes or ("text",) in task_class(result.task).asks):
        words = ["generate", adapter, "--prompt"] if writes else ["predict", adapter, "--text"]
        commands.append(("one answer", [*words, result.samples[0].prompt]))
    if result.recipe.data.test is not None:
        commands.append(("its scores on other rows", ["eval", adapter, "--data", result.recipe.data.test]))
    if example is not None:
        own: list[object] = ["train", out / "recipe.yaml", "--data", example, "--split", "0.2"]
        mine = f"{out}-mine"
        commands.append((f"train on your own rows: edit {example} first", [*own, "--out", mine]))
    merged: list[object] = ["merge", adapter, "--out", out / "merged"]
    if result.merged_dir is not None:
        merged = ["merge", adapter, "--out", out / "merged-bf16", "--dtype", "bfloat16"]
    commands.append(("merge it into the base", merged))
    start = program()
    return [(purpose, shlex.join([*start, *map(str, words)])) for purpose, words in commands]
