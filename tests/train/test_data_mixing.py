"""Several sources with weights, and which rows of them are taken."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_train import chat, plan_of, recipe_for, write_jsonl
from transformers import AutoTokenizer

from veneer.train import Recipe, RecipeError, load_recipe, run
from veneer.train.data import Table, load_tables
from veneer.train.encode import IGNORE
from veneer.train.errors import DataError
from veneer.train.outlook import outlook
from veneer.train.recipe import DataSpec, build_recipe


@pytest.fixture
def sources(tmp_path: Path) -> tuple[Path, Path]:
    """Twelve rows, and three of which each column has another name."""
    first = [{"prompt": f"a{number}", "completion": "x", "score": number / 10, "lang": "en"} for number in range(12)]
    second = [{"q": f"b{number}", "a": "y", "lang": "de"} for number in range(3)]
    return write_jsonl(tmp_path / "first.jsonl", first), write_jsonl(tmp_path / "second.jsonl", second)


NAMES = {"prompt": "q", "completion": "a"}


def tables(train: Any, seed: int = 0, **spec: Any) -> tuple[Table, Table | None]:
    return load_tables(DataSpec.model_validate({"train": train, **spec}), "causal-lm", seed)


def prompts(table: Table | None) -> list[str]:
    assert table is not None
    return table.dataset["prompt"][:]


def two(sources: tuple[Path, Path], *weights: float | None) -> list[dict[str, Any]]:
    first, second = ({"path": str(path)} for path in sources)
    both = [first, {**second, "columns": NAMES}]
    return [row if weight is None else {**row, "weight": weight} for row, weight in zip(both, weights, strict=True)]


def test_without_weights_every_row_comes_once(sources: tuple[Path, Path]) -> None:
    table, _ = tables(two(sources, None, None))
    assert prompts(table) == [f"a{number}" for number in range(12)] + ["b0", "b1", "b2"]
    assert table.notes == ("15 training rows from 2 sources: first.jsonl 12 (80%; all), second.jsonl 3 (20%; all).",)
    assert str(table.error(13, "odd")).endswith("second.jsonl:2: odd")


def test_weights_draw_until_all_or_one_is_used_up(sources: tuple[Path, Path]) -> None:
    whole, _ = tables(two(sources, 1, 1))
    count = Counter(name[0] for name in prompts(whole))
    assert set(prompts(whole)) == {f"a{n}" for n in range(12)} | {"b0", "b1", "b2"}
    assert 6 <= count["b"] <= 24
    assert f"second.jsonl {count['b']}" in whole.notes[0]
    assert "times each" in whole.notes[0]
    short, _ = tables(two(sources, 1, 1), stopping_strategy="first_exhausted")
    assert len(set(prompts(short))) == len(short) <= 15
    heavy, _ = tables(two(sources, 9, 1))
    assert Counter(name[0] for name in prompts(heavy))["a"] > 2 * len(heavy) / 3
    again = [prompts(tables(two(sources, 1, 1), seed)[0]) for seed in (0, 0, 1)]
    assert again[0] == again[1] == prompts(whole) != again[2]


def test_the_split_is_made_before_the_mix(sources: tuple[Path, Path]) -> None:
    train, test = tables(two(sources, 1, 2), split=0.34)
    held = prompts(test)
    assert sorted(name[0] for name in held) == ["a"] * 4 + ["b"]
    assert not set(held) & set(prompts(train))
    assert set(held) | set(prompts(train)) == {f"a{n}" for n in range(12)} | {"b0", "b1", "b2"}


def test_filter_shuffle_limit(sources: tuple[Path, Path]) -> None:
    path = str(sources[0])
    assert prompts(tables(path, limit=3)[0]) == ["a0", "a1", "a2"]
    table, test = tables(path, filter={"score": {"min": 0.3, "max": 0.8}}, limit=4, shuffle=True, split=0.25)
    took = [*prompts(table), *prompts(test)]
    assert len(took) == 4
    assert set(took) <= {f"a{n}" for n in range(3, 9)}
    assert table.notes == (
        "first.jsonl: the filter takes 6 of 12 rows read.",
        "first.jsonl: 4 rows are taken, as `limit` says.",
    )
    orders = [prompts(tables(path, seed, shuffle=True)[0]) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(f"a{n}" for n in range(12))


def test_a_test_file_keeps_all_its_rows(sources: tuple[Path, Path]) -> None:
    _, test = tables(str(sources[0]), test=str(sources[0]), filter={"score": {"min": 0.3}}, limit=2)
    assert len(prompts(test)) == 12


def test_a_source_has_its_own_filter_and_limit(sources: tuple[Path, Path]) -> None:
    first, second = two(sources, None, None)
    first |= {"limit": 2, "filter": {"score": {"min": 0.5}}}
    second |= {"filter": {"q": {"any_of": ["b1", "b9"]}}}
    assert prompts(tables([first, second])[0]) == ["a5", "a6", "b1"]


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("x", [0]),
        (["x", "yy"], [0, 1]),
        ({"not_equals": "x"}, [1, 2, 3]),
        ({"none_of": ["x", "yy"]}, [2, 3]),
        ({"min_length": 2}, [1, 2, 3]),
        ({"min_length": 2, "max_length": 2}, [1, 3]),
        ({"contains": "z"}, [2]),
        ({"not_contains": "z"}, [0, 1, 3]),
        ({"matches": "^[xy]+$"}, [0, 1]),
        ({"not_matches": "^[xy]+$"}, [2, 3]),
        ({"equals": 10}, [3]),
        ({"missing": True}, [4, 5]),
        ({"missing": False}, [0, 1, 2, 3]),
    ],
)
def test_conditions(tmp_path: Path, condition: Any, kept: list[int]) -> None:
    values = ["x", "yy", "zzz", "10", None]
    rows = [{"text": f"row {number}", "tag": value} for number, value in enumerate(values)]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"text": "row 5"}])
    table, _ = tables(str(path), filter={"tag": condition})
    assert table.dataset["text"][:] == [f"row {number}" for number in kept]


def test_numbers_and_truths(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,score,good\nr0,0.5,true\nr1,7,false\nr2,-1,TRUE\n")
    for wanted, kept in (
        ({"score": {"min": 0}}, ["r0", "r1"]),
        ({"score": {"max": 0.5}}, ["r0", "r2"]),
        ({"good": True}, ["r0", "r2"]),
        ({"score": 7}, ["r1"]),
    ):
        assert tables(str(path), filter=wanted)[0].dataset["text"][:] == kept
    path.write_text("text,score\nr0,0.5\nr1,many\n")
    with pytest.raises(DataError, match=r"rows\.csv:3: data\.filter: `min` compares numbers, and 'score' is 'many'"):
        tables(str(path), filter={"score": {"min": 0}})


def test_what_a_filter_leaves_nothing_of(sources: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match=r"takes none of its 12 rows"):
        tables(str(sources[0]), filter={"lang": "fr"})


@pytest.mark.parametrize(
    ("data", "key", "near"),
    [
        ({"train": [{"path": "a", "weigth": 2}]}, "data.train.0.weigth", "weight"),
        ({"train": [{"weight": 2}]}, "data.train.0.path", None),
        ({"train": [{"path": "a", "weight": 0}]}, "data.train.0.weight", None),
        ({"train": ["a", 3]}, "data.train.1", None),
        ({"train": []}, "data.train", None),
        ({"train": 5}, "data.train", None),
        ({"train": "a", "stopping_strategy": "all_exhaused"}, "data.stopping_strategy", "all_exhausted"),
        ({"train": "a", "filter": {"x": {"min_lenght": 2}}}, "data.filter.x.min_lenght", "min_length"),
        ({"train": [{"path": "a", "filter": {"x": {"mni": 2}}}]}, "data.train.0.filter.x.mni", "min"),
        ({"train": "a", "filter": {"x": {"matches": "("}}}, "data.filter.x.matches", None),
        ({"train": "a", "filter": {"x": {"min": "y"}}}, "data.filter.x.min", None),
        ({"train": "a", "limit": 0}, "data.limit", None),
    ],
)
def test_keys_are_checked(data: Any, key: str, near: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        build_recipe({"task": "causal-lm", "base": "b", "data": data}, [], {})
    assert (caught.value.key, caught.value.near) == (key, near)


def test_columns_are_checked_with_the_place_in_the_recipe(
    recipe_file: Callable[[str], Path], sources: tuple[Path, Path], llama: Path
) -> None:
    text = (
        "task: causal-lm\nbase: {base}\ndata:\n  train:\n    - {first}\n    - path: {second}\n      columns: {names}\n"
    )

    def refused(names: str, more: str = "") -> RecipeError:
        first, second = sources
        with pytest.raises(RecipeError) as caught:
            load_recipe(recipe_file(text.format(base=llama, first=first, second=second, names=names) + more))
        return caught.value

    error = refused("{prompt: q, completion: aa}")
    assert (error.key, error.line, error.near) == ("data.train.1.columns.completion", 7, "a")
    assert "no column 'aa'" in error.problem
    error = refused("{prompt: q, complexion: a}")
    assert error.near == "completion"
    error = refused("{prompt: q, completion: a}", "  filter: {lnag: en}\n")
    assert (error.key, error.near) == ("data.filter.lnag", "lang")


@pytest.fixture
def kinds(tmp_path: Path) -> list[dict[str, Any]]:
    """Chats, prompts with completions, and texts."""
    chats = write_jsonl(tmp_path / "chats.jsonl", [chat(f"one {number}", "red") for number in range(4)])
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"question": "two", "answer": f"blue {n}"} for n in range(3)])
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"three four {number}"} for number in range(2)])
    columns = {"prompt": "question", "completion": "answer"}
    return [{"path": str(chats)}, {"path": str(pairs), "columns": columns}, {"path": str(texts)}]


def test_chats_prompts_and_texts_mix(causal: Callable[..., Recipe], kinds: list[dict[str, Any]], llama: Path) -> None:
    recipe = causal(data={"train": kinds}, train={"max_steps": 1, "use_cpu": True})
    plan, tokenizer = plan_of(recipe), AutoTokenizer.from_pretrained(llama)
    rows = plan.train.to_list()
    assert len(rows) == 9
    learned = [tokenizer.decode([token for token in row["labels"] if token != IGNORE]) for row in rows]
    assert learned[0] == "red<|im_end|>"
    assert learned[4] == "blue 0<|im_end|>"
    assert learned[7].endswith("three four 0<|im_end|>"[1:])
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert [row["input_ids"][0] == start for row in rows] == [True] * 4 + [False] * 5
    alone = [row for source in kinds for row in plan_of(causal(data={"train": [source]})).train.to_list()]
    assert rows == alone


def test_prompts_as_chats(causal: Callable[..., Recipe], kinds: list[dict[str, Any]], tmp_path: Path) -> None:
    same = write_jsonl(tmp_path / "same.jsonl", [chat("two", f"blue {number}") for number in range(3)])
    wanted = plan_of(causal(data={"train": str(same)}))
    found = plan_of(causal(data={"train": kinds[1:2]}, options={"as_chat": True}))
    assert found.train.to_list() == wanted.train.to_list()
    assert found.stop_ids == wanted.stop_ids
    assert found.asking == wanted.asking


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_of_several_kinds(causal: Callable[..., Recipe], kinds: list[dict[str, Any]], streaming: bool) -> None:
    weighed = [{**source, "weight": 1} for source in kinds]
    data = {"train": weighed, "streaming": True, "test": kinds[0]["path"]} if streaming else {"train": kinds}
    data |= {} if streaming else {"split": 0.4}
    result = run(causal(data=data, train={"max_steps": 2, "use_cpu": True}, eval__max_new_tokens=3))
    assert result.after["loss"] > 0
    assert len(result.samples) == (4 if streaming else 3)  # prompts of test rows; a text has none


@pytest.mark.parametrize(
    ("number", "row", "words"),
    [
        (0, {"messages": [{"role": "user", "content": "one"}]}, r"chats\.jsonl:5: no turn of the assistant"),
        (1, {"question": "two", "answer": " "}, r"pairs\.jsonl:4: 'answer' is empty"),
        (1, {"question": "two"}, r"pairs\.jsonl:4: no 'answer'"),
        (2, {"text": None}, r"texts\.jsonl:3: 'text' is null"),
        (1, {"question": "two " * 300, "answer": "x"}, r"pairs\.jsonl:4: nothing to learn is left after cutting"),
    ],
)
def test_what_is_wrong_in_a_mixture_is_told_by_file_and_line(
    causal: Callable[..., Recipe], kinds: list[dict[str, Any]], number: int, row: dict[str, Any], words: str
) -> None:
    path = Path(kinds[number]["path"])
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=words):
        plan_of(causal(data={"train": kinds}))


def test_kinds_that_do_not_mix(causal: Callable[..., Recipe], kinds: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"rows have messages or prompt\+completion or text"):
        plan_of(causal(data={"train": kinds}, options={"packing": "chunk"}))
    scored = write_jsonl(tmp_path / "a.jsonl", [{"anchor": "a", "positive": "b", "close": 0.5}])
    plain = write_jsonl(tmp_path / "b.jsonl", [{"anchor": "a", "positive": "b"}])
    both = [{"path": str(scored), "columns": {"score": "close"}}, {"path": str(plain)}]
    with pytest.raises(
        RecipeError, match=r"b\.jsonl has anchor\+positive where .*a\.jsonl has anchor\+positive\+score"
    ):
        causal(task="embedding", data={"train": both})


def test_a_mixed_run_says_what_came_from_where(causal: Callable[..., Recipe], sources: tuple[Path, Path]) -> None:
    data = {"train": two(sources, 1, 1), "split": 0.34}
    recipe = causal(data=data, train={"max_steps": 1, "use_cpu": True}, eval__generate=False)
    found = outlook(recipe)
    assert any(note.endswith("times each).") for note in found.notes)
    assert not any("repeat" in warning for warning in found.warnings)
    result = run(recipe)
    assert [note for note in result.notes if "from 2 sources" in note]
    assert load_recipe(None, **build_dump(result.recipe)).data == recipe.data


def build_dump(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json") | {"out": recipe.out + "2"}


def test_pairs_with_and_without_a_prompt_in_one_run(llama: Path, bert: Path, tmp_path: Path) -> None:
    """Each source keeps its own columns: no prompt is lost because another source has none."""
    turn = lambda role, text: {"role": role, "content": text}
    asked = {
        "prompt": [turn("user", "one")],
        "chosen": [turn("assistant", "red")],
        "rejected": [turn("assistant", "blue")],
    }
    whole = {side: [*asked["prompt"], *asked[side]] for side in ("chosen", "rejected")}
    first, second = write_jsonl(tmp_path / "a.jsonl", [asked]), write_jsonl(tmp_path / "b.jsonl", [whole])
    mixed: dict[str, Any] = {"data": {"train": [{"path": str(first)}, {"path": str(second)}]}}
    rows = plan_of(recipe_for("dpo", first, llama, **mixed)).train.to_list()
    assert rows[0] == rows[1]
    texts = write_jsonl(tmp_path / "c.jsonl", [{"prompt": "anna", "chosen": "bob", "rejected": "rome"}])
    alone = write_jsonl(tmp_path / "d.jsonl", [{"chosen": "bob", "rejected": "rome"}])
    mixed = {"data": {"train": [{"path": str(texts)}, {"path": str(alone)}]}}
    rows = plan_of(recipe_for("reward", texts, bert, **mixed)).train.to_list()
    assert rows[0] == plan_of(recipe_for("reward", texts, bert)).train[0]
    assert rows[1] == plan_of(recipe_for("reward", alone, bert)).train[0]
    mixed = {"data": {"train": [{"path": str(first)}, {"path": str(texts)}]}}
    with pytest.raises(DataError, match=r"'prompt' is text, and a list at a\.jsonl:1") as caught:
        plan_of(recipe_for("dpo", first, llama, **mixed))
    assert (caught.value.file, caught.value.line) == (str(texts), 1)


def test_columns_that_not_all_sources_have_are_told(bert: Path, tmp_path: Path) -> None:
    pair = {"anchor": "anna", "positive": "bob"}
    first = write_jsonl(tmp_path / "a.jsonl", [{**pair, "negative": "rome"}])
    second = write_jsonl(tmp_path / "b.jsonl", [{**pair, "anchor": "the"}])
    recipe = recipe_for("embedding", first, bert, data={"train": [{"path": str(first)}, {"path": str(second)}]})
    table, _ = load_tables(recipe.data, recipe.task, recipe.seed)
    assert "a.jsonl: 'negative' left out, for not all sources have it." in table.notes


def test_sources_name_their_own_columns(t5: Path, tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"article": "one two", "summary": "red"}])
    second = write_jsonl(tmp_path / "b.jsonl", [{"instruction": "one two", "response": "red"}])
    named = {"path": str(second), "columns": {"source": "instruction", "target": "response"}}
    rows = plan_of(recipe_for("seq2seq", first, t5, data={"train": [{"path": str(first)}, named]})).train.to_list()
    assert rows[0] == rows[1]
    with pytest.raises(DataError, match=r"for example `data: \{columns: \{source: instruction, target: response\}\}`"):
        recipe_for("seq2seq", first, t5, data={"train": [{"path": str(first)}, {"path": str(second)}]})
