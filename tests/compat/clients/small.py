"""Models and tokenizers small enough to train in a second, made without a download."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, LlamaConfig, PreTrainedTokenizerFast

WORDS = [
    "the",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "rug",
    "good",
    "bad",
    "big",
    "red",
    "is",
    "was",
    "a",
    "one",
    "two",
    "user",
    "assistant",
    "yes",
    "no",
    "hello",
]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY = len(SPECIAL) + len(WORDS)
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"


def tokenizer() -> Any:
    """Whole words, with a beginning and an end."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, model_max_length=32, **names)


def llama(cls: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    return cls(LlamaConfig(vocab_size=VOCABULARY, **SIZES, **ids, **options))


def bert(cls: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return cls(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0, **SIZES, **options))
