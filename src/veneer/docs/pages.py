"""The text of the methods' pages, in Markdown."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Sequence

from ..config import AdapterConfig, PromptLearningConfig
from .example import example
from .facts import Facts, Field, fields_of
from .layers import INP, OUT

NOTE = "<!-- Written by `make docs` from the method's file; edits here are lost. -->"
FAMILIES = {AdapterConfig: "fields-of-methods-that-adapt-layers", PromptLearningConfig: "fields-of-prompt-methods"}


def filename(name: str) -> str:
    return f"{name.lower()}.md"


def page(facts: Facts) -> str:
    """One method's page."""
    parts = [NOTE, f"# {facts.title}", _prose(facts.doc.partition(":")[2].strip()), _capabilities(facts)]
    parts += [_tensors(facts), _fields(facts), _example(facts)]
    return "\n\n".join(parts) + "\n"


def _prose(doc: str) -> str:
    """A docstring as Markdown: what is indented stays as it stands, in a code block."""
    out = []
    for block in re.split(r"\n\s*\n", doc):
        lines = block.split("\n")
        split = next((i for i, line in enumerate(lines) if line.startswith("    ")), len(lines))
        if split:
            out.append("\n".join(lines[:split]))
        if split < len(lines):
            code = inspect.cleandoc("\n".join(lines[split:])) if all(_indented(x) for x in lines[split:]) else None
            out.append(f"```\n{code}\n```" if code is not None else "\n".join(lines[split:]))
    text = "\n\n".join(out)
    return text[:1].upper() + text[1:]


def _indented(line: str) -> bool:
    return line.startswith("    ") or not line.strip()


def _capabilities(facts: Facts) -> str:
    rows = [("config", f"`{facts.config.__name__}`" + _selected(facts))]
    if facts.on_layers:
        rows += [("layers", ", ".join(facts.layers)), ("merges", merges(facts))]
        rows += [("a batch may mix adapters", yes(facts.mixed)), ("several adapters at once", yes(facts.several))]
    else:
        rows += [("acts on", "the whole model"), ("merges", "no")]
    if facts.variants:
        rows.append(("variants", ", ".join(f"[{v}]({filename(v)})" for v in facts.variants)))
    return "\n".join(["## What it does", "", "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def _selected(facts: Facts) -> str:
    """The option that selects a method which has no type of its own."""
    if facts.public:
        return f', `peft_type="{facts.name}"`'
    options = ", ".join(f"{k}={v!r}" for k, v in facts.method.example.items())
    return f" with `{options}`"


def yes(value: bool) -> str:
    return "yes" if value else "no"


def merges(facts: Facts) -> str:
    if not facts.merges:
        return "no"
    missing = [k for k in facts.layers if k not in facts.merges]
    return "yes" + (f", except on {', '.join(missing)}" if missing else "")


def _tensors(facts: Facts) -> str:
    if not facts.tensors:
        return "## Tensors\n\nNone of its own: it acts through other adapters."
    if facts.on_layers:
        head = (
            f"With the example's settings, on a {facts.layers[0]} of {INP} inputs and {OUT} outputs called `layer`; a "
            "name without it is that of a tensor which all layers share."
        )
    else:
        head = "In the file, with the example's settings, on the example's model."
    lines = ["## Tensors", "", head, "", "| name | shape | trained | in the file |", "|---|---|---|---|"]
    lines += [f"| `{t.key}` | {_shape(t.shape)} | {yes(t.trained)} | {yes(t.saved)} |" for t in facts.tensors]
    return "\n".join(lines)


def _shape(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _fields(facts: Facts) -> str:
    lines = [f"## {facts.config.__name__}", "", *field_table(facts.config, facts.fields)]
    family = next((anchor for cls, anchor in FAMILIES.items() if issubclass(facts.config, cls)), None)
    if family:
        lines += ["", f"It also has [the fields of its family](README.md#{family})."]
    return "\n".join(lines)


def field_table(config: type, fields: Sequence[Field]) -> list[str]:
    """A row a field; what the class or its parents say of it ("r: rank. alpha: ...") goes into the row, the rest in
    front."""
    said: dict[str, str] = {}
    intro = ""
    for cls in reversed([c for c in config.__mro__ if dataclasses.is_dataclass(c)]):
        intro, here = described(inspect.cleandoc(cls.__doc__ or ""), [f.name for f in fields])
        said |= here
    lines = [intro, ""] if intro else []
    if fields:
        lines += ["| field | type | default | |", "|---|---|---|---|"]
    for f in fields:
        cells = (f"`{f.name}`", f"`{f.type}`", f"`{f.default}`", said.get(f.name, ""))
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return lines


def described(doc: str, names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The text before the first field, and field -> what is said of it; of fields named together the first has it."""
    if not names:
        return " ".join(doc.split()), {}
    either = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    marks = list(re.finditer(rf"(?<![\w\"'.])(?P<names>(?:{either})(?:(?:, | and )(?:{either}))*):\s", doc))
    said: dict[str, str] = {}
    for mark, after in zip(marks, [*(m.start() for m in marks[1:]), len(doc)]):
        text = " ".join(doc[mark.end() : after].split())
        first, *others = re.split(", | and ", mark["names"])
        said[first] = text
        said |= dict.fromkeys(others, f"see {first}")
    return " ".join((doc[: marks[0].start()] if marks else doc).split()), said


def _example(facts: Facts) -> str:
    return f"## Example\n\n```python\n{example(facts)}```"


def families() -> str:
    """The fields that methods have in common."""
    out = []
    for cls, anchor in FAMILIES.items():
        table = field_table(cls, fields_of(dataclasses.fields(cls)))
        out.append("\n".join([f"## {anchor.replace('-', ' ').capitalize()}", "", *table]))
    return "\n\n".join(out)
