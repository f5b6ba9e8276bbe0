"""A resized vocabulary travels with an adapter, in files that both libraries read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import veneer
from veneer.vocabulary import own_size

IDS = torch.tensor([[1, 21, 3]])
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "beside": ("LoraConfig", {"target_modules": ["q_proj"]}, "embed_tokens.weight"),
    "adapted": ("LoraConfig", {"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.base_layer.weight"),
    "rows": (
        "LoraConfig",
        {"target_modules": ["q_proj"], "trainable_token_indices": [0, 1]},
        "embed_tokens.token_adapter.base_layer.weight",
    ),
    "rows alone": ("TrainableTokensConfig", {"token_indices": [0, 1]}, "embed_tokens.base_layer.weight"),
    "head whole": ("LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "embed_tokens.weight"),
}


def base_in(folder: Path) -> Path:
    """A folder with a base's config."""
    LlamaConfig(vocab_size=20, **SIZES).save_pretrained(folder)
    return folder


def grown(folder: Path, seed: int, tied: bool = False) -> Any:
    """The base with two rows more, the embedding's drawn from a seed."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=tied, **SIZES))
    model.name_or_path = model.config._name_or_path = str(folder)
    model.resize_token_embeddings(22, mean_resizing=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        model.get_input_embeddings().weight[20:] = torch.randn(2, 16)
        if not tied:
            model.get_output_embeddings().weight[20:] = 0.1
    return model


PAIRS = {"by veneer": (veneer, veneer), "for peft": (veneer, peft), "by peft": (peft, veneer)}
CASES = [(k, p, False) for k in KINDS for p in PAIRS] + [(k, p, True) for k in ("adapted", "rows") for p in PAIRS]


@pytest.mark.parametrize(("kind", "pair", "tied"), CASES)
def test_resized_embeddings_travel(kind: str, pair: str, tied: bool, tmp_path: Path) -> None:
    (name, options, key), (writer, reader), base = KINDS[kind], PAIRS[pair], base_in(tmp_path / "base")
    model = writer.get_peft_model(grown(base, 1, tied), getattr(writer, name)(task_type="CAUSAL_LM", **options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3)
    model.save_pretrained(tmp_path / "adapter")
    assert f"base_model.model.model.{key}" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    again = reader.PeftModel.from_pretrained(grown(base, 2, tied), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)


def test_the_bases_size_is_read_where_the_hub_keeps_its_files(tmp_path: Path, monkeypatch: Any) -> None:
    repo = tmp_path / "models--org--base"
    base_in(repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert own_size("org/base", None) == 20
    assert own_size("org/other", None) is None
    assert own_size(str(repo / "snapshots" / "abc"), None) == 20
    assert own_size("a base of one's own", None) is None


def test_an_auto_class_asks_for_the_tokenizer_of_the_same_revision(tmp_path: Path, monkeypatch: Any) -> None:
    base, repo = base_in(tmp_path / "base"), tmp_path / "hub" / "models--org--adapter"
    config = veneer.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    folder = repo / "snapshots" / "abc"
    veneer.get_peft_model(grown(base, 1), config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "mine").write_text("abc")
    small = LlamaForCausalLM(LlamaConfig(vocab_size=20, **SIZES))
    asked: list[Any] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: small)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **options: asked.append((a, options)) or range(22))
    where = {"revision": "mine", "cache_dir": str(tmp_path / "hub")}
    model = veneer.AutoPeftModelForCausalLM.from_pretrained("org/adapter", **where)
    assert asked == [((str(folder),), {})]
    assert model.get_input_embeddings().weight.shape[0] == 22
