"""Packed layers without a backend are refused by name, with the reason and the way out, whatever class they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear

from veneer import LoraConfig, get_peft_model
from veneer.backends.refused import why_not


def stand_in(module: str, base: type[nn.Module] = nn.Module) -> Any:
    """A class as a library of that name would have it."""
    return type("PackedLinear", (base,), {"__module__": module})


class Model(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.proj, self.free = layer, nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.free(self.proj(x))


@pytest.mark.parametrize(
    ("layer", "what", "remedy"),
    [
        (FP8Linear(32, 32), "FP8 in blocks", r"FineGrainedFP8Config\(dequantize=True\)"),
        (stand_in("gptqmodel.nn_modules.qlinear.torch")(), "GPTQ or AWQ", "nf4"),
        (stand_in("aqlm.inference")(), "AQLM", "load the original model"),
        (stand_in("transformers.integrations.eetq")(), "EETQ", "load the original model"),
        (stand_in("optimum.quanto.nn.qlinear", nn.Linear)(32, 32), "quanto", "load the original model"),
        (
            stand_in("compressed_tensors.linear", nn.Linear)(32, 32),
            "compressed-tensors",
            r"CompressedTensorsConfig\(dequantize=True\)",
        ),
    ],
    ids=["fp8", "gptq", "aqlm", "eetq", "quanto", "compressed"],
)
def test_named_and_with_a_way_out(layer: nn.Module, what: str, remedy: str) -> None:
    for targets in (["proj"], "all-linear"):
        config = LoraConfig(target_modules=targets, r=2)
        with pytest.raises(ValueError, match=rf"Target module proj .*packed as {what}.*no backend.*{remedy}"):
            get_peft_model(Model(layer), config)
    get_peft_model(Model(layer), LoraConfig(target_modules=["free"], r=2))  # beside it all is well


def test_other_layers_are_not_meant() -> None:
    assert why_not(nn.Linear(2, 2)) is None
    assert why_not(Model(nn.Linear(2, 2))) is None

    class Own(nn.Linear):
        pass

    assert why_not(Own(2, 2)) is None
