"""The suite: each case runs veneer, peft and, where there is one, the limit, in processes of their own that take turns.

    python benchmarks/run.py                        every case (make bench)
    python benchmarks/run.py decode inject --rounds 3
    python benchmarks/run.py step --set seq=512     with another option of the case
    python benchmarks/run.py --list

Results go to benchmarks/results.json (--json), beside what the file already holds of other cases; each with the
machine and the commit. `python benchmarks/table.py` writes docs/speed.md from it. A GPU is used where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import adapters
import compiled
import decode
import epoch
import startup
import step
from common import Case, commit, machine, race, serve, write

CASES: dict[str, Case] = {
    **step.CASES,
    **decode.CASES,
    **adapters.CASES,
    **compiled.CASES,
    **epoch.CASES,
    **startup.CASES,
}
HERE = Path(__file__).parent


def options(case: Case, given: list[str]) -> dict[str, Any]:
    """The case's options with those given as name=value."""
    out = dict(case.options)
    for pair in given:
        name, _, text = pair.partition("=")
        if name not in out:
            raise SystemExit(f"--set {pair}: this case has no option {name!r}; it has: {', '.join(out) or 'none'}")
        out[name] = type(out[name])(text)
    return out


def line(row: dict[str, Any]) -> str:
    out = []
    for kind in ("time", "cpu", "memory"):
        for name, r in row[kind].items():
            target = "" if r["target"] is None else f"   target {r['target']}"
            out.append(f"  {kind:6} {name:22} {r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f}){target}")
    if row["difference"] is not None:
        out.append(f"  the contestants' numbers agree to {row['difference']:.1e}")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="names of cases (default: all)")
    parser.add_argument("--rounds", type=int, help="rounds of each case (default: its own number)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the cases")
    parser.add_argument("--json", default=str(HERE / "results.json"), help="where results go")
    parser.add_argument("--list", action="store_true", help="show the cases")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name:14} {case.about}" for name, case in CASES.items()))
        return
    if args.worker:
        case = CASES[args.case]
        serve(lambda: case.build(args.worker, options(case, args.set)))
        return
    names = args.cases or list(CASES)
    if unknown := [n for n in names if n not in CASES]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(CASES)}")
    failed = [n for n in names if not one(n, args)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def one(name: str, args: argparse.Namespace) -> bool:
    """Run a case, print its ratios, put them into the file; False where it failed."""
    case = CASES[name]
    case.options = options(case, args.set)
    print(f"{name}: {case.about}", flush=True)
    if missing := case.needs():
        print(f"  left out: {missing}", flush=True)
        return True
    argv = [x for pair in args.set for x in ("--set", pair)]
    try:
        row = race(name, case, os.path.abspath(__file__), args.rounds or case.rounds, argv)
    except RuntimeError as e:
        print(f"  {e}", file=sys.stderr, flush=True)
        return False
    print(line(row), flush=True)
    held = json.loads(Path(args.json).read_text(encoding="utf-8")) if os.path.exists(args.json) else {}
    write(args.json, held | {name: row | {"machine": machine(), "commit": commit()}})
    return True


if __name__ == "__main__":
    main()
