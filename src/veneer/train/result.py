"""What a run gives back, and how it is written down."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from veneer.train.recipe import Recipe

__all__ = ["RunResult", "Sample", "describe_machine", "peak_memory_mb", "whole_folder", "write_result"]


@dataclass(frozen=True)
class Sample:
    """One held-out row: what was asked, what was expected, and what the model answered before and after."""

    prompt: str
    expected: str
    base: str
    tuned: str
    base_ok: bool
    tuned_ok: bool


@dataclass(repr=False)
class RunResult:
    """A finished run.

    ``history`` has one dict a log line: step, loss, learning_rate, tokens_per_second, peak_memory_mb
    (2**20 bytes) and eta (seconds); or what evaluation found: eval_loss and other scores; or the answers that it got:
    samples, a list of prompt, expected, answer and ok. ``before`` and ``after`` are the test scores without and with
    the adapter, empty where there are no test rows. Folders are absolute; ``merged_dir`` may be None.
    """

    out: str
    task: str
    recipe: Recipe
    history: list[dict[str, Any]]
    before: dict[str, float]
    after: dict[str, float]
    samples: list[Sample]
    train_seconds: float
    train_tokens: int
    trainable_params: int
    total_params: int
    adapter_dir: str
    merged_dir: str | None
    machine: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        from veneer.train.notebook import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from veneer.train.notebook import as_html

        return as_html(self)


def write_result(result: RunResult, folder: Path) -> None:
    """Write `log.jsonl`, `recipe.yaml` and `result.json` (folders relative to its own) into ``folder``."""
    lines = "".join(json.dumps(row) + "\n" for row in result.history)
    (folder / "log.jsonl").write_text(lines, encoding="utf-8")
    (folder / "recipe.yaml").write_text(result.recipe.dump(), encoding="utf-8")
    plain = {item.name: getattr(result, item.name) for item in dataclasses.fields(result)}
    del plain["history"]
    plain |= {
        "out": ".",
        "recipe": result.recipe.model_dump(mode="json"),
        "samples": [dataclasses.asdict(sample) for sample in result.samples],
        "adapter_dir": "adapter",
        "merged_dir": None if result.merged_dir is None else "merged",
    }
    text = json.dumps(plain, indent=2, ensure_ascii=False)
    (folder / "result.json").write_text(text + "\n", encoding="utf-8")


@contextmanager
def whole_folder(out: Path, keep: Callable[[], bool] = lambda: False) -> Iterator[Path]:
    """A folder beside ``out`` to write into: it takes ``out``'s name at the end, or goes if anything fails.

    A folder that already has the name makes way only once the new one is complete. The folder beside keeps its name
    from one process to the next; where writing fails and ``keep`` says so, it stays.
    """
    beside, aside = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    if aside.exists():  # an earlier process was killed between the two renames below, or after them
        if out.exists():
            shutil.rmtree(aside)
        else:
            os.replace(aside, out)
    beside.mkdir(parents=True, exist_ok=True)
    done = False
    try:
        yield beside
        if out.exists():
            os.replace(out, aside)
        os.replace(beside, out)
        done = True
    finally:
        if done:
            shutil.rmtree(aside, ignore_errors=True)
        else:
            if not keep():
                shutil.rmtree(beside, ignore_errors=True)
            if aside.exists() and not out.exists():
                os.replace(aside, out)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory held so far, in 2**20 bytes: on the GPU, or by this process on a CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a run's numbers belong to."""
    import psutil
    import torch
    import transformers

    from veneer.version import __version__

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": device.type,
        "name": name,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "veneer": __version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
