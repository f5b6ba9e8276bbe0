"""`veneer generate`: answers to one prompt or to a file of them, in batches."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.errors import DebugFlag, UserError
from veneer.cli.quiet import quiet_libraries
from veneer.cli.shared import (
    BaseOption,
    MaxNewTokens,
    ModelArgument,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
)

__all__ = ["generate", "read_prompts"]

PROMPT_KEYS = ("messages", "prompt", "text", "instruction", "input")


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file (each with a prompt), or one row for each line of any other text file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError("no such file", where=str(path), hint="Give a JSONL file of prompts.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text: {error.reason}", where=str(path)) from None
    if path.suffix not in {".jsonl", ".json"}:
        return [{"prompt": line} for line in lines if line.strip()]
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        hint = "Every line is one JSON object."
        raise UserError(f"not valid JSON: {error}", where=where, hint=hint) from None
    if not isinstance(row, dict) or not any(key in row for key in PROMPT_KEYS):
        hint = f"A row needs one of these keys: {', '.join(PROMPT_KEYS)}."
        raise UserError("no prompt in this row", where=where, hint=hint)
    messages = row.get("messages", [])
    good = isinstance(messages, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    if not good:
        raise UserError("`messages` is not a list of {role, content} objects", where=where)
    return row


def conversation(row: dict[str, Any], system: str | None = None) -> list[dict[str, str]]:
    """A row as messages that end with the user: a stored answer at the end is left off."""
    messages = [dict(message) for message in row.get("messages", [])]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        text = next((row[key] for key in PROMPT_KEYS if key in row and key != "messages"), "")
        messages = [{"role": "user", "content": str(text)}]
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def generate(
    model: ModelArgument,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="JSONL rows with prompt or messages.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write JSONL here instead of the screen.")] = None,
    base: BaseOption = None,
    system: System = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    debug: DebugFlag = False,
) -> None:
    """Answer prompts in batches; an adapter that does not write prints what it predicts."""
    rows = [{"prompt": text} for text in prompt or []] + (read_prompts(file) if file else [])
    if not rows:
        raise UserError("no prompt", hint="Give --prompt 'text' or --file prompts.jsonl.")
    from veneer.train.use import load

    quiet_libraries()
    loaded = load(model, base=base)
    if not loaded.task.writes:
        from veneer.cli.predict import text_predictions

        recipe = loaded.recipe("--prompt", eval__batch_size=batch_size, eval__max_new_tokens=max_new_tokens)
        texts = [conversation(row)[-1]["content"] for row in rows]
        answers: Iterator[Any] = iter(text_predictions(loaded, texts, recipe))
    else:
        from veneer.cli.generation import Sampling, complete

        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
        asking = loaded.asking
        prompts = [conversation(row, asking.system if system is None else system) for row in rows]
        answers = complete(loaded.model, loaded.tokenizer, prompts, sampling, batch_size, asking.chat)
    if out is None:
        for answer in answers:
            typer.echo(answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False))
    else:
        _write(out, rows, answers)


def _write(out: Path, rows: list[dict[str, Any]], answers: Iterator[Any]) -> None:
    """Each row with its answer under ``output``; the file appears only once it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    with partial.open("w", encoding="utf-8") as lines:
        for row, answer in zip(rows, answers, strict=True):
            lines.write(json.dumps({**row, "output": answer}, ensure_ascii=False) + "\n")
    os.replace(partial, out)
    typer.echo(f"{len(rows)} answers in {out}")
