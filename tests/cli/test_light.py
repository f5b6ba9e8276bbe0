"""`veneer --help` is quick because it imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
ENV = {**os.environ, "PYTHONPATH": str(SRC)}
HEAVY = ("torch", "transformers", "datasets", "numpy", "pandas", "peft")


def best_times(*codes: str, repeats: int = 5) -> list[float]:
    """The quickest of some runs of each, in seconds, taken in turns, so that load hits all alike."""
    times: list[list[float]] = [[] for _ in codes]
    for _ in range(repeats):
        for code, kept in zip(codes, times):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], env=ENV, check=True, capture_output=True)
            kept.append(time.perf_counter() - start)
    return [min(kept) for kept in times]


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["quickstart", "--help"]])
def test_help_and_version_import_nothing_heavy(words: list[str]) -> None:
    code = f"""
import sys
sys.argv = ["veneer", *{words!r}]
from veneer.cli.app import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("HEAVY", [name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENV, check=True, capture_output=True, text=True)
    assert "HEAVY []" in done.stdout


def test_help_costs_little_more_than_typer_and_rich() -> None:
    run = "import sys; sys.argv = ['veneer', '--help']\nfrom veneer.cli.app import main\n"
    floor, ours = best_times("import typer, rich", run + "try: main()\nexcept SystemExit: pass")
    # drawing the help page is rich's and typer's work too, so it is let through with room
    assert ours < 0.5 or ours < 5 * floor, (ours, floor)
