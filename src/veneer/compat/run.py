"""Run an unmodified peft script on veneer."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

from . import install

USAGE = "usage: python -m veneer.compat [-m module | script.py] [arguments ...]"


def run_as_peft(arguments: Sequence[str]) -> None:
    """Run `script.py ...` or `-m module ...` as Python does, with veneer under the name `peft`.

    Exits with status 2 where there is no script to run; what the script raises is the script's.
    """
    args = list(arguments)
    if args[:1] == ["-m"] and len(args) > 1:
        install()
        sys.argv = args[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        return
    if not args or args[0].startswith("-"):
        sys.exit(USAGE)
    if not os.path.isfile(args[0]):
        print(f"{args[0]}: no such script\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    install()
    sys.argv = args
    sys.path.insert(0, os.path.dirname(os.path.abspath(args[0])))
    runpy.run_path(args[0], run_name="__main__")
