"""The HTTP side: OpenAI's chat and completions, models, health, metrics, keys and limits."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import AdapterError, MissingExtra
from .engine import Busy, Engine
from .jobs import Event, Job

try:
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
except ImportError as error:
    raise MissingExtra("serving needs FastAPI and uvicorn: pip install 'veneer[serve]'") from error

from pydantic import BaseModel, Field

__all__ = ["Limits", "make_app"]


@dataclass(frozen=True)
class Limits:
    """tokens: of prompt and answer together. seconds: a request's longest time. body: bytes of a request."""

    tokens: int = 4096
    answer: int = 1024
    seconds: float = 300.0
    body: int = 1_000_000


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]]

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        odd = next((p for p in self.content if p.get("type") != "text"), None)
        if odd is not None:
            raise Refused(400, f"content of type {odd.get('type')!r} is not served here; send text", "messages")
        return "".join(str(p.get("text", "")) for p in self.content)


class Asked(BaseModel):
    """What both kinds of request share."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    n: int = Field(1, ge=1, le=1)


class Chat(Asked):
    messages: list[Message] = Field(min_length=1)


class Completion(Asked):
    prompt: str | list[int]


class Refused(Exception):
    """A request that gets an error as OpenAI's server words it."""

    def __init__(self, status: int, message: str, param: str | None = None, kind: str = "invalid_request_error"):
        self.status, self.message, self.param, self.kind = status, message, param, kind
        super().__init__(message)

    def response(self) -> JSONResponse:
        held = {"message": self.message, "type": self.kind, "param": self.param, "code": None}
        return JSONResponse({"error": held}, status_code=self.status)


class Service:
    """base: the name under which the base model itself is asked for."""

    def __init__(self, engine: Engine, base: str, limits: Limits, keys: tuple[str, ...]):
        self.engine, self.base, self.limits, self.keys = engine, base, limits, keys
        self.began = time.time()

    def names(self) -> list[str]:
        return [self.base, *self.engine.adapters]

    def allow(self, request: Request) -> None:
        """Raise Refused without a valid key, or where the body is too large."""
        if int(request.headers.get("content-length") or 0) > self.limits.body:
            raise Refused(413, f"the request is larger than {self.limits.body} bytes")
        if not self.keys:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if not any(hmac.compare_digest(given, key.encode()) for key in self.keys):
            raise Refused(401, "missing or wrong API key; send it as Authorization: Bearer KEY", kind="auth_error")

    def job(self, asked: Asked, ids: list[int], emit: Any) -> Job:
        if asked.model not in self.names():
            have = ", ".join(self.names())
            raise Refused(404, f"the model {asked.model!r} does not exist here; there are: {have}", "model")
        room = self.limits.tokens - len(ids)
        if not ids or room < 1:
            raise Refused(
                400, f"the prompt has {len(ids)} tokens; 1 to {self.limits.tokens - 1} are allowed", "messages"
            )
        wanted = asked.max_completion_tokens or asked.max_tokens or self.limits.answer
        stop = [asked.stop] if isinstance(asked.stop, str) else list(asked.stop or [])
        return Job(
            prompt=ids,
            adapter=None if asked.model == self.base else asked.model,
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
        try:
            self.engine.submit(job)
        except Busy as error:
            raise Refused(429, str(error), kind="rate_limit_error") from None
        except AdapterError as error:
            raise Refused(404, str(error), "model") from None
        return job, self._follow(job, inbox)

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
        }
        for name, value in gauges.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# TYPE veneer_{name} {kind}", f"veneer_{name} {value}"]
        return "\n".join(lines) + "\n"


def make_app(engine: Engine, base: str, limits: Limits | None = None, keys: tuple[str, ...] = ()) -> FastAPI:
    """The application over a started engine. keys: those that open /v1; none: it is open."""
    from ..version import __version__

    service = Service(engine, base, limits or Limits(), keys)
    app = FastAPI(title="veneer", version=__version__, docs_url=None, redoc_url=None)

    @app.exception_handler(Refused)
    async def _refused(_: Request, error: Refused) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"] if p != "body")
        return Refused(400, f"{place}: {first['msg']}", place).response()

    @app.get("/health")
    async def health() -> Response:
        return PlainTextResponse("ok" if engine.alive else "stopped", status_code=200 if engine.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        service.allow(request)
        held = {"object": "model", "created": int(service.began), "owned_by": "veneer"}
        return {"object": "list", "data": [{"id": n, **held} for n in service.names()]}

    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: Chat) -> Response:
        service.allow(request)
        return await _answer(service, asked, _chat_ids(engine.tokenizer, asked), Shape.chat())

    @app.post("/v1/completions")
    async def complete(request: Request, asked: Completion) -> Response:
        service.allow(request)
        ids = asked.prompt if isinstance(asked.prompt, list) else list(engine.tokenizer(asked.prompt)["input_ids"])
        vocabulary = engine.model.get_input_embeddings().weight.shape[0]
        if any(not 0 <= i < vocabulary for i in ids):
            raise Refused(400, f"a token id is outside the vocabulary of {vocabulary}", "prompt")
        return await _answer(service, asked, ids, Shape.text())

    return app


def _chat_ids(tokenizer: Any, asked: Chat) -> list[int]:
    from ..cli.generation import prompt_text

    turns = [{"role": "system" if m.role == "developer" else m.role, "content": m.text()} for m in asked.messages]
    text = prompt_text(tokenizer, turns)
    return list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])


@dataclass(frozen=True)
class Shape:
    """How an endpoint words its objects: names, and where the text stands."""

    whole: str
    part: str
    prefix: str
    is_chat: bool

    @staticmethod
    def chat() -> Shape:
        return Shape("chat.completion", "chat.completion.chunk", "chatcmpl-", True)

    @staticmethod
    def text() -> Shape:
        return Shape("text_completion", "text_completion", "cmpl-", False)

    def choice(self, text: str, reason: str | None) -> dict[str, Any]:
        held = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        return {"index": 0, "logprobs": None, "finish_reason": reason, **held}

    def delta(self, text: str, reason: str | None, first: bool) -> dict[str, Any]:
        if not self.is_chat:
            return self.choice(text, reason)
        role = {"role": "assistant"} if first else {}
        return {"index": 0, "logprobs": None, "finish_reason": reason, "delta": {**role, "content": text}}


async def _answer(service: Service, asked: Asked, ids: list[int], shape: Shape) -> Response:
    head = {"id": f"{shape.prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
    job, events = await service.events(asked, ids)
    if asked.stream:
        return StreamingResponse(_stream(job, events, asked, head, shape), media_type="text/event-stream")
    text, reason = "", None
    try:
        async for event in events:
            if event.reason == "error":
                raise Refused(500, event.text, kind="server_error")
            text, reason = text + event.text, event.reason
    except asyncio.TimeoutError:
        raise Refused(504, f"the answer took more than {service.limits.seconds:g} s", kind="timeout") from None
    usage = _usage(job)
    return JSONResponse({**head, "object": shape.whole, "choices": [shape.choice(text, reason)], "usage": usage})


async def _stream(
    job: Job, events: AsyncIterator[Event], asked: Asked, head: dict[str, Any], shape: Shape
) -> AsyncIterator[str]:
    first = True
    head = {**head, "object": shape.part}
    try:
        async for event in events:
            if event.reason == "error":
                yield _line({"error": {"message": event.text, "type": "server_error"}})
                return
            yield _line({**head, "choices": [shape.delta(event.text, event.reason, first)]})
            first = False
    except asyncio.TimeoutError:
        yield _line({"error": {"message": "the answer took too long", "type": "timeout"}})
        return
    if (asked.stream_options or {}).get("include_usage"):
        yield _line({**head, "choices": [], "usage": _usage(job)})
    yield "data: [DONE]\n\n"


def _line(held: dict[str, Any]) -> str:
    return f"data: {json.dumps(held, ensure_ascii=False)}\n\n"


def _usage(job: Job) -> dict[str, int]:
    prompt, made = len(job.prompt), len(job.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
