"""docs/speed.md from benchmarks/results.json and, where it was kept, what where.py found.

python benchmarks/table.py [--json benchmarks/results.json] [--where benchmarks/where.json] [--out docs/speed.md]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEAD = """# Speed and memory

Made by `python benchmarks/table.py` from what `make bench` measured; a case that was not run has no row. Every case
runs its contestants in processes of their own that take turns, round by round, and the ratios are taken within a
round: the table has their median, their lowest and their highest. Where both compute the same, their numbers are
compared, and a difference fails the run. "frozen" is the base's own forward and the gradient of its input, nothing
trained; "base" is the model without adapters; "switches" is veneer with what `veneer train` turns on (`base_kernels`,
the loss in chunks at the labels alone, freed memory kept), "int8" the same with `base.matmul: int8`, "small" the same
with `mlp_checkpointing` and `return_memory`. "time" is the wall clock's, "cpu" the processor's, "memory" the peak above
the base's weights. `python benchmarks/run.py CASE --rounds 3` runs one case.
"""


def rows(name: str, row: dict[str, Any]) -> list[str]:
    out = []
    for kind in ("time", "cpu", "memory"):
        for pair, r in row[kind].items():
            target = "" if r["target"] is None else f"{r['target']:g}"
            reached = "" if r["target"] is None else "yes" if r["median"] <= r["target"] else "no"
            spread = f"{r['low']:.3f} to {r['high']:.3f}"
            out.append(f"| `{name}` | {kind} | {pair} | {r['median']:.3f} | {spread} | {target} | {reached} |")
    return out


def page(results: dict[str, Any]) -> str:
    machines: dict[str, list[str]] = {}
    for name, row in results.items():
        m = row["machine"]
        where = f"{m['device']}, {m['threads']} threads, torch {m['torch']}, commit {row['commit']}"
        machines.setdefault(where, []).append(name)
    lines = [HEAD]
    for where, names in machines.items():
        lines += [f"## {where}", ""]
        lines += [f"- `{n}`: {results[n]['about']}, {results[n]['rounds']} rounds" for n in names]
        lines += ["", "| case | of | ratio | median | spread | target | reached |", "|---|---|---|---|---|---|---|"]
        lines += [text for n in names for text in rows(n, results[n])]
        lines.append("")
    return "\n".join(lines)


LIMIT = """## What limits a step

`python benchmarks/where.py --case {case} --steps {steps} --json benchmarks/where.json`, on {device}, {threads} threads,
commit {commit}: the operators' own processor time by what they are, as torch's profiler tells it, each contestant in a
process of its own, one after another. The same products of the base take more or less time with the machine's mood:
compare rows within a column.

"""
PRODUCTS = ("base's products", "head's products", "attention")


def limits(found: dict[str, Any]) -> str:
    """where.py's table, and what it says."""
    from where import table

    seconds = found["seconds"]
    floor = sum(seconds["frozen"].get(g, 0.0) for g in PRODUCTS)
    peft = seconds["peft"]
    own = {who: sum(s for g, s in of.items() if g not in PRODUCTS) for who, of in seconds.items()}
    scale = floor + own["peft"]  # peft's step with the frozen base's products, so that all columns share them
    said = ", ".join(f"{who} {(floor + own[who]) / scale:.2f}" for who in seconds if who not in ("peft", "int8"))
    share = sum(peft.get(g, 0.0) for g in PRODUCTS) / sum(peft.values())
    return (
        LIMIT.format(**found, **found["machine"])
        + table(seconds)
        + f"\n\nThe base's and the head's products and attention are {share:.0%} of peft's step, and whoever computes\n"
        + "in the base's own precision makes them, too. With the same products for all, parts of peft's step:\n"
        + f"{said}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default=str(ROOT / "benchmarks" / "results.json"))
    parser.add_argument("--where", type=Path, default=ROOT / "benchmarks" / "where.json")
    parser.add_argument("--out", default=str(ROOT / "docs" / "speed.md"))
    args = parser.parse_args()
    text = page(json.loads(Path(args.json).read_text(encoding="utf-8")))
    if args.where.is_file():
        text += "\n" + limits(json.loads(args.where.read_text(encoding="utf-8")))
    Path(args.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
