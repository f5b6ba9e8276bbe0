"""Recipes with optimizers made for LoRA, and with initial values drawn from the training rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from veneer.train import Recipe, run
from veneer.train.errors import RecipeError

SHORT = {"learning_rate": 5e-3, "num_train_epochs": 6, "use_cpu": True}


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "loraplus", "loraplus_lr_ratio": 4},
        {"optimizer": "lorafa"},
        {"optimizer": "riemannian", "riemannian_reg": 0.1},
    ],
    ids=lambda o: o["optimizer"],
)
def test_an_optimizer_from_the_recipe_lowers_the_loss(causal: Callable[..., Recipe], options: dict[str, Any]) -> None:
    result = run(causal(train={**SHORT, **options}, eval={"generate": False}))
    assert result.after["loss"] < 0.8 * result.before["loss"]


@pytest.mark.parametrize("name", ["eva", "corda", "lora_ga"])
def test_initial_values_from_the_recipes_rows(causal: Callable[..., Recipe], name: str) -> None:
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": name}
    if name == "lora_ga":
        adapter["lora_ga_config"] = {"stable_gamma": 64}
    result = run(causal(adapter=adapter, train={**SHORT, "learning_rate": 2e-3}, eval={"generate": False}))
    assert result.after["loss"] < 0.8 * result.before["loss"]


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"optimizer": "loraplu", "loraplus_lr_ratio": 4}, "loraplus"),
        ({"optimizer": "loraplus"}, "loraplus_lr_ratio"),
        ({"optimzer": "loraplus"}, "optimizer"),
        ({"loraplus_lr_ratio": 4}, "optimizer: loraplus"),
        ({"optimizer": "lorafa", "optim": "sgd"}, "Keep one"),
    ],
)
def test_wrong_settings_name_what_is_right(causal: Callable[..., Recipe], train: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as error:
        causal(train=train)
    assert said in str(error.value)


def test_an_optimizer_for_lora_wants_lora(causal: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError) as error:
        causal(adapter={"method": "vera"}, train={"optimizer": "lorafa"})
    assert "adapter.method" in str(error.value)
