"""Rows that are read while a run trains: their order, their checks, and a run that is cut short."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_data_tokens import BASES, ROWS
from test_resume import TRAIN, StopAt, check_same, stop_and_go
from tiny_train import recipe_for, write_jsonl

from veneer.train import Recipe, RecipeError, run, stream
from veneer.train.errors import DataError
from veneer.train.outlook import outlook
from veneer.train.prepare import prepare
from veneer.train.stream import Mark, RowStream, Stream, open_stream

SMALL = {"r": 2, "target_modules": ["q_proj"]}
STEPS = {"max_steps": 3, "use_cpu": True, "per_device_train_batch_size": 4}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 rows, and 6 first ones: a run of a few steps goes through several."""
    monkeypatch.setattr(stream, "CHUNK", 5)
    monkeypatch.setattr(stream, "SAMPLE", (6, 6))


def numbered(path: Path, count: int, name: str = "a") -> Path:
    return write_jsonl(path, [{"prompt": f"{name}{number}", "completion": "x"} for number in range(count)])


def rows_of(causal: Callable[..., Recipe], take: int, **data: Any) -> list[str]:
    rows, _ = open_stream(causal(data={"streaming": True, **data}, train=STEPS))
    return [row["prompt"] for _, row, _ in itertools.islice(rows, take)]


def test_each_pass_has_an_order_of_its_own(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    path = str(numbered(tmp_path / "a.jsonl", 20))
    found = rows_of(causal, 60, train=path, shuffle_buffer=8)
    passes = [found[first : first + 20] for first in (0, 20, 40)]
    assert all(sorted(one) == sorted(f"a{number}" for number in range(20)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert all(int(name[1:]) < place + 8 for place, name in enumerate(passes[0]))  # no farther ahead than the buffer
    assert found == rows_of(causal, 60, train=path, shuffle_buffer=8)
    plain = rows_of(causal, 25, train=path, shuffle_buffer=1)
    assert plain == [f"a{number % 20}" for number in range(25)]


def test_sources_are_drawn_by_weight(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    first, second = numbered(tmp_path / "a.jsonl", 400), numbered(tmp_path / "b.jsonl", 5, "b")
    both = [{"path": str(first), "weight": 3}, {"path": str(second), "weight": 1}]
    count = Counter(name[0] for name in rows_of(causal, 400, train=both))
    assert 70 < count["b"] < 130
    short = {"train": both, "stopping_strategy": "first_exhausted", "shuffle_buffer": 1}
    rows, _ = open_stream(causal(data={"streaming": True, **short}, train=STEPS))
    once = [row["prompt"] for _, row, _ in rows.one_pass(0)]
    assert len(once) == len(set(once))
    _, table = open_stream(causal(data={"train": [str(first), str(second)], "streaming": True}, train=STEPS))
    assert "one after the other" in table.notes[1]


def test_filters_and_limits_of_a_stream(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    path = str(numbered(tmp_path / "a.jsonl", 20))
    data = {"train": path, "filter": {"prompt": {"matches": "^a[0-9]$"}}, "limit": 4, "shuffle_buffer": 1}
    assert rows_of(causal, 6, **data) == ["a0", "a1", "a2", "a3", "a0", "a1"]
    with pytest.raises(DataError, match="holds no rows that are taken"):
        rows_of(causal, 1, train=path, filter={"prompt": "none"})


@pytest.mark.parametrize("packing", ["none", pytest.param("pack", marks=pytest.mark.slow)])
def test_a_stream_cut_twice_ends_the_same(
    causal: Callable[..., Recipe], chats: Path, tmp_path: Path, small_chunks: None, packing: str
) -> None:
    """7 steps of 8 rows go more than twice through 24; with dropout, and masks of packed rows, and rows of like lengths
    together in windows of two steps.
    """
    adapter = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.3}
    data = {"train": str(chats), "test": str(chats), "streaming": True, "shuffle_buffer": 20, "max_length": 120}

    def recipe(out: str) -> Recipe:
        return causal(out=out, adapter=adapter, data=data, train=TRAIN, options={"packing": packing},
                      eval__generate=False, eval__limit=4)  # fmt: skip

    check_same(*stop_and_go(recipe, tmp_path, [3, 6]))


@pytest.mark.slow
@pytest.mark.parametrize("task", ROWS)
def test_every_task_streams_and_goes_on(
    request: pytest.FixtureRequest, tmp_path: Path, small_chunks: None, task: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[task](number) for number in range(23)])
    base = request.getfixturevalue(BASES.get(task, "bert"))
    options = {"stride": 4} if task == "question-answering" else {}

    def recipe(out: str) -> Recipe:
        data = {"train": str(path), "test": str(path), "streaming": True, "shuffle_buffer": 17}
        return recipe_for(task, path, base, out=out, data=data, train=TRAIN, options=options, eval={"generate": False})

    check_same(*stop_and_go(recipe, tmp_path, [3, 6]))


@pytest.mark.slow
def test_a_process_that_reads_ahead_gives_the_same(
    causal: Callable[..., Recipe], chats: Path, tmp_path: Path, small_chunks: None
) -> None:
    data = {"train": str(chats), "test": str(chats), "streaming": True, "shuffle_buffer": 10}

    def recipe(out: str, workers: int = 1) -> Recipe:
        train = {**TRAIN, "dataloader_num_workers": workers}
        return causal(out=out, adapter=SMALL, data=data, train=train, eval__generate=False, eval__limit=4)

    alone, cut = stop_and_go(recipe, tmp_path, [3])
    check_same(alone, cut)
    check_same(Path(run(recipe(str(tmp_path / "none"), 0)).out), alone)


def test_what_a_checkpoint_says_of_a_stream() -> None:
    found = stream.Stream.__new__(stream.Stream)
    found.marks, found.window = [Mark(0, 0), Mark(5, 5), Mark(9, 10)], 1
    assert [found.mark(features) for features in (0, 4, 5, 8, 9, 30)] == [
        Mark(0, 0), Mark(0, 0), Mark(5, 5), Mark(5, 5), Mark(9, 10), Mark(9, 10)
    ]  # fmt: skip
    found.window = 6  # the window of the features 6 to 11 begins in the chunk that begins with 5
    assert [found.mark(features) for features in (5, 6, 11, 12)] == [Mark(0, 0), Mark(5, 5), Mark(5, 5), Mark(9, 10)]


def lengths_of(path: Path, count: int) -> Path:
    draw = random.Random(0)
    return write_jsonl(path, [{"prompt": f"a{n}", "completion": "red " * draw.randint(1, 40)} for n in range(count)])


def opened(causal: Callable[..., Recipe], path: Path, tmp_path: Path, **more: Any) -> Stream:
    data = {"train": str(path), "streaming": True, "shuffle_buffer": 64, **more.pop("data", {})}
    found = prepare(causal(data=data, train={**STEPS, **more}), tmp_path).plan.stream
    assert found is not None
    return found


def test_steps_of_a_stream_have_rows_of_like_lengths(
    causal: Callable[..., Recipe], tmp_path: Path, small_chunks: None
) -> None:
    path = lengths_of(tmp_path / "rows.jsonl", 192)

    def read(**more: Any) -> tuple[float, list[list[int]]]:
        found = opened(causal, path, tmp_path, **more)
        lengths = [feature["length"] for feature in itertools.islice(found, 192)]
        batches = [lengths[first : first + 4] for first in range(0, 192, 4)]
        return sum(max(batch) * 4 for batch in batches) / sum(lengths), batches

    padded, batches = read()
    plain, unsorted = read(train_sampling_strategy="random")
    assert padded < 1.12 < 1.3 < plain
    assert sorted(itertools.chain(*batches)) == sorted(itertools.chain(*unsorted))  # 192 is three windows of 64
    rising = sum(sum(b) > sum(a) for a, b in itertools.pairwise(batches))
    assert 12 < rising < 36  # and no trend
    assert read(data={"shuffle_buffer": 1})[0] > 1.3  # a buffer of one row leaves them in their order


def test_a_stream_by_length_goes_on_anywhere(causal: Callable[..., Recipe], tmp_path: Path, small_chunks: None) -> None:
    path, same = lengths_of(tmp_path / "rows.jsonl", 50), {"data": {"shuffle_buffer": 12}}
    whole = opened(causal, path, tmp_path, **same)
    assert whole.window == 12
    wanted = list(itertools.islice(whole, 130))
    assert len({str(feature["input_ids"]) for feature in wanted}) == 50
    for seen in (1, 11, 12, 13, 64, 99):
        again = opened(causal, path, tmp_path, **same)
        again.resume(seen, whole.mark(seen))
        assert list(itertools.islice(again, seen, 130)) == wanted[seen:], seen


def test_going_on_makes_no_tokens_of_what_was_seen(
    causal: Callable[..., Recipe], chats: Path, tmp_path: Path, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"train": str(chats), "streaming": True, "shuffle_buffer": 10}
    recipe = causal(adapter=SMALL, data=data, train={**TRAIN, "eval_strategy": "no"})
    with pytest.raises(KeyboardInterrupt):
        run(recipe, callbacks=[StopAt(7)])
    made: list[int] = []
    table = RowStream.table
    monkeypatch.setattr(RowStream, "table", lambda self, rows: made.append(len(rows)) or table(self, rows))
    run(recipe)
    assert made[0] == 6  # the first rows, looked at before it begins
    assert sum(made[1:]) <= 4 * 5 + 8  # of 48 rows that were seen, and 8 that are left


def test_a_bad_row_is_met_when_it_is_reached(causal: Callable[..., Recipe], tmp_path: Path, small_chunks: None) -> None:
    rows = [{"prompt": f"q{number}", "completion": "x"} for number in range(30)]
    rows[25] = {"prompt": "q", "completion": ""}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = {"train": str(path), "streaming": True, "shuffle_buffer": 2}
    with pytest.raises(DataError, match=r"rows\.jsonl:26: 'completion' is empty"):
        run(causal(adapter=SMALL, data=data, train={**STEPS, "max_steps": 9}))
    result = run(causal(adapter=SMALL, data=data, train={**STEPS, "max_steps": 2}))
    assert [note for note in result.notes if note.startswith("Rows are streamed; the first 6 stand")]
    assert [note for note in result.notes if "were read from the stream: rows.jsonl" in note]


def test_an_unknown_label_is_met_when_it_is_reached(bert: Path, tmp_path: Path, small_chunks: None) -> None:
    rows = [{"text": "anna", "label": f"l{number % 2}"} for number in range(20)]
    rows[12]["label"] = "l9"
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = {"train": str(path), "streaming": True, "shuffle_buffer": 1}
    with pytest.raises(DataError, match=r"rows\.jsonl:13: unknown label 'l9'"):
        run(recipe_for("seq-cls", path, bert, data=data, train={**STEPS, "max_steps": 9}))


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        ({"train": {}}, "train.max_steps"),
        ({"train": {"num_train_epochs": 3}}, "train.max_steps"),
        ({"data__split": 0.2}, "data.split"),
        ({"train": {**STEPS, "dataloader_num_workers": 2}}, "train.dataloader_num_workers"),
        ({"data__shuffle_buffer": 0}, "data.shuffle_buffer"),
    ],
)
def test_what_a_stream_cannot_do(causal: Callable[..., Recipe], chats: Path, flags: dict[str, Any], key: str) -> None:
    given = {"data": {"train": str(chats), "streaming": True}, "train": STEPS, **flags}
    with pytest.raises(RecipeError) as caught:
        causal(**given)
    assert caught.value.key == key


def test_a_plan_of_a_stream(causal: Callable[..., Recipe], chats: Path, tmp_path: Path) -> None:
    recipe = causal(data={"train": str(chats), "test": str(chats), "streaming": True}, train=STEPS)
    found = outlook(recipe)
    assert (found.rows.number, found.estimate.steps) == (24, 3)
    assert found.notes[0] == "Rows are streamed; the first 24 stand for all in what is said of them here."
    assert any("of the test set" in warning for warning in found.warnings)
    assert prepare(recipe, tmp_path).plan.stream is not None


def test_other_files_are_other_rows(causal: Callable[..., Recipe], chats: Path, small_chunks: None) -> None:
    data = {"train": str(chats), "streaming": True}
    recipe = causal(adapter=SMALL, data=data, train={**TRAIN, "eval_strategy": "no"})
    with pytest.raises(KeyboardInterrupt):
        run(recipe, callbacks=[StopAt(3)])
    chats.write_bytes(chats.read_bytes() + b"\n")
    with pytest.raises(RecipeError, match="differs in the rows"):
        run(recipe)
