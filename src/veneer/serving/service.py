"""Requests into jobs for the engine: names, keys, limits, and the answers' way back."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from torch import Tensor

from ..errors import AdapterError
from .encode import Reading, Wanted
from .engine import Busy, Engine
from .jobs import Event, Job
from .wire import Asked, Refused

__all__ = ["Limits", "Service"]


@dataclass(frozen=True)
class Limits:
    """tokens: of prompt and answer together. seconds: a request's longest time. body: bytes of a request. texts: of
    one request for embeddings or classes."""

    tokens: int = 4096
    answer: int = 1024
    seconds: float = 300.0
    body: int = 1_000_000
    texts: int = 256


class Service:
    """base: the name under which the base model itself is asked for. task, base_answers, labels: see Served."""

    def __init__(
        self, engine: Engine, base: str, limits: Limits, keys: tuple[str, ...], *, task: str = "causal-lm",
        base_answers: bool = True, labels: tuple[str, ...] = (),
    ):  # fmt: skip
        self.engine, self.base, self.limits, self.keys = engine, base, limits, keys
        self.task, self.base_answers, self.labels = task, base_answers, labels
        self.began = time.time()

    def names(self) -> list[str]:
        return [*[self.base] * self.base_answers, *self.engine.adapters]

    def allow(self, request: Request) -> None:
        """Raise Refused without a valid key."""
        if not self.keys:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if not any(hmac.compare_digest(given, key.encode()) for key in self.keys):
            raise Refused(401, "missing or wrong API key; send it as Authorization: Bearer KEY", kind="auth_error")

    def adapter(self, model: str) -> str | None:
        """The adapter that a request's model is, None for the base. Raises Refused for another name."""
        if model not in self.names():
            have = ", ".join(self.names())
            raise Refused(404, f"the model {model!r} does not exist here; there are: {have}", "model")
        return None if model == self.base else model

    def needs(self, *tasks: str) -> None:
        """Raise Refused where the served model is for another task."""
        if self.task not in tasks:
            raise Refused(400, f"this server runs a model for {self.task}; this endpoint needs {' or '.join(tasks)}")

    def ids(self, text: str | list[int], param: str) -> list[int]:
        """Token ids of a text, or those given, if the vocabulary has them."""
        if isinstance(text, str):
            return list(self.engine.tokenizer(text)["input_ids"])
        vocabulary = self.engine.model.get_input_embeddings().weight.shape[0]
        if any(not 0 <= i < vocabulary for i in text):
            raise Refused(400, f"a token id is outside the vocabulary of {vocabulary}", param)
        return text

    def job(self, asked: Asked, ids: list[int], emit: Any) -> Job:
        adapter = self.adapter(asked.model)
        room = self.limits.tokens - len(ids)
        if not ids or room < 1:
            raise Refused(
                400, f"the prompt has {len(ids)} tokens; 1 to {self.limits.tokens - 1} are allowed", "messages"
            )
        wanted = asked.max_completion_tokens or asked.max_tokens or self.limits.answer
        stop = [asked.stop] if isinstance(asked.stop, str) else list(asked.stop or [])
        return Job(
            prompt=ids,
            adapter=adapter,
            emit=emit,
            max_tokens=min(wanted, self.limits.answer, room),
            temperature=asked.temperature,
            top_p=asked.top_p,
            stop=[s for s in stop if s],
            seed=asked.seed,
        )

    async def events(self, asked: Asked, ids: list[int]) -> tuple[Job, AsyncIterator[Event]]:
        """Submit and follow one request; leaving early, or the time limit, cancels it."""
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Event]()
        job = self.job(asked, ids, lambda e: loop.call_soon_threadsafe(inbox.put_nowait, e))
        self._submit(job)
        return job, self._follow(job, inbox)

    def _submit(self, job: Job | Reading) -> None:
        try:
            self.engine.submit(job)
        except Busy as error:
            raise Refused(429, str(error), kind="rate_limit_error") from None
        except AdapterError as error:
            raise Refused(404, str(error), "model") from None

    async def read(self, model: str, texts: list[str | list[int]], wanted: Wanted) -> tuple[list[Tensor], int]:
        """One row a text, and the number of tokens read. Raises Refused for texts that are empty, too many or long."""
        if not 1 <= len(texts) <= self.limits.texts:
            raise Refused(400, f"{len(texts)} texts; 1 to {self.limits.texts} are allowed", "input")
        rows = [self.ids(text, "input") for text in texts]
        longest = min(self.limits.tokens, self.positions())
        for number, row in enumerate(rows):
            if not 1 <= len(row) <= longest:
                raise Refused(400, f"text {number} has {len(row)} tokens; 1 to {longest} are allowed", "input")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[list[Tensor] | str] = loop.create_future()

        def emit(result: list[Tensor] | str) -> None:
            loop.call_soon_threadsafe(_settle, done, result)

        job = Reading(rows, self.adapter(model), wanted, emit)
        self._submit(job)
        try:
            found = await asyncio.wait_for(done, self.limits.seconds)
        except asyncio.TimeoutError:
            raise Refused(504, f"it took more than {self.limits.seconds:g} s", kind="timeout") from None
        finally:
            job.cancelled = True
        if isinstance(found, str):
            raise Refused(500, found, kind="server_error")
        return found, sum(map(len, rows))

    def positions(self) -> int:
        """The longest input that the model has positions for."""
        config = self.engine.model.config
        return int(getattr(config, "max_position_embeddings", None) or self.limits.tokens)

    async def _follow(self, job: Job, inbox: asyncio.Queue[Event]) -> AsyncIterator[Event]:
        until = time.monotonic() + self.limits.seconds
        try:
            while True:
                event = await asyncio.wait_for(inbox.get(), max(until - time.monotonic(), 0.001))
                yield event
                if event.reason is not None:
                    return
        finally:
            job.cancelled = True

    def metrics(self) -> str:
        """Prometheus' text form."""
        lines = []
        for name, kind in (("requests", "Requests accepted."), ("tokens", "Tokens generated.")):
            lines += [f"# HELP veneer_{name}_total {kind}", f"# TYPE veneer_{name}_total counter"]
            for (what, adapter), n in sorted(self.engine.counts.items()):
                if what == name:
                    label = (adapter or self.base).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
                    lines.append(f'veneer_{name}_total{{model="{label}"}} {n}')
        gauges = {
            "running_requests": len(self.engine.active),
            "waiting_requests": self.engine.waiting.qsize(),
            "model_calls_total": self.engine.steps,
            "busy_seconds_total": round(self.engine.busy_seconds, 6),
            "loaded_adapters": len(self.engine.pool.loaded),
            "adapter_loads_total": self.engine.pool.counts["loads"],
            "adapter_evictions_total": self.engine.pool.counts["evictions"],
        }
        for name, value in gauges.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# TYPE veneer_{name} {kind}", f"veneer_{name} {value}"]
        return "\n".join(lines) + "\n"


def _settle(done: asyncio.Future[list[Tensor] | str], found: list[Tensor] | str) -> None:
    if not done.done():
        done.set_result(found)
