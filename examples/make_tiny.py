"""Make a small model on the spot, for the tutorials that need a kind of which none is bundled.

    python examples/make_tiny.py bert models/tiny-bert examples/data/general.txt examples/data/workshop_train.txt
    python examples/make_tiny.py t5 models/tiny-t5 examples/data/phrases_train.jsonl

bert learns to fill masks in the first file, t5 to repeat what it reads there; further files only add words. That
takes seconds on a CPU. A real run names a real model.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

STEPS, BATCH = 120, 32
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def texts_of(path: Path) -> list[str]:
    """The lines of a text file, or every text of a JSONL file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [text for line in lines for text in json.loads(line).values()] if path.suffix == ".jsonl" else lines


def make_tokenizer(words: set[str], kind: str) -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *sorted(words)])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    form = "[CLS] $A [SEP]" if kind == "bert" else "$A [SEP]"
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]") if name in form]
    raw.post_processor = processors.TemplateProcessing(single=form, special_tokens=ends)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"} if kind == "bert" else {"eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **special)


def make_model(kind: str, size: int) -> Any:
    """Two layers of width 64."""
    if kind == "bert":
        return BertForMaskedLM(
            BertConfig(
                vocab_size=size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
                max_position_embeddings=64,
            )
        )  # fmt: skip
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=size, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=3,
            decoder_start_token_id=0, dropout_rate=0.0,
        )
    )  # fmt: skip


def pretrain(model: Any, kind: str, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Train all of it; the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw, loss = random.Random(0), torch.tensor(0.0)
    for _ in range(STEPS):
        batch = tokenizer(draw.sample(texts, BATCH), padding=True, return_tensors="pt", return_token_type_ids=False)
        ids = batch["input_ids"]
        labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
        if kind == "bert":
            hidden = (torch.rand(ids.shape) < 0.2) & (ids >= len(SPECIAL))
            batch["input_ids"] = ids.masked_fill(hidden, tokenizer.mask_token_id)
            labels = ids.masked_fill(~hidden, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def main(kind: str, folder: str, *files: str) -> None:
    torch.manual_seed(0)
    texts = [texts_of(Path(file)) for file in files]
    tokenizer = make_tokenizer({word for part in texts for text in part for word in text.split()}, kind)
    model = make_model(kind, len(tokenizer))
    loss = pretrain(model, kind, tokenizer, texts[0])
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {len(tokenizer)} words, loss {loss:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
