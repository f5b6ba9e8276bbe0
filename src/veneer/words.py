"""Layers in words: ``layers="encoder&last:2"`` instead of a list of numbers.

A word picks layers by their place in their stack; stacks are found in the module graph, so the words
mean the same on every architecture. The grammar, loosest binding first::

    choice  :=  term ("," term)*            union
    term    :=  factor ("&" factor)*        intersection
    factor  :=  ["!"] word                  everything but
    word    :=  every:N | every:N+K         every N-th layer, starting at layer K (0)
             |  first:N | last:N | middle:N a number of layers ...
             |  first:P% | last:P% | middle:P%   ... or a share, rounded to the nearest, at least one
             |  even | odd | N | N-M        by index, from 0, M included
             |  encoder | decoder           all layers of that side

Indices count within each stack: the blocks of an encoder and of a decoder apart.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

GRAMMAR = (
    "words are every:N, every:N+K, first:N, last:N, middle:N (or a share, first:25%), even, odd, N, N-M, "
    "encoder, decoder; join them with ',' (union) and '&' (intersection), negate with '!'"
)
_EXAMPLES = ("every:2", "first:4", "last:4", "middle:4", "even", "odd", "encoder", "decoder")

Place = tuple[str, int]  # (path of the stack, index in it)


@dataclass(frozen=True)
class Stack:
    """A list of like blocks: ``path`` in the model, ``length`` blocks, ``side`` encoder, decoder or None."""

    path: str
    length: int
    side: str | None


@dataclass(frozen=True)
class Word:
    """One parsed word: the indices it picks, and the stack length without which it makes no sense."""

    text: str
    pick: Callable[[Stack], Iterable[int]]
    need: int = 0
    negated: bool = False


def find_stacks(model: nn.Module) -> list[Stack]:
    """The outermost stacks of blocks, in the model's order.

    A stack is an ``nn.ModuleList`` (or an ``nn.Sequential`` of two or more blocks of one class) whose
    entries have children of their own. Lists inside a block (the sub-layers of T5, experts) are parts of
    that block. Where a model has none, lists of one class of plain modules count.
    """
    return _stacks(model, composite=True) or _stacks(model, composite=False)


def _stacks(model: nn.Module, composite: bool) -> list[Stack]:
    found: list[Stack] = []
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or path.startswith(inside):
            continue
        if _is_stack(module, composite):
            found.append(Stack(path, len(module), _side(path, module)))
            inside += (f"{path}." if path else "",)
    return found


def _is_stack(module: nn.ModuleList | nn.Sequential, composite: bool) -> bool:
    blocks = list(module.children())
    if not blocks:
        return False
    alike = len({type(block) for block in blocks}) == 1
    nested = all(next(block.children(), None) is not None for block in blocks)
    if isinstance(module, nn.Sequential):
        return composite and alike and nested and len(blocks) > 1
    # hybrids mix block classes in one list, so blocks that hold modules need not be alike
    return nested if composite else alike


def _side(path: str, stack: nn.ModuleList | nn.Sequential) -> str | None:
    """The outermost path component that says so decides, then the blocks' class name."""
    block = type(next(stack.children())).__name__
    for part in (*path.lower().split("."), block.lower()):
        sides = [side for side in ("encoder", "decoder") if side in part]
        if len(sides) == 1:
            return sides[0]
    return None


def _share(number: str, percent: str | None, n: int) -> int:
    if not percent:
        return min(int(number), n)
    return min(n, max(1, (n * int(number) + 50) // 100))


def _ends(kind: str, number: str, percent: str | None) -> Callable[[Stack], Iterable[int]]:
    def pick(stack: Stack) -> Iterable[int]:
        n = stack.length
        k = _share(number, percent, n)
        start = {"first": 0, "last": n - k, "middle": (n - k) // 2}[kind]
        return range(start, start + k)

    return pick


def parse_word(text: str) -> Word:
    """One word without operators. Raises ValueError with the grammar and the nearest word."""
    if text in ("encoder", "decoder"):
        return Word(text, lambda s: range(s.length if s.side == text else 0))
    if text in ("even", "odd"):
        return Word(text, lambda s: range(int(text == "odd"), s.length, 2))
    if m := re.fullmatch(r"every:(\d+)(?:\+(\d+))?", text):
        step, start = int(m[1]), int(m[2] or 0)
        if step < 1:
            raise ValueError(f"layers: {text!r} steps by 0; every:N needs N of at least 1")
        return Word(text, lambda s: range(start, s.length, step), need=start + 1)
    if m := re.fullmatch(r"(first|last|middle):(\d+)(%)?", text):
        if int(m[2]) < 1 or (m[3] and int(m[2]) > 100):
            raise ValueError(f"layers: {text!r} asks for {m[2]}{m[3] or ' layers'}; give 1 to 100% or 1 layer up")
        return Word(text, _ends(m[1], m[2], m[3]), need=0 if m[3] else int(m[2]))
    if m := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        low, high = int(m[1]), int(m[2] or m[1])
        if high < low:
            raise ValueError(f"layers: {text!r} runs backwards; write {high}-{low}")
        return Word(text, lambda s: range(low, min(high + 1, s.length)), need=high + 1)
    near = difflib.get_close_matches(text, _EXAMPLES, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"layers: {text!r} is not a word I know.{hint} The {GRAMMAR}.")


def parse_layers(words: str | int | Iterable[str | int]) -> list[list[Word]]:
    """A union of intersections of words. A list is a union of its entries."""
    entries = [words] if isinstance(words, (str, int)) else list(words)
    terms = []
    for term in ",".join(str(entry) for entry in entries).split(","):
        factors = []
        for factor in term.split("&"):
            text = factor.strip().lower()
            bare = text.lstrip("!")
            word = parse_word(bare.strip())
            factors.append(Word(text, word.pick, word.need, (len(text) - len(bare)) % 2 == 1))
        terms.append(factors)
    return terms


def select_layers(stacks: list[Stack], words: str | int | Iterable[str | int]) -> set[Place]:
    """The layers that ``words`` pick, as (stack path, index).

    Raises:
        ValueError: an unknown word; a model without stacks; a word that no stack is long enough for; a
            side that the model does not have; a choice that comes out empty.
    """
    terms = parse_layers(words)
    if not stacks:
        raise ValueError(
            f"layers={words!r} needs a stack of layers, but the model has no nn.ModuleList of blocks; "
            "name the modules in target_modules instead"
        )
    universe = {(stack.path, i) for stack in stacks for i in range(stack.length)}
    picked: set[Place] = set()
    for term in terms:
        chosen = universe
        for word in term:
            places = _places(word, stacks)
            chosen = chosen - places if word.negated else chosen & places
        picked |= chosen
    if not picked:
        raise ValueError(f"layers={words!r} picks no layer of {_listing(stacks)}")
    return picked


def _places(word: Word, stacks: list[Stack]) -> set[Place]:
    longest = max(stack.length for stack in stacks)
    if word.need > longest:
        raise ValueError(f"layers: {word.text!r} needs {word.need} layers, but the model has {_listing(stacks)}")
    places = {(stack.path, i) for stack in stacks for i in word.pick(stack)}
    if not places:
        raise ValueError(f"layers: {word.text!r} picks nothing; the model has {_listing(stacks)}")
    return places


def _listing(stacks: list[Stack]) -> str:
    return ", ".join(
        f"{s.path or 'the model itself'} (layers 0-{s.length - 1}{', ' + s.side if s.side else ''})" for s in stacks
    )


def place_of(name: str, stacks: Iterable[Stack]) -> Place | None:
    """Where a module lives: (stack path, index), or None outside every stack."""
    for stack in stacks:
        prefix = f"{stack.path}." if stack.path else ""
        if name.startswith(prefix):
            index = name[len(prefix) :].partition(".")[0]
            if index.isdecimal():
                return stack.path, int(index)
    return None
