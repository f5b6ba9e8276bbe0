"""Variants of hand-written order messages: the same sentence with another thing, colour, number, day or order number.

    python examples/vary_orders.py train.jsonl test.jsonl > more.jsonl

Every JSON value of the `orders` data is quoted from its message, so a slot can be exchanged in both at once. A slot is
only exchanged where its words stand once in the message. English rows vary in every slot; rows in languages whose
articles and adjectives agree with the noun only in numbers written as digits, order numbers and weekdays. No variant
is a near copy of a test message.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

THINGS = {
    "mug": "mugs", "t-shirt": "t-shirts", "hoodie": "hoodies", "cap": "caps", "scarf": "scarves", "poster": "posters",
    "notebook": "notebooks", "backpack": "backpacks", "candle": "candles", "umbrella": "umbrellas",
    "blanket": "blankets", "teapot": "teapots", "lamp": "lamps",
}  # fmt: skip
WORN = ("t-shirt", "hoodie")  # only these have sizes
PLURALS = {v: k for k, v in THINGS.items()}
COLORS = ["red", "blue", "green", "black", "white", "yellow", "grey", "pink"]
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
FOREIGN_DAYS = [
    ["Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"],
    ["lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "dimanche"],
    ["lunes", "martes", "miércoles", "jueves", "viernes", "sábado", "domingo"],
]
RELATED = r"\b(both|of them|of those|total|each|half|dozen|couple|together|instead|not|rather)\b"  # numbers that depend
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October"]


class Row:
    """One message and its JSON, changed together."""

    def __init__(self, text: str, answer: dict[str, Any], rng: random.Random):
        self.text, self.answer, self.rng = text, answer, rng

    def swap(self, old: str, new: str) -> bool:
        """Exchange words in the message, where they stand once; the case of the first letter is kept."""
        found = list(re.finditer(rf"(?<![\w-]){re.escape(old)}(?![\w-])", self.text))
        if len(found) != 1 or old == new:
            return False
        start, end = found[0].span()
        head = self.text[:start]
        if re.search(r"\b[Aa]n? $", head):
            head = re.sub(r"\b([Aa])n? $", lambda m: m[1] + ("n " if new[0].lower() in "aeiou" else " "), head)
        self.text = head + new + self.text[end:]
        return True

    def items(self) -> None:
        names = [item["name"] for item in self.answer.get("items", [])]
        if len(set(names)) == len(names):
            for item in self.answer.get("items", []):
                self.thing(item, names)
        for item in self.answer.get("items", []):
            self.color(item)
            self.number(item)

    def thing(self, item: dict[str, Any], taken: list[str]) -> None:
        old = item["name"]
        table: Callable[[str], str] = (lambda k: THINGS[k]) if old in PLURALS else (lambda k: k)
        if old not in THINGS and old not in PLURALS:
            return
        pool = WORN if item.get("size") or PLURALS.get(old, old) in WORN else [k for k in THINGS if k not in WORN]
        new = table(self.rng.choice([k for k in pool if table(k) not in taken] or [PLURALS.get(old, old)]))
        if self.swap(old, new):
            taken[taken.index(old)] = item["name"] = new

    def color(self, item: dict[str, Any]) -> None:
        if item.get("color") in COLORS:
            free = [c for c in COLORS if not re.search(rf"\b{c}\b", self.text, re.IGNORECASE)]
            new = self.rng.choice(free)
            if sum(i.get("color") == item["color"] for i in self.answer["items"]) == 1 and self.swap(
                item["color"], new
            ):
                item["color"] = new

    def number(self, item: dict[str, Any]) -> None:
        words = {v: k for k, v in NUMBERS.items()}
        old, new = item["qty"], self.rng.choice(list(NUMBERS.values()))
        counted = re.findall(rf"\b({'|'.join(NUMBERS)}|\d{{1,2}})\b", self.text.lower())
        if re.search(RELATED, self.text.lower()) or len(counted) > len(self.answer["items"]):
            return
        if old in words and sum(i["qty"] == old for i in self.answer["items"]) == 1:
            if self.swap(words[old], words[new]) or self.swap(words[old].capitalize(), words[new].capitalize()):
                item["qty"] = new
            else:
                self.digits(item)

    def digits(self, item: dict[str, Any]) -> None:
        new = self.rng.randint(2, 12)
        if item["qty"] > 1 and self.swap(str(item["qty"]), str(new)):
            item["qty"] = new

    def order_id(self) -> None:
        new = self.rng.randint(1000, 9999)
        if self.answer.get("order_id") and self.swap(str(self.answer["order_id"]), str(new)):
            self.answer["order_id"] = new

    def date(self, english: bool) -> None:
        old = self.answer.get("date") or ""
        for days in [DAYS, [d.lower() for d in DAYS], *([] if english else FOREIGN_DAYS)]:
            if old in days:
                new = self.rng.choice(days)
                if self.swap(old, new):
                    self.answer["date"] = new
        match = re.fullmatch(rf"({'|'.join(MONTHS)}) \d+|\d+ ({'|'.join(MONTHS)})", old)
        if match:
            month, day = self.rng.choice(MONTHS), str(self.rng.randint(1, 28))
            new = f"{month} {day}" if match[1] else f"{day} {month}"
            if self.swap(old, new):
                self.answer["date"] = new


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def near(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def variants(rows: list[dict[str, Any]], held_out: list[set[str]], rng: random.Random) -> Iterator[dict[str, Any]]:
    seen = {row["messages"][1]["content"].lower() for row in rows}
    for row in rows:
        system, user, assistant = (m["content"] for m in row["messages"])
        english = not re.search(
            r"[àâäáçéèêëíîïñóôöùûúüß¿¡]|\b(und|eine?n?|bitte|der|mir|une?|des|pour|les|mes|una?|por|los|las|para|dos)\b",
            user.lower(),
        )
        made = Row(user, json.loads(assistant), rng)
        made.order_id()
        made.date(english)
        if english:
            made.items()
        else:
            for item in made.answer.get("items", []):
                made.digits(item)
        if made.text.lower() in seen or any(near(words(made.text), w) >= 0.8 for w in held_out):
            continue
        seen.add(made.text.lower())
        answer = json.dumps(made.answer, ensure_ascii=False, separators=(",", ":"))
        contents = (system, made.text, answer)
        yield {"messages": [{**m, "content": c} for m, c in zip(row["messages"], contents, strict=True)]}


def main() -> None:
    train, test = ([json.loads(line) for line in Path(p).read_text("utf-8").splitlines()] for p in sys.argv[1:3])
    held_out = [words(row["messages"][1]["content"]) for row in test]
    for row in variants(train, held_out, random.Random(0)):
        print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
