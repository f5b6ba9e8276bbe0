"""TRL's SFTTrainer, DPOTrainer and RewardTrainer, given a peft_config, under the name peft."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from small import llama, tokenizer
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

assert "veneer" in peft.__file__, peft.__file__
COMMON: dict[str, Any] = {"per_device_train_batch_size": 2, "max_steps": 3, "report_to": [], "use_cpu": True}
COMMON |= {"learning_rate": 0.05, "disable_tqdm": True, "save_strategy": "no", "bf16": False, "max_length": 24}
PAIRS = [{"prompt": "the cat", "chosen": " sat on the mat", "rejected": " ran on a rug"}] * 8


def lora(task: str) -> Any:
    return peft.LoraConfig(task_type=task, target_modules=["q_proj", "v_proj"], r=2)


def check(trainer: Any, folder: Path, base: Any) -> None:
    """It trained the adapter and nothing else, and what it saves gives the same output."""
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_" in n or "score" in n for n in changed), changed
    trainer.save_model(str(folder))
    ids = torch.tensor([[2, 4, 5, 7]])
    back = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    torch.testing.assert_close(back(ids).logits, trainer.model.eval()(ids).logits)


def sft(folder: Path) -> None:
    data = Dataset.from_list([{"text": "the cat sat on the mat"}, {"text": "a dog ran on the rug"}] * 4)
    args = SFTConfig(str(folder / "sft"), **COMMON)
    made = llama(LlamaForCausalLM)
    trainer = SFTTrainer(made, args, train_dataset=data, processing_class=tokenizer(), peft_config=lora("CAUSAL_LM"))
    check(trainer, folder / "sft-out", llama(LlamaForCausalLM))


def dpo(folder: Path) -> None:
    args = DPOConfig(str(folder / "dpo"), **COMMON)
    trainer = DPOTrainer(
        llama(LlamaForCausalLM),
        args=args,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer(),
        peft_config=lora("CAUSAL_LM"),
    )
    check(trainer, folder / "dpo-out", llama(LlamaForCausalLM))


def reward(folder: Path) -> None:
    args = RewardConfig(str(folder / "reward"), **COMMON)
    trainer = RewardTrainer(
        llama(LlamaForSequenceClassification, num_labels=1),
        args=args,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer(),
        peft_config=lora("SEQ_CLS"),
    )
    check(trainer, folder / "reward-out", llama(LlamaForSequenceClassification, num_labels=1))


with tempfile.TemporaryDirectory() as made_folder:
    for run in (sft, dpo, reward):
        if len(sys.argv) < 2 or run.__name__ in sys.argv[1:]:
            run(Path(made_folder))
            print(run.__name__, "ran")
