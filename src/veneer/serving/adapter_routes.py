"""Endpoints that load and unload adapters while the server runs, in vLLM's form."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response

from ..errors import AdapterError
from .engine import FAILURES, Busy
from .pool import Forbidden
from .service import Service
from .wire import LoadAdapter, Refused, UnloadAdapter

__all__ = ["add_adapter_routes"]


def add_adapter_routes(app: FastAPI, service: Service) -> None:
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter; both answer once it is done."""

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request, asked: LoadAdapter) -> Response:
        service.allow(request)
        name = asked.lora_name
        if name == service.base:
            raise Refused(400, f"{name!r} is the base's name", "lora_name")
        try:
            order = service.engine.load(name, asked.lora_path)
        except Forbidden as error:
            raise Refused(403, str(error), "lora_path", "permission_error") from None
        except Busy as error:
            raise Refused(503, str(error), kind="server_error") from None
        except AdapterError as error:
            raise Refused(400, str(error), "lora_name") from None
        await _done(service, order)
        return PlainTextResponse(f"adapter {name!r} is loaded")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request, asked: UnloadAdapter) -> Response:
        service.allow(request)
        try:
            order = service.engine.unload(asked.lora_name)
        except Busy as error:
            raise Refused(503, str(error), kind="server_error") from None
        except AdapterError as error:
            raise Refused(404, str(error), "lora_name") from None
        await _done(service, order)
        return PlainTextResponse(f"adapter {asked.lora_name!r} is unloaded")


async def _done(service: Service, order: Future[None]) -> None:
    """Wait for the engine. Raises Refused with what loading raised, or where it takes too long (it goes on then)."""
    try:
        await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(order)), service.limits.seconds)
    except asyncio.TimeoutError:
        message = f"not done after {service.limits.seconds:g} s: requests use the adapters that are loaded"
        raise Refused(504, message, kind="timeout") from None
    except Busy as error:
        raise Refused(503, str(error), kind="server_error") from None
    except FAILURES as error:
        raise Refused(400, str(error), "lora_path") from None
