"""Recipes of methods that put tokens, keys or a network before or beside the base, those with a loss of their own among
them: training with the head applied at labelled places alone must not pass that loss by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from veneer.methods import cpt, shadow
from veneer.train import Recipe, run

CONTEXT = {
    "method": "cpt", "cpt_token_ids": [5, 9, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4],
    "opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5,
    "opt_projection_epsilon": 9.0, "opt_projection_format_epsilon": 5.0,
}  # fmt: skip
TRAIN = {"learning_rate": 0.05, "max_steps": 6, "use_cpu": True, "per_device_train_batch_size": 2}


def trained(causal: Callable[..., Recipe], adapter: dict[str, Any]) -> None:
    result = run(causal(adapter=adapter, train=TRAIN, eval={"generate": False}))
    assert result.after["loss"] < result.before["loss"]


@pytest.mark.parametrize(
    ("adapter", "module", "name"),
    [(CONTEXT, cpt, "weighted_loss"), ({"method": "shadow"}, shadow, "auxiliary_loss")],
    ids=["cpt", "shadow"],
)
def test_a_loss_of_the_methods_own_is_trained(
    causal: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any], module: Any, name: str
) -> None:
    real, calls = getattr(module, name), []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(module, name, counted)
    trained(causal, adapter)
    assert len(calls) >= TRAIN["max_steps"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "cartridge", "num_virtual_tokens": 4},
        {"method": "multitask_prompt_tuning", "num_virtual_tokens": 4, "num_tasks": 1},
        {"method": "p_tuning", "num_virtual_tokens": 4},
        {"method": "adaption_prompt", "adapter_len": 3, "adapter_layers": 1},
    ],
    ids=lambda a: a["method"],
)
def test_a_recipe_lowers_the_loss(causal: Callable[..., Recipe], adapter: dict[str, Any]) -> None:
    trained(causal, adapter)
