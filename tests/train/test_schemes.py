"""Schemes of entity labels: recognised, scored as seqeval scores each, and what breaks them told with its row."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from seqeval.metrics import f1_score
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES, IOE1, IOE2, Entities
from tiny_train import plan_of, recipe_for, write_jsonl

from veneer.train.entities import spans
from veneer.train.errors import RecipeError
from veneer.train.loop import run
from veneer.train.metrics import entity_scores
from veneer.train.metrics import spans as shown
from veneer.train.outlook import outlook
from veneer.train.schemes import breaks, scheme_of, tags_are_entities

SEQEVAL: dict[str, Any] = {"IOB1": IOB1, "IOB2": IOB2, "IOE1": IOE1, "IOE2": IOE2, "IOBES": IOBES, "BILOU": BILOU}
Span = tuple[int, int, str]


def written(entities: list[Span], length: int, scheme: str) -> list[str]:
    """The labels of entities (first, last + 1, type) by the scheme's definition."""
    labels = ["O"] * length
    for first, last, kind in entities:
        letters = ["I"] * (last - first)
        ends, begins = ([(e[side], e[2]) for e in entities] for side in (1, 0))
        if scheme == "IOB2" or (scheme == "IOB1" and (first, kind) in ends):
            letters[0] = "B"
        if scheme == "IOE2" or (scheme == "IOE1" and (last, kind) in begins):
            letters[-1] = "E"
        if scheme in {"IOBES", "BILOU"}:
            end, single = ("E", "S") if scheme == "IOBES" else ("L", "U")
            letters = [single] if len(letters) == 1 else ["B", *letters[1:-1], end]
        labels[first:last] = [f"{letter}-{kind}" for letter in letters]
    return labels


def drawn(draw: random.Random, length: int = 12) -> list[Span]:
    entities, place = [], 0
    while place < length:
        last = min(length, place + draw.randint(1, 3))
        if draw.random() < 0.7:
            entities.append((place, last, draw.choice(["per", "loc"])))
        place = last
    return entities


@pytest.mark.parametrize("scheme", SEQEVAL)
def test_each_scheme_is_recognised_read_and_scored(scheme: str) -> None:
    draw = random.Random(3)
    wanted, found = ([drawn(draw) for _ in range(30)] for _ in range(2))
    want, got = ([written(row, 12, scheme) for row in side] for side in (wanted, found))
    assert tags_are_entities({label for row in want for label in row})
    assert scheme_of(want) == scheme
    assert not any(breaks(row, scheme) for row in want)
    assert [spans(row) for row in want] == wanted
    left, right = ([(i, e) for i, row in enumerate(side) for e in row] for side in (wanted, found))
    f1 = 2 * len({*left} & {*right}) / len(left + right)
    assert entity_scores(want, got)["f1"] == pytest.approx(f1)
    if scheme != "IOE1":  # seqeval does not see its entities of one word
        assert f1_score(want, got, mode="strict", scheme=SEQEVAL[scheme]) == pytest.approx(f1)
    words = [str(i) for i in range(12)]
    text = lambda row: "; ".join(f"{kind}: {' '.join(words[first:last])}" for first, last, kind in row) or "-"
    assert [shown(words, row) for row in want] == [text(row) for row in wanted]


@pytest.mark.parametrize("scheme", [scheme for scheme in SEQEVAL if scheme != "IOE1"])
def test_breaks_are_where_seqeval_reads_less(scheme: str) -> None:
    """A row without breaks is read whole by seqeval's strict reading, and one with breaks is not."""
    draw, both = random.Random(5), set()
    letters = {"IOB1": "BI", "IOB2": "BI", "IOE2": "IE", "IOBES": "BIES", "BILOU": "BILU"}[scheme]
    for _ in range(300):
        row = [draw.choice(["O", *(f"{letter}-{kind}" for letter in letters for kind in "xy")]) for _ in range(4)]
        read = [(e.start, e.end, e.tag) for e in Entities([row], SEQEVAL[scheme]).entities[0]]
        broken = bool(breaks(row, scheme))
        both.add(broken)
        assert broken == (written(read, 4, scheme) != row), (row, read, breaks(row, scheme))
    assert both == {True, False}


def test_letters_of_no_scheme() -> None:
    assert not tags_are_entities(["NOUN", "VERB"])
    assert not tags_are_entities(["O"])
    with pytest.raises(ValueError, match="letters E, L are together in no scheme"):
        scheme_of([["E-x", "L-x"]])
    assert scheme_of([["O"], ["B-x"]]) == "IOB2"
    assert scheme_of([["I-x", "O"]]) == "IOB1"


def test_the_scheme_is_said_and_what_breaks_it(bert: Path, tmp_path: Path) -> None:
    rows = [{"tokens": ["anna", "in", "rome"], "labels": ["B-per", "O", "B-loc"]}] * 3
    odd = {"tokens": ["bob", "in", "the", "rome"], "labels": ["B-per", "I-loc", "O", "I-loc"]}
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, odd])
    recipe = recipe_for("token-cls", path, bert, data={"train": str(path)})
    seen = outlook(recipe)
    assert "The labels are read as IOB2; scores are of whole entities." in seen.notes
    warning = "2 labels in 1 of 4 rows of a.jsonl break IOB2: a.jsonl:4, word 2 ('in'), I-loc in `B-per I-loc O`."
    assert warning in seen.warnings
    mixed = write_jsonl(tmp_path / "b.jsonl", [{"tokens": ["bob", "in"], "labels": ["L-x", "S-x"]}])
    with pytest.raises(RecipeError, match=r"letters L, S are together in no scheme.*eval.metric: accuracy"):
        plan_of(recipe_for("token-cls", mixed, bert))


def test_a_run_on_bilou(bert: Path, tmp_path: Path) -> None:
    rows = [
        {"tokens": ["anna", "in", "the", "rome"], "labels": ["U-per", "O", "B-loc", "L-loc"]},
        {"tokens": ["bob", "bob"], "labels": ["U-per", "U-per"]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    train = {"learning_rate": 0.01, "num_train_epochs": 40, "use_cpu": True, "lr_scheduler_type": "constant"}
    result = run(recipe_for("token-cls", path, bert, train=train))
    assert result.after["f1"] == 1.0
    assert [sample.tuned for sample in result.samples] == ["per: anna; loc: the rome", "per: bob; per: bob"]
