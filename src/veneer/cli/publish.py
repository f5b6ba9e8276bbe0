"""`veneer push` and `veneer pull`: adapters to and from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.errors import DebugFlag

__all__ = ["pull", "push"]

Repo = Annotated[str, typer.Argument(help="Repository on the hub, OWNER/NAME.")]


def push(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, or a run's folder.")],
    repo: Repo,
    base: Annotated[
        str | None, typer.Option("--base", help="Hub id of its base, where the adapter names a folder of this machine.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch to write to.")] = None,
    create_pr: Annotated[bool, typer.Option("--pr", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Message of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would go, and the card; send nothing.")
    ] = False,
    debug: DebugFlag = False,
) -> None:
    """Upload an adapter with its card to the hub, in one commit."""
    from veneer.cli.quiet import quiet_libraries
    from veneer.publish import plan_upload, push_adapter

    quiet_libraries()
    upload = plan_upload(adapter, repo, base=base)
    for name, size in upload.sizes().items():
        typer.echo(f"{size:>12,}  {name}")
    if upload.left_out:
        typer.echo(f"left out: {', '.join(upload.left_out)}")
    for note in upload.notes:
        typer.echo(f"note: {note}")
    if dry_run:
        typer.echo(f"would go to {repo}; the card:\n\n{upload.card}")
        return
    typer.echo(
        push_adapter(upload, repo, private=private or None, revision=revision, create_pr=create_pr, message=message)
    )


def pull(
    repo: Repo,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must not exist yet.")],
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Compare with this base, not with the one that the adapter names.")
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """Download an adapter from the hub, and say whether the base on this machine is the one it was trained on."""
    from veneer.cli.quiet import quiet_libraries
    from veneer.publish import pull_adapter

    quiet_libraries()
    found = pull_adapter(repo, out, revision=revision, base=base)
    typer.echo(f"{found.folder}: {repo} at {found.commit}")
    trained = [f"trained on {found.base or 'a base it does not name'}"]
    trained += [f"revision {found.revision}"] * (found.revision is not None)
    trained += [f"fingerprint {found.fingerprint}"] * (found.fingerprint is not None)
    typer.echo(", ".join(trained))
    if found.differences is None:
        typer.echo(f"the base was not compared: {found.unchecked}")
    elif found.differences:
        typer.echo(f"the base here is another one: {found.differences[0]} ({len(found.differences)} differences)")
    else:
        typer.echo("the base here is the same")
