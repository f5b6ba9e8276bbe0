"""`veneer predict`: a trained adapter's answers to a file of rows, in batches, as JSONL."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.errors import DebugFlag, UserError
from veneer.cli.quiet import quiet_libraries
from veneer.cli.shared import BaseOption, ModelArgument, Overrides

if TYPE_CHECKING:
    from veneer.train.data import Table
    from veneer.train.recipe import Recipe
    from veneer.train.use import Loaded

__all__ = ["predict", "predictions", "text_predictions"]

BATCHES = 16
"""Batches read at a time: enough to sort rows by length, little enough to stream."""


def predict(
    model: ModelArgument,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Rows to answer: JSONL, CSV, Parquet ...")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", "-t", help="A text to answer; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write JSONL here instead of the screen.")] = None,
    base: BaseOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows at a time.")] = 16,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = None,
    overrides: Overrides = None,
    debug: DebugFlag = False,
) -> None:
    """Answer rows with a trained adapter: labels, spans, entities, scores, vectors or text, by its task."""
    if (file is None) == (text is None):
        raise UserError("nothing to answer", hint="Give --file rows.jsonl, or --text 'some text'.")
    from veneer.train.use import load

    quiet_libraries()
    loaded = load(model, base=base)
    flags = {"eval__batch_size": batch_size, "eval__max_new_tokens": max_new_tokens}
    recipe = loaded.recipe(str(file or "--text"), overrides or [], **flags)
    if file is None:
        answers: Iterator[Any] = iter(text_predictions(loaded, text or [], recipe))
    else:
        answers = ({**row, "prediction": found} for row, found in predictions(loaded, file, recipe))
    if out is None:
        for answer in answers:
            sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
            sys.stdout.flush()  # who reads a pipe has it as soon as it is there
        return
    typer.echo(f"{write_lines(out, answers)} rows in {out}")


def write_lines(out: Path, answers: Iterator[Any]) -> int:
    """One JSON value a line, beside and renamed once whole; returns how many."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    count = 0
    try:
        with partial.open("w", encoding="utf-8") as lines:
            for answer in answers:
                lines.write(json.dumps(answer, ensure_ascii=False) + "\n")
                count += 1
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return count


def predictions(loaded: Loaded, file: Path, recipe: Recipe) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each row of a file and the answer to it, in the file's order, read a few batches at a time.

    Raises:
        DataError: with the file, the line or row, and the reason.
    """
    from veneer.train.data import locate, read_chunks

    path = locate(str(file), "test")
    for table, rows in read_chunks(recipe.data, recipe.task, path, BATCHES * recipe.eval.batch_size):
        yield from zip(rows, answer_table(loaded, table, recipe), strict=True)


def text_predictions(loaded: Loaded, texts: list[str], recipe: Recipe) -> list[dict[str, Any]]:
    """The answers to texts, where one text is all that the task reads.

    Raises:
        UserError: the task reads more.
    """
    from veneer.train.data import Layout, asked_table

    single = next((ask[0] for ask in reversed(loaded.task.asks) if len(ask) == 1 and ask[0] != "tokens"), None)
    if single is None or single == "messages":
        asks = " and ".join(loaded.task.asks[-1])
        raise UserError(f"{recipe.task} reads {asks}, not one text", hint="Give them in a file, with --file.")
    rows = [{single: text} for text in texts]
    table = asked_table(recipe.task, Path("--text"), Layout(single, {single: single}), rows, None)
    return answer_table(loaded, table, recipe)


def answer_table(loaded: Loaded, table: Table, recipe: Recipe) -> list[dict[str, Any]]:
    """The task's answers; free text goes through the way in which the adapter was asked in training."""
    if not loaded.task.writes:
        return loaded.task.predict(loaded, table, recipe)
    from veneer.cli.generate import conversation
    from veneer.cli.generation import Sampling, complete

    rows = [{"messages": row["prompt"]} if isinstance(row.get("prompt"), list) else row for row in table.dataset]
    prompts = [conversation(row, loaded.asking.system) for row in rows]
    sampling = Sampling(recipe.eval.max_new_tokens or 256)
    size = recipe.eval.batch_size
    texts = complete(loaded.model, loaded.tokenizer, prompts, sampling, size, loaded.asking.chat)
    return [{"text": text} for text in texts]
