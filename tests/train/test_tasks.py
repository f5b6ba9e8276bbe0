"""What the tasks make of checked rows: labels, stop tokens, and rows that cannot be trained on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_train import bpe_tokenizer, chat, write_jsonl
from transformers import AutoConfig, AutoTokenizer

from veneer.train.collate import Collator
from veneer.train.data import load_tables
from veneer.train.encode import IGNORE
from veneer.train.errors import DataError, RecipeError
from veneer.train.recipe import Recipe, load_recipe
from veneer.train.tasks import TASKS, Plan, get_task, task_of
from veneer.train.tasks.token_cls import align


def make_plan(recipe: Recipe, tokenizer: Any = None) -> Plan:
    base = recipe.base.name
    train, test = load_tables(recipe.data, recipe.task, recipe.seed)
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(base)
    return get_task(recipe.task).plan(recipe, train, test, tokenizer, AutoConfig.from_pretrained(base))


def chat_recipe(train: Path, llama: Path, **flags: Any) -> Recipe:
    return load_recipe(None, task="causal-lm", base=str(llama), data__train=str(train), **flags)


def test_every_task_names_itself() -> None:
    for name in TASKS:
        assert get_task(name).name == name
        assert get_task(name) is get_task(name)


def test_chat_plan(chats: Path, llama: Path, tokenizer: Any) -> None:
    plan = make_plan(chat_recipe(chats, llama, data__test=str(chats)))
    assert len(plan.train) == 24
    for row in plan.train:
        assert row["length"] == len(row["input_ids"]) == len(row["labels"])
        said = tokenizer.decode([label for label in row["labels"] if label != IGNORE])
        assert said in [f'{{"colour": "{name}"}}<|im_end|>' for name in ("red", "green", "blue")]
    assert plan.examples[0] == ("colour 0", '{"colour": "red"}')
    assert tokenizer.decode(plan.targets[0]).endswith("colour 0<|im_end|>\n<|im_start|>assistant\n")
    assert plan.stop_ids == {tokenizer.eos_token_id}


def test_text_and_prompt_plans(tmp_path: Path, llama: Path, tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "red green", "question": "colour ", "answer": "blue"}])
    plan = make_plan(chat_recipe(path, llama))
    assert tokenizer.decode(plan.train[0]["labels"][1:]) == tokenizer.decode(plan.train[0]["input_ids"][1:])
    names = {"data__prompt": "question", "data__completion": "answer"}
    plan = make_plan(chat_recipe(path, llama, data__test=str(path), **names))
    said = [label for label in plan.train[0]["labels"] if label != IGNORE]
    assert tokenizer.decode(said) == "blue<|im_end|>"
    assert plan.examples == [("colour", "blue")]


def test_answers_lost_to_truncation_are_an_error(tmp_path: Path, llama: Path) -> None:
    rows = [chat("one", "red"), chat("one two three four " * 9, "red"), chat("two " * 40, "blue")]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        make_plan(chat_recipe(path, llama, data__max_length=40))
    assert (caught.value.file, caught.value.line) == (str(path), 2)
    assert "nothing to learn is left after cutting to 40 tokens (2 rows in all)" in caught.value.problem
    assert "Raise `data.max_length`" in str(caught.value.hint)


def test_cut_rows_are_told(tmp_path: Path, llama: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [chat("one", "red " * 400), chat("one", "red")])
    plan = make_plan(chat_recipe(path, llama, data__max_length=60))
    assert plan.notes == ["1 of 2 training rows are cut to 60 tokens."]
    assert max(plan.train["length"]) == 60
    # the model itself has 256 positions, whatever the recipe allows
    assert max(make_plan(chat_recipe(path, llama, data__max_length=9999)).train["length"]) == 256


def test_one_token_of_text_is_an_error(tmp_path: Path, llama: Path) -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.eos_token = None
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "!"}])
    with pytest.raises(DataError, match="no token to learn"):
        make_plan(chat_recipe(path, llama), tokenizer)


def test_chat_rows_need_a_template(chats: Path, llama: Path) -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        make_plan(chat_recipe(chats, llama), tokenizer)


def test_template_errors_name_the_row(chats: Path, llama: Path) -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') if messages[0]['content'] == 'colour 2' else 'x' }}"
    with pytest.raises(DataError) as caught:
        make_plan(chat_recipe(chats, llama), tokenizer)
    assert caught.value.line == 3


def test_metric_must_fit(chats: Path, conll: Path, llama: Path, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not fit causal-lm"):
        make_plan(chat_recipe(chats, llama, data__test=str(chats), eval__metric="entities"))
    plain = write_jsonl(tmp_path / "plain.jsonl", [chat("one", "red")])
    with pytest.raises(RecipeError, match="is not JSON"):
        make_plan(chat_recipe(plain, llama, data__test=str(plain), eval__metric="json"))
    with pytest.raises(RecipeError, match="does not fit token-cls"):
        make_plan(word_recipe(conll, bert, data__test=str(conll), eval__metric="json"))


def word_recipe(train: Path, bert: Path, **flags: Any) -> Recipe:
    return load_recipe(None, task="token-cls", base=str(bert), data__train=str(train), **flags)


def test_align() -> None:
    words = [None, 0, 0, 1, 2, 2, None]
    assert align(words, [5, 6, 7]) == ([IGNORE, 5, IGNORE, 6, 7, IGNORE, IGNORE], [(0, 1), (1, 3), (2, 4)])
    assert align(words, [5, 6, 7], everywhere=True)[0] == [IGNORE, 5, 5, 6, 7, 7, IGNORE]
    assert align([None, 1, None], [5, 6]) == ([IGNORE, 6, IGNORE], [(1, 1)])  # word 0 has no sub-word


def test_word_plan(conll: Path, bert: Path) -> None:
    plan = make_plan(word_recipe(conll, bert, data__test=str(conll)))
    assert plan.label_names == ["O", "B-loc", "B-per"]
    tokenizer = AutoTokenizer.from_pretrained(bert)
    row = plan.train[0]
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == [
        "[CLS]", "an", "##na", "in", "par", "##is", ".", "[SEP]"
    ]  # fmt: skip
    assert row["labels"] == [IGNORE, 2, IGNORE, 0, 1, IGNORE, 0, IGNORE]
    assert plan.examples[0] == ("anna in paris .", "per: anna; loc: paris")
    everywhere = make_plan(word_recipe(conll, bert, data__label_all_subwords=True))
    assert everywhere.train[0]["labels"] == [IGNORE, 2, 2, 0, 1, 1, 0, IGNORE]


def test_class_weights_of_words(conll: Path, bert: Path) -> None:
    """The loss is torch's weighted sum over the labelled sub-words, by their number."""
    recipe = word_recipe(conll, bert, data__test=str(conll), options={"class_weights": {"B-per": 3.0, "O": 0.5}})
    task = task_of(recipe)
    plan = task.plan_train(recipe, *_words(recipe, bert))
    assert plan.label_names == ["O", "B-loc", "B-per"]
    batch = Collator(0)([plan.train[0], plan.train[1]])
    assert batch["weights"].shape == batch["labels"].shape
    logits = torch.randn(*batch["labels"].shape, 3)
    model = lambda **inputs: (
        SimpleNamespace(logits=logits) if inputs.keys() <= {"input_ids", "attention_mask"} else None
    )
    flat, labels = logits.flatten(0, 1), batch["labels"].flatten()
    given = torch.tensor([0.5, 1.0, 3.0])
    summed = torch.nn.functional.cross_entropy(flat, labels, weight=given, reduction="sum")
    torch.testing.assert_close(task.loss(model, dict(batch), None), summed / (labels != IGNORE).sum())  # type: ignore[arg-type]
    torch.testing.assert_close(task.loss(model, dict(batch), torch.tensor(7)), summed / 7)  # type: ignore[arg-type]
    balanced = word_recipe(conll, bert, options={"class_weights": "balanced"})
    found = task_of(balanced).plan_train(balanced, *_words(balanced, bert)).train["weights"][:]
    assert sum(sum(row) for row in found) == pytest.approx(sum(1 for row in found for value in row if value))
    wrong = word_recipe(conll, bert, options={"class_weights": {"B-prs": 2.0}})
    with pytest.raises(RecipeError, match=r"no row has the label 'B-prs'.*Did you mean `B-per`"):
        task_of(wrong).plan_train(wrong, *_words(wrong, bert))


def _words(recipe: Recipe, bert: Path) -> tuple[Any, Any, Any]:
    train, _ = load_tables(recipe.data, recipe.task, recipe.seed)
    return train, AutoTokenizer.from_pretrained(bert), AutoConfig.from_pretrained(bert)


def test_unknown_label_in_test_rows(conll: Path, bert: Path, tmp_path: Path) -> None:
    path = tmp_path / "test.conll"
    path.write_text("anna\tB-per\n\nin\tO\nrome\tB-Loc\n")
    with pytest.raises(DataError) as caught:
        make_plan(word_recipe(conll, bert, data__test=str(path)))
    assert (caught.value.file, caught.value.line) == (str(path), 3)
    assert "unknown label 'B-Loc' at word 2 ('rome')" in caught.value.problem
    assert "Did you mean `B-loc`?" in str(caught.value.hint)


def test_words_cut_off_count_as_o(conll: Path, bert: Path) -> None:
    plan = make_plan(word_recipe(conll, bert, data__test=str(conll), data__max_length=5))
    assert "4 of 6 test rows are cut; the words cut off count as O." in plan.notes
    assert plan.targets[0][2] == [(0, 1), (1, 3)]
    assert len(plan.targets[0][1]) == 4


def test_a_base_keeps_the_order_of_its_own_labels(conll: Path, bert: Path) -> None:
    recipe = word_recipe(conll, bert)
    config = AutoConfig.from_pretrained(bert, id2label={0: "B-per", 1: "B-loc", 2: "O"})
    train, _ = load_tables(recipe.data, "token-cls", 0)
    plan = get_task("token-cls").plan(recipe, train, None, AutoTokenizer.from_pretrained(bert), config)
    assert plan.label_names == ["B-per", "B-loc", "O"]
