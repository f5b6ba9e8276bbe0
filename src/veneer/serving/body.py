"""A limit on the size of a request, before anything reads it."""

from __future__ import annotations

from typing import Any

from .wire import Refused

__all__ = ["BodyLimit"]


class BodyLimit:
    """ASGI middleware: answers 413 where a body is, or turns out to be, longer than `most` bytes."""

    def __init__(self, app: Any, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if not told.isdigit() or int(told) > self.most:
            await self._refuse(scope, receive, send)
            return
        body, more = b"", True
        while more and len(body) <= self.most:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has gone
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) > self.most:
            await self._refuse(scope, receive, send)
            return
        whole: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Any:
            return whole.pop() if whole else await receive()

        await self.app(scope, again, send)

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        refused = Refused(413, f"the request is larger than {self.most} bytes")
        await refused.response()(scope, receive, send)
