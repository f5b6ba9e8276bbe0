"""Training rows as tokens, kept for the next run with the same rows, tokenizer and settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.files import write_json
from veneer.train.asking import Asking
from veneer.train.gguf_cache import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from veneer.train.data import Table
    from veneer.train.recipe import Recipe
    from veneer.train.tasks import Plan

__all__ = ["kept_plan"]

#: seconds of work from which on it is worth keeping
WORTH = 2.0
#: days after which what nobody has used goes
DAYS = 30
_PLAIN = ("label_names", "model_options", "facts", "notes")


def kept_plan(recipe: Recipe, train: Table, tokenizer: Any, config: Any, make: Callable[[], Plan]) -> Plan:
    """What ``make`` gives for the training rows, or what an earlier run has kept of the same.

    A plan that took less than WORTH seconds is not kept, nor is any where `data.cache` is off or the cache cannot be
    written.
    """
    if not recipe.data.cache:
        return make()
    folder = cache_folder() / "tokens" / _key(recipe, train, tokenizer, config)
    if (folder / "plan.json").is_file():
        os.utime(folder)
        return _read(folder)
    began = time.monotonic()
    plan = make()
    if time.monotonic() - began >= WORTH:
        _write(plan, folder)
    return plan


def _key(recipe: Recipe, train: Table, tokenizer: Any, config: Any) -> str:
    """A hash of all that tokens come from: rows, task, tokenizer, the model's config, versions."""
    import tokenizers
    import transformers

    from veneer.version import __version__

    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    settings = {
        "versions": [__version__, transformers.__version__, tokenizers.__version__],
        "task": [recipe.task, recipe.options, recipe.tokens, train.layout.kind],
        "data": [recipe.data.max_length, recipe.data.label_all_subwords],
        "tokenizer": [backend, tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.model_max_length],
        "kind": [type(tokenizer).__name__, tokenizer.padding_side, tokenizer.truncation_side],
        "config": config.to_dict(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    _add_rows(digest, train)
    return digest.hexdigest()[:32]


def _add_rows(digest: Any, train: Table) -> None:
    """The rows, in their order, as Arrow writes them."""
    import pyarrow

    rows = train.dataset.with_format("arrow")
    for first in range(0, len(rows), 1000):
        out = pyarrow.BufferOutputStream()
        part = rows[first : first + 1000].combine_chunks()
        with pyarrow.ipc.new_stream(out, part.schema) as writer:
            writer.write_table(part)
        digest.update(out.getvalue())


def _read(folder: Path) -> Plan:
    import datasets

    from veneer.train.tasks import Plan

    found = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    asking = None if found["asking"] is None else Asking(**found["asking"])
    train = datasets.Dataset.load_from_disk(str(folder / "train"))
    return Plan(train, stop_ids=set(found["stop_ids"]), asking=asking, **{name: found[name] for name in _PLAIN})


def _write(plan: Plan, folder: Path) -> None:
    """Write a plan beside its place and rename it; room is made by dropping what has not been used for long."""
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    asking = None if plan.asking is None else dataclasses.asdict(plan.asking)
    values = {name: getattr(plan, name) for name in _PLAIN} | {"asking": asking, "stop_ids": sorted(plan.stop_ids)}
    try:
        partial.mkdir(parents=True)
        plan.train.save_to_disk(str(partial / "train"))
        write_json(str(partial / "plan.json"), values)
        _drop_old(folder.parent)
        os.replace(partial, folder)
    except OSError:  # a full disk, a folder that cannot be written, another run that was faster
        shutil.rmtree(partial, ignore_errors=True)


def _drop_old(root: Path) -> None:
    for folder in root.iterdir():
        if time.time() - folder.stat().st_mtime > DAYS * 86400:
            shutil.rmtree(folder, ignore_errors=True)
