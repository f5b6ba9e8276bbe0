"""Where a LoRA training step spends its time: the operators' own processor time, by what they are.

    python benchmarks/where.py [--case step] [--steps 3] [--json FILE]

Runs the contestants of a case of step.py one after another, each in a process of its own, under torch's profiler. The
profiler costs a little itself; the shares are what counts. Shapes tell the adapter's products from the base's: a
product with a side of at most `r` is the adapter's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import step
from common import commit, machine, write

PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::addmm_",
    "aten::baddbmm_",
    "aten::_int_mm",
    "aten::_int_mm_out",
)
MEMORY = (
    "aten::copy_",
    "aten::fill_",
    "aten::zero_",
    "aten::cat",
    "aten::index_select",
    "aten::embedding_dense_backward",
)
LOSS = ("log_softmax", "nll_loss", "logsumexp", "cross_entropy", "logit")
GROUPS = ("base's products", "head's products", "adapter's products", "attention", "loss", "element-wise", "copies",
          "optimizer", "other")  # fmt: skip


def group(name: str, shapes: Iterable[Any], rank: int, vocabulary: int) -> str:
    """One of GROUPS. shapes: of the operator's inputs."""
    sizes = [shape for shape in shapes if shape and all(isinstance(n, int) for n in shape)]
    if name in PRODUCTS:
        if any(min(shape[-2:]) <= rank for shape in sizes if len(shape) > 1):
            return "adapter's products"
        return "head's products" if any(vocabulary in shape for shape in sizes) else "base's products"
    if "attention" in name:
        return "attention"
    if any(word in name for word in LOSS) or any(vocabulary in shape for shape in sizes):
        return "loss"
    if "_foreach" in name or "fused_adam" in name or "Optimizer" in name:
        return "optimizer"
    if name in MEMORY:
        return "copies"
    return "element-wise" if name.startswith("aten::") else "other"


def measure(who: str, case: str, steps: int) -> dict[str, float]:
    """Group -> seconds a step."""
    from torch.profiler import ProfilerActivity, profile

    options = step.CASES[case].options
    lap = step.build(who, options)
    lap.run(lap.prepare())
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        for _ in range(steps):
            lap.run(lap.prepare())
    found: dict[str, float] = defaultdict(float)
    for event in seen.key_averages(group_by_input_shape=True):
        at = group(event.key, event.input_shapes or (), options["r"], step.SMOLLM2["vocab_size"])
        found[at] += event.self_cpu_time_total / 1e6 / steps
    return dict(found)


def table(found: dict[str, dict[str, float]]) -> str:
    lines = [f"| seconds a step | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    lines += [f"| {g} | {' | '.join(f'{row.get(g, 0.0):.2f}' for row in found.values())} |" for g in GROUPS]
    return "\n".join([*lines, f"| all | {' | '.join(f'{sum(row.values()):.2f}' for row in found.values())} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(step.CASES), default="step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.worker:
        print(json.dumps(measure(o.worker, o.case, o.steps)))
        return
    case, found = step.CASES[o.case], {}
    for who in (w for w in case.contestants if w != "small"):
        words = [sys.executable, __file__, "--worker", who, "--case", o.case, "--steps", str(o.steps)]
        env = {**os.environ, "PYTHONWARNINGS": "ignore", **case.env.get(who, {})}
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=env)
        found[who] = json.loads(done.stdout.splitlines()[-1])
    print(table(found))
    if o.json:
        write(o.json, {"case": o.case, "steps": o.steps, "seconds": found, "machine": machine(), "commit": commit()})


if __name__ == "__main__":
    main()
