"""`train.report_to`: TensorBoard, Weights & Biases, MLflow, trackio and the others, by transformers' own callbacks.

They are asked for in the recipe, checked before any weight is loaded, given the scores before and after training
beside what Trainer logs, and closed once the last score is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

from veneer.available import has
from veneer.train.errors import RecipeError, nearest

if TYPE_CHECKING:
    from veneer.train.recipe import Recipe

__all__ = ["PACKAGES", "Reporter", "check_loggers", "reporting"]

#: what `report_to` can name: modules of which one must be there, and what to install
PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "wandb": (("wandb",), "wandb"),
    "mlflow": (("mlflow",), "mlflow"),
    "trackio": (("trackio",), "trackio"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "clearml": (("clearml",), "clearml"),
    "swanlab": (("swanlab",), "swanlab"),
    "dvclive": (("dvclive",), "dvclive"),
    "neptune": (("neptune",), "neptune"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "dagshub": (("dagshub",), "dagshub mlflow"),
    "azure_ml": (("azureml",), "azureml-sdk"),
    "flyte": (("flytekit",), "flytekit"),
}


def check_loggers(recipe: Recipe) -> None:
    """Look at `train.report_to` before anything is loaded.

    Raises:
        RecipeError: a name that means nothing, or one whose package is not installed.
    """
    asked = recipe.train.get("report_to") or "none"
    names = [asked] if isinstance(asked, str) else asked
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problem = f"expected a name or a list of names, found {asked!r}"
        raise recipe.error("train", "report_to", problem=problem)
    for name in names:
        if name in ("all", "none"):
            continue
        if name not in PACKAGES:
            known = [*PACKAGES, "all", "none"]
            hint = f"It may be {', '.join(known)}. Every run writes log.jsonl without being asked."
            raise recipe.error("train", "report_to", problem=f"{name!r}", near=nearest(name, known), hint=hint)
        modules, package = PACKAGES[name]
        if not any(has(module) for module in modules):
            problem = f"{name} needs {' or '.join(modules)}, which is not installed"
            raise recipe.error("train", "report_to", problem=problem, hint=f"Run `pip install {package}`.")


def _forward(event: str) -> Callable[..., None]:
    def call(self: Reporter, args: Any, state: Any, control: Any, **more: Any) -> None:
        for logger in self.loggers:
            getattr(logger, event)(args, state, control, **more)

    return call


class Reporter(TrainerCallback):
    """Hands a run's events on to its loggers, which may close only after the scores that follow training."""

    def __init__(self, loggers: list[TrainerCallback], folder: Path, before: Mapping[str, float]) -> None:
        self.loggers, self.before = loggers, before
        for logger in loggers:
            if isinstance(logger, TensorBoardCallback) and logger.logging_dir is None:
                logger.logging_dir = str(folder / "tensorboard")

    on_epoch_begin = _forward("on_epoch_begin")
    on_epoch_end = _forward("on_epoch_end")
    on_step_begin = _forward("on_step_begin")
    on_step_end = _forward("on_step_end")
    on_evaluate = _forward("on_evaluate")
    on_save = _forward("on_save")
    on_log = _forward("on_log")

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        for logger in self.loggers:
            if isinstance(logger, TensorBoardCallback) and state.global_step and state.is_world_process_zero:
                # what an earlier attempt wrote after its last checkpoint is not to be shown twice
                make: Any = logger._SummaryWriter
                logger.tb_writer = make(log_dir=logger.logging_dir, purge_step=state.global_step + 1)
            try:
                logger.on_train_begin(args, state, control, **more)
            except Exception as error:  # each of them has errors of its own
                name = type(logger).__name__.removesuffix("Callback")
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                hint = "Set it up as it says, or take it out; every run writes log.jsonl."
                problem = f"{name} cannot begin: {reason}"
                raise RecipeError(problem, key="train.report_to", hint=hint) from error
        if state.global_step == 0:
            self.scores(args, state, control, self.before, more.get("model"))

    def scores(self, args: Any, state: Any, control: Any, values: Mapping[str, float], model: Any) -> None:
        """Log scores of the test rows, under the names that evaluation during training gives them."""
        if values:
            self.on_log(args, state, control, logs={f"eval_{key}": value for key, value in values.items()}, model=model)


@contextmanager
def reporting(
    trainer: Trainer, folder: Path, before: Mapping[str, float]
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Inside, ``trainer`` reports to what its arguments name; yields what takes the scores after training.

    TensorBoard's files go to ``folder``/tensorboard, unless TENSORBOARD_LOGGING_DIR is set. A W&B run that began
    inside ends here, so that a second run of the same process is one of its own.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    kinds = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    loggers = [item for item in trainer.callback_handler.callbacks if isinstance(item, kinds)]
    if not loggers:
        yield lambda scores: None
        return
    for logger in loggers:
        trainer.remove_callback(logger)
    reporter = Reporter(loggers, folder, before)
    trainer.add_callback(reporter)
    theirs = _wandb_run() if any(isinstance(logger, WandbCallback) for logger in loggers) else None
    done = False
    try:
        yield lambda scores: reporter.scores(trainer.args, trainer.state, trainer.control, scores, trainer.model)
        done = True
    finally:
        for logger in loggers:
            logger.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
            if isinstance(logger, WandbCallback) and theirs is None and _wandb_run() is not None:
                import wandb

                wandb.finish(exit_code=0 if done else 1)


def _wandb_run() -> Any:
    import wandb

    return wandb.run
