"""Optimizers made for LoRA in a recipe: rates and decay of a run, schedule, clipping, accumulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.optimizers
import pytest
import torch
from test_resume import TRAIN
from transformers import AutoModelForCausalLM, TrainerCallback

from veneer.train import Recipe, run

OPTIONS: dict[str, dict[str, Any]] = {
    "loraplus": {"optimizer": "loraplus", "loraplus_lr_ratio": 4},
    "lorafa": {"optimizer": "lorafa"},
    "riemannian": {"optimizer": "riemannian", "riemannian_reg": 0.1},
}
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
RULES = {"weight_decay": 0.1, "warmup_steps": 2, "lr_scheduler_type": "cosine", "max_grad_norm": 0.05}


class Seen(TrainerCallback):
    """Each step's rates, by the names of the parameters, and the gradients' length before the step."""

    def __init__(self) -> None:
        self.rates: list[dict[str, tuple[float, float]]] = []
        self.lengths: list[float] = []
        self.frozen: set[str] = set()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **more: Any
    ) -> None:
        names = {id(p): n for n, p in model.named_parameters()}
        self.frozen = {n for n, p in model.named_parameters() if "lora_A" in n and not p.requires_grad}
        groups = optimizer.param_groups
        self.rates.append({names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]})
        grads = [p.grad for g in groups for p in g["params"] if p.grad is not None]
        self.lengths.append(float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads]))))


def peft_groups(name: str, base: str) -> dict[str, tuple[float, float]]:
    """Rate and decay of every parameter in peft's own optimizer."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**ADAPTER))
    made, rate, decay = peft.optimizers, 0.02, 0.1
    found = {
        "loraplus": lambda: made.create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=4, loraplus_weight_decay=decay
        ),
        "lorafa": lambda: made.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=rate, weight_decay=decay),
        "riemannian": lambda: made.create_riemannian_optimizer(
            model, torch.optim.AdamW, lr=rate, reg=0.1, weight_decay=decay
        ),
    }[name]()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = found.param_groups
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"] if id(p) in trained}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_rates_follow_the_schedule_and_gradients_are_clipped(
    causal: Callable[..., Recipe], llama: Path, name: str
) -> None:
    seen = Seen()
    train = {**TRAIN, **RULES, **OPTIONS[name], "gradient_accumulation_steps": 2, "save_strategy": "no"}
    run(causal(adapter=ADAPTER, train=train, eval={"generate": False}), callbacks=[seen])
    assert len(seen.rates) == TRAIN["max_steps"]
    want = peft_groups(name, str(llama))
    shape = [0.0, 0.5, 1.0]  # of the warm-up, over the rate itself
    for step, factor in enumerate(shape):
        assert seen.rates[step] == {n: (pytest.approx(rate * factor), decay) for n, (rate, decay) in want.items()}
    falling = [rates[next(iter(want))][0] for rates in seen.rates[2:]]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < falling[0] / 2
    assert max(seen.lengths) <= RULES["max_grad_norm"] * 1.001
    assert bool(seen.frozen) == (name == "lorafa")


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_two_halves_of_a_batch_are_the_batch(causal: Callable[..., Recipe], tmp_path: Path, name: str) -> None:
    """Gradients are summed before the optimizer projects, preconditions or scales them."""
    got = []
    for at, (rows, parts) in enumerate(((4, 1), (2, 2))):
        split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts}
        train = {**TRAIN, **OPTIONS[name], **split, "max_steps": 3, "save_strategy": "no"}
        result = run(causal(out=str(tmp_path / str(at)), adapter=ADAPTER, train=train, eval={"generate": False}))
        got.append(result.after["loss"])
        assert result.after["loss"] < result.before["loss"]
    assert got[0] == pytest.approx(got[1], rel=1e-3)
