"""An adapter knows the base it was trained on, and says when it is loaded on another."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from ship_zoo import save_adapter, save_llama
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertForMaskedLM
from typer.testing import CliRunner

from veneer import LoraConfig, PeftModel, PeftWarning, PromptTuningConfig, get_peft_model
from veneer.base_mark import compare, mark_of, read_mark
from veneer.cli.app import app

LORA: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "r": 4, "task_type": "CAUSAL_LM"}
FILE = "adapter_model.safetensors"


def loading(base: Any, folder: Path, **more: Any) -> list[str]:
    """What loading warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(base, str(folder), **more)
    return [str(w.message) for w in caught if issubclass(w.category, PeftWarning)]


def model(llama: Path, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama, **more)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA),
        LoraConfig(**{**LORA, "target_modules": "all-linear"}),
        LoraConfig(**LORA, init_lora_weights="pissa"),
        LoraConfig(**LORA, modules_to_save=["lm_head", "embed_tokens"]),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
    ids=["lora", "everywhere", "rewrites", "whole", "prompt"],
)
def test_the_same_base_in_any_dtype_is_quiet(config: Any, llama: Path, make_adapter: Any) -> None:
    folder = make_adapter(config)
    mark = read_mark(folder / FILE)
    assert mark is not None
    assert mark["name"] == str(llama)
    assert 5 <= len(mark["weights"]) <= 16
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert loading(model(llama, dtype=dtype), folder) == []
    settings = model(llama).config
    with torch.device("meta"):
        hollow = AutoModelForCausalLM.from_config(settings)
    assert compare(mark, hollow) == []  # nothing can be read, and nothing is said


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.model.layers[1].self_attn.q_proj.weight.data.mul_(1.5),
        lambda m: [p.data.add_(torch.randn_like(p) * 0.02) for p in m.parameters()],
    ],
    ids=["a layer", "tuned"],
)
def test_another_base_is_named(change: Callable[[Any], None], llama: Path, make_adapter: Any) -> None:
    folder = make_adapter(LoraConfig(**LORA, init_lora_weights=True))
    other = model(llama)
    torch.manual_seed(0)
    change(other)
    marked = compare(read_mark(folder / FILE) or {}, other)
    assert marked
    assert all("has other values" in line for line in marked)
    (said,) = loading(other, folder)
    assert f"trained on another base ({llama})" in said
    assert f"{len(marked)} of " in said


def test_another_shape_and_another_depth(llama: Path, tmp_path: Path, make_adapter: Any) -> None:
    folder = make_adapter(LoraConfig(**LORA))
    mark = read_mark(folder / FILE)
    assert mark is not None
    wide = model(save_llama(tmp_path / "wide", width=64))
    assert any("was [" in line for line in compare(mark, wide))
    short = model(llama)
    del short.model.layers[1]
    assert any("is not there" in line for line in compare(mark, short))


def test_more_tokens_and_other_adapters_are_no_other_base(llama: Path, make_adapter: Any) -> None:
    folder = make_adapter(LoraConfig(**LORA))
    grown = model(llama)
    grown.resize_token_embeddings(350)
    assert loading(grown, folder) == []
    both = get_peft_model(
        model(llama), LoraConfig(**{**LORA, "target_modules": ["k_proj"]}, modules_to_save=["lm_head"])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        both.load_adapter(str(folder), "other")


def test_what_the_files_lack_is_no_part_of_the_mark(tmp_path: Path) -> None:
    """A pooler that is drawn anew each time, in marks of today and in those that hold it."""
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    base = AutoModel.from_pretrained(tmp_path / "bert")
    adapted = get_peft_model(base, LoraConfig(target_modules=["query"], r=2))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    mark = read_mark(tmp_path / "adapter" / FILE)
    assert mark is not None
    assert not [path for path in mark["weights"] if "pooler" in path]
    other = AutoModel.from_pretrained(tmp_path / "bert")
    assert not torch.equal(other.pooler.dense.weight, base.pooler.dense.weight)
    old = {**mark, "weights": {**mark["weights"], "pooler.dense.weight": {"shape": [16, 16], "values": [9.0] * 8}}}
    assert compare(old, other) == []
    assert loading(other, tmp_path / "adapter") == []
    other.encoder.layer[0].output.dense.weight.data.mul_(2)
    assert compare(mark, other) == ["encoder.layer.0.output.dense.weight has other values"]


def test_peft_reads_the_file_and_files_without_a_mark_load(llama: Path, tmp_path: Path, make_adapter: Any) -> None:
    folder = make_adapter(LoraConfig(**LORA))
    peft.PeftModel.from_pretrained(model(llama), str(folder))
    peft.get_peft_model(model(llama), peft.LoraConfig(**LORA)).save_pretrained(str(tmp_path / "theirs"))
    assert read_mark(tmp_path / "theirs" / FILE) is None
    assert loading(model(llama), tmp_path / "theirs") == []


def test_the_cards_say_where_it_comes_from(llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "send", "completion": "two apples"}\n' * 4)
    words = [
        "train",
        "--task",
        "causal-lm",
        "--base",
        llama,
        "--data",
        rows,
        "--out",
        tmp_path / "run",
        "--max-steps",
        1,
    ]
    done = CliRunner().invoke(app, [*map(str, words), "--r", "2"])
    assert done.exit_code == 0, done.output
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    mark = mark_of(model(llama).requires_grad_(False))
    assert mark is not None
    assert mark["hash"] in card
    assert hashlib.sha256(rows.read_bytes()).hexdigest() in card
    plain = save_adapter(llama, LoraConfig(**LORA), tmp_path / "plain")
    held = read_mark(plain / FILE)
    assert held == json.loads(json.dumps(mark))
    assert f"fingerprint `{mark['hash']}`" in (plain / "README.md").read_text()
