"""Adapter names that look like parts of tensors' names: those that peft takes work, and no file has a trace of them."""

from __future__ import annotations

import peft
import pytest
import torch
from law_cases import CASES, Case
from lawlib import Net, config, data, distance, randomize

from veneer import AdapterError
from veneer.state import collect, put
from veneer.tuner import Tuner

FIRST = [c for c in CASES if c.site_name == "Linear" and not c.variant]
LORA = next(c for c in FIRST if c.method_name == "LORA")
ODD = ["a_b", "lora_A", "lora_A_ModuleDict", "base_layer", "weight", "0", "first", "a b"]
REFUSED = {  # name -> what the error says
    "default.x": "use a non-empty name without dots",
    "lora_A.weight": "use a non-empty name without dots",
    "": "use a non-empty name without dots",
    "items": "choose another, such as 'items_adapter'",
    "training": "choose another, such as 'training_adapter'",
}


def made(case: Case, name: str) -> Tuner:
    torch.manual_seed(1)
    return Tuner(Net(case.make_module).eval(), config(case), name).eval()


@pytest.mark.parametrize("case", FIRST, ids=[c.id for c in FIRST])
def test_odd_adapter_names(case: Case) -> None:
    x = data(case)
    plain = randomize(made(case, "default"))
    y, saved = plain(x), {k: t.clone() for k, t in collect(plain, "default").items()}
    for name in ODD:
        t = made(case, name)
        assert collect(t, name).keys() == saved.keys()
        assert put(t, name, saved).ok
        assert distance(t(x), y) < 1e-6, name
        t.add_adapter("second", config(case))
        t.delete_adapter("second")
        assert distance(t(x), y) < 1e-6, name


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_no_module_can_have_are_refused(name: str) -> None:
    with pytest.raises(KeyError):
        peft.get_peft_model(Net(LORA.make_module), config(LORA, package=peft), adapter_name=name)
    with pytest.raises(AdapterError, match=REFUSED[name]):
        made(LORA, name)
    t = made(LORA, "default")
    with pytest.raises(AdapterError, match=REFUSED[name]):
        t.add_adapter(name, config(LORA))
    assert list(t.peft_config) == ["default"]
