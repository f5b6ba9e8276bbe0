"""Decoding one token at a time, 16 rows with 16 LoRA adapters (r=16, every linear layer, SmolLM2-135M shape)."""

from __future__ import annotations

from typing import Any

from common import SMOLLM2, Case, Lap, device, package

ROWS, TOKENS = 16, 4


def build(who: str, o: dict[str, Any]) -> Lap:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SMOLLM2))
    ids = torch.randint(0, SMOLLM2["vocab_size"], (ROWS, 32), device=device())
    names = [f"a{i}" for i in range(ROWS)]
    more: dict[str, Any] = {}
    if who != "base":
        pkg = package(who)
        config = lambda: pkg.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
        model = pkg.get_peft_model(model, config(), names[0])
        for name in names[1:]:
            model.add_adapter(name, config())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, p in sorted((n, p) for n, p in model.named_parameters() if "lora_" in n):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        more = {"adapter_names": names}
    model = model.to(device()).eval()

    def prepare() -> Any:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=True, **more)

    def run(out: Any) -> float:
        past, total = out.past_key_values, 0.0
        with torch.no_grad():
            for i in range(TOKENS):
                out = model(input_ids=ids[:, i : i + 1], past_key_values=past, use_cache=True, **more)
                total += out.logits.abs().mean().item()
        return total

    return Lap(run, prepare)


CASES = {
    "decode": Case(
        about="decoding, a batch of 16 rows with 16 different LoRA adapters",
        build=build,
        contestants=("base", "peft", "veneer"),
        targets={("veneer", "base"): 1.4, ("veneer", "peft"): 0.3, ("peft", "base"): None},
        agree=("peft", "veneer"),
    )
}
