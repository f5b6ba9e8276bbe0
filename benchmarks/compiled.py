"""torch.compile on an adapted model: a training step, and steps with a switch to another adapter before each.

LoRA r=16 on every linear layer, two layers of SmolLM2-135M's sizes: compiling them is minutes of a processor, all of it
in the lap that is not timed. "eager" is veneer without torch.compile. In `compiled-switch` four adapters take turns, a
lap is one turn through all four; what a switch makes a package compile anew in every lap is part of its time. On a CPU
torch compiles to C++, which needs a compiler: without one the cases are left out, and say so.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

from common import SMOLLM2, Case, Lap, device, package

OPTIONS = {"batch": 2, "seq": 256, "r": 16, "layers": 2, "adapters": 1}


def no_compiler() -> str | None:
    """What is missing to compile here."""
    if device() == "cuda" or any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        return None
    return "torch.compile needs a C++ compiler on a CPU, and none is found (on Debian: apt-get install g++)"


def build(who: str, o: dict[str, Any]) -> Lap:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    pkg, names = package("peft" if who == "peft" else "veneer"), [f"a{i}" for i in range(o["adapters"])]
    torch.manual_seed(0)  # importing a package may draw
    base = LlamaForCausalLM(LlamaConfig(**{**SMOLLM2, "num_hidden_layers": o["layers"]})).to(device()).train()
    config = lambda: pkg.LoraConfig(task_type="CAUSAL_LM", r=o["r"], target_modules="all-linear")
    model: Any = pkg.get_peft_model(base, config(), names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    generator = torch.Generator().manual_seed(1)
    for _, p in sorted((n, p) for n, p in model.named_parameters() if "lora_" in n):
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    optimizers = {}
    for name in names:
        model.set_adapter(name)
        optimizers[name] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.set_adapter(names[0])
    ids = torch.randint(0, SMOLLM2["vocab_size"], (o["batch"], o["seq"]), generator=generator).to(device())
    call = model if who == "eager" else torch.compile(model, fullgraph=who == "veneer")

    def run(_: Any) -> float:
        total = 0.0
        for name in names:
            if len(names) > 1:
                model.set_adapter(name)
            loss = call(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            total += loss.item()
        return total

    return Lap(run)


def case(about: str, **options: Any) -> Case:
    return Case(
        about=about,
        build=build,
        contestants=("eager", "peft", "veneer"),
        targets={("veneer", "peft"): 1.0, ("veneer", "eager"): None, ("peft", "eager"): None},
        agree=("eager", "peft", "veneer"),
        options={**OPTIONS, **options},
        rounds=3,
        needs=no_compiler,
    )


CASES = {
    "compiled": case("compiled LoRA step, 2 x 256, 2 layers, float32"),
    "compiled-switch": case("compiled LoRA steps on 4 adapters in turn, 1 x 256, 2 layers", batch=1, adapters=4),
}
