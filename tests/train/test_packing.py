"""Texts cut as one stream, and rows packed side by side without seeing each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_train import chat, plan_of, recipe_for, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from veneer.train import BaseModelError, RecipeError, run
from veneer.train.encode import IGNORE
from veneer.train.packing import check_packing, chunk, pack, place_rows
from veneer.train.tasks import task_of


def recipe_of(path: Path, base: Path, **more: Any) -> Any:
    given: dict[str, Any] = {"data": {"train": str(path), "max_length": 64}, "options": {"packing": "pack"}}
    return recipe_for("causal-lm", path, base, **{**given, **more})


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    rows = [chat("colour " * (1 + i % 4), "red green " * (1 + i % 3)) for i in range(11)]
    return write_jsonl(tmp_path / "mixed.jsonl", rows)


def test_groups_hold_every_row_once_and_fill_up() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 50, (500,), generator=generator).tolist()
    groups = place_rows(lengths, 64)
    assert sorted(row for group in groups for row in group) == list(range(500))
    assert all(sum(lengths[row] for row in group) <= 64 for group in groups)
    assert sum(lengths) / (64 * len(groups)) > 0.97
    assert place_rows([64, 64, 1], 64) == [[0], [1], [2]]


def test_chunks_learn_every_token_once() -> None:
    rows = [([10, 11, 12], []), ([20, 21], []), ([30, 31, 32, 33], [])]
    for limit in (2, 3, 4, 5, 9, 30):
        pieces = chunk(rows, limit)
        assert all(2 <= len(ids) <= limit for ids, _ in pieces)
        assert [label for _, labels in pieces for label in labels if label != IGNORE] == [
            11,
            12,
            20,
            21,
            30,
            31,
            32,
            33,
        ]
        assert all(labels[1:] == ids[1:] for ids, labels in pieces)


def test_positions_begin_anew_and_no_first_token_is_learned() -> None:
    columns = pack([([5, 6, 7], [5, 6, 7]), ([8, 9], [IGNORE, 9])], 8)
    assert columns == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "labels": [[IGNORE, 6, 7, IGNORE, 9]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "length": [5],
    }


def small(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128))
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, **sliding,
    ))  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_rows_do_not_see_each_other(kind: str, attention: str, mixed: Path, llama: Path) -> None:
    """Loss and gradient of packed rows are those of each row alone, padding and all."""
    recipe = recipe_of(mixed, llama)
    plan, task = plan_of(recipe), task_of(recipe)
    alone = plan_of(recipe_of(mixed, llama, options={}))
    assert len(plan.train) < len(alone.train) == 11
    model = AutoModelForCausalLM.from_pretrained(llama) if kind == "llama" else small(kind)
    model.set_attn_implementation(attention)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    collate = task.collator(AutoTokenizer.from_pretrained(llama))
    items = sum((task.items(collate([row])) != IGNORE).sum() for row in alone.train.to_list())
    losses, grads = [], []
    for rows in ([plan.train.to_list()], [[row] for row in alone.train.to_list()]):
        model.zero_grad()
        parts = [task.loss(model, collate(part), items) for part in rows]
        sum(parts).backward()  # type: ignore[union-attr]
        losses.append(sum(parts))
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=2e-6)


def test_a_model_that_mixes_packed_rows_is_refused(llama: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    check_packing(model)
    forward = model.forward
    model.forward = lambda position_ids=None, **more: forward(**more)
    with pytest.raises(BaseModelError, match=r"LlamaForCausalLM lets packed rows see each other.*packing: none"):
        check_packing(model)


def test_a_packed_run_equals_a_padded_one(mixed: Path, llama: Path, tmp_path: Path) -> None:
    """One step over all rows gives the same adapter, base kernels included."""
    found = []
    for packing in ("none", "pack"):
        train = {
            "max_steps": 2, "per_device_train_batch_size": 16, "optim": "sgd", "learning_rate": 0.5,
            "max_grad_norm": 0.0, "use_cpu": True,
        }  # fmt: skip
        out = str(tmp_path / packing)
        result = run(recipe_of(mixed, llama, options={"packing": packing}, train=train, out=out))
        found.append(load_file(Path(result.adapter_dir) / "adapter_model.safetensors"))
        assert any("% full" in note for note in result.notes) == (packing == "pack")
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-5)
    assert any(tensor.abs().max() > 0.01 for name, tensor in found[0].items() if "lora_B" in name)


def test_texts_are_cut_as_one_stream(tmp_path: Path, llama: Path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "red green blue " * n} for n in (1, 40, 2, 7)])
    data = {"train": str(path), "test": str(path), "max_length": 20}
    recipe = recipe_of(path, llama, options={"packing": "chunk"}, data=data)
    plan = plan_of(recipe)
    assert set(plan.train["length"][:-1]) == {20}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = plan.train[0]["input_ids"][:1] + [token for row in plan.train for token in row["input_ids"][1:]]
    assert tokenizer.decode(ids) == "".join("red green blue " * n + "<|im_end|>" for n in (1, 40, 2, 7))
    assert plan.test["input_ids"][:] == plan.train["input_ids"][:]  # no test text is cut either
    assert not any("are cut" in note for note in plan.notes)


def test_what_cannot_be_packed_is_refused(mixed: Path, llama: Path) -> None:
    with pytest.raises(RecipeError, match="`chunk` cuts texts, and the rows have messages"):
        plan_of(recipe_of(mixed, llama, options={"packing": "chunk"}))
    prompt = {"method": "prompt_tuning", "num_virtual_tokens": 2}
    with pytest.raises(RecipeError, match="puts virtual tokens before a row"):
        run(recipe_of(mixed, llama, adapter=prompt, train={"use_cpu": True}))


def test_prompts_can_be_learned_too(mixed: Path, llama: Path) -> None:
    row = plan_of(recipe_of(mixed, llama, options={"packing": "pack", "train_on_prompt": True})).train[0]
    starts = [i for i, place in enumerate(row["position_ids"]) if place == 0]
    for i, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
        assert label == (IGNORE if i in starts else token)
