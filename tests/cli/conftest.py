"""Tiny models and data for the command line: random weights, a tokenizer of a few dozen words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
WORDS = "please send me two three four red green blue apples pears plums to the shop of Ada Bob Eve in Paris Rome"
CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def _tokenizer(folder: Path, special: dict[str, str], chat_template: str | None) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(special.values()), initial_alphabet=alphabet)
    raw.train_from_iterator([WORDS, '{"items": 3, "colour": "red"} user assistant system'], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama (hidden size 32) and a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_lm")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    size = _tokenizer(folder, special, CHAT_TEMPLATE)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer BERT (hidden size 32) without a head."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny_encoder")
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    size = _tokenizer(folder, special, None)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve conversations with JSON answers; one prompt holds markup, which no page may take for its own."""
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    rows = []
    for i in range(12):
        colour, count = ("red", "green", "blue")[i % 3], ("two", "three", "four")[i % 4 % 3]
        prompt = f"please send {count} {colour} apples" + (" <script>alert(1)</script>" if i == 0 else "")
        answer = json.dumps({"items": count, "colour": colour})
        rows.append({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def conll_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight tagged sentences."""
    path = tmp_path_factory.mktemp("data") / "tags.conll"
    names = [("Ada", "Paris"), ("Bob", "Rome")] * 4
    text = "".join(f"send O\n{who} B-PER\nto O\n{place} B-LOC\n\n" for who, place in names)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def veneer_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m veneer` in a process of its own."""

    def run(*words: object, stdin: str = "", cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        env = {
            **os.environ,
            "PYTHONPATH": str(SRC),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "120",
        }
        command = [sys.executable, "-m", "veneer", *map(str, words)]
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=env, cwd=cwd, timeout=120, check=False
        )

    return run
