"""A server in a thread, for tests that ask it."""

from __future__ import annotations

import functools
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import openai
import uvicorn

from veneer.serving.api import Limits, make_app
from veneer.serving.engine import Engine

KEY = "secret-key"


class Running:
    def __init__(self, engine: Engine, limits: Limits, keys: tuple[str, ...] = (KEY,), **more: Any):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.engine = engine
        app = make_app(engine, "base", limits, keys, **more)
        self.server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    @functools.lru_cache  # noqa: B019  # a client is slow to make
    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0)

    def read(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}") as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        self.engine.stop(10)

    def post(self, path: str, body: Any, key: str = KEY) -> tuple[int, Any]:
        """(status, answer): JSON where it is JSON. body: bytes go as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, head)
        try:
            with urllib.request.urlopen(request) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def load(self, name: str, path: Any, key: str = KEY) -> tuple[int, Any]:
        return self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}, key)

    def unload(self, name: str, key: str = KEY) -> tuple[int, Any]:
        return self.post("/v1/unload_lora_adapter", {"lora_name": name}, key)
