"""Tiny tokenizers and rows that several training tests build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from veneer.train import Recipe, load_recipe
from veneer.train.data import load_tables
from veneer.train.tasks import Plan, task_of

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def bpe_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE over a few words; no BOS unless ``special`` names one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    text = ["user assistant system one two three four colour red green blue answer question"] * 3
    tokenizer.train_from_iterator(text, trainer)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"} | special
    out = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    out.chat_template = CHATML
    return out


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that writes a BOS before every text by itself."""
    out = bpe_tokenizer(bos_token="<|im_start|>")
    out.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    return out


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def recipe_for(task: str, path: Path, base: Path, **more: Any) -> Recipe:
    """A recipe that trains and tests a small LoRA on the rows of one file; ``more`` replaces whole sections."""
    given: dict[str, Any] = {
        "task": task,
        "base": str(base),
        "data": {"train": str(path), "test": str(path)},
        "adapter": {"r": 8, "target_modules": "all-linear"},
        "out": str(path.parent / "out"),
    }
    return load_recipe(None, **{**given, **more})


def plan_of(recipe: Recipe) -> Plan:
    """What the recipe's task makes of its rows."""
    train, test = load_tables(recipe.data, recipe.task, recipe.seed)
    base = recipe.base.name
    tokenizer, config = AutoTokenizer.from_pretrained(base), AutoConfig.from_pretrained(base)
    return task_of(recipe).plan(recipe, train, test, tokenizer, config)
