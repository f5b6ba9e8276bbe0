"""The switches that trade time for memory: the same training, and errors where they cannot do what they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from veneer.train import Recipe, RecipeError, run
from veneer.train.memory import offloaded, step_in_backward
from veneer.train.trainer import TaskTrainer

STEPS = {"max_steps": 4, "learning_rate": 0.01, "logging_steps": 1, "use_cpu": True, "max_grad_norm": 0}


def losses(causal: Callable[..., Recipe], folder: Path, **train: Any) -> list[float]:
    adapter = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1}
    result = run(causal(out=str(folder), adapter=adapter, train={**STEPS, **train}, data__test=None))
    return [row["loss"] for row in result.history]


@pytest.mark.parametrize(
    "train",
    [
        {"optimizer_in_backward": True},
        {"optimizer_in_backward": True, "optimizer": "loraplus", "loraplus_lr_ratio": 4},
        {"optimizer_in_backward": True, "optim": "sgd", "weight_decay": 0.1},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "optimizer_in_backward": True},
        {"mlp_checkpointing": True, "return_memory": True},
    ],
    ids=lambda train: " ".join(map(str, train.values())),
)
def test_same_losses(causal: Callable[..., Recipe], tmp_path: Path, train: dict[str, Any]) -> None:
    switches = ("optimizer_in_backward", "activation_checkpointing", "mlp_checkpointing", "return_memory")
    plain = {key: value for key, value in train.items() if key not in switches}
    expected = losses(causal, tmp_path / "a", **plain)
    assert losses(causal, tmp_path / "b", **train) == pytest.approx(expected, rel=1e-5)
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)


def test_gradients_are_gone_when_backward_ends(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    held: list[int] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
            held.append(sum(p.grad is not None for p in model.parameters()))

    for train in ({}, {"optimizer_in_backward": True}):
        out = str(tmp_path / str(len(held)))
        run(causal(out=out, train={**STEPS, "max_steps": 1, **train}, data__test=None), callbacks=[Watch()])
    assert held[0] > 0
    assert held[1] == 0


def test_an_offloaded_step_is_the_same(
    causal: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = losses(causal, tmp_path / "a")
    moved: list[int] = []

    class Spy(torch.autograd.graph.save_on_cpu):
        def __enter__(self) -> None:
            moved.append(1)
            super().__enter__()

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Spy)
    init = TaskTrainer.__init__

    def switched(self: Any, **more: Any) -> None:
        init(self, **more)
        self.memory.activation_offload = True  # a recipe refuses it on a CPU

    monkeypatch.setattr(TaskTrainer, "__init__", switched)
    assert losses(causal, tmp_path / "b") == pytest.approx(expected, rel=1e-6)
    assert len(moved) == STEPS["max_steps"]


def test_offloading_is_off_unless_asked_for() -> None:
    assert type(offloaded(False)).__name__ == "nullcontext"


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_steps_in_backward_are_the_steps_after_it(optimizer: Any) -> None:
    """With groups of their own, a schedule, a layer used twice, and a state that is loaded half way."""
    models, made = [], []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
        models.append(model)
        made.append(optimizer(groups, lr=0.02, weight_decay=0.1))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in made]
    handles = step_in_backward(made[1])
    x = torch.randn(5, 4)
    for turn in range(4):
        for model, opt, schedule in zip(models, made, schedules, strict=True):
            model(model(x)).square().sum().backward()
            opt.step()
            opt.zero_grad()
            schedule.step()
            if turn == 1:
                opt.load_state_dict(opt.state_dict())
    pairs = list(zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in pairs)
    for handle in handles:
        handle.remove()
    models[1](x).sum().backward()
    assert all(p.grad is not None for p in models[1].parameters())


@pytest.mark.parametrize(
    ("train", "key", "said"),
    [
        ({"activation_offload": True}, "activation_offload", "runs on the CPU"),
        ({"optimizer_in_backward": True, "max_grad_norm": 1.0}, "max_grad_norm", "max_grad_norm: 0"),
        ({"optimizer_in_backward": True, "gradient_accumulation_steps": 2}, "gradient_accumulation_steps", "batches"),
        ({"optimizer_in_backward": True, "optimizer": "riemannian"}, "optimizer", "A and B together"),
        (
            {
                "optimizer_in_backward": True,
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"use_reentrant": True},
            },
            "activation_checkpointing_kwargs",
            "use_reentrant",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(causal: Callable[..., Recipe], train: dict[str, Any], key: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        run(causal(train={**STEPS, **train}))
    assert caught.value.key == f"train.{key}"


def test_refused_with_a_schedule(causal: Callable[..., Recipe]) -> None:
    adapter = {"method": "adalora", "target_modules": ["q_proj"], "total_step": 4, "init_r": 4, "target_r": 2}
    with pytest.raises(RecipeError, match="reads the gradients after each step"):
        run(causal(adapter=adapter, train={**STEPS, "optimizer_in_backward": True}))
