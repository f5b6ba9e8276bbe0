"""Whole runs on tiny models: the loss falls, the scores rise, and the files read back."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_train import chat, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from veneer.train import Recipe, load_recipe, run
from veneer.train.bases import load_base, resolve_base

Flags = dict[str, Any]


def test_causal_lm_end_to_end(causal: Callable[..., Recipe], llama: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    result = run(causal(merge=True, train__num_train_epochs=45), console=console)
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < 0.2 * losses[0]
    assert result.after["loss"] < 0.2 * result.before["loss"]
    assert (result.before["exact_match"], result.after["exact_match"]) == (0.0, 1.0)
    assert result.after["field_accuracy"] == 1.0
    assert {"step", "loss", "learning_rate", "tokens_per_second", "peak_memory_mb", "eta"} <= set(result.history[0])
    assert result.history[-1]["eta"] == 0.0
    assert all(row["tokens_per_second"] > 0 and row["peak_memory_mb"] > 0 for row in result.history)
    sample = result.samples[0]
    assert (sample.prompt, sample.expected, sample.tuned) == (
        "colour 0",
        '{"colour": "red"}',
        '{"colour": "red"}',
    )
    assert (len(result.samples), sample.base_ok, sample.tuned_ok) == (8, False, True)
    rows = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(llama)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert result.train_tokens == 45 * tokens
    assert "Padding with <|endoftext|>" in console.file.getvalue()  # type: ignore[attr-defined]
    check_files(result, llama)


def check_files(result: Any, llama: Path) -> None:
    """The folder reads back: adapter and merged model agree, logs and recipe are what the run was."""
    from veneer import PeftModel

    out = Path(result.out)
    assert {path.name for path in out.iterdir()} == {
        "adapter",
        "merged",
        "log.jsonl",
        "recipe.yaml",
        "result.json",
    }
    assert [path for path in out.parent.iterdir() if path.name.startswith(".out")] == []
    base = AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.arange(3, 40)[None]
    plain = base(ids).logits
    tuned = PeftModel.from_pretrained(base, str(out / "adapter"))(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")(ids).logits
    torch.testing.assert_close(merged, tuned, rtol=1e-4, atol=1e-4)
    assert (tuned - plain).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(out / "adapter").pad_token == "<|endoftext|>"
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == (str(llama), "CAUSAL_LM")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert log == result.history
    plain_result = json.loads((out / "result.json").read_text())
    assert plain_result["after"] == result.after
    assert plain_result["recipe"]["adapter"]["r"] == 8
    again = load_recipe(out / "recipe.yaml", out="elsewhere")
    assert again.model_dump(exclude={"out"}) == result.recipe.model_dump(exclude={"out"})


def test_same_seed_same_adapter(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    short = {"max_steps": 4, "use_cpu": True}
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        result = run(causal(out=str(tmp_path / name), seed=seed, train=short, data__test=None))
        found.append(load_file(Path(result.adapter_dir) / "adapter_model.safetensors"))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert not all(torch.equal(found[0][key], found[2][key]) for key in found[0])


def test_no_test_rows_no_scores(causal: Callable[..., Recipe], chats: Path) -> None:
    result = run(causal(data={"train": str(chats)}, train={"max_steps": 1, "use_cpu": True}))
    assert (result.before, result.after, result.samples) == ({}, {}, [])
    assert any("No test rows" in note for note in result.notes)


def test_plain_text_is_scored_by_its_loss(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": "red green blue red green blue"}] * 8)
    train = {"learning_rate": 0.03, "num_train_epochs": 12, "use_cpu": True}
    result = run(causal(data={"train": str(path), "test": str(path)}, train=train))
    assert set(result.after) == {"loss", "perplexity"}
    assert result.after["loss"] < 0.5 * result.before["loss"]


def test_token_cls_end_to_end(conll: Path, bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    recipe = load_recipe(
        None,
        task="token-cls",
        base=str(bert),
        data={"train": str(conll), "test": str(conll)},
        adapter={"r": 8, "target_modules": "all-linear"},
        train={
            "learning_rate": 0.02,
            "num_train_epochs": 20,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
        },
        out=str(tmp_path / "ner"),
        merge=True,
    )
    result = run(recipe)
    losses = [row["loss"] for row in result.history]
    assert sum(losses[-3:]) < 0.2 * sum(losses[:3])
    assert result.after["f1"] == 1.0 > result.before["f1"]
    sample = result.samples[0]
    assert (sample.prompt, sample.tuned, sample.tuned_ok) == (
        "anna in paris .",
        "per: anna; loc: paris",
        True,
    )
    saved = load_file(Path(result.adapter_dir) / "adapter_model.safetensors")
    assert any("classifier" in name and "lora" not in name for name in saved)
    assert json.loads((Path(result.adapter_dir) / "labels.json").read_text()) == ["O", "B-loc", "B-per"]
    merged, tokenizer = load_base(resolve_base(str(result.merged_dir)), "token-cls")
    assert merged.fresh_modules == []
    assert merged.config.id2label == {0: "O", 1: "B-loc", 2: "B-per"}
    ids = tokenizer([["anna", "in", "paris"]], is_split_into_words=True, return_tensors="pt")["input_ids"]
    found = merged.eval()(ids).logits.argmax(-1)[0].tolist()
    assert [merged.config.id2label[found[place]] for place in (1, 3, 4)] == ["B-per", "O", "B-loc"]


def test_prompt_tuning_trains_too(causal: Callable[..., Recipe]) -> None:
    adapter = {"method": "prompt_tuning", "num_virtual_tokens": 4}
    train = {"max_steps": 10, "learning_rate": 0.3, "logging_steps": 1, "use_cpu": True}
    result = run(causal(adapter=adapter, train=train))
    assert result.after["loss"] < result.before["loss"]


def test_chat_without_generation(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "few.jsonl", [chat("one", "red")] * 4)
    data = {"train": str(path), "test": str(path)}
    result = run(causal(data=data, eval__generate=False, train={"max_steps": 1, "use_cpu": True}))
    assert set(result.after) == {"loss", "perplexity"}


@pytest.mark.slow
def test_wnut17_with_minilm(wnut17: Path, tmp_path: Path) -> None:
    """LoRA on MiniLM with 600 sentences of WNUT-17 finds entities that the new head does not."""
    text = (wnut17 / "train.conll").read_text(encoding="utf-8").replace("\n\t\n", "\n\n")
    sentences = [part for part in text.split("\n\n") if "\tB-" in part]
    part = tmp_path / "train.conll"
    part.write_text("\n\n".join(sentences[:600]), encoding="utf-8")
    recipe = load_recipe(
        None,
        task="token-cls",
        base="minilm-l6",
        data={"train": str(part), "test": str(wnut17 / "dev.conll"), "max_length": 128},
        adapter={"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        train={"learning_rate": 1e-3, "num_train_epochs": 8, "per_device_train_batch_size": 16},
        eval={"limit": 200},
        out=str(tmp_path / "wnut"),
    )
    result = run(recipe)
    assert result.before["f1"] < 0.05
    assert result.after["f1"] > 0.3
