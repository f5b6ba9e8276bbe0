"""A base model with all the adapters that a server is to answer with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from .pool import Pool

__all__ = ["TASKS", "Served", "load_pool", "load_served", "task_to_serve"]

TASKS = ("causal-lm", "embedding", "seq-cls")
"""What a server can do; causal-lm also gives embeddings."""


@dataclass
class Served:
    """pooling: how embeddings are made. base_answers: whether the base alone has all its weights (a classifier's head
    may come with the adapters only). labels: class names of the base."""

    pool: Pool
    tokenizer: Any
    task: str
    pooling: str = "mean"
    base_answers: bool = True
    labels: list[str] = field(default_factory=list)


def load_served(base: str, adapters: Mapping[str, str], dtype: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a language model with all its adapters in memory; see load_pool."""
    served = load_pool(base, adapters, dtype=dtype, task="causal-lm")
    return served.pool.model, served.tokenizer


def load_pool(
    base: str,
    adapters: Mapping[str, str],
    *,
    dtype: str | None = None,
    task: str | None = None,
    folders: Sequence[str | Path] = (),
    limit: int | None = None,
) -> Served:
    """The base, and as many of the adapters as may be in memory. adapters: name -> folder, of any methods that act on
    layers. task: one of TASKS, None: as the adapters, else the base, say.

    Raises BaseModelError for the base, AdapterError for an adapter that cannot share a batch.
    """
    from ..opened import adapter_folder
    from ..train.bases import BaseRef, load_base, resolve_base
    from ..train.purpose import read_purpose

    known = {name: adapter_folder(source) for name, source in adapters.items()}
    ref = resolve_base(base)
    if dtype is not None:
        ref = BaseRef(ref.kind, ref.name, ref.path, ref.revision, dtype, ref.trust_remote_code)
    task = task or task_to_serve(ref, list(known.values()))
    if task not in TASKS:
        raise AdapterError(f"a model for {task} cannot be served; these can: {', '.join(TASKS)}")
    options = _labels(list(known.values())) if task == "seq-cls" else {}
    model, tokenizer = load_base(ref, task, **options)
    pool = Pool(model.eval(), known, folders=folders, limit=limit)
    for name in known if limit is None else list(known)[-limit:]:
        pool.bring(name, set())
    purposes = (read_purpose(folder) for folder in known.values())
    poolings = {p.options.get("pooling", "mean") for p in purposes if p is not None and p.task == "embedding"}
    if len(poolings) > 1:
        raise AdapterError(f"the adapters pool differently ({', '.join(sorted(poolings))}); serve them apart")
    labels = [name for _, name in sorted(model.config.id2label.items())] if task == "seq-cls" else []
    pooling = next(iter(poolings), "mean")
    return Served(pool, tokenizer, task, pooling, not model.fresh_modules, labels)


def task_to_serve(ref: Any, folders: Sequence[Path]) -> str:
    """What all the adapters were trained for; without any that say so, what the base is."""
    from ..train.purpose import read_purpose
    from ..train.use import _task_of_base

    purposes = {p.task for p in map(read_purpose, folders) if p is not None}
    if len(purposes) > 1:
        raise AdapterError(f"the adapters are for several tasks ({', '.join(sorted(purposes))}); serve them apart")
    found = purposes.pop() if purposes else _task_of_base(ref)
    if found in ("dpo",):
        return "causal-lm"
    if not purposes and found == "causal-lm" and _reads_only(ref):
        return "embedding"
    return found


def _reads_only(ref: Any) -> bool:
    """Whether the base is an encoder without a head."""
    from ..train.bases import load_config

    name = (load_config(ref).architectures or [""])[0]
    return name.endswith("Model") and "LMHead" not in name


def _labels(folders: Sequence[Path]) -> dict[str, Any]:
    """The classes of the adapters, as options of the base's config. Raises AdapterError where they differ in number."""
    from .. import state
    from ..opened import _labels as heads
    from ..train.use import label_names

    sizes: dict[int, Path] = {}
    names: list[str] | None = None
    for folder in folders:
        if (folder / "labels.json").is_file():
            own = label_names(folder)
            names = names or own
            sizes.setdefault(len(own), folder)
        elif (size := heads(state.read(str(folder))[0])) is not None:
            sizes.setdefault(size, folder)
    if len(sizes) > 1:
        each = ", ".join(f"{folder}: {n}" for n, folder in sizes.items())
        raise AdapterError(f"the adapters have different numbers of classes ({each}); serve them apart")
    if names is not None:
        return {"id2label": dict(enumerate(names))}
    return {"num_labels": next(iter(sizes))} if sizes else {}
