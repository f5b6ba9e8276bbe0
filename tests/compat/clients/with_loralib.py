"""A checkpoint of Microsoft's loralib, made with loralib itself, as an adapter."""

from __future__ import annotations

import loralib
import peft
import torch
from torch import nn

from veneer.arithmetic.styles import read_pairs, write_pairs

assert "veneer" in peft.__file__, peft.__file__
R, ALPHA = 4, 8


class Net(nn.Module):
    def __init__(self, linear: object, **options: object):
        super().__init__()
        self.first, self.second = linear(6, 10, **options), linear(10, 4, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


torch.manual_seed(0)
theirs = Net(loralib.Linear, r=R, lora_alpha=ALPHA)
loralib.mark_only_lora_as_trainable(theirs)
optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
x = torch.randn(8, 6)
for _ in range(5):
    theirs(x).square().mean().backward()
    optimizer.step()
checkpoint = loralib.lora_state_dict(theirs)
assert all("lora_" in k for k in checkpoint)

base = Net(nn.Linear)
base.load_state_dict({k: v for k, v in theirs.state_dict().items() if "lora_" not in k})
assert not torch.allclose(base(x), theirs(x))
keys = write_pairs(read_pairs(checkpoint, alpha=ALPHA), "peft")  # alpha / r goes into B
model = peft.get_peft_model(base, peft.LoraConfig(r=R, lora_alpha=R, target_modules=["first", "second"]))
outcome = peft.set_peft_model_state_dict(model, keys)
assert not outcome.unexpected_keys
torch.testing.assert_close(model(x), theirs(x))
torch.testing.assert_close(model.merge_and_unload()(x), theirs(x))
