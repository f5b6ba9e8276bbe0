"""The runner that the benchmarks share: contestants in processes of their own that take turns, and ratios taken round
by round, so that a change in the machine's speed hits all alike.

A file of cases holds CASES, a dict name -> Case. `build(who, options)` of a case makes one contestant, a Lap.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}


# -- a case ------------------------------------------------------------------------------------------------
@dataclass
class Lap:
    """One contestant, ready to run: run(prepare()) is timed, prepare() is not. run returns a number that the
    contestants must agree on (a loss), or None; after() returns it where finding it is not to be timed.
    memory_base_mb: what the base takes, by which the peak is lessened."""

    run: Callable[[Any], float | None]
    prepare: Callable[[], Any] = lambda: None
    memory_base_mb: float = 0.0
    after: Callable[[], float] | None = None


@dataclass
class Case:
    """about: one line. targets: (contestant, other) -> the ratio of times to reach; None: shown, without a target.
    agree: contestants whose numbers must be equal within `tolerance`. options: what build gets. rounds: the default.
    env: environment variables of a contestant's process. needs: what is missing here to run the case, None: nothing.
    laps: this many a process, which then ends, so that no process keeps its luck with memory, and one alone is in
    memory; 0: one process for all rounds."""

    about: str
    build: Callable[[str, dict[str, Any]], Lap]
    contestants: tuple[str, ...]
    targets: dict[tuple[str, str], float | None]
    memory_targets: dict[tuple[str, str], float | None] = field(default_factory=dict)
    agree: tuple[str, ...] = ()
    tolerance: float = 1e-4
    options: dict[str, Any] = field(default_factory=dict)
    rounds: int = 5
    env: dict[str, dict[str, str]] = field(default_factory=dict)
    needs: Callable[[], str | None] = lambda: None
    laps: int = 0


# -- memory ------------------------------------------------------------------------------------------------
def resident_mb(peak: bool = False) -> float:
    """This process's memory now, or its highest since `forget_peak`."""
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        wanted = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) for line in f if line.startswith(wanted)) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform != "darwin" else 2**20)


def forget_peak() -> None:
    """Let the peak begin anew, so that it is that of the laps, not of building."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")


def peak_mb() -> float:
    """On a GPU what was allocated there, else the process's resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_mb(peak=True)


# -- a contestant's process --------------------------------------------------------------------------------
def package(who: str) -> Any:
    """veneer or peft."""
    import importlib

    return importlib.import_module("peft" if who == "peft" else "veneer")


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def serve(build: Callable[[], Lap]) -> None:
    """Build, run once to warm up, then one lap for every line on stdin; a JSON line out for each."""
    lap = build()
    lap.run(lap.prepare())
    forget_peak()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        given = lap.prepare()
        gc.collect()
        synchronize()
        began, cpu = time.perf_counter(), cpu_seconds()
        value = lap.run(given)
        synchronize()
        seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
        if lap.after is not None:
            value = lap.after()
        del given
        told = {"seconds": seconds, "cpu": cpu, "value": value, "peak_mb": peak_mb() - lap.memory_base_mb}
        print(json.dumps(told), flush=True)


def cpu_seconds() -> float:
    """The processor's time of this process and of those that it started and that ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


class Contestant:
    """A process that serves laps."""

    def __init__(self, name: str, script: str, argv: Iterable[str], env: dict[str, str] | None = None):
        self.name: str = name
        self.laps: list[dict[str, Any]] = []
        quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        variables = {**os.environ, **quiet, **(env or {})}
        command = [sys.executable, script, "--worker", name, *argv]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )
        self.ready = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"'):  # libraries print, too, Trainer dicts with single quotes
                return json.loads(line)
        raise RuntimeError(f"{self.name} stopped with exit status {self.process.wait()}; its error is above")

    def lap(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.laps.append(self.read())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# -- the race ----------------------------------------------------------------------------------------------
def take_turns(field: list[Contestant], rounds: int) -> None:
    """One lap each a round; who goes first changes with the round."""
    for i in range(rounds):
        for c in field[i % len(field) :] + field[: i % len(field)]:
            c.lap()


def kept(case: Case, start: Callable[[str], Contestant], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """One process a contestant; -> name: laps."""
    entrants: list[Contestant] = []
    try:
        for who in case.contestants:
            entrants.append(start(who))
        take_turns(entrants, rounds)
    finally:
        for c in entrants:
            c.close()
    return {c.name: c.laps for c in entrants}


def fresh(case: Case, start: Callable[[str], Contestant], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """A process a contestant and round, one at a time; -> name: laps."""
    by: dict[str, list[dict[str, Any]]] = {who: [] for who in case.contestants}
    for i in range(rounds):
        turn = i % len(case.contestants)
        for who in case.contestants[turn:] + case.contestants[:turn]:
            c = start(who)
            try:
                for _ in range(case.laps):
                    c.lap()
            finally:
                c.close()
            by[who] += c.laps
    return by


def race(name: str, case: Case, script: str, rounds: int, argv: list[str]) -> dict[str, Any]:
    """A case's row: medians, ratios with their spread, whether the targets were reached.

    Raises RuntimeError where a process fails or numbers differ that must not.
    """
    start = lambda who: Contestant(who, script, ["--case", name, *argv], case.env.get(who))
    by = fresh(case, start, rounds) if case.laps else kept(case, start, rounds)
    return {
        "about": case.about,
        "options": case.options,
        "rounds": rounds,
        "seconds": {n: spread([lap["seconds"] for lap in laps]) for n, laps in by.items()},
        "cpu_seconds": {n: spread([lap["cpu"] for lap in laps]) for n, laps in by.items()},
        "peak_mb": {n: max(lap["peak_mb"] for lap in laps) for n, laps in by.items()},
        "time": ratios(by, "seconds", case.targets),
        "cpu": ratios(by, "cpu", case.targets),
        "memory": ratios(by, "peak_mb", case.memory_targets),
        "difference": difference(by, case),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(by: dict[str, list[dict[str, Any]]], key: str, targets: dict[Any, float | None]) -> dict[str, Any]:
    out = {}
    for (a, b), target in targets.items():
        values = [x[key] / y[key] for x, y in zip(by[a], by[b], strict=True)]
        out[f"{a}/{b}"] = {**spread(values), "target": target}
    return out


def difference(by: dict[str, list[dict[str, Any]]], case: Case) -> float | None:
    """The largest relative difference of the numbers that must agree."""
    if len(case.agree) < 2:
        return None
    first, *others = ([lap["value"] for lap in by[n]] for n in case.agree)
    worst = max(abs(a - b) / max(abs(a), 1e-12) for other in others for a, b in zip(first, other, strict=True))
    if not worst <= case.tolerance:
        raise RuntimeError(f"{' and '.join(case.agree)} differ by {worst:.1e}, more than {case.tolerance:.0e}")
    return worst


# -- machine and files -------------------------------------------------------------------------------------
def machine() -> dict[str, Any]:
    import torch

    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    if not cuda and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            models = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
        name = models[0] if models else name
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    here = os.path.dirname(os.path.abspath(__file__))
    out = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return out.stdout.strip() or None


def write(path: str | Path, result: dict[str, Any]) -> None:
    temporary = f"{path}.part"
    Path(temporary).write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)
