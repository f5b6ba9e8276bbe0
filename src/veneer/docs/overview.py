"""docs/methods/README.md: which method to take, from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .facts import Facts
from .pages import NOTE, families, filename, merges, yes

HEAD = """# The methods

One page a method; each has its formula, tensors, fields and a program that runs."""
MEASURED = ("trained", "file", "step time", "against peft", "memory", "quantised")
COLUMNS = ("method", "in one line", *MEASURED[:-1], "merges", "mixed batches", MEASURED[-1])
GUIDE = """## Which one

- Start with [LoRA](lora.md): it takes every layer, merges, mixes in a batch, and every server knows its files.
- Files too many or too large: sort the table by `file`; what draws its frozen part from a seed is smallest.
- Nothing may slow down inference: take one that merges. Many adapters on one running base: take one with mixed batches.
- Memory is short: the column `memory` is what a step needs above the base's weights."""


def overview(all_facts: Sequence[Facts], measured: dict[str, Any] | None) -> str:
    """The page: guide, table, details of the measurement, fields in common.

    measured: the content of benchmarks/methods.json; without it the table has no measured columns.
    """
    rows = (measured or {}).get("methods", {})
    parts = [NOTE, HEAD, GUIDE, _table(all_facts, rows)]
    if measured:
        parts.append(_how(measured))
    return "\n\n".join([*parts, families()]) + "\n"


def _table(all_facts: Sequence[Facts], rows: dict[str, Any]) -> str:
    keep = [i for i, c in enumerate(COLUMNS) if rows or c not in MEASURED]
    lines = [[COLUMNS[i] for i in keep], ["---"] * len(keep)]
    for f in sorted(all_facts, key=lambda f: f.title.lower()):
        lines.append([_cells(f, rows.get(f.name))[i] for i in keep])
    return "## Table\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(f: Facts, r: dict[str, Any] | None) -> list[str]:
    numbers = [""] * 5
    if r is not None:
        numbers = [f"{r['trained']:,}", human(r["file_bytes"]), f"{r['time_to_frozen']:.2f}",
                   f"{r['time_ratio']:.2f}", f"{r['peak_mb']['veneer']:.0f} MB"]  # fmt: skip
    can = [merges(f) if f.on_layers else "no", yes(f.mixed), _tried((r or {}).get("quantised"))]
    return [f"[{f.title}]({filename(f.name)})", f.summary, *numbers, *can]


def _tried(works: bool | None) -> str:
    return "" if works is None else yes(works)


def human(size: float) -> str:
    """Bytes: 1536 -> "1.5 KB"."""
    units = ["B", "KB", "MB", "GB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" or size >= 100 else f"{size:.1f} {units[0]}"


def _how(measured: dict[str, Any]) -> str:
    case, machine, shape = measured["case"], measured["machine"], measured["case"]["shape"]
    rows = measured["methods"].values()
    worst, rounds = max(r["loss_difference"] for r in rows), min(r.get("rounds", case.get("rounds")) for r in rows)
    clock = "the processor's time" if case["threads"] == 1 else "wall time"
    commits = sorted({str(r["commit"]) for r in rows})
    return "\n".join(
        [
            "## How it was measured",
            "",
            f"A Llama of {shape['num_hidden_layers']} layers, hidden {shape['hidden_size']}, "
            f"{case['batch']} x {case['seq']} tokens, float32; every linear layer adapted where the method can, with "
            "its page's settings. `step time`: forward, backward and AdamW over the frozen base's own forward and "
            "input gradient. `against peft`: step time over that of peft 0.21.2, below 1 is faster; median of "
            f"at least {rounds} rounds in which both took turns. Both are ratios of {clock}. With so few tokens the "
            "base is a large part of every step: a method at 1.2 has little left to save, and peft's step is at most "
            "halved where it takes more than twice the base's. `memory`: the peak above the base's weights. "
            "`quantised`: it trains on a base in NF4. "
            f"`file`: the adapter's tensors on disk. The losses of both packages agree to {worst:.0e}.",
            "",
            f"{machine['device']}, {case['threads']} thread{'s' * (case['threads'] > 1)}, torch {machine['torch']}, "
            f"at commits {', '.join(commits)} (a row's is in the file). "
            "`python benchmarks/methods.py --json benchmarks/methods.json` measures again, `make docs` writes this "
            "page.",
        ]
    )
