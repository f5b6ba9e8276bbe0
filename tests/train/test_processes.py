"""`veneer train` in two processes: one run, one folder, the numbers of one process with twice the batch."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import outcome, same
from tiny_train import chat, write_jsonl
from yaml import safe_dump

from veneer.train import DataError, RecipeError, load_recipe, processes, run
from veneer.train.trainer import training_arguments

Flags = dict[str, Any]
HERE = Path(__file__).parent
SRC = HERE.parents[1] / "src"
TRAIN: Flags = {
    "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 0.02, "logging_steps": 1, "use_cpu": True,
    "eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 3,
}  # fmt: skip
#: rows of each task; the test rows are no multiple of anything
ROWS: dict[str, tuple[str, list[Flags], Flags]] = {
    "causal-lm": ("llama", [chat("colour " * (1 + i % 4), ["red", "green", "blue"][i % 3]) for i in range(12)], {}),
    "dpo": ("llama", [{"prompt": f"colour {i}", "chosen": "red", "rejected": "blue four"} for i in range(12)], {}),
    "reward": ("llama", [{"prompt": f"colour {i}", "chosen": "red", "rejected": "blue four"} for i in range(12)], {}),
    "seq2seq": ("t5", [{"source": "one " * (1 + i % 3), "target": "red"} for i in range(12)], {}),
    "seq-cls": ("bert", [{"text": "anna in " + "rome " * (i % 3), "label": "ab"[i % 2]} for i in range(12)], {}),
    "token-cls": ("bert", [{"tokens": ["anna", "in", "rome"][: 1 + i % 3],
                            "labels": ["B-per", "O", "B-loc"][: 1 + i % 3]} for i in range(12)], {}),
    "masked-lm": ("bert", [{"text": "anna in paris . the bob " * (1 + i % 3)} for i in range(12)], {"join": False}),
    "question-answering": ("bert", [{"question": "anna", "context": "bob in rome . " * (1 + i % 2),
                                     "answers": {"text": ["rome"], "answer_start": [7]}} for i in range(12)],
                           {"stride": 4}),
    "embedding": ("bert", [{"anchor": "anna " * (1 + i % 3), "positive": "bob", "negative": "rome in"}
                           for i in range(12)], {"loss": "triplet"}),
}  # fmt: skip


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


def history(out: Path) -> list[Flags]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def numbers(out: Path) -> list[float]:
    names = ("loss", "eval_loss", "grad_norm")
    return [row[name] for row in history(out) for name in names if name in row]


@pytest.fixture
def recipes(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Flags]:
    def make(task: str, out: str, **train: Any) -> Flags:
        name, rows, options = ROWS[task]
        base = tmp_path / name
        if not base.is_dir():  # two processes draw other dropout than one
            shutil.copytree(request.getfixturevalue(name), base)
            config = json.loads((base / "config.json").read_text())
            off = {key: 0.0 for key in config if key.endswith("dropout_prob")}
            (base / "config.json").write_text(json.dumps(config | off))
        data, test = (tmp_path / f"{task}-{split}.jsonl" for split in ("train", "test"))
        write_jsonl(data, rows), write_jsonl(test, rows[:7])
        return {
            "task": task, "base": str(base), "data": {"train": str(data), "test": str(test), "max_length": 48},
            "adapter": {"r": 4, "target_modules": "all-linear"}, "options": options, "train": {**TRAIN, **train},
            "eval": {"batch_size": 2, "max_new_tokens": 4}, "out": str(tmp_path / out),
        }  # fmt: skip

    return make


@pytest.mark.slow
def test_two_processes_train_as_one(recipes: Callable[..., Flags], tmp_path: Path) -> None:
    """Every task; and a run that is cut short between two log lines, with accumulation, and from a stream."""
    cut = {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2,
           "per_device_train_batch_size": 1}  # fmt: skip
    stream = recipes("causal-lm", "stream", **cut | {"gradient_accumulation_steps": 1})
    stream["data"] |= {"streaming": True, "shuffle_buffer": 6}
    cls = recipes("seq-cls", "best", load_best_model_at_end=True, save_strategy="steps", save_steps=3, max_steps=30,
                  early_stopping_patience=1, early_stopping_threshold=9.0)  # fmt: skip
    jobs: dict[str, Flags] = {task: {"recipe": recipes(task, task), "stop": None} for task in ROWS}
    jobs |= {
        "whole": {"recipe": recipes("causal-lm", "whole", **cut), "stop": None},
        "cut": {"recipe": recipes("causal-lm", "cut", **cut), "stop": 5},
        "stream": {"recipe": stream, "stop": None},
        "stream-cut": {"recipe": {**stream, "out": str(tmp_path / "stream-cut")}, "stop": 4},
        "best": {"recipe": cls, "stop": None},
    }
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps(jobs))
    done = launch(str(HERE / "processes_job.py"), str(path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert not list(tmp_path.glob(".*partial"))
    for name in [*ROWS, "whole", "stream", "best"]:
        flags = jobs[name]["recipe"]
        batch = 2 * flags["train"]["per_device_train_batch_size"]
        alone = flags | {
            "out": flags["out"] + "-alone",
            "train": {**flags["train"], "per_device_train_batch_size": batch},
        }
        result = run(load_recipe(None, **alone))
        two = json.loads((tmp_path / name / "result.json").read_text())
        torch.testing.assert_close(
            numbers(tmp_path / name), numbers(Path(alone["out"])), rtol=2e-3, atol=1e-4, msg=name
        )
        assert two["before"] == pytest.approx(result.before, rel=1e-4), name
        assert two["after"].keys() == result.after.keys()
        score = "loss" if "loss" in result.after else next(iter(result.after))
        assert two["after"][score] == pytest.approx(result.after[score], rel=2e-3, abs=1e-4), name
        assert two["train_tokens"] == result.train_tokens, name
        assert len(two["samples"]) == len(result.samples)
    assert max(row["step"] for row in history(tmp_path / "best")) == 6  # nothing is better by 9: early stopping
    for whole, again in (("whole", "cut"), ("stream", "stream-cut")):
        assert numbers(tmp_path / whole) == numbers(tmp_path / again)
        left, right = (load_file(tmp_path / out / "adapter" / "adapter_model.safetensors") for out in (whole, again))
        assert all(torch.equal(left[key], right[key]) for key in left)
        assert _result(tmp_path / whole)["train_tokens"] == _result(tmp_path / again)["train_tokens"]


def _workers(launcher: int) -> list[int]:
    """The processes that a launcher has started, in the order of their ranks."""
    listed = Path(f"/proc/{launcher}/task/{launcher}/children")
    return sorted(int(child) for child in listed.read_text().split()) if listed.is_file() else []


def _killed(command: list[str], who: str, place: Path, draw: random.Random) -> None:
    """Start a run, and SIGKILL the launcher and all its processes, or one of them, once ``place`` is there."""
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=env, stdout=quiet, stderr=quiet)
    until = time.monotonic() + 300
    while not place.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.01)
    time.sleep(draw.uniform(0.0, 0.3))
    workers = _workers(process.pid)
    assert len(workers) == 2
    if who == "all":
        process.kill()
    for worker in workers if who == "all" else [workers[int(who)]]:
        os.kill(worker, signal.SIGKILL)
    assert process.wait(timeout=120) != 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in Linux's /proc")
def test_kill_9_in_two_processes(recipes: Callable[..., Flags], tmp_path: Path) -> None:
    """The launcher and both processes, the main one, the other one: what is left goes on bit for bit."""
    flags = recipes("causal-lm", "whole", max_steps=40, save_strategy="steps", save_steps=2, eval_steps=20,
                    save_total_limit=2, gradient_accumulation_steps=2)  # fmt: skip
    flags["adapter"] |= {"lora_dropout": 0.2}
    flags["eval"] |= {"generate": False}
    path = tmp_path / "recipe.yaml"
    path.write_text(safe_dump(flags))
    words = ("-m", "veneer", "train", str(path))
    cut = (*words, "--out", str(tmp_path / "cut"))
    done = launch(*words)
    assert done.returncode == 0, done.stderr[-4000:]
    command, draw = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *cut], random.Random(0)
    for who, step in (("all", 4), ("0", 14), ("1", 24)):
        _killed(command, who, tmp_path / ".cut.partial" / "checkpoints" / f"checkpoint-{step}", draw)
        assert not (tmp_path / "cut").exists()
    done = launch(*cut)
    assert done.returncode == 0, done.stderr[-4000:]
    same(outcome(tmp_path / "whole"), outcome(tmp_path / "cut"))


def _result(out: Path) -> Flags:
    found: Flags = json.loads((out / "result.json").read_text())
    return found


@pytest.mark.slow
def test_the_command_prints_once(recipes: Callable[..., Flags], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(safe_dump(recipes("token-cls", "out")))
    done = launch("-m", "veneer", "train", str(path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("Held-out scores") == 1
    assert done.stdout.count("Measuring the base model") == 1
    assert done.stderr.count("step 6/6") + done.stdout.count("step 6/6") == 1
    assert (tmp_path / "out" / "report.html").is_file()
    planned = launch("-m", "veneer", "plan", str(path), "--set", f"out={tmp_path / 'other'}")
    assert planned.returncode == 0
    assert planned.stdout.count("adapted layers") == 1
    wrong = launch("-m", "veneer", "train", str(path), "--set", f"out={tmp_path / 'other'}", "--set", "task=token-clas")
    assert wrong.returncode != 0
    assert wrong.stderr.count("unknown task") == 1


@pytest.mark.parametrize(
    ("name", "value", "words"), [("fsdp", "full_shard", "whole model"), ("deepspeed", "a.json", "whole model")]
)
def test_models_in_parts_are_refused(
    name: str, value: str, words: str, recipes: Callable[..., Flags], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(None, **recipes("token-cls", "out", **{name: value}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(RecipeError, match=words):
        training_arguments(recipe, "x")


def test_a_launcher_of_models_in_parts_is_refused(
    recipes: Callable[..., Flags], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(None, **recipes("token-cls", "out"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match=r"FSDP's parts.*torchrun"):
        training_arguments(recipe, "x")


def test_a_run_of_other_processes_is_not_taken_over(
    recipes: Callable[..., Flags], monkeypatch: pytest.MonkeyPatch
) -> None:
    from veneer.train.attempt import _asked, _differences

    recipe = load_recipe(None, **recipes("token-cls", "out"))
    asked = _asked(recipe)
    assert _differences({key: value for key, value in asked.items() if key != "processes"}, asked) == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert _differences(asked, _asked(recipe)) == ["the number of processes (1, now 2)"]


def test_one_process_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")  # without a RANK it is not a launcher's
    assert processes.several() == 1
    assert not processes.begin()
    with processes.sharing():
        assert processes.mine([1, 2, 3]) == [1, 2, 3]
        assert processes.merged([1, None]) == [1, None]
        assert processes.summed(1.0, 2) == (1.0, 2)
    assert processes.from_main("a") == "a"
    assert processes.main_first(lambda: 3) == 3


def test_errors_travel_between_processes() -> None:
    error = DataError("is wrong", file="a.jsonl", line=3, key="data.train", near="b", hint="Mend it.")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (DataError, str(error), vars(error))
