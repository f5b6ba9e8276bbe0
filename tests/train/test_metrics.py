"""Scores, against values worked out by hand."""

from __future__ import annotations

import pytest

from veneer.train import metrics


def test_json_scores() -> None:
    want = ['{"a": 1, "b": {"c": [1, 2]}}', '{"a": true}', '{"a": []}', '{"a": 1}']
    got = ['{"b": {"c": [1, 3]}, "a": 1}', '{"a": 1}', ' {"a":[]} ', '{"a": 1, "x": 2}']
    scores, right = metrics.json_scores(want, got)
    assert right == [
        False,
        False,
        True,
        False,
    ]  # 3 is not 2; 1 is not true; spacing is nothing; x is invented
    assert scores["exact_match"] == 0.25
    assert scores["field_accuracy"] == pytest.approx((2 + 0 + 1 + 1) / (3 + 1 + 1 + 2))
    assert scores["valid_json"] == 1.0


def test_json_scores_of_what_is_no_json() -> None:
    scores, right = metrics.json_scores(['{"a": 1, "b": 2}'] * 2, ["sure! here it is", '```{"a": 1, "b": 2}```'])
    assert right == [False, False]
    assert set(scores.values()) == {0.0}


def test_key_order_matters_not_but_nesting_does() -> None:
    assert metrics.json_scores(['{"a.b": 1}'], ['{"a": {"b": 1}}'])[1] == [False]
    assert metrics.json_scores(['{"a": 1, "b": 2}'], ['{"b": 2, "a": 1}'])[1] == [True]


def test_answers_are_json() -> None:
    assert metrics.answers_are_json(['{"a": 1}', "[1]"])
    assert not metrics.answers_are_json(['{"a": 1}', "3"])
    assert not metrics.answers_are_json([])


def test_exact_scores() -> None:
    assert metrics.exact_scores(["a", "b "], [" a\n", "B"]) == ({"exact_match": 0.5}, [True, False])


def test_entity_scores() -> None:
    want = [["B-per", "I-per", "O", "B-loc"], ["O", "B-loc"]]
    got = [["B-per", "O", "O", "B-loc"], ["O", "B-loc"]]
    scores = metrics.entity_scores(want, got)
    assert scores == {
        "f1": pytest.approx(2 / 3),
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "accuracy": pytest.approx(5 / 6),
    }


def test_tags_and_spans() -> None:
    words = ["Anna", "Li", "in", "New", "York", "Rome"]
    assert metrics.spans(words, ["B-per", "I-per", "O", "B-loc", "I-loc", "B-loc"]) == (
        "per: Anna Li; loc: New York; loc: Rome"
    )
    assert metrics.spans(["a"], ["O"]) == "-"
    assert metrics.spans(["run", "cat"], ["VERB", "NOUN"]) == "VERB: run; NOUN: cat"
