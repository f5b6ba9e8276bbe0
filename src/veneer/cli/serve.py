"""`veneer serve`: a base and its adapters behind an OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.errors import DebugFlag, UserError

__all__ = ["serve"]


def serve(
    base: Annotated[str, typer.Argument(help="Base model: a bundled name, a folder, a .gguf file or a hub id.")],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME=PATH", help="An adapter and the name to ask for it.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the base itself; by default its own.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option("--api-key", envvar="VENEER_API_KEY", help="A key that opens the server.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Base weights: float32, bfloat16 or float16.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests that run together.")] = 16,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that wait; more are refused.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=2, help="Prompt and answer together.")] = 4096,
    max_answer: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    adapter_folder: Annotated[
        list[Path] | None,
        typer.Option("--adapter-folder", help="Folder from which adapters may be loaded while the server runs."),
    ] = None,
    max_adapters: Annotated[
        int | None, typer.Option(min=1, help="Adapters in memory; the least recently used make room.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="causal-lm, embedding or seq-cls; by default what the adapters or the base say.")
    ] = None,
    max_texts: Annotated[int, typer.Option(min=1, help="Texts in one request for embeddings or classes.")] = 256,
    max_body: Annotated[int, typer.Option(min=100, help="Bytes of a request.")] = 1_000_000,
    timeout: Annotated[float, typer.Option(min=0.1, help="Longest time of a request, in seconds.")] = 300.0,
    debug: DebugFlag = False,
) -> None:
    """Serve a base and its adapters; a request names the adapter as its model."""
    from veneer.cli.quiet import quiet_libraries
    from veneer.serving.api import Limits, make_app
    from veneer.serving.engine import Engine
    from veneer.serving.load import load_pool
    from veneer.serving.server import run

    asked = named(adapter or [])
    own = name or Path(base).name
    if own in asked:
        raise UserError(f"{own!r} names the base and an adapter", where="--adapter", hint="Choose another name.")
    quiet_libraries()
    missing = next((f for f in adapter_folder or [] if not f.is_dir()), None)
    if missing is not None:
        raise UserError(f"{missing} is not a folder", where="--adapter-folder", hint="Make it first.")
    folders = list(adapter_folder or [])
    served = load_pool(base, asked, dtype=dtype, task=task, folders=folders, limit=max_adapters)
    engine = Engine(served.pool, served.tokenizer, max_batch, max_queue, served.pooling).start()
    limits = Limits(max_tokens, max_answer, timeout, max_body, max_texts)
    app = make_app(
        engine, own, limits, tuple(api_key or ()),
        task=served.task, base_answers=served.base_answers, labels=served.labels,
    )  # fmt: skip
    typer.echo(f"models: {', '.join([*[own] * served.base_answers, *asked])}\nlistening on http://{host}:{port}/v1")
    typer.echo(f"task: {served.task}" + (f"; chat at http://{host}:{port}/" * (served.task == "causal-lm")))
    if not api_key and host not in ("127.0.0.1", "localhost", "::1"):
        typer.echo("no --api-key: whoever reaches this address can use it")
    try:
        run(app, host, port, timeout)
    finally:
        engine.stop()


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
