"""`python -m veneer` is the `veneer` command."""

from __future__ import annotations

from veneer.cli.app import main

if __name__ == "__main__":
    main()
