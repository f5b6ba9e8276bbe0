"""`veneer serve`: a base and its adapters behind an OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.errors import DebugFlag, UserError

__all__ = ["serve"]


Base = Annotated[str, typer.Argument(help="Base model: a bundled name, a folder, a .gguf file or a hub id.")]
Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", metavar="NAME=PATH", help="An adapter and the name to ask for it.")
]
Name = Annotated[str | None, typer.Option("--name", help="Name of the base itself; by default its own.")]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")]
Keys = Annotated[
    list[str] | None, typer.Option("--api-key", envvar="VENEER_API_KEY", help="A key that opens the server.")
]
Dtype = Annotated[str | None, typer.Option(help="Base weights: float32, bfloat16 or float16.")]
MaxBatch = Annotated[int, typer.Option(min=1, help="Requests that run together.")]
MaxQueue = Annotated[int, typer.Option(min=1, help="Requests that wait; more are refused.")]
MaxTokens = Annotated[int, typer.Option(min=2, help="Prompt and answer together.")]
MaxAnswer = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Folders = Annotated[
    list[Path] | None,
    typer.Option("--adapter-folder", help="Folder from which adapters may be loaded while the server runs."),
]
MaxAdapters = Annotated[int | None, typer.Option(min=1, help="Adapters in memory; the least recently used make room.")]
Task = Annotated[
    str | None, typer.Option(help="causal-lm, embedding or seq-cls; by default what the adapters or the base say.")
]
MaxTexts = Annotated[int, typer.Option(min=1, help="Texts in one request for embeddings or classes.")]
MaxBody = Annotated[int, typer.Option(min=100, help="Bytes of a request.")]
Timeout = Annotated[float, typer.Option(min=0.1, help="Longest time of a request, in seconds.")]


def serve(
    base: Base,
    adapter: Adapters = None,
    name: Name = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Keys = None,
    dtype: Dtype = None,
    max_batch: MaxBatch = 16,
    max_queue: MaxQueue = 256,
    max_tokens: MaxTokens = 4096,
    max_answer: MaxAnswer = 1024,
    adapter_folder: Folders = None,
    max_adapters: MaxAdapters = None,
    task: Task = None,
    max_texts: MaxTexts = 256,
    max_body: MaxBody = 1_000_000,
    timeout: Timeout = 300.0,
    debug: DebugFlag = False,
) -> None:
    """Serve a base and its adapters; a request names the adapter as its model."""
    from veneer.cli.quiet import quiet_libraries
    from veneer.serving.api import Limits, make_app
    from veneer.serving.engine import Engine
    from veneer.serving.load import load_pool
    from veneer.serving.server import run

    asked, own, folders = named(adapter or []), name or Path(base).name, list(adapter_folder or [])
    _check(own, asked, folders)
    quiet_libraries()
    served = load_pool(base, asked, dtype=dtype, task=task, folders=folders, limit=max_adapters)
    engine = Engine(served.pool, served.tokenizer, max_batch, max_queue, served.pooling).start()
    limits = Limits(max_tokens, max_answer, timeout, max_body, max_texts)
    app = make_app(
        engine, own, limits, tuple(api_key or ()),
        task=served.task, base_answers=served.base_answers, labels=served.labels,
    )  # fmt: skip
    _tell([*[own] * served.base_answers, *asked], host, port, served.task, bool(api_key))
    try:
        run(app, host, port, timeout)
    finally:
        engine.stop()


def _check(own: str, asked: dict[str, str], folders: list[Path]) -> None:
    if own in asked:
        raise UserError(f"{own!r} names the base and an adapter", where="--adapter", hint="Choose another name.")
    missing = next((f for f in folders if not f.is_dir()), None)
    if missing is not None:
        raise UserError(f"{missing} is not a folder", where="--adapter-folder", hint="Make it first.")


def _tell(models: list[str], host: str, port: int, task: str, closed: bool) -> None:
    typer.echo(f"models: {', '.join(models)}\nlistening on http://{host}:{port}/v1")
    typer.echo(f"task: {task}" + (f"; chat at http://{host}:{port}/" * (task == "causal-lm")))
    if not closed and host not in ("127.0.0.1", "localhost", "::1"):
        typer.echo("no --api-key: whoever reaches this address can use it")


def named(given: list[str], where: str = "--adapter") -> dict[str, str]:
    out: dict[str, str] = {}
    for word in given:
        name, sign, path = word.partition("=")
        if not sign or not name or not path or "." in name:
            hint = f"Write {where} NAME=PATH, the name without dots."
            raise UserError(f"{word!r} is not NAME=PATH", where=where, hint=hint)
        if name in out:
            raise UserError(f"{name!r} is given twice", where=where, hint="Give each adapter its own name.")
        out[name] = path
    return out
