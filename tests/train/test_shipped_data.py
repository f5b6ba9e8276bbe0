"""The two data sets inside the package: every row keeps its card's conventions and the halves do not leak."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest

HALVES = ("train", "test")
PARTS = (*HALVES, "later")  # of the orders
KEYS = ["action", "items", "order_id", "date", "gift", "bag", "note"]
ITEM_KEYS = ["name", "qty", "color", "size"]
SCHEMA = {
    "order": ["items", "date", "gift", "bag", "note"],
    "cancel": ["items", "order_id"],
    "return": ["items", "order_id"],
    "status": ["order_id"],
}
ACTIONS = set(SCHEMA)
SIZES = {"S", "M", "L", "XL"}
ENTITIES = {"PRODUCT", "ORDER_ID", "DATE", "PERSON", "PLACE"}
# words that give a message's language away; what has none of them is English
LANGUAGE_WORDS = {
    "de": {
        "bitte",
        "und",
        "bestellung",
        "eine",
        "einen",
        "ein",
        "ich",
        "ohne",
        "zwei",
        "für",
        "bis",
        "paar",
        "keine",
        "wann",
        "der",
    },
    "fr": {"une", "commande", "je", "pour", "svp", "deux", "merci", "et", "les", "pas"},
    "es": {"pedido", "una", "para", "quiero", "el", "por", "gracias", "los", "del", "sin", "con"},
}


def orders(half: str) -> list[tuple[str, dict[str, Any], str]]:
    """(message, request, answer text) of every row."""
    text = files("veneer").joinpath("data", "orders", f"{half}.jsonl").read_text(encoding="utf-8")
    rows = []
    for line in text.splitlines():
        row = json.loads(line)
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        _, user, assistant = (message["content"] for message in row["messages"])
        rows.append((user, json.loads(assistant), assistant))
    return rows


def tickets(half: str) -> list[tuple[list[str], list[str]]]:
    """(words, labels) of every sentence."""
    text = files("veneer").joinpath("data", "tickets_ner", f"{half}.conll").read_text(encoding="utf-8")
    sentences = []
    for block in text.strip().split("\n\n"):
        pairs = [line.split("\t") for line in block.split("\n")]
        assert all(len(pair) == 2 and all(pair) for pair in pairs), block
        sentences.append(([word for word, _ in pairs], [label for _, label in pairs]))
    return sentences


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def closest(left: list[set[str]], right: list[set[str]]) -> float:
    """The largest share of common words between a set on the left and one on the right."""
    return max(len(a & b) / len(a | b) for a in left for b in right)


def language(message: str) -> str:
    hits = {name: len(words & words_of(message)) for name, words in LANGUAGE_WORDS.items()}
    best = max(hits, key=lambda name: hits[name])
    return best if hits[best] else "en"


@pytest.mark.parametrize("half", PARTS)
def test_orders_share_one_short_system_prompt_and_are_minified(half: str) -> None:
    text = files("veneer").joinpath("data", "orders", f"{half}.jsonl").read_text(encoding="utf-8")
    prompts = {json.loads(line)["messages"][0]["content"] for line in text.splitlines()}
    assert prompts == {"Order to JSON"}
    for message, request, answer in orders(half):
        assert answer == json.dumps(request, ensure_ascii=False, separators=(",", ":")), message


@pytest.mark.parametrize("half", PARTS)
def test_orders_keep_the_schema_and_the_order_of_keys(half: str) -> None:
    for message, request, _ in orders(half):
        assert list(request) == ["action", *SCHEMA[request["action"]]], message
        assert request["action"] != "order" or request["items"], message
        assert all(isinstance(request[key], bool) for key in ("gift", "bag") if key in request)
        assert type(request.get("order_id")) in (int, type(None))
        for item in request.get("items", []):
            assert list(item) == ITEM_KEYS, message
            assert type(item["qty"]) is int, message
            assert item["qty"] >= 1, message
            assert item["size"] in {*SIZES, None}


@pytest.mark.parametrize("half", PARTS)
def test_orders_quote_the_message(half: str) -> None:
    for message, request, _ in orders(half):
        quoted = [request[key] for key in ("date", "note") if request.get(key)]
        quoted += [item[key] for item in request.get("items", []) for key in ("name", "color") if item[key]]
        quoted += [str(request["order_id"])] if request.get("order_id") else []
        for value in quoted:
            assert re.search(rf"(?<!\w){re.escape(value)}(?!\w)", message), (value, message)
        note = request.get("note")
        assert f'"{note}"' in message if note else '"' not in message, message


def test_orders_do_not_repeat_or_leak() -> None:
    train, test, later = ([message for message, _, _ in orders(part)] for part in PARTS)
    assert len(train) >= 420
    assert len(test) >= 70
    plain = [" ".join(re.findall(r"\w+", message.lower())) for message in train + test + later]
    assert len(set(plain)) == len(plain)
    for held in (test, later):
        assert closest([words_of(m) for m in train], [words_of(m) for m in held]) < 0.8


@pytest.mark.parametrize(("half", "least"), [("train", 20), ("test", 2)])
def test_orders_cover_languages_actions_and_fields(half: str, least: int) -> None:
    rows = orders(half)
    spoken = Counter(language(message) for message, _, _ in rows)
    assert all(spoken[name] >= least for name in ("en", "de", "fr", "es")), spoken
    fields = Counter(key for _, request, _ in rows for key, value in request.items() if value not in (None, []))
    assert all(fields[key] >= least for key in KEYS), fields
    actions = Counter(request["action"] for _, request, _ in rows)
    assert all(actions[name] >= least for name in ACTIONS), actions
    flags = Counter((key, request[key]) for _, request, _ in rows for key in ("gift", "bag") if key in request)
    assert all(flags[key, value] >= 1 for key in ("gift", "bag") for value in (True, False)), flags


@pytest.mark.parametrize("half", HALVES)
def test_tickets_are_iob2(half: str) -> None:
    for words, labels in tickets(half):
        assert not any(re.search(r"\s", word) for word in words)
        for before, label in zip(["O", *labels], labels):
            assert label == "O" or (label[:2] in ("B-", "I-") and label[2:] in ENTITIES), (words, label)
            if label.startswith("I-"):
                assert before in (f"B-{label[2:]}", label), (words, before, label)


@pytest.mark.parametrize(("half", "least"), [("train", 60), ("test", 15)])
def test_tickets_cover_every_entity(half: str, least: int) -> None:
    seen = Counter(label[2:] for _, labels in tickets(half) for label in labels if label.startswith("B-"))
    assert set(seen) == ENTITIES
    assert min(seen.values()) >= least, seen
    assert any(set(labels) == {"O"} for _, labels in tickets(half))


def test_tickets_do_not_repeat_or_leak() -> None:
    train, test = ([words for words, _ in tickets(half)] for half in HALVES)
    assert len(train) >= 280
    assert len(test) >= 75
    plain = [" ".join(words).lower() for words in train + test]
    assert len(set(plain)) == len(plain)
    sets = [[{word.lower() for word in words} for words in half] for half in (train, test)]
    assert closest(*sets) < 0.8


@pytest.mark.parametrize("name", ["orders", "tickets_ner"])
def test_each_set_has_a_card_that_names_its_fields_and_licence(name: str) -> None:
    card = files("veneer").joinpath("data", name, "README.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in card
    for field in (*KEYS, *ITEM_KEYS) if name == "orders" else sorted(ENTITIES):
        assert f"`{field}`" in card, field
    rows = len(orders("train")) if name == "orders" else len(tickets("train"))
    held = len(orders("test")) if name == "orders" else len(tickets("test"))
    assert f"{rows} train" in card
    assert f"{held} test" in card
