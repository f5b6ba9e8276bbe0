"""The HTTP side: OpenAI's chat and completions, models, health, metrics; texts and adapters have files of their own."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ..errors import MissingExtra

try:
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
except ImportError as error:
    raise MissingExtra("serving needs FastAPI and uvicorn: pip install 'veneer[serve]'") from error

from .adapter_routes import add_adapter_routes
from .body import BodyLimit
from .engine import Engine
from .jobs import Event, Job
from .page import HEADERS, chat_page
from .service import Limits, Service
from .text_routes import add_text_routes
from .wire import Asked, Chat, Completion, Refused, Shape, line_of, usage_of

__all__ = ["Limits", "make_app"]


def make_app(
    engine: Engine,
    base: str,
    limits: Limits | None = None,
    keys: tuple[str, ...] = (),
    *,
    task: str = "causal-lm",
    base_answers: bool = True,
    labels: Sequence[str] = (),
) -> FastAPI:
    """The application over a started engine. keys: those that open /v1; none: it is open. task, base_answers, labels:
    see Served."""
    from ..version import __version__

    limits = limits or Limits()
    service = Service(engine, base, limits, keys, task=task, base_answers=base_answers, labels=tuple(labels))
    app = FastAPI(title="veneer", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, most=limits.body)
    _add_errors(app)
    _add_state(app, service)
    _add_writing(app, service)
    add_text_routes(app, service)
    add_adapter_routes(app, service)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def _refused(_: Request, error: Refused) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"] if p != "body")
        return Refused(400, f"{place}: {first['msg']}", place).response()


def _add_state(app: FastAPI, service: Service) -> None:
    engine = service.engine

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(chat_page(service.base), headers=HEADERS)

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
        parents = {n: None if n == service.base else service.base for n in service.names()}
        return {"object": "list", "data": [{"id": n, **held, "parent": parent} for n, parent in parents.items()]}


def _add_writing(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request, asked: Chat) -> Response:
        service.allow(request)
        service.needs("causal-lm")
        return await _answer(service, asked, _chat_ids(service.engine.tokenizer, asked), Shape.chat())

    @app.post("/v1/completions")
    async def complete(request: Request, asked: Completion) -> Response:
        service.allow(request)
        service.needs("causal-lm")
        return await _answer(service, asked, service.ids(asked.prompt, "prompt"), Shape.text())


def _chat_ids(tokenizer: Any, asked: Chat) -> list[int]:
    from ..cli.generation import prompt_text

    turns = [{"role": "system" if m.role == "developer" else m.role, "content": m.text()} for m in asked.messages]
    text = prompt_text(tokenizer, turns)
    return list(tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"])


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
    usage = usage_of(job)
    return JSONResponse({**head, "object": shape.whole, "choices": [shape.choice(text, reason)], "usage": usage})


async def _stream(
    job: Job, events: AsyncIterator[Event], asked: Asked, head: dict[str, Any], shape: Shape
) -> AsyncIterator[str]:
    first = True
    head = {**head, "object": shape.part}
    try:
        async for event in events:
            if event.reason == "error":
                yield line_of({"error": {"message": event.text, "type": "server_error"}})
                return
            yield line_of({**head, "choices": [shape.delta(event.text, event.reason, first)]})
            first = False
    except asyncio.TimeoutError:
        yield line_of({"error": {"message": "the answer took too long", "type": "timeout"}})
        return
    if (asked.stream_options or {}).get("include_usage"):
        yield line_of({**head, "choices": [], "usage": usage_of(job)})
    yield "data: [DONE]\n\n"
