"""The progress display: a bar in a terminal, a few plain lines elsewhere, and never a reason to fail."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from veneer.train.progress import PLAIN_LINES, ProgressCallback, clock, memory_in_use_mb


def drive(callback: ProgressCallback, folder: Path, steps: int) -> None:
    """Call what the trainer calls."""
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[])
    state, control = TrainerState(max_steps=steps), TrainerControl()
    callback.on_train_begin(args, state, control)
    for step in range(1, steps + 1):
        state.global_step = step
        callback.on_log(args, state, control, logs={"loss": 1.0 / step, "tokens_per_second": 1234.0})
        callback.on_step_end(args, state, control)
    callback.on_train_end(args, state, control)


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_plain_lines_are_few_and_end_with_the_last_step(tmp_path: Path, steps: int) -> None:
    stream = io.StringIO()
    drive(ProgressCallback(Console(file=stream, force_terminal=False, width=40)), tmp_path, steps)
    lines = stream.getvalue().splitlines()
    assert 1 <= len(lines) <= PLAIN_LINES + 2
    assert lines[-1].startswith(f"step {steps}/{steps}")
    assert f"loss {1 / steps:.3f}" in lines[-1]
    assert "1,234 tok/s" in lines[-1]
    assert "left" in lines[-1]
    assert "B" in lines[-1].split()[-1]
    assert "\x1b" not in stream.getvalue()


def test_terminal_shows_a_bar(tmp_path: Path) -> None:
    stream = io.StringIO()
    callback = ProgressCallback(Console(file=stream, force_terminal=True, width=120))
    drive(callback, tmp_path, 5)
    assert "5/5" in stream.getvalue()
    assert "0.200" in stream.getvalue()
    assert callback.bar is None


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)


def in_a_terminal(folder: Path) -> str:
    """What a real terminal gets of 60 steps."""
    reader, writer = os.openpty()
    drained: list[bytes] = []

    def drain() -> None:
        while True:
            try:
                drained.append(os.read(reader, 4096))
            except OSError:  # the other side is closed
                return

    thread = threading.Thread(target=drain)
    thread.start()
    with os.fdopen(writer, "w") as stream:
        drive(ProgressCallback(Console(file=stream, width=100)), folder, 60)
    thread.join(10)
    os.close(reader)
    return b"".join(drained).decode()


def is_plain(text: str, steps: int) -> bool:
    """Lines that read in their order, none drawn over."""
    lines = text.splitlines()
    return 1 <= len(lines) <= PLAIN_LINES + 2 and not set("\x1b\r") & set(text) and f"step {steps}/{steps}" in lines[-1]


def test_a_terminal_gets_a_bar(tmp_path: Path, plain_environment: None) -> None:
    shown = in_a_terminal(tmp_path)
    assert "\x1b[" in shown
    assert "60/60" in shown
    assert "step 60/60" not in shown


@pytest.mark.parametrize("force", [False, True])
def test_a_log_file_and_a_pipe_get_lines(
    tmp_path: Path, plain_environment: None, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    if force:  # as builds set it: colours are welcome, but nothing can be drawn over
        monkeypatch.setenv("FORCE_COLOR", "1")
    log = tmp_path / "train.log"
    with log.open("w") as stream:
        callback = ProgressCallback(Console(file=stream))
        drive(callback, tmp_path, 1000)
        assert is_plain(log.read_text(), 1000)  # written as it comes, not when the file is closed
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        drive(ProgressCallback(Console(file=stream)), tmp_path, 60)
    with os.fdopen(reader) as stream:
        assert is_plain(stream.read(), 60)


def test_a_pipe_whose_reader_has_gone(tmp_path: Path, plain_environment: None) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    callback = ProgressCallback(Console(file=stream))
    drive(callback, tmp_path, 3)
    assert callback.open is False
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def test_a_command_in_a_notebooks_cell_gets_lines(
    tmp_path: Path, plain_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output is a terminal to the command, but the cell cannot draw over what it has shown."""
    for name, value in (("JPY_PARENT_PID", "1"), ("FORCE_COLOR", "1"), ("TERM", "xterm-color")):
        monkeypatch.setenv(name, value)
    assert is_plain(in_a_terminal(tmp_path).replace("\r\n", "\n"), 60)


def test_a_notebook_gets_text(
    tmp_path: Path, plain_environment: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a kernel's own process, which rich knows by the class of its shell."""

    class ZMQInteractiveShell:
        pass

    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    assert Console().is_jupyter
    drive(ProgressCallback(), tmp_path, 60)
    out, err = capsys.readouterr()
    assert is_plain(out, 60)
    assert err == ""


def test_a_closed_stream_ends_the_display_and_not_the_training(tmp_path: Path) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    callback = ProgressCallback(Console(file=Broken(), force_terminal=False))
    drive(callback, tmp_path, 3)
    assert callback.open is False


def test_leaving_the_block_takes_the_bar_down(tmp_path: Path) -> None:
    callback = ProgressCallback(Console(file=io.StringIO(), force_terminal=True))
    args: Any = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])

    def fail() -> None:
        with callback:
            callback.on_train_begin(args, TrainerState(max_steps=2), TrainerControl())
            assert callback.bar is not None
            raise RuntimeError("training failed")

    with pytest.raises(RuntimeError, match="training failed"):
        fail()
    assert callback.bar is None


def test_clock() -> None:
    assert [clock(s) for s in (0, 9.6, 75, 3675, -3)] == ["0:00", "0:10", "1:15", "1:01:15", "0:00"]


def test_memory_is_this_process() -> None:
    assert 50 < memory_in_use_mb() < 100_000
