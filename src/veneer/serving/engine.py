"""The engine: one thread that runs the model for all requests together, each row with its own adapter.

New requests are prefilled together, those of like lengths in one call, and join the batch between two steps; finished
ones leave it.
"""

from __future__ import annotations

import inspect
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..context import BASE
from ..errors import AdapterError
from ..model import PeftModel
from .batch import Batch, groups
from .encode import Encoder, Reading
from .jobs import Event, Job, sample
from .pool import Pool

__all__ = ["Busy", "Engine"]


class Busy(AdapterError):
    """The queue is full."""


FAILURES = (RuntimeError, ValueError, NotImplementedError, IndexError, OSError, KeyError)
"""What a model's call or an adapter's loading may raise: it ends the requests at hand, not the server."""


class Engine:
    """model: a model (its adapters then stay as they are), or a Pool, from which adapters come and go. max_batch: rows
    at once; max_queue: requests that wait; pooling: see Encoder.

    counts: requests and tokens by adapter, for metrics.
    """

    def __init__(self, model: Any, tokenizer: Any, max_batch: int = 16, max_queue: int = 256, pooling: Any = "mean"):
        from ..cli.generation import stop_ids

        self.pool = model if isinstance(model, Pool) else _fixed(model)
        self.pool.model.eval()
        self.tokenizer, self.max_batch = tokenizer, max_batch
        writes = getattr(self.model, "generation_config", None) is not None
        self.ends = stop_ids(self.model, tokenizer) if writes else set()
        self.waiting: queue.Queue[Job | Reading | None] = queue.Queue(max_queue)
        self.held: list[Job | Reading] = []  # left the queue, but all places for adapters are busy
        self.active: list[Job] = []
        self.batch = Batch()
        self.encoder = Encoder(pooling, max_batch)
        keeps = "logits_to_keep" in inspect.signature(type(_plain(self.model)).forward).parameters
        self._last_only: dict[str, int] = {"logits_to_keep": 1} if keeps else {}  # a prompt's other logits are not used
        self.counts: Counter[tuple[str, str]] = Counter()
        self.steps, self.busy_seconds = 0, 0.0
        self._orders: list[tuple[Callable[[], bool], Future[None]]] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="veneer-engine", daemon=True)

    @property
    def model(self) -> Any:
        return self.pool.model

    @property
    def adapters(self) -> list[str]:
        """The names that can be asked for, in memory or not."""
        return list(self.pool.known)

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

    def submit(self, job: Job | Reading) -> None:
        """Put a job into the queue. Raises AdapterError for an unknown adapter, Busy where the queue is full."""
        if job.adapter is not None and job.adapter not in self.pool.known:
            raise AdapterError(f"no adapter {job.adapter!r}; there are: {', '.join(self.adapters) or 'none'}")
        if self._stopping.is_set():
            raise Busy("the server is stopping")
        try:
            self.waiting.put_nowait(job)
        except queue.Full:
            raise Busy(f"{self.waiting.maxsize} requests are waiting already; try again later") from None
        self.counts["requests", job.adapter or ""] += 1

    def load(self, name: str, path: str) -> Future[None]:
        """Know the adapter in an allowed folder by a name, and load it between two steps, once there is room.

        Raises AdapterError for the folder or the name; the future raises what loading raises, and forgets the name.
        """
        self.pool.add(name, self.pool.allowed(path))

        def order() -> bool:
            try:
                return self.pool.bring(name, self._busy())
            except FAILURES:
                self.pool.known.pop(name, None)
                raise

        return self._order(order)

    def unload(self, name: str) -> Future[None]:
        """Forget an adapter: it is refused from now on, and leaves once the requests that use it are answered."""
        if self.pool.known.pop(name, None) is None:
            raise AdapterError(f"no adapter {name!r}; there are: {', '.join(self.adapters) or 'none'}")

        def order() -> bool:
            with self.waiting.mutex:
                queued = {j.adapter for j in self.waiting.queue if j is not None}
            if name in queued | self._busy() | {j.adapter for j in self.held}:
                return False
            self.pool.drop(name)
            return True

        return self._order(order)

    def _order(self, act: Callable[[], bool]) -> Future[None]:
        done: Future[None] = Future()
        if self._stopping.is_set():
            raise Busy("the server is stopping")
        with self._lock:
            self._orders.append((act, done))
        if self.waiting.empty():  # wake the thread; a queue that is not empty has it awake
            try:
                self.waiting.put_nowait(None)
            except queue.Full:
                return done
        return done

    # -- the thread ---------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while True:
            self._obey()
            new = self._admit()
            if not new and not self.active and not self.encoder.open:
                if self._stopping.is_set() and self.waiting.empty() and not self.held:
                    self._refuse_orders()
                    return
                continue
            start = time.perf_counter()
            self._guarded(new)
            self.busy_seconds += time.perf_counter() - start

    def _obey(self) -> None:
        """Carry out what was ordered; what cannot be done yet stays."""
        with self._lock:
            orders, self._orders = self._orders, []
        for act, done in orders:
            try:
                finished = act()
            except FAILURES as error:
                done.set_exception(error)
                continue
            if finished:
                done.set_result(None)
            else:
                with self._lock:
                    self._orders.append((act, done))

    def _refuse_orders(self) -> None:
        self._obey()
        for _, done in self._orders:
            done.set_exception(Busy("the server has stopped"))

    def _busy(self) -> set[str]:
        """Adapters that rows in the batch, or held requests that wait for nothing but a row, use."""
        return {j.adapter for j in self.active if j.adapter is not None} | self.encoder.adapters()

    def _guarded(self, new: list[Job]) -> None:
        """One round; a failure of the model ends the requests in it, not the server."""
        try:
            with torch.inference_mode():
                if self.active:
                    self._step()
                for rows in groups([len(j.prompt) for j in new]):
                    self._prefill([new[i] for i in rows])
                self.encoder.step(self._call)
        except FAILURES as error:
            why = f"{type(error).__name__}: {error}"
            for job in {id(j): j for j in (*self.active, *new)}.values():
                job.emit(Event(why, "error"))
            self.encoder.fail(why)
            self.active, self.batch = [], Batch()

    def _admit(self) -> list[Job]:
        """Waiting jobs for the free rows; blocks while there is nothing to do."""
        new: list[Job] = []
        before, self.held = self.held, []
        while len(self.active) + len(new) < self.max_batch and len(self.held) < self.max_batch:
            idle = not (self.active or new or self.held or self.encoder.open or before)
            if before:
                job: Job | Reading | None = before.pop(0)
            else:
                try:
                    job = self.waiting.get(block=idle and not self._stopping.is_set())
                except queue.Empty:
                    break
            if job is not None:
                self._place(job, new)
            elif idle:
                break
        self.held += before
        return new

    def _place(self, job: Job | Reading, new: list[Job]) -> None:
        """Into the next round, with its adapter in memory; or held until there is room for that."""
        if job.cancelled:
            return
        try:
            busy = self._busy() | {j.adapter for j in new if j.adapter is not None}
            if job.adapter is not None and not self.pool.bring(job.adapter, busy):
                self.held.append(job)
                return
        except FAILURES as error:
            job.emit(Event(f"{error}", "error") if isinstance(job, Job) else f"{error}")  # type: ignore[arg-type]
            return
        if isinstance(job, Reading):
            self.encoder.open.append(job)
        else:
            new.append(job)

    def _call(self, jobs: Sequence[Job | Reading], **inputs: Any) -> Any:
        """The model over one row a job, each with its adapter."""
        device = next(self.model.parameters()).device
        inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        if self.pool.mixes:
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
            jobs, input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            **self._last_only,
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


def _plain(model: Any) -> Any:
    """The base model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _fixed(model: Any) -> Pool:
    """A pool of the adapters that a model has, from which nothing comes or goes."""
    pool = Pool(model)
    for name in getattr(model, "peft_config", {}):
        pool.known[name] = Path()
        pool.loaded[name] = None
    return pool
