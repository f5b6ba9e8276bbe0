"""What goes over the wire: OpenAI's requests, its errors, and how answers are worded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from .jobs import Job

__all__ = ["Asked", "Chat", "Classify", "Completion", "Embed", "LoadAdapter", "Message", "Refused", "Shape",
           "UnloadAdapter", "line_of", "usage_of"]  # fmt: skip


class Refused(Exception):
    """A request that gets an error as OpenAI's server words it."""

    def __init__(self, status: int, message: str, param: str | None = None, kind: str = "invalid_request_error"):
        self.status, self.message, self.param, self.kind = status, message, param, kind
        super().__init__(message)

    def response(self) -> JSONResponse:
        held = {"message": self.message, "type": self.kind, "param": self.param, "code": None}
        return JSONResponse({"error": held}, status_code=self.status)


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


class Texts(BaseModel):
    """input: one text or several, as text or as token ids."""

    model: str
    input: str | list[int] | list[str] | list[list[int]]

    def texts(self) -> list[str | list[int]]:
        if isinstance(self.input, str):
            return [self.input]
        return [self.input] if self.input and isinstance(self.input[0], int) else list(self.input)  # type: ignore


class Embed(Texts):
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)


class Classify(Texts):
    pass


class LoadAdapter(BaseModel):
    """lora_path: absolute, or inside a folder that the server may read."""

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1)


class UnloadAdapter(BaseModel):
    lora_name: str = Field(min_length=1)


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


def line_of(held: dict[str, Any]) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(held, ensure_ascii=False)}\n\n"


def usage_of(job: Job) -> dict[str, int]:
    prompt, made = len(job.prompt), len(job.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
