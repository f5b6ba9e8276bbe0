"""What is wrong with rows is told before training, with the file, the row and the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_train import bpe_tokenizer, chat, recipe_for, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM

from veneer.train import Recipe, run
from veneer.train.errors import DataError
from veneer.train.prepare import prepare

QV = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
GOOD = [{"prompt": f"one {number}", "completion": "red"} for number in range(3)]
CHATS = [chat(f"one {number}", "red") for number in range(3)]


def plan_error(recipe: Recipe, tmp_path: Path) -> str:
    with pytest.raises(DataError) as caught:
        prepare(recipe, tmp_path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"prompt": "", "completion": "red"}, "rows.jsonl:4: 'prompt' is empty"),
        ({"prompt": "one", "completion": None}, "rows.jsonl:4: 'completion' is null"),
        ({"prompt": "one"}, "rows.jsonl:4: no 'completion'; the row has 'prompt'"),
        ({"prompt": "one", "completion": 3}, "rows.jsonl:4: 'completion' is int, expected text"),
        ({"prompt": "one " * 300, "completion": "red"},
         "rows.jsonl:4: nothing to learn is left after cutting to 64 tokens"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_learned(
    causal: Callable[..., Recipe], tmp_path: Path, bad: dict[str, Any], words: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*GOOD, bad])
    assert words in plan_error(causal(data={"train": str(path), "max_length": 64}), tmp_path)


def test_rows_of_formats_without_lines_are_numbered(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*GOOD, {"prompt": "one", "completion": ""}]))
    assert "rows.json: row 4: 'completion' is empty" in plan_error(causal(data={"train": str(path)}), tmp_path)


def model_in(folder: Path, tokenizer: Any, size: int = 400) -> Path:
    config = LlamaConfig(vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, eos_token_id=2, bos_token_id=None, pad_token_id=None)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_chat_template_that_is_missing(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = None
    base = str(model_in(tmp_path / "plain", tokenizer))
    pairs = write_jsonl(tmp_path / "pairs.jsonl", GOOD)
    chats = write_jsonl(tmp_path / "chats.jsonl", CHATS)
    wanted = "chats.jsonl:1: a chat, and the model has no chat template"
    assert wanted in plan_error(causal(base=base, data={"train": [str(pairs), str(chats)]}), tmp_path)
    error = plan_error(causal(base=base, data={"train": str(pairs)}, options={"as_chat": True}), tmp_path)
    assert "pairs.jsonl:1: a chat, and the model has no chat template" in error
    ranked = [
        {"prompt": [turn], "chosen": [reply], "rejected": [{**reply, "content": "no"}]}
        for turn, reply in [CHATS[0]["messages"]]
    ]
    path = write_jsonl(tmp_path / "ranked.jsonl", ranked)
    error = plan_error(recipe_for("dpo", path, Path(base), data={"train": str(path)}), tmp_path)
    assert "ranked.jsonl:1: a chat, and the model has no chat template" in error


def test_tokens_outside_the_vocabulary(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    base = str(model_in(tmp_path / "small", tokenizer, len(tokenizer) - 1))
    odd = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1).replace("Ġ", " ")
    path = write_jsonl(tmp_path / "rows.jsonl", [*GOOD, {"prompt": "one", "completion": f"red{odd}"}])
    error = plan_error(causal(base=base, data={"train": str(path)}), tmp_path)
    assert f"rows.jsonl:4: token {len(tokenizer) - 1} is outside the {len(tokenizer) - 1} rows" in error
    assert "do not belong together" in error
    packed = plan_error(causal(base=base, data={"train": str(path)}, options={"packing": "pack"}), tmp_path)
    assert "rows.jsonl: token" in packed  # rows are put together: the file is all that is known


def test_what_is_odd_is_told_by_train_itself(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    rows = [chat("one", "red"), chat("two", "blue"), chat("one", "red"), chat("three", "blue " * 60)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    test = write_jsonl(tmp_path / "test.jsonl", [chat("two", "blue")])
    data = {"train": str(path), "test": str(test), "max_length": 40}
    result = run(causal(adapter=QV, data=data, train={"max_steps": 1, "use_cpu": True}, eval__generate=False))
    said = "\n".join(result.notes)
    assert "1 row repeats an earlier one: rows.jsonl:3 is rows.jsonl:1 again." in said
    assert "1 row of the test set is among the training rows, so scores will be too good: test.jsonl:1 is" in said
    assert "1 row (rows.jsonl:4 first; 1 row cut to 40 tokens) ends without a token that ends an answer" in said


def test_without_an_end_token_and_without_a_pad_token(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    base = str(model_in(tmp_path / "endless", tokenizer))
    path = write_jsonl(tmp_path / "rows.jsonl", GOOD)
    train = {"max_steps": 1, "use_cpu": True}
    result = run(causal(base=base, adapter=QV, data={"train": str(path)}, train=train))
    said = "\n".join(result.notes)
    assert "The tokenizer has no end-of-text token: the model does not learn to stop." in said
    assert "pad" in said


def test_unknown_labels(bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.conll"
    path.write_text("anna\tB-per\n\nbob\tB-prs\n")
    test = tmp_path / "test.conll"
    test.write_text("anna\tB-per\n\nrome\tO\nbob\tB-loc\n")
    data = {"train": str(path), "test": str(test)}
    error = plan_error(recipe_for("token-cls", path, bert, data=data), tmp_path)
    assert "test.conll:3: unknown label 'O' at word 1 ('rome')" in error
