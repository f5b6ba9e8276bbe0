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
    timeout: Annotated[float, typer.Option(min=0.1, help="Longest time of a request, in seconds.")] = 300.0,
    debug: DebugFlag = False,
) -> None:
    """Serve a base and its adapters; a request names the adapter as its model."""
    from veneer.cli.quiet import quiet_libraries
    from veneer.serving.api import Limits, make_app
    from veneer.serving.engine import Engine
    from veneer.serving.load import load_served
    from veneer.serving.server import run

    named = _named(adapter or [])
    own = name or Path(base).name
    if own in named:
        raise UserError(f"{own!r} names the base and an adapter", where="--adapter", hint="Choose another name.")
    quiet_libraries()
    model, tokenizer = load_served(base, named, dtype)
    engine = Engine(model, tokenizer, max_batch, max_queue).start()
    limits = Limits(max_tokens, max_answer, timeout)
    app = make_app(engine, own, limits, tuple(api_key or ()))
    typer.echo(f"models: {', '.join([own, *named])}\nlistening on http://{host}:{port}/v1")
    if not api_key and host not in ("127.0.0.1", "localhost", "::1"):
        typer.echo("no --api-key: whoever reaches this address can use it")
    try:
        run(app, host, port, timeout)
    finally:
        engine.stop()


def _named(given: list[str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for word in given:
        name, sign, path = word.partition("=")
        if not sign or not name or not path or "." in name:
            hint = "Write --adapter NAME=PATH, the name without dots."
            raise UserError(f"{word!r} is not NAME=PATH", where="--adapter", hint=hint)
        if name in out:
            raise UserError(f"{name!r} is given twice", where="--adapter", hint="Give each adapter its own name.")
        out[name] = path
    return out
