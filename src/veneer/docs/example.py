"""The working example of a method's page: a program that makes, trains, saves and merges or loads an adapter."""

from __future__ import annotations

from pathlib import Path

from .facts import Facts, settings
from .layers import SIZES

PROGRAM = """import torch
from transformers import LlamaConfig, LlamaForCausalLM

from veneer import {names}

base = LlamaForCausalLM(
    LlamaConfig({sizes}, num_attention_heads=4)
)
config = {config}(task_type="CAUSAL_LM"{options})
model = get_peft_model(base, config)
model.print_trainable_parameters()

ids = torch.randint(1, {vocabulary}, (4, 16))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
for _ in range(3):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained("adapter")
{after}
"""
MERGE = """
merged = model.merge_and_unload()  # a plain LlamaForCausalLM
merged.save_pretrained("merged")"""
USE = """
model.eval()
logits = model(input_ids=ids).logits"""


def example(facts: Facts) -> str:
    """A program of about 25 lines that runs in a second, in an empty folder: the method's file in programs/, or one
    from its settings."""
    own = Path(__file__).parent / "programs" / f"{facts.name.lower()}.py"
    if own.exists():
        return own.read_text(encoding="utf-8")
    options = "".join(f", {k}={_literal(v)}" for k, v in settings(facts.method).items())
    merges = bool(facts.merges)
    return PROGRAM.format(
        names=", ".join(sorted([facts.config.__name__, "get_peft_model"])),
        sizes=", ".join(f"{k}={v}" for k, v in SIZES.items()),
        config=facts.config.__name__,
        options=options,
        vocabulary=SIZES["vocab_size"],
        after=MERGE if merges else USE,
    ).rstrip() + "\n"  # fmt: skip


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value).replace("'", '"')
