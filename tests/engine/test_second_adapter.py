"""A second adapter finds the layers that the first one has wrapped."""

from __future__ import annotations

from pathlib import Path

import torch
from api_zoo import llama, logits, moved

import veneer


def all_linear() -> veneer.LoraConfig:
    return veneer.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


def test_all_linear_means_the_same_layers_again(tmp_path: Path) -> None:
    model = veneer.get_peft_model(llama(), all_linear())
    model.add_adapter("second", all_linear())
    assert model.base_model.targeted["second"] == model.base_model.targeted["default"]
    assert len(model.base_model.targeted["second"]) == 14
    moved(model).set_adapter("second")
    moved(model, seed=2).save_pretrained(tmp_path, selected_adapters=["second"])
    third = veneer.get_peft_model(llama(), all_linear())
    third.load_adapter(tmp_path / "second", "again")
    third.set_adapter("again")
    torch.testing.assert_close(logits(third.eval()), logits(model))
