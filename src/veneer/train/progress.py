"""Training progress on a person's screen, as a transformers callback.

In a terminal: one live bar with loss, tokens per second, time left and memory. In a pipe, a log file or a notebook:
about twenty plain lines over the whole run.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from veneer.train.screen import lines_to, redraws

__all__ = ["ProgressCallback", "clock", "memory_in_use_mb"]

PLAIN_LINES = 20


def memory_in_use_mb(device: torch.device | None = None) -> float:
    """Memory allocated on a GPU, or this process's resident set on CPU, in MB (2**20 bytes)."""
    if device is not None and device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().rss / 2**20
    import resource

    # no current value without /proc: the peak, which macOS counts in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def clock(seconds: float) -> str:
    """``75`` -> ``1:15``; ``3675`` -> ``1:01:15``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressCallback(TrainerCallback):
    """Shows a run's progress on ``console``. Also a context manager, which clears the bar if training fails.

    The loss, and the tokens per second where the trainer logs them, come from the trainer's own log lines. A
    console that goes away in mid-run (a closed pipe) ends the display, not the training.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = lines_to(console if console is not None else Console(stderr=True))
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.loss: float | None = None
        self.speed: float | None = None
        self.started = 0.0
        self.first_step = 0
        self.open = True
        self.device: torch.device | None = None

    def __enter__(self) -> ProgressCallback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar down, leaving its last state on the screen. Harmless when there is none."""
        bar, self.bar = self.bar, None
        if bar is not None:
            self._safely(bar.stop)

    def _safely(self, act: Any, *args: Any, **kwargs: Any) -> None:
        if not self.open:
            return
        try:
            act(*args, **kwargs)
        except (OSError, ValueError, SystemExit):  # a closed stream; rich exits on a broken pipe
            self.open = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            self.open = False
            return
        self.started, self.first_step, self.device = time.monotonic(), state.global_step, args.device
        if redraws(self.console):
            self.bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
                console=self.console,
                expand=True,
                refresh_per_second=4,
            )
            self._safely(self.bar.start)
            self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, line="")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        self.loss = logs.get("loss", self.loss)
        speed = logs.get("tokens_per_second")
        if speed is not None:  # rows differ in length and machines in load: show the trend
            self.speed = speed if self.speed is None else 0.8 * self.speed + 0.2 * speed

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.open:
            return
        done, total = state.global_step, state.max_steps
        if self.bar is not None and self.task is not None:
            self._safely(self.bar.update, self.task, completed=done, line=self.line(done, total))
        elif self.bar is None:
            every = max(1, -(-total // PLAIN_LINES))
            if done % every == 0 or done == total or done == self.first_step + 1:
                text = f"step {done}/{total}  {self.line(done, total)}"
                self._safely(self.console.print, text, highlight=False, soft_wrap=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop()

    def line(self, done: int, total: int) -> str:
        """``loss 0.412  1.8k tok/s  1:15 left  2.1 GB``, with what is known so far."""
        parts = []
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.speed is not None:
            parts.append(f"{self.speed:,.0f} tok/s")
        steps = done - self.first_step
        if steps > 0:
            parts.append(f"{clock((time.monotonic() - self.started) / steps * (total - done))} left")
        memory = memory_in_use_mb(self.device)
        parts.append(f"{memory / 1024:.1f} GB" if memory >= 1024 else f"{memory:.0f} MB")
        return "  ".join(parts)
