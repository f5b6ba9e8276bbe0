"""The engine: one thread that runs the model for all requests together, each row with its own adapter.

New requests are prefilled in one call and join the batch between two steps; finished ones leave it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F

from ..context import BASE
from ..errors import AdapterError
from .batch import Batch
from .jobs import Event, Job, sample

__all__ = ["Busy", "Engine"]


class Busy(AdapterError):
    """The queue is full."""


class Engine:
    """model: a PeftModel, or a plain language model. max_batch: rows at once; max_queue: requests that wait.

    counts: requests and tokens by adapter, for metrics.
    """

    def __init__(self, model: Any, tokenizer: Any, max_batch: int = 16, max_queue: int = 256):
        from ..cli.generation import stop_ids

        self.model, self.tokenizer, self.max_batch = model.eval(), tokenizer, max_batch
        self.adapters: list[str] = list(getattr(model, "peft_config", {}))
        self.ends = stop_ids(model, tokenizer)
        self.waiting: queue.Queue[Job | None] = queue.Queue(max_queue)
        self.active: list[Job] = []
        self.batch = Batch()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.steps, self.busy_seconds = 0, 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="veneer-engine", daemon=True)

    def start(self) -> Engine:
        self._thread.start()
        return self

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping.is_set()

    def stop(self, timeout: float | None = 60.0) -> None:
        """Finish what was accepted, then end the thread."""
        self._stopping.set()
        self.waiting.put(None)
        self._thread.join(timeout)

    def submit(self, job: Job) -> None:
        """Put a job into the queue. Raises AdapterError for an unknown adapter, Busy where the queue is full."""
        if job.adapter is not None and job.adapter not in self.adapters:
            raise AdapterError(f"no adapter {job.adapter!r}; loaded: {', '.join(self.adapters) or 'none'}")
        if self._stopping.is_set():
            raise Busy("the server is stopping")
        try:
            self.waiting.put_nowait(job)
        except queue.Full:
            raise Busy(f"{self.waiting.maxsize} requests are waiting already; try again later") from None
        self.counts["requests", job.adapter or ""] += 1

    # -- the thread ---------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while True:
            new = self._admit()
            if not new and not self.active:
                return
            start = time.perf_counter()
            self._guarded(new)
            self.busy_seconds += time.perf_counter() - start

    def _guarded(self, new: list[Job]) -> None:
        """One round; a failure of the model ends the requests in it, not the server."""
        try:
            with torch.inference_mode():
                if self.active:
                    self._step()
                if new:
                    self._prefill(new)
        except (RuntimeError, ValueError, NotImplementedError, IndexError) as error:
            for job in {id(j): j for j in (*self.active, *new)}.values():
                job.emit(Event(f"{type(error).__name__}: {error}", "error"))
            self.active, self.batch = [], Batch()

    def _admit(self) -> list[Job]:
        """Waiting jobs for the free rows; blocks while there is nothing to do. Empty with nothing active: the end."""
        new: list[Job] = []
        while len(self.active) + len(new) < self.max_batch:
            idle = not self.active and not new
            try:
                job = self.waiting.get(block=idle and not self._stopping.is_set())
            except queue.Empty:
                break
            if job is not None:
                new.append(job)
            elif idle and self.waiting.empty():
                break
        return new

    def _call(self, jobs: list[Job], **inputs: Any) -> Any:
        if self.adapters:
            inputs["adapter_names"] = [j.adapter or BASE for j in jobs]
        self.steps += 1
        return self.model(**inputs)

    def _prefill(self, jobs: list[Job]) -> None:
        from transformers import DynamicCache

        device = next(self.model.parameters()).device
        length = max(len(j.prompt) for j in jobs)
        rows = [F.pad(torch.tensor(j.prompt), (length - len(j.prompt), 0)) for j in jobs]
        mask = torch.stack(
            [F.pad(torch.ones(len(j.prompt), dtype=torch.long), (length - len(j.prompt), 0)) for j in jobs]
        )
        ids, mask = torch.stack(rows).to(device), mask.to(device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache()
        out = self._call(
            jobs, input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )  # fmt: skip
        chosen = torch.tensor([sample(row, j) for row, j in zip(out.logits[:, -1], jobs)], device=device)
        self.batch.join(cache, mask, chosen[:, None])
        self.active += jobs
        self._deliver(len(self.active) - len(jobs), chosen.tolist())

    def _step(self) -> None:
        out = self._call(self.active, **self.batch.inputs())
        chosen = [sample(row, j) for row, j in zip(out.logits[:, -1], self.active)]
        self.batch.feed(torch.tensor(chosen, device=out.logits.device))
        self._deliver(0, chosen)

    def _deliver(self, first: int, chosen: list[int]) -> None:
        """Hand tokens to the jobs from `first` on; those that are done leave."""
        left = list(range(first))
        for i, token in enumerate(chosen, first):
            job = self.active[i]
            self.counts["tokens", job.adapter or ""] += 1
            if not job.take(token, self.tokenizer, self.ends):
                left.append(i)
        if len(left) < len(self.active):
            self.active = [self.active[i] for i in left]
            self.batch.keep(left)
