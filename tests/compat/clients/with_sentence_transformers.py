"""sentence-transformers' adapter methods under the name peft."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from sentence_transformers import SentenceTransformer, models
from small import bert, tokenizer
from transformers import BertModel

assert "veneer" in peft.__file__, peft.__file__
TEXTS = ["the cat sat", "a dog ran on the rug"]


def made(folder: Path) -> Any:
    bert(BertModel).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    body = models.Transformer(str(folder))
    return SentenceTransformer(modules=[body, models.Pooling(body.get_word_embedding_dimension())], device="cpu")


def encoded(model: Any) -> torch.Tensor:
    return model.encode(TEXTS, convert_to_tensor=True)


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    model = made(folder / "base")
    base = encoded(model)
    model.add_adapter(peft.LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["query", "value"], r=2))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.normal_(std=0.5)
    assert model.active_adapters() == ["default"]
    adapted = encoded(model)
    assert not torch.allclose(adapted, base)
    model.disable_adapters()
    torch.testing.assert_close(encoded(model), base)
    model.enable_adapters()
    torch.testing.assert_close(encoded(model), adapted)
    model.save_pretrained(str(folder / "out"))
    weights = list((folder / "out").rglob("adapter_model.safetensors"))
    assert weights, "no adapter was saved"
    back = made(folder / "base")
    back.load_adapter(str(weights[0].parent))
    torch.testing.assert_close(encoded(back), adapted)
    model.delete_adapter("default")
    torch.testing.assert_close(encoded(model), base)
