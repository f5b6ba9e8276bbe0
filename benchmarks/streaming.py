"""What streaming rows takes: memory beside the file's size, and how fast a run that was cut short finds its place.

    python benchmarks/streaming.py [rows]

Prints, for a file of rows with a prompt and a completion: its size, what the process' memory grew by while all
rows went through a shuffle buffer, rows a second of CPU that are read again when a run goes on, and rows a second that
are made into tokens, which going on saves.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from veneer.train.bases import load_config, load_tokenizer, resolve_base
from veneer.train.progress import memory_in_use_mb
from veneer.train.recipe import build_recipe
from veneer.train.stream import CHUNK, RowStream, open_stream
from veneer.train.tasks import task_of

BASE = "smollm2-135m-instruct"
WORDS = ["the", "train", "leaves", "at", "nine", "and", "nobody", "has", "seen", "where", "its", "driver", "went"]


def write_rows(path: Path, rows: int) -> None:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            row = {"prompt": " ".join(draw.choices(WORDS, k=30)), "completion": " ".join(draw.choices(WORDS, k=60))}
            out.write(json.dumps(row) + "\n")


def read_all(stream: RowStream, rows: int) -> tuple[float, float]:
    """Rows a second of CPU, and the most MB that the process held beyond what it held before."""
    before = most = memory_in_use_mb()
    began = time.process_time()
    for number, _ in enumerate(itertools.islice(stream, rows)):
        if number % 5000 == 0:
            most = max(most, memory_in_use_mb())
    return rows / (time.process_time() - began), most - before


def main(rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows)
        data = {"train": str(path), "streaming": True, "shuffle_buffer": 1000}
        recipe = build_recipe({"task": "causal-lm", "base": BASE, "data": data}, [], {})
        ref = resolve_base(recipe.base)
        tokenizer, config, task = load_tokenizer(ref), load_config(ref), task_of(recipe)
        stream, first = open_stream(recipe)
        plan = task.plan_train(recipe, first, tokenizer, config)
        speed, grown = read_all(stream, rows)
        began = time.process_time()
        for chunk in range(8):
            table = first.select(range(chunk % 3 * CHUNK, (chunk % 3 + 1) * CHUNK))
            task.more_rows(plan, recipe, table, tokenizer, config)
        tokens = 8 * CHUNK / (time.process_time() - began)
        print(f"{rows:,} rows, {path.stat().st_size / 2**20:.0f} MB: memory grew by {grown:.1f} MB")
        print(f"read again: {speed:,.0f} rows a second; made into tokens: {tokens:,.0f} rows a second")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400_000)
