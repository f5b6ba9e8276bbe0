"""One seed, one start: the numbers that a new adapter takes from the global generator are peft's, so that scripts with
a seed begin with the same tensors and shuffle their data alike."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import veneer

LAYERS = ["lin", "last"]
EVERY = [*LAYERS, "table", "conv"]
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("lora", "LoraConfig", {"target_modules": EVERY}),
    ("lora-gaussian", "LoraConfig", {"target_modules": EVERY, "init_lora_weights": "gaussian"}),
    ("lora-random", "LoraConfig", {"target_modules": EVERY, "init_lora_weights": False}),
    ("lora-bias", "LoraConfig", {"target_modules": LAYERS, "lora_bias": True}),
    ("lora-pissa", "LoraConfig", {"target_modules": LAYERS, "init_lora_weights": "pissa"}),
    ("lora-olora", "LoraConfig", {"target_modules": LAYERS, "init_lora_weights": "olora"}),
    ("dora", "LoraConfig", {"target_modules": EVERY, "use_dora": True}),
    ("saved-head", "LoraConfig", {"target_modules": ["lin"], "modules_to_save": ["last"]}),
    ("adalora", "AdaLoraConfig", {"target_modules": LAYERS, "init_r": 3, "total_step": 10}),
    ("ia3", "IA3Config", {"target_modules": [*LAYERS, "conv"], "feedforward_modules": ["last"]}),
    ("ia3-random", "IA3Config", {"target_modules": LAYERS, "feedforward_modules": ["last"], "init_ia3_weights": False}),
    ("vera", "VeraConfig", {"target_modules": LAYERS, "r": 3}),
    ("vera-random", "VeraConfig", {"target_modules": LAYERS, "r": 3, "init_weights": False}),
    ("loha", "LoHaConfig", {"target_modules": [*LAYERS, "conv"], "r": 3}),
    ("loha-random", "LoHaConfig", {"target_modules": LAYERS, "r": 3, "init_weights": False}),
    ("lokr", "LoKrConfig", {"target_modules": [*LAYERS, "conv"], "r": 3}),
    ("oft", "OFTConfig", {"target_modules": LAYERS, "oft_block_size": 4, "r": 0}),
    ("hra", "HRAConfig", {"target_modules": LAYERS, "r": 2}),
    ("miss", "MissConfig", {"target_modules": LAYERS, "r": 2}),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.last = nn.Linear(24, 16), nn.Linear(16, 8)
        self.table, self.conv = nn.Embedding(11, 8), nn.Conv2d(3, 4, 3)


def started(lib: Any, config: str, options: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What an adapter starts from, and the state that it leaves the generator in."""
    base = Net()
    torch.manual_seed(7)
    model = lib.get_peft_model(base, getattr(lib, config)(**options))
    trained = {k: v.detach().clone() for k, v in model.named_parameters() if v.requires_grad}
    return trained, torch.get_rng_state()


@pytest.mark.parametrize(("config", "options"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_an_adapter_starts_from_pefts_numbers(config: str, options: dict[str, Any]) -> None:
    ours, after = started(veneer, config, options)
    theirs, after_theirs = started(peft, config, options)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert torch.equal(after, after_theirs)
