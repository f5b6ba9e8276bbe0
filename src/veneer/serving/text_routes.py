"""Endpoints that read texts: OpenAI's embeddings, and classes in vLLM's form."""

from __future__ import annotations

import base64
import time
import uuid
from typing import Any

import torch
from fastapi import FastAPI, Request
from torch import Tensor

from .service import Service
from .wire import Classify, Embed, Refused

__all__ = ["add_text_routes"]


def add_text_routes(app: FastAPI, service: Service) -> None:
    """POST /v1/embeddings, /v1/classify and /classify."""

    @app.post("/v1/embeddings")
    async def embed(request: Request, asked: Embed) -> dict[str, Any]:
        service.allow(request)
        service.needs("causal-lm", "embedding")
        rows, tokens = await service.read(asked.model, asked.texts(), "embedding")
        vectors = [_cut(row, asked.dimensions) for row in rows]
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(v, asked.encoding_format)}
            for i, v in enumerate(vectors)
        ]
        return {"object": "list", "data": data, "model": asked.model, "usage": _usage(tokens)}

    @app.post("/classify")
    @app.post("/v1/classify")
    async def classify(request: Request, asked: Classify) -> dict[str, Any]:
        service.allow(request)
        service.needs("seq-cls")
        rows, tokens = await service.read(asked.model, asked.texts(), "classes")
        names = service.engine.pool.labels.get(asked.model) or list(service.labels)
        data = [{"index": i, **_class(row, names)} for i, row in enumerate(rows)]
        head = {"id": f"classify-{uuid.uuid4().hex}", "object": "list", "created": int(time.time())}
        return {**head, "model": asked.model, "data": data, "usage": _usage(tokens)}


def _cut(vector: Tensor, dimensions: int | None) -> Tensor:
    """The first dimensions, at length 1 again."""
    if dimensions is None:
        return vector
    if dimensions > len(vector):
        raise Refused(400, f"{dimensions} dimensions were asked for; the model has {len(vector)}", "dimensions")
    return torch.nn.functional.normalize(vector[:dimensions], dim=0)


def _encoded(vector: Tensor, form: str) -> list[float] | str:
    """Numbers, or base64 of little-endian float32."""
    if form == "float":
        return vector.tolist()
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()


def _class(logits: Tensor, names: list[str]) -> dict[str, Any]:
    """The likeliest class and all probabilities; of a single output, the number itself as its probability's logit."""
    probs = logits.softmax(0) if len(logits) > 1 else logits.sigmoid()
    best = int(probs.argmax())
    label = names[best] if len(names) == len(logits) else f"LABEL_{best}"
    return {"label": label, "probs": probs.tolist(), "num_classes": len(logits)}


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}
