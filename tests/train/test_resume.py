"""A run that is killed and started again ends as one that was left alone, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import random
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
from transformers import TrainerCallback

from veneer.train import Recipe, RecipeError, run
from veneer.train.checkpoints import SEAL, is_whole, last_whole, seal

Flags = dict[str, Any]

#: what differs from one run to the next for other reasons than the numbers trained
CLOCKS = {"tokens_per_second", "peak_memory_mb", "eta"}
TRAIN: Flags = {
    "max_steps": 7, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.02,
    "logging_steps": 3, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4,
    "save_total_limit": 2, "use_cpu": True,
}  # fmt: skip


class StopAt(TrainerCallback):
    """Ends the process' run where a signal could: after a step, before its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def outcome(out: Path) -> tuple[Any, ...]:
    """The tensors, the optimizer's state, the log and the scores of a finished run."""
    logs = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    logs = [{k: v for k, v in row.items() if k not in CLOCKS and "per_second" not in k and "runtime" not in k}
            for row in logs]  # fmt: skip
    result = json.loads((out / "result.json").read_text())
    scores = {key: result[key] for key in ("before", "after", "samples", "train_tokens")}
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    kept = sorted((out / "checkpoints").glob("checkpoint-*")) if (out / "checkpoints").is_dir() else []
    optimizers = {path.name: torch.load(path / "optimizer.pt", weights_only=True) for path in kept}
    return logs, scores, config, tensors, optimizers


def same(a: Any, b: Any, where: str = "") -> None:
    """Equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{where}[{index}]")
    else:
        assert a == b, where


def stop_and_go(recipe: Callable[[str], Recipe], tmp_path: Path, steps: list[int]) -> tuple[Path, Path]:
    """The folders of a run left alone and of one that is stopped after each of ``steps``."""
    whole = Path(run(recipe(str(tmp_path / "whole"))).out)
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            run(recipe(str(tmp_path / "cut")), callbacks=[StopAt(step)])
        assert not (tmp_path / "cut").exists()
    return whole, Path(run(recipe(str(tmp_path / "cut"))).out)


def check_same(whole: Path, cut: Path) -> None:
    first, second = outcome(whole), outcome(cut)
    same(first, second)
    assert first[3]
    assert {path.name for path in whole.iterdir()} == {path.name for path in cut.iterdir()}
    assert not list(cut.parent.glob(".*partial"))


def test_a_run_cut_twice_ends_the_same(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    """With dropout, within an epoch, between two log lines, and after a checkpoint at the very end."""
    adapter = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.3}

    def recipe(out: str) -> Recipe:
        return causal(out=out, adapter=adapter, train=TRAIN, eval__generate=False, eval__limit=4)

    check_same(*stop_and_go(recipe, tmp_path, [3, 6]))


METHODS: dict[str, Flags] = {
    "adalora": {"method": "adalora", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 7,
                "target_modules": ["q_proj", "v_proj"]},
    "pissa": {"init_lora_weights": "pissa", "target_modules": "all-linear"},
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "prompt": {"method": "prompt_tuning", "num_virtual_tokens": 3},
    "prefix": {"method": "prefix_tuning", "num_virtual_tokens": 3},
    "vera": {"method": "vera", "r": 8, "target_modules": ["q_proj", "o_proj"]},
    "monteclora": {"monteclora_config": {"num_samples": 2}, "target_modules": ["q_proj", "v_proj"]},
    "oft": {"method": "oft", "oft_block_size": 4, "r": 0, "module_dropout": 0.2, "target_modules": ["q_proj"]},
    "osf": {"method": "osf", "target_modules": ["q_proj"]},
    "vblora": {"method": "vblora", "num_vectors": 8, "vector_length": 4, "target_modules": ["q_proj", "v_proj"]},
    "head": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}  # fmt: skip


OPTIMIZERS: dict[str, Flags] = {
    "loraplus": {"optimizer": "loraplus", "loraplus_lr_ratio": 4},
    "lorafa": {"optimizer": "lorafa"},
    "riemannian": {"optimizer": "riemannian"},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd", "lr_scheduler_type": "linear", "max_grad_norm": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_methods_go_on(causal: Callable[..., Recipe], tmp_path: Path, name: str) -> None:
    def recipe(out: str) -> Recipe:
        return causal(out=out, adapter=METHODS[name], train=TRAIN, eval__generate=False, eval__limit=4)

    check_same(*stop_and_go(recipe, tmp_path, [3]))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_go_on(causal: Callable[..., Recipe], tmp_path: Path, name: str) -> None:
    adapter = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}

    train = {**TRAIN, **OPTIMIZERS[name], "eval_strategy": "no"}

    def recipe(out: str) -> Recipe:
        return causal(out=out, adapter=adapter, train=train, data__test=None)

    check_same(*stop_and_go(recipe, tmp_path, [3]))


SHORT: Flags = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "use_cpu": True, "logging_steps": 1}
SMALL: Flags = {"r": 2, "target_modules": ["q_proj"]}


def cut(recipe: Recipe, step: int) -> Path:
    """Stop a run after a step; returns the folder of its checkpoints."""
    with pytest.raises(KeyboardInterrupt):
        run(recipe, callbacks=[StopAt(step)])
    out = Path(recipe.out)
    return out.with_name(f".{out.name}.partial") / "checkpoints"


def test_a_checkpoint_that_is_not_whole_is_never_taken(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    seen: list[int] = []

    class Begin(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            seen.append(state.global_step)

    recipe = causal(adapter=SMALL, train=SHORT, data__test=None)
    folder = cut(recipe, 4)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    (folder / "checkpoint-3" / SEAL).unlink()  # killed before the seal
    file = folder / "checkpoint-2" / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # a page that never reached the disk
    file.write_bytes(content)
    result = run(recipe, callbacks=[Begin()])
    assert seen == [1]
    whole = run(causal(adapter=SMALL, train=SHORT, data__test=None, out=str(tmp_path / "whole")))
    same(outcome(Path(whole.out)), outcome(Path(result.out)))


def test_a_full_disk_leaves_the_last_good_checkpoint(
    causal: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.save

    def full(value: Any, path: Any, *rest: Any, **more: Any) -> None:
        if "checkpoint-3" in str(path) and str(path).endswith("scheduler.pt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(value, path, *rest, **more)

    recipe = causal(adapter=SMALL, train={**SHORT, "save_total_limit": 1}, data__test=None)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RecipeError, match=r"cannot write checkpoint-3 .*No space left.*checkpoint-2 is whole"):
            run(recipe)
    folder = tmp_path / ".out.partial" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    assert last_whole(folder) == folder / "checkpoint-2"
    result = run(recipe)
    whole = run(causal(adapter=SMALL, train={**SHORT, "save_total_limit": 1}, data__test=None, out=str(tmp_path / "b")))
    same(outcome(Path(whole.out)), outcome(Path(result.out)))


def test_another_recipe_does_not_take_over(causal: Callable[..., Recipe]) -> None:
    folder = cut(causal(adapter=SMALL, train=SHORT, data__test=None), 2)
    other = {**SHORT, "learning_rate": 0.5}
    with pytest.raises(RecipeError, match=r"unfinished run that differs in train\.learning_rate"):
        run(causal(adapter=SMALL, train=other, data__test=None))
    assert last_whole(folder) is not None
    run(causal(adapter=SMALL, train=other, data__test=None, overwrite=True))
    assert not folder.exists()


def test_two_processes_do_not_share_a_folder(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    import psutil

    recipe = causal(adapter=SMALL, train=SHORT, data__test=None)
    cut(recipe, 2)
    parent = psutil.Process(os.getppid())
    owner = {"pid": parent.pid, "started": parent.create_time()}
    (tmp_path / ".out.partial" / ".resume" / "owner.json").write_text(json.dumps(owner))
    with pytest.raises(RecipeError, match=f"process {parent.pid} is training into"):
        run(recipe)


def test_checkpoints_come_by_themselves_and_go(
    causal: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that says nothing of checkpoints can be cut short too, and its finished folder holds none."""
    from veneer.train import checkpoints

    class Often(checkpoints.Autosave):
        SHARE = 0

        def __init__(self) -> None:
            super().__init__(0.0)

    monkeypatch.setattr(checkpoints, "Autosave", Often)
    recipe = causal(adapter=SMALL, train={"max_steps": 3, "use_cpu": True}, data__test=None)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, callbacks=[StopAt(3)])
    hidden = tmp_path / ".out.partial" / ".resume" / "checkpoints"
    assert {path.name for path in hidden.iterdir()} == {"checkpoint-1", "checkpoint-2"}
    out = Path(run(recipe).out)
    assert {path.name for path in out.iterdir()} == {"adapter", "log.jsonl", "recipe.yaml", "result.json"}
    assert [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_seal_names_every_file(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "a").write_bytes(b"abc")
    assert not is_whole(tmp_path)
    seal(tmp_path)
    assert is_whole(tmp_path)
    (tmp_path / "part" / "a").write_bytes(b"ab")
    assert not is_whole(tmp_path)


def command(recipe: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "veneer", "train", str(recipe), *more]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "adalora", "stream"])
def test_kill_9_at_any_moment(causal: Callable[..., Recipe], tmp_path: Path, name: str) -> None:
    """The real command, killed by SIGKILL at five random moments; what is left is exact all the same."""
    adapter = {**METHODS["adalora"], "total_step": 30} if name == "adalora" else {**SMALL, "lora_dropout": 0.2}
    train = {**TRAIN, "max_steps": 30, "save_steps": 1}
    file = tmp_path / "recipe.yaml"
    rows: Flags = {"data__streaming": True, "data__shuffle_buffer": 10} if name == "stream" else {}
    file.write_text(causal(adapter=adapter, train=train, eval__generate=False, eval__limit=4, **rows).dump())
    began = time.monotonic()
    subprocess.run(command(file, "--out", "whole"), cwd=tmp_path, check=True, capture_output=True)
    length = time.monotonic() - began
    draw, kills = random.Random(name), 0
    while kills < 5:
        process = subprocess.Popen(
            command(file, "--out", "cut"), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(draw.uniform(0.3, 0.9) * length)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    if not (tmp_path / "cut").exists():
        subprocess.run(command(file, "--out", "cut"), cwd=tmp_path, check=True, capture_output=True)
    assert kills
    first, second = outcome(tmp_path / "whole"), outcome(tmp_path / "cut")
    same(first, second)


@pytest.mark.slow
def test_a_file_that_may_not_grow(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands in for a disk that is full from the first large file on; nothing is left of the run."""
    file = tmp_path / "recipe.yaml"
    file.write_text(causal(adapter={"r": 8, "target_modules": "all-linear"}, train=SHORT, data__test=None).dump())
    limited = f"ulimit -f 40; exec {' '.join(command(file, '--out', 'cut'))}"
    done = subprocess.run(["bash", "-c", limited], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "cannot write checkpoint-1" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob(".cut*"))
