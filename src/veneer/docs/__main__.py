"""`python -m veneer.docs [FOLDER] [--benchmark FILE] [--check]`: write docs/methods, or compare with what is there."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from .. import registry
from ..files import write_atomic
from .facts import facts
from .overview import overview
from .pages import NOTE, filename, page


def documents(measured: dict[str, Any] | None) -> dict[str, str]:
    """File name -> text of every page."""
    everything = [facts(name) for name in registry.METHODS]
    return {"README.md": overview(everything, measured), **{filename(f.name): page(f) for f in everything}}


def stale(folder: Path, texts: dict[str, str]) -> list[str]:
    """Files of the folder that differ from the texts, are absent, or are of a method that is no more."""
    held = {f.name: f.read_text(encoding="utf-8") for f in folder.glob("*.md")}
    held = {n: text for n, text in held.items() if n in texts or text.startswith(NOTE)}
    return sorted(n for n in held.keys() | texts.keys() if held.get(n) != texts.get(n))


def _write(text: str, path: str) -> None:
    Path(path).write_text(text, encoding="utf-8")


def measurements(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m veneer.docs", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs/methods"))
    parser.add_argument("--benchmark", type=Path, default=Path("benchmarks/methods.json"))
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is not up to date")
    args = parser.parse_args()
    texts = documents(measurements(args.benchmark))
    wrong = stale(args.folder, texts)
    if args.check:
        sys.exit(f"not up to date (run `make docs`): {', '.join(wrong)}" if wrong else 0)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in wrong:
        if name in texts:
            write_atomic(str(args.folder / name), partial(_write, texts[name]))
        else:
            (args.folder / name).unlink()
    print(f"{args.folder}: {len(texts)} pages, {len(wrong)} changed")


if __name__ == "__main__":
    main()
