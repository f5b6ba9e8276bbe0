"""Train a model's blocks one after another: each block's LoRA A starts as the trained A of the block before.

    python examples/handoff.py

Runs in seconds on a CPU: a small Llama, made on the spot, learns to count.
"""

from __future__ import annotations

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from veneer import LayerwiseHandoff, LoraConfig, get_peft_model, matrices

BLOCKS, STEPS_PER_STAGE = 4, 25


class Counting(Dataset):
    """Rows of numbers that count up from anywhere, modulo 32."""

    def __len__(self) -> int:
        return 256

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(12) + i) % 32
        return {"input_ids": ids, "labels": ids}


def main() -> list[float]:
    """Train; returns the loss every ten steps."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            num_key_value_heads=4,
            initializer_range=0.2,  # random weights that say something: the head is frozen
        )
    )
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj", "o_proj", "down_proj"], r=4, lora_alpha=16)
    model = get_peft_model(base, config)
    handoff = LayerwiseHandoff(model, steps_per_stage=STEPS_PER_STAGE)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=BLOCKS * STEPS_PER_STAGE,
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=args, train_dataset=Counting(), callbacks=[handoff])
        trainer.train()

    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    print("\nloss  " + "  ".join(f"{loss:.2f}" for loss in losses))
    print("\nhanded on:")
    for source, target in handoff.stages.handed:
        print(f"  {source} -> {target}")
    print("\nwhat each layer learned:")
    for name, m in matrices(model).items():
        print(f"  {name:32s} norm {m.norm():6.3f}   effective rank {m.effective_rank():.2f}")
    return losses


if __name__ == "__main__":
    main()
