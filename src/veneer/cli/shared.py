"""Arguments and options that several commands take, each written once."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "BaseOption",
    "MaxNewTokens",
    "ModelArgument",
    "Overrides",
    "Seed",
    "System",
    "Temperature",
    "TopK",
    "TopP",
]

ModelArgument = Annotated[str, typer.Argument(help="An adapter's folder, a run's folder, or a base model.")]
BaseOption = Annotated[str | None, typer.Option("--base", help="Use this base, not the adapter's own.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key: --set adapter.r=32.")
]
System = Annotated[str | None, typer.Option("--system", help="System message.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Sample from this much probability.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Sample from this many tokens; 0 is all.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed for sampling.")]
