"""What starting costs: importing the package, once torch is imported."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from common import Case, Lap

HELP = """
import sys
from veneer.cli.app import main
sys.argv = ["veneer", "--help"]
try:
    main()
except SystemExit:
    assert "torch" not in sys.modules
"""
CODE = {"torch": "import torch", "torch and veneer": "import torch; import veneer", "help": HELP}


def build(who: str, o: dict[str, Any]) -> Lap:
    def run(_: Any) -> None:
        subprocess.run([sys.executable, "-c", CODE[who]], check=True, stdout=subprocess.DEVNULL)

    return Lap(run)


CASES = {
    "import": Case(
        about="a process that imports torch, with veneer, and `veneer --help`, which imports no torch",
        build=build,
        contestants=tuple(CODE),
        targets={("torch and veneer", "torch"): None, ("help", "torch"): None},
    )
}
