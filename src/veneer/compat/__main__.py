"""`python -m veneer.compat script.py ...`: run a script with veneer under the name `peft`."""

from __future__ import annotations

import sys

from .run import run_as_peft

if __name__ == "__main__":
    run_as_peft(sys.argv[1:])
