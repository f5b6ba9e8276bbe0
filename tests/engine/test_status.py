"""Status of layers and models, and the count of trained parameters, beside peft's."""

from __future__ import annotations

import dataclasses
from typing import Any

import peft
import pytest
from api_zoo import llama

import veneer


def status(package: Any, what: str, prepare: Any = None) -> Any:
    kwargs = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = package.get_peft_model(llama(), package.LoraConfig(**kwargs))
    model.add_adapter("b", package.LoraConfig(**{**kwargs, "target_modules": ["q_proj"]}))
    if prepare is not None:
        prepare(model)
    found = getattr(model, what)()
    return [dataclasses.asdict(s) for s in found] if isinstance(found, list) else dataclasses.asdict(found)


STEPS = {
    "fresh": None,
    "other active": lambda m: m.set_adapter("b"),
    "two active": lambda m: m.base_model.set_adapter(["default", "b"]),
    "merged": lambda m: m.merge_adapter(["default"]),
    "frozen": lambda m: m.set_requires_grad("default", requires_grad=False),
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("step", STEPS)
def test_model_status_equals_peft(step: str) -> None:
    ours, theirs = status(veneer, "get_model_status", STEPS[step]), status(peft, "get_model_status", STEPS[step])
    for key in ("base_model_type", "peft_types", "trainable_params", "total_params", "num_adapter_layers", "enabled",
                "active_adapters", "merged_adapters", "requires_grad", "available_adapters", "devices"):  # fmt: skip
        if step == "disabled" and key in ("trainable_params", "requires_grad"):
            continue  # disabling is a switch of the output here and does not freeze
        assert ours[key] == theirs[key], key


@pytest.mark.parametrize("step", [s for s in STEPS if s != "disabled"])
def test_layer_status_equals_peft(step: str) -> None:
    ours, theirs = status(veneer, "get_layer_status", STEPS[step]), status(peft, "get_layer_status", STEPS[step])
    assert [s["name"] for s in ours] == [s["name"] for s in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in ("module_type", "enabled", "active_adapters", "merged_adapters", "requires_grad",
                    "available_adapters", "devices"):  # fmt: skip
            assert a[key] == b[key], (a["name"], key)


def test_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for package in (veneer, peft):
        model = package.get_peft_model(
            llama(), package.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        )
        model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
        trained, total = model.get_nb_trainable_parameters()
        assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert total == sum(p.numel() for p in model.parameters())
    assert printed[0] == printed[1]
