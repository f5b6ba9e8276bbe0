"""`veneer combine`, `resize`, `convert`, `extract`: adapters in, adapters out, the error of each printed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from veneer.cli.errors import DebugFlag, UserError
from veneer.cli.shared import BaseOption

if TYPE_CHECKING:
    from veneer.arithmetic.folders import Result

__all__ = ["combine", "convert", "extract", "resize"]

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder (or file) to write; it must not exist yet.")]
ErrorAllowed = Annotated[
    float | None, typer.Option("--error", help="Each layer's smallest rank that is off by no more than this share.")
]


def combine(
    adapters: Annotated[list[str], typer.Argument(help="Folders of LoRA adapters of one base.")],
    out: Out,
    weights: Annotated[str | None, typer.Option(help="One number an adapter: 1,0.5,-1; 1 each by default.")] = None,
    how: Annotated[
        str, typer.Option("--type", help="cat (exact), svd, linear, ties, dare_linear, dare_ties, magnitude_prune.")
    ] = "cat",
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of the svd types.")] = None,
    error: ErrorAllowed = None,
    density: Annotated[float | None, typer.Option(help="Share of entries that pruning keeps.")] = None,
    base: BaseOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the dare types.")] = None,
    debug: DebugFlag = False,
) -> None:
    """Add LoRA adapters, with weights of either sign, into a new one."""
    from veneer.arithmetic.combination import combine_adapters

    try:
        numbers = None if weights is None else [float(w) for w in weights.split(",")]
    except ValueError:
        raise UserError(f"{weights!r} is not a list of numbers", where="--weights", hint="Write 1,0.5,-1.") from None
    with _settings():
        done = combine_adapters(
            adapters, out, numbers, how, base=base, seed=seed, svd_rank=rank, svd_error=error, density=density
        )  # fmt: skip
    _report(done, "the weighted sum")


def resize(
    adapter: Annotated[str, typer.Argument(help="A LoRA adapter's folder.")],
    out: Out,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="The new rank of every layer.")] = None,
    error: ErrorAllowed = None,
    debug: DebugFlag = False,
) -> None:
    """Change a LoRA adapter's rank: the best there is, with the error it costs."""
    from veneer.arithmetic.combination import resize_adapter

    with _settings():
        done = resize_adapter(adapter, out, rank, error)
    _report(done, "the adapter")


def convert(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, or a LoRA file of another program.")],
    out: Out,
    to: Annotated[str, typer.Option("--to", help="peft, loralib, kohya or diffusers keys.")] = "peft",
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Make a LoRA of this rank of any method.")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Or keep this share of each change's energy, in (0, 1].")
    ] = None,
    base: BaseOption = None,
    alpha: Annotated[float | None, typer.Option(help="lora_alpha, where the file does not hold it.")] = None,
    prefix: Annotated[str | None, typer.Option(help="Start of kohya's or diffusers' keys (lora_unet, unet).")] = None,
    task_type: Annotated[
        str | None, typer.Option("--task-type", help="CAUSAL_LM and the like, for the config.")
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """Turn any adapter into LoRA, or a LoRA file into another program's form and back."""
    from veneer.arithmetic.formats import convert_file

    if rank is not None and energy is not None:
        raise UserError("both set the rank", where="--rank and --energy", hint="Give one of them.")
    size = rank if energy is None else energy
    done = convert_file(
        adapter, out, to=to, rank=size, base=base, alpha=alpha, prefix=prefix, task_type=task_type
    )  # fmt: skip
    if isinstance(done, Path):
        typer.echo(f"written to {done}")
    else:
        _report(done, "the adapter")


def extract(
    base: Annotated[str, typer.Argument(help="The base model: a bundled name, a folder, a .gguf file or a hub id.")],
    tuned: Annotated[str, typer.Argument(help="The full model that was made from it.")],
    out: Out,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Rank of every layer.")] = None,
    error: ErrorAllowed = None,
    only_lora: Annotated[bool, typer.Option("--only-lora", help="Leave out what no LoRA layer holds (norms).")] = False,
    debug: DebugFlag = False,
) -> None:
    """Make a LoRA adapter of the difference between two full models."""
    from veneer.arithmetic.extraction import extract_lora, load_pair
    from veneer.cli.quiet import quiet_libraries

    quiet_libraries()
    first, second, task = load_pair(base, tuned)
    done = extract_lora(first, second, out, rank, error, task_type=task, save_whole=not only_lora)
    _report(done, "the difference")
    if done.whole:
        typer.echo(f"saved whole: {', '.join(done.whole[:6])}{' ...' if len(done.whole) > 6 else ''}")
    if done.left:
        typer.echo(f"left out: {', '.join(done.left[:6])}{' ...' if len(done.left) > 6 else ''}")


@contextmanager
def _settings() -> Iterator[None]:
    """Settings that do not fit are the user's to mend."""
    from veneer.errors import AdapterError

    try:
        yield
    except AdapterError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def _report(done: Result, what: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    ranks = sorted(set(done.ranks.values()))
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    console.print(f"written to {done.folder}: {len(done.ranks)} layers, {span}", highlight=False)
    worst = sorted(done.errors.items(), key=lambda x: -x[1])
    mean = sum(done.errors.values()) / max(len(worst), 1)
    if done.worst < 1e-5:
        console.print(f"equal to {what} (largest relative error {done.worst:.1g})", highlight=False)
        return
    console.print(f"error against {what}, Frobenius: mean {mean:.2%}, largest {done.worst:.2%}", highlight=False)
    table = Table(title="Farthest layers", title_style="bold", title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("rank", justify="right")
    table.add_column("error", justify="right")
    for name, error in worst[:8]:
        table.add_row(name, str(done.ranks.get(name, "")), f"{error:.2%}")
    console.print(table)
