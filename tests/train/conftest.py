"""Tiny models and tokenizers on disk, and the data files that the training tests read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_train import bpe_tokenizer, chat, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from veneer.train import Recipe, load_recipe


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "veneer-cache"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return bpe_tokenizer()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama and its chat tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=2,
        bos_token_id=None,
        pad_token_id=None,  # a pad token's row of the embedding is zero, here the head's row too
        tie_word_embeddings=True,
        initializer_range=0.3,  # a frozen head of the usual 0.02 could say nothing, however it is tuned
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    bpe_tokenizer().save_pretrained(folder)
    return folder


WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "an",
    "##na",
    "bo",
    "##b",
    "in",
    "par",
    "##is",
    "rome",
    "the",
    ".",
    "[MASK]",
]


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer BERT (no classification head) and a WordPiece tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=64,
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        initializer_range=0.15,  # rows of a frozen base must differ for a head to tell them apart
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    colours = ["red", "green", "blue"]
    rows = [chat(f"colour {i % 3}", json.dumps({"colour": colours[i % 3]})) for i in range(24)]
    return write_jsonl(tmp_path / "chats.jsonl", rows)


CONLL = "anna\tB-per\nin\tO\nparis\tB-loc\n.\tO\n\nbob\tB-per\nin\tO\nrome\tB-loc\n\t\nthe\tO\nrome\tB-loc\n"


@pytest.fixture
def conll(tmp_path: Path) -> Path:
    path = tmp_path / "train.conll"
    path.write_text(CONLL * 1 + "\n" + CONLL, encoding="utf-8")
    return path


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def causal(chats: Path, llama: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(**flags: Any) -> Recipe:
        given: dict[str, Any] = {
            "task": "causal-lm",
            "base": str(llama),
            "data": {"train": str(chats), "test": str(chats)},
            "adapter": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
            "train": {"learning_rate": 0.02, "num_train_epochs": 12, "logging_steps": 3, "use_cpu": True},
            "out": str(tmp_path / "out"),
        }
        return load_recipe(None, **{**given, **flags})

    return make


@pytest.fixture(scope="session")
def wnut17() -> Path:
    """The WNUT-17 folder: `$VENEER_TEST_DATA/wnut17`, or `../shared/data/wnut17` beside the repository."""
    root = os.environ.get("VENEER_TEST_DATA") or str(Path(__file__).parents[3] / "shared" / "data")
    folder = Path(root) / "wnut17"
    if not folder.is_dir():
        pytest.skip(f"no WNUT-17 files in {folder}; set VENEER_TEST_DATA to a folder that holds wnut17/")
    return folder


def _seq2seq_tokenizer(folder: Path) -> int:
    tokenizer = bpe_tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]
    )
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer T5."""
    folder = tmp_path_factory.mktemp("models") / "t5"
    size = _seq2seq_tokenizer(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=size, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer BART."""
    folder = tmp_path_factory.mktemp("models") / "bart"
    size = _seq2seq_tokenizer(folder)
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=size, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        dropout=0.0, init_std=0.2,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(folder)
    return folder
