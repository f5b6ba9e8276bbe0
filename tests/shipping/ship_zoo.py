"""Tiny models, tokenizers and adapters for the tests of what comes after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from veneer import get_peft_model

WORDS = "please send me two three four red green blue apples pears plums to the shop of Ada Bob Eve in Paris Rome"
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(special.values()), initial_alphabet=alphabet)
    raw.train_from_iterator([WORDS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_llama(folder: Path, tied: bool = False, width: int = 32, **more: Any) -> Path:
    folder.mkdir(parents=True)
    size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=48 if width == 32 else 2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2 if width == 32 else 4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder, **more)
    return folder


def randomised(model: Any, seed: int, size: float = 0.1) -> Any:
    """The model with noise on every trained tensor."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=generator) * size)
    return model


def save_adapter(base: Path, config: Any, folder: Path, seed: int = 1) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    randomised(get_peft_model(model, config), seed).save_pretrained(str(folder))
    return folder


def probe(rows: int = 2, length: int = 9, vocabulary: int = 200) -> torch.Tensor:
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(7))
