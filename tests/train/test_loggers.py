"""What TensorBoard, Weights & Biases and the others get to see of a run, and what is said where one is missing."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import StopAt
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from typer.testing import CliRunner

from veneer.available import has
from veneer.cli.app import app
from veneer.train import Recipe, RecipeError, loggers, run

SHORT = {
    "max_steps": 6, "learning_rate": 0.02, "logging_steps": 1, "use_cpu": True, "per_device_train_batch_size": 4,
}  # fmt: skip
EVAL = {"max_new_tokens": 4, "limit": 4}
LOSS_ONLY = {"generate": False, "limit": 4}


@pytest.fixture(autouse=True)
def _no_folders_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TENSORBOARD_", "MLFLOW_", "TRACKIO_"))]:
        monkeypatch.delenv(name)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every curve that TensorBoard would draw."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_gets_every_number(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    train = {**SHORT, "report_to": "tensorboard", "eval_strategy": "steps", "eval_steps": 2}
    result = run(causal(train=train, eval=EVAL))
    found = curves(tmp_path / "out" / "tensorboard")
    for name in ("loss", "tokens_per_second", "peak_memory_mb", "eta", "learning_rate"):
        assert [step for step, _ in found[f"train/{name}"]] == [1, 2, 3, 4, 5, 6], name
    logged = [row["tokens_per_second"] for row in result.history if "loss" in row]
    assert [value for _, value in found["train/tokens_per_second"]] == pytest.approx(logged)
    matches = found["eval/exact_match"]
    assert [step for step, _ in matches] == [0, 2, 4, 6, 6]  # the base, evaluation in training, the tuned model
    assert (matches[0][1], matches[-1][1]) == (result.before["exact_match"], result.after["exact_match"])
    assert found["eval/loss"][0][1] == pytest.approx(result.before["loss"])


def test_tensorboard_goes_where_its_variable_says(
    causal: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    run(causal(train={**SHORT, "max_steps": 1, "report_to": ["tensorboard"]}, eval=LOSS_ONLY))
    assert "train/loss" in curves(tmp_path / "elsewhere")
    assert not (tmp_path / "out" / "tensorboard").exists()


@pytest.mark.slow
def test_a_run_that_goes_on_draws_no_step_twice(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    train = {**SHORT, "report_to": "tensorboard", "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        run(causal(train=train, eval=LOSS_ONLY), callbacks=[StopAt(6)])
    cut = curves(tmp_path / ".out.partial" / "tensorboard")
    assert [step for step, _ in cut["train/loss"]] == [1, 2, 3, 4, 5]
    run(causal(train=train, eval=LOSS_ONLY))
    found = curves(tmp_path / "out" / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found["eval/loss"]] == [0, 6]


def test_quiet_bars_stop_no_logger(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = causal(train=SHORT, eval=LOSS_ONLY)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.dump(), encoding="utf-8")
    words = ["train", str(path), "--set", "train.report_to=tensorboard", "--set", "train.disable_tqdm=true"]
    done = CliRunner().invoke(app, words, env={"TQDM_DISABLE": "1"})
    assert done.exit_code == 0, done.output
    assert len(curves(tmp_path / "out" / "tensorboard")["train/loss"]) == 6


class Recorder(TrainerCallback):
    """Stands where a logger of transformers would, and writes down what it is told."""

    told: list[tuple[str, int, dict[str, Any]]]

    def __init__(self) -> None:
        Recorder.told = self.told = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.told.append(("begin", state.global_step, {"run_name": args.run_name}))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        self.told.append(("log", state.global_step, dict(logs)))

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.told.append(("end", state.global_step, {}))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "swanlab", Recorder)
    monkeypatch.setattr(loggers, "has", lambda module: module == "swanlab")


@pytest.mark.usefixtures("recorder")
def test_a_logger_closes_after_the_last_score(causal: Callable[..., Recipe]) -> None:
    result = run(causal(train={**SHORT, "max_steps": 2, "report_to": "swanlab"}, eval=LOSS_ONLY))
    told = Recorder.told
    assert told[0] == ("begin", 0, {"run_name": "out"})
    assert told[1] == ("log", 0, {f"eval_{name}": value for name, value in result.before.items()})
    assert told[-2] == ("log", 2, {f"eval_{name}": value for name, value in result.after.items()})
    assert [what for what, _, _ in told if what != "log"] == ["begin", "end"]
    assert told[-1][0] == "end"
    assert sum("tokens_per_second" in logs for _, _, logs in told) == 2


@pytest.mark.usefixtures("recorder")
def test_a_logger_that_cannot_begin(causal: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        raise OSError("no API key\nand more")

    monkeypatch.setattr(Recorder, "on_train_begin", fail)
    with pytest.raises(RecipeError, match=r"train.report_to: Recorder cannot begin: no API key. Set it up") as caught:
        run(causal(train={**SHORT, "report_to": "swanlab"}, eval=LOSS_ONLY))
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.usefixtures("recorder")
def test_a_logger_closes_where_training_fails(causal: Callable[..., Recipe]) -> None:
    recipe = causal(train={**SHORT, "report_to": "swanlab", "run_name": "mine"}, eval=LOSS_ONLY)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, callbacks=[StopAt(2)])
    assert Recorder.told[0] == ("begin", 0, {"run_name": "mine"})
    assert Recorder.told[-1][0] == "end"


@pytest.mark.parametrize(
    ("name", "package"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("trackio", "trackio"), ("comet_ml", "comet-ml")]
)
def test_a_missing_package_is_said_before_weights(
    causal: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, package: str
) -> None:
    monkeypatch.setattr(loggers, "has", lambda module: module != name)
    monkeypatch.setattr("veneer.train.loop.load_base", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(RecipeError, match=f"{name} needs {name}, which is not installed") as caught:
        run(causal(train={**SHORT, "report_to": ["tensorboard", name]}))
    assert caught.value.hint == f"Run `pip install {package}`."
    assert caught.value.key == "train.report_to"
    assert not (tmp_path / "out").exists()


def test_an_unknown_logger_has_a_nearest_name(causal: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="Did you mean `tensorboard`"):
        run(causal(train={**SHORT, "report_to": "tensorbord"}))


def test_every_logger_of_transformers_is_known() -> None:
    theirs = set(integration_utils.INTEGRATION_TO_CALLBACK) - {"kubeflow"}  # that one is switched on by its variable
    assert theirs == set(loggers.PACKAGES)


class FakeRun:
    def __init__(self, **given: Any) -> None:
        self.given, self.summary, self.logs, self.code = given, {}, [], None

    def _label(self, **more: Any) -> None:
        pass


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """A module with what transformers calls of wandb; the runs that were begun."""
    runs: list[FakeRun] = []
    module: Any = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.run, module.config = None, {}

    def init(**given: Any) -> None:
        module.run = FakeRun(**given)
        runs.append(module.run)

    def finish(exit_code: int = 0) -> None:
        module.run.code, module.run = exit_code, None

    module.init, module.finish = init, finish
    module.log = lambda values: module.run.logs.append(values)

    class Config(dict):  # type: ignore[type-arg]
        def update(self, *values: Any, **more: Any) -> None:  # wandb's takes allow_val_change beside
            super().update(*values)

    module.config = Config()
    errors: Any = types.ModuleType("wandb.sdk.lib.config_util")
    errors.ConfigError = type("ConfigError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("wandb.sdk", "wandb.sdk.lib"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "wandb.sdk.lib.config_util", errors)
    monkeypatch.setattr(loggers, "has", lambda name: True)
    return runs


def test_wandb_honours_its_project_and_ends_its_run(
    causal: Callable[..., Recipe], fake_wandb: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    result = run(causal(train={**SHORT, "max_steps": 2, "report_to": "wandb"}, eval=LOSS_ONLY))
    with pytest.raises(KeyboardInterrupt):
        run(causal(train={**SHORT, "report_to": "wandb"}, eval=LOSS_ONLY, overwrite=True), callbacks=[StopAt(1)])
    assert [r.given for r in fake_wandb] == [{"project": "mine", "name": "out"}] * 2  # each a run of its own
    assert [r.code for r in fake_wandb] == [0, 1]
    logs = fake_wandb[0].logs
    assert all("train/tokens_per_second" in row for row in logs if "train/loss" in row)
    assert logs[0]["eval/loss"] == result.before["loss"]
    assert logs[-1] == {f"eval/{k}": v for k, v in result.after.items()} | {"train/global_step": 2}


@pytest.mark.slow
def test_wandb_itself_offline(causal: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has("wandb"):
        pytest.skip("wandb is not installed; pip install wandb")
    for name, value in {"MODE": "offline", "PROJECT": "mine", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run(causal(train={**SHORT, "report_to": "wandb"}, eval=LOSS_ONLY))
    import wandb

    assert wandb.run is None
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    written = path.read_bytes()
    for text in (b"mine", b"out", b"train/tokens_per_second", b"train/eta", b"eval/loss", b"peft_config"):
        assert text in written, text
