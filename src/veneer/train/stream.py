"""Training rows read while a run trains, for data larger than memory: drawn, shuffled in a buffer, made into tokens.

What comes when depends on the seed and on how many rows came before, so a run that was cut short reads up to where it
was and goes on with the very row that would have come next.
"""

from __future__ import annotations

import itertools
import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import IterableDataset

from veneer.train.errors import DataError
from veneer.train.mixing import shares
from veneer.train.readers import Row
from veneer.train.sampler import WINDOW
from veneer.train.sources import Part, Place, parts_of

if TYPE_CHECKING:
    from veneer.train.data import Layout, Table
    from veneer.train.recipe import Recipe

__all__ = ["FILE", "Mark", "RowStream", "Stream", "by_length", "open_stream"]

FILE = "stream.json"
#: rows that are checked and made into tokens together
CHUNK = 256
#: bounds of how many of the first rows stand for the others
SAMPLE = (1000, 10_000)

Placed = tuple[Place, Row, int]


class Mark(NamedTuple):
    """A place where a chunk begins: features made before it, and the rows they came from."""

    features: int = 0
    rows: int = 0


def buffered(rows: Iterator[Placed], size: int, draw: random.Random) -> Iterator[Placed]:
    """Rows in an order drawn from a buffer of ``size``: each that comes takes the place of one that goes."""
    buffer = list(itertools.islice(rows, size))
    for row in rows:
        place = draw.randrange(len(buffer))
        buffer[place], row = row, buffer[place]
        yield row
    draw.shuffle(buffer)
    yield from buffer


def by_length(features: list[dict[str, Any]], batch: int, seed: str) -> list[dict[str, Any]]:
    """Features of like lengths together, ``batch`` at a time, the batches in an order drawn from the seed."""
    if len(features) <= batch:
        return features
    features = sorted(features, key=lambda feature: feature["length"])
    batches = [features[first : first + batch] for first in range(0, len(features), batch)]
    random.Random(seed).shuffle(batches)
    return list(itertools.chain.from_iterable(batches))


class RowStream:
    """The rows of all sources, as often as they are wanted: one pass after the other, each in an order of its own."""

    def __init__(self, parts: Sequence[Part], layouts: Sequence[Layout], recipe: Recipe) -> None:
        self.parts, self.layouts, self.task, self.seed = parts, layouts, recipe.task, recipe.seed
        self.buffer, self.stopping = recipe.data.shuffle_buffer, recipe.data.stopping_strategy

    def __iter__(self) -> Iterator[Placed]:
        """Rows without end. Raises DataError where there are none."""
        for number in itertools.count():
            empty = True
            for row in self.one_pass(number):
                empty = False
                yield row
            if empty:
                raise DataError("holds no rows that are taken", file=self.parts[0].path, hint="Look at `data.filter`.")

    def one_pass(self, number: int) -> Iterator[Placed]:
        """All rows once, or, with weights, until every source (or one) is used up."""
        draw = random.Random(f"{self.seed} {number}")
        return buffered(self._drawn(draw), self.buffer, draw)

    def _drawn(self, draw: random.Random) -> Iterator[Placed]:
        probabilities = shares([part.source.weight for part in self.parts])
        if probabilities is None or len(self.parts) == 1:
            yield from itertools.chain.from_iterable(self._source(number) for number in range(len(self.parts)))
            return
        sources = [self._source(number) for number in range(len(self.parts))]
        whole: set[int] = set()
        came: set[int] = set()
        while True:
            [number] = draw.choices(range(len(sources)), probabilities)
            row = next(sources[number], None)
            if row is None:
                whole.add(number)
                if self.stopping == "first_exhausted" or len(whole) == len(sources):
                    return
                if number not in came:
                    raise DataError("holds no rows that are taken", file=self.parts[number].path)
                sources[number] = self._source(number)
                row = next(sources[number])
            came.add(number)
            yield row

    def _source(self, number: int) -> Iterator[Placed]:
        part = self.parts[number]
        for place, row in itertools.islice(part.rows(streaming=True), part.spec.limit):
            yield place, row, number

    def table(self, rows: Sequence[Placed]) -> Table:
        """A table of rows. Raises DataError, with the file and line, where one is not what the task reads."""
        from veneer.train.data import pick, table_of
        from veneer.train.layouts import joined

        picked = [(place, pick(self.layouts[part], self.task, place, row)) for place, row, part in rows]
        return table_of(self.parts[0].path, joined(self.layouts), picked)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Training rows as tokens, without end. ``encode`` makes features of a table.

    ``batch``: features of a step, if steps are to have features of like lengths; they are put in order within windows
    no longer than the buffer. ``resume`` makes the next pass begin further on; before it, as many stand-ins come as
    there were features, for Trainer counts and drops those that it has seen.
    """

    def __init__(self, rows: RowStream, encode: Callable[[Table], Any], batch: int | None = None) -> None:
        self.rows, self.encode = rows, encode
        self.batch = batch or 1
        self.window = self.batch * max(1, min(WINDOW, rows.buffer // self.batch)) if batch else 1
        self.marks: list[Mark] = [Mark()]
        self.seen = 0
        self.came: Counter[str] = Counter()

    def mark(self, features: int) -> Mark:
        """The last chunk that begins at or before the window of the next feature after so many."""
        begin = features - features % self.window
        return self.marks[bisect_right(self.marks, begin, key=lambda mark: mark.features) - 1]

    def resume(self, features: int, mark: Mark) -> None:
        """Go on after so many features, reading tokens from ``mark`` on."""
        self.seen, self.marks = features, [mark]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        features = self._in_order(self.seen)
        if self.seen:
            first = next(features)
            yield from itertools.repeat(first, self.seen)
            yield first
        yield from features

    def _in_order(self, seen: int) -> Iterator[dict[str, Any]]:
        """Features after so many, as they are trained on."""
        number, inside = divmod(seen, self.window)
        features = self._features(self.marks[0])
        for _ in range(number * self.window - self.marks[0].features):
            next(features)
        while True:
            window = by_length(list(itertools.islice(features, self.window)), self.batch, f"{self.rows.seed} {number}")
            yield from window[inside:]
            number, inside = number + 1, 0

    def _features(self, start: Mark) -> Iterator[dict[str, Any]]:
        count, read = start
        self.marks, self.came = [start], Counter()
        rows = iter(self.rows)
        self.came.update(self.rows.parts[row[2]].path.name for row in itertools.islice(rows, read))
        while True:
            chunk = list(itertools.islice(rows, CHUNK))
            made = self.encode(self.rows.table(chunk)).to_list()
            for feature in made:
                if "row" in feature:  # what a mask is drawn from: no two passes alike
                    feature["row"] = count
                count += 1
                yield feature
            read += len(chunk)
            self.came.update(self.rows.parts[part].path.name for _, _, part in chunk)
            self.marks.append(Mark(count, read))

    def describe(self) -> list[str]:
        """One sentence: how many rows came from each source, where they were read by this process."""
        total = sum(self.came.values())
        if not total:
            return []
        shown = ", ".join(f"{name} {number:,} ({number / total:.0%})" for name, number in self.came.items())
        return [f"About {total:,} rows were read from the stream: {shown}."]


def open_stream(recipe: Recipe) -> tuple[RowStream, Table]:
    """The rows of a recipe that streams, and a table of the first of them.

    Raises:
        DataError: no rows, or first ones that cannot be used.
    """
    from dataclasses import replace

    from veneer.train.data import layouts_of

    parts = parts_of(recipe.data, "train")
    stream = RowStream(parts, layouts_of(parts, recipe.task), recipe)
    size = min(max(recipe.data.shuffle_buffer, SAMPLE[0]), SAMPLE[1])
    first = list(itertools.islice(stream.one_pass(0), size))
    if not first:
        raise DataError("holds no rows that are taken", file=Path(parts[0].path), hint="Look at `data.filter`.")
    notes = [f"Rows are streamed; the first {len(first):,} stand for all in what is said of them here."]
    if len(parts) > 1 and shares([part.source.weight for part in parts]) is None:
        notes.append("The sources come one after the other; give them weights (`weight: 1`) to have them mixed.")
    table = stream.table(first)
    return stream, replace(table, notes=tuple(notes), workers=recipe.data.workers)
