"""Rows made into tokens a batch at a time, by several processes where asked, with a bar where it takes a while."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["BATCH", "in_batches"]

BATCH = 1000
#: seconds after which a person is shown how far it is
PATIENCE = 1.5

Encode = Callable[[int, int], Any]
#: a worker process' own
_job: list[Encode] = []


def in_batches(total: int, encode: Encode, workers: int = 1, size: int = BATCH) -> Iterator[Any]:
    """What ``encode(first, last)`` gives for each ``size`` rows of ``total``, in their order.

    With ``workers`` above 1 that many processes share the batches; what it gives, and what it raises, must pickle.
    """
    spans = [(first, min(first + size, total)) for first in range(0, total, size)]
    workers = min(workers, len(spans))
    if workers <= 1:
        yield from _shown((encode(*span) for span in spans), spans)
        return
    from multiprocess import get_all_start_methods, get_context  # datasets' own, which can send closures

    context = get_context("fork" if "fork" in get_all_start_methods() else "spawn")
    with context.Pool(workers, initializer=_begin, initargs=(encode,)) as pool:
        yield from _shown(map(pickle.loads, pool.imap(_work, spans)), spans)


def _begin(encode: Encode) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the machine already
    _job[:] = [encode]


def _work(span: tuple[int, int]) -> bytes:
    return pickle.dumps(_job[0](*span), pickle.HIGHEST_PROTOCOL)  # the pool's own pickler takes as long as the work


def _shown(results: Iterator[Any], spans: list[tuple[int, int]]) -> Iterator[Any]:
    """The results, and a bar on a terminal once they take longer than a moment."""
    from rich.console import Console
    from rich.progress import Progress

    from veneer.train.processes import is_main
    from veneer.train.screen import redraws

    console, began = Console(stderr=True), time.monotonic()
    bar = Progress(console=console, transient=True) if redraws(console) and is_main() else None
    task = None
    try:
        for (_, last), result in zip(spans, results, strict=True):
            if bar is not None and last < spans[-1][1] and time.monotonic() - began > PATIENCE:
                if task is None:
                    bar.start()
                    task = bar.add_task("Rows to tokens", total=spans[-1][1])
                bar.update(task, completed=last)
            yield result
    finally:
        if task is not None and bar is not None:
            bar.stop()
