"""How word labels mark entities: which scheme rows follow, and where they break it.

The letters are those of IOB1 and IOB2 (Tjong Kim Sang and Veenstra 1999), their mirror images IOE1 and IOE2, IOBES
(also BIOES) and BILOU (Ratinov and Roth 2009), whose L and U are the E and S of IOBES.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["as_iobes", "breaks", "scheme_of", "tags_are_entities"]

#: the letters of each scheme; of those that have all of a set of rows, the one with the fewest breaks is meant
_LETTERS = {"IOB2": "BI", "IOB1": "BI", "IOE2": "IE", "IOE1": "IE", "IOBES": "BIES", "BILOU": "BILU"}
_AS_IOBES = {"L": "E", "U": "S"}


def tags_are_entities(names: Iterable[str]) -> bool:
    """Whether labels are `O` and `B-x`, `I-x`, `E-x`, `S-x`, `L-x` or `U-x`."""
    names = list(names)
    return any(name != "O" for name in names) and all(re.fullmatch(r"O|[BIESLU]-.+", name) for name in names)


def as_iobes(labels: Sequence[str]) -> list[str]:
    """Labels with BILOU's L and U written as E and S; the others as they are."""
    return [_AS_IOBES[label[0]] + label[1:] if label[:2] in {"L-", "U-"} else label for label in labels]


def scheme_of(rows: Sequence[Sequence[str]]) -> str:
    """The scheme that rows of labels follow, or break the least; where rows follow several, the first of IOB2, IOB1,
    IOE2, IOE1, IOBES, BILOU.

    Raises:
        ValueError: letters that no scheme has together.
    """
    letters = {label[0] for row in rows for label in row if label != "O"}
    fits = [name for name, own in _LETTERS.items() if letters <= set(own)]
    if not fits:
        raise ValueError(f"the letters {', '.join(sorted(letters))} are together in no scheme ({', '.join(_LETTERS)})")
    return min(fits, key=lambda name: sum(len(breaks(row, name)) for row in rows))


def breaks(labels: Sequence[str], scheme: str) -> list[int]:
    """The words whose label does not follow the scheme, given the labels beside it."""
    parts = [(label[0], label[2:]) for label in as_iobes(labels)]
    outside = ("O", "")
    before, after = [outside, *parts[:-1]], [*parts[1:], outside]
    rule = _RULES["IOBES" if scheme == "BILOU" else scheme]
    return [i for i, part in enumerate(parts) if part[0] != "O" and not rule(before[i], part, after[i])]


Part = tuple[str, str]


def _iob2(before: Part, own: Part, after: Part) -> bool:
    return own[0] == "B" or before in {("B", own[1]), ("I", own[1])}


def _iob1(before: Part, own: Part, after: Part) -> bool:
    """B only parts an entity from one of its type right before it."""
    return own[0] == "I" or before[1] == own[1]


def _iobes(before: Part, own: Part, after: Part) -> bool:
    """What has begun ends: B and I are followed by I or E of their type, I and E follow B or I."""
    opened = own[0] in "BS" or before in {("B", own[1]), ("I", own[1])}
    return opened and (own[0] in "ES" or after in {("I", own[1]), ("E", own[1])})


def _mirrored(part: Part) -> Part:
    return ("B" if part[0] == "E" else part[0], part[1])


_RULES = {
    "IOB2": _iob2,
    "IOB1": _iob1,
    "IOE2": lambda before, own, after: _iob2(_mirrored(after), _mirrored(own), _mirrored(before)),
    "IOE1": lambda before, own, after: _iob1(_mirrored(after), _mirrored(own), _mirrored(before)),
    "IOBES": _iobes,
}
