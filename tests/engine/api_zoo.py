"""Tiny transformers models, LoRA on them, and random adapter values; the same bits on every call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import veneer

SMALL = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    options = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 49, **changes}
    return LlamaForCausalLM(LlamaConfig(**options)).eval()


def bert(head: type[PreTrainedModel] = BertForTokenClassification, num_labels: int = 3) -> PreTrainedModel:
    torch.manual_seed(0)
    return head(BertConfig(**SMALL, num_labels=num_labels)).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)).eval()


def t5() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def tokens(rows: int = 3, length: int = 7) -> Tensor:
    return torch.randint(1, 49, (rows, length), generator=torch.Generator().manual_seed(5))


def lora(**changes: Any) -> veneer.LoraConfig:
    return veneer.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **changes})


def moved(model: Any, seed: int = 1, scale: float = 0.2) -> Any:
    """Every trainable tensor away from its initial value; the model itself."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p) * scale)
    return model.eval()


def adapted(*names: str, **changes: Any) -> veneer.PeftModel:
    """A Llama with adapters of these names (of rank 4, 5, ...), each with other values."""
    model = veneer.get_peft_model(llama(), lora(task_type="CAUSAL_LM", **changes), adapter_name=names[0])
    for i, name in enumerate(names[1:], 1):
        model.add_adapter(name, lora(task_type="CAUSAL_LM", **{"r": 4 + i, **changes}))
    for i, name in enumerate(names):
        model.set_adapter(name)
        moved(model, seed=i + 1)
    model.set_adapter(names[0])
    return model


def logits(model: Any, x: Tensor | None = None, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens() if x is None else x, **kwargs).logits


def saved(folder: Path, **changes: Any) -> tuple[Path, Tensor]:
    """A folder with an adapter of the plain Llama, and the logits it gives."""
    model = adapted("default", **changes)
    model.save_pretrained(folder)
    return folder, logits(model)
