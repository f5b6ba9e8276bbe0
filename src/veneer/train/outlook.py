"""A run seen before it is begun: the model without weights, the rows as they will be read, what is odd about them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.train.encode import IGNORE
from veneer.train.errors import RecipeError
from veneer.train.estimate import Estimate, Speed, batches_of, estimate, kernels_of

if TYPE_CHECKING:
    from veneer.train.prepare import Parts
    from veneer.train.recipe import Recipe

__all__ = ["Matches", "Outlook", "Rows", "Stream", "outlook"]

#: (text of a token, whether its label is learned)
Stream = list[tuple[str, bool]]
BINS = 10


@dataclass(frozen=True)
class Matches:
    """Adapted layers by the last part of their names, how many of the whole, and patterns that matched nothing."""

    layers: dict[str, int]
    trained: int
    total: int
    unmatched: list[str]


@dataclass(frozen=True)
class Rows:
    """The training rows: their number, tokens, longest and middle length, histogram ((from, to), rows), the share of
    padding in the batches, the share of tokens that are learned.
    """

    number: int
    test: int
    tokens: int
    longest: int
    middle: int
    histogram: list[tuple[tuple[int, int], int]]
    padding: float
    learned: float


@dataclass(frozen=True)
class Outlook:
    """What `veneer plan` shows. ``base`` is what the process holds beside a model, in bytes: Python, its libraries."""

    matches: Matches
    rows: Rows
    estimate: Estimate
    examples: list[Stream]
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    base: int = 0


def outlook(recipe: Recipe, speed: Speed | None = None) -> Outlook:
    """Check a recipe and look at everything that can be known of its run without weights.

    Raises:
        RecipeError: what would stop the run before its first step.
    """
    from veneer.train.checks import check_recipe
    from veneer.train.data_warnings import data_warnings, pad_warning
    from veneer.train.prepare import prepare, read_rows
    from veneer.train.progress import memory_in_use_mb

    check_recipe(recipe)
    parts = prepare(recipe, Path(recipe.out) / "checkpoints")
    if parts.ref.quantize is not None:
        parts.notes.append(f"The estimate counts the weights before {parts.ref.quantize} makes them smaller.")
    if getattr(parts.args, "activation_checkpointing", None) or parts.args.gradient_checkpointing:
        parts.notes.append("The estimate is without checkpointing of activations, which holds less and takes longer.")
    model, kernels = _model(recipe, parts)
    needs = estimate(recipe, parts, model, kernels, speed)
    _, train, test = read_rows(recipe)
    return Outlook(
        matches=_matches(recipe, model),
        rows=_rows(recipe, parts),
        estimate=needs,
        examples=[_stream(parts, row) for row in _some(len(parts.plan.train))],
        warnings=[*data_warnings(recipe, parts, train, test), *pad_warning(parts.tokenizer)],
        notes=parts.notes,
        base=round(memory_in_use_mb() * 2**20),  # every library is loaded by now
    )


def _model(recipe: Recipe, parts: Parts) -> tuple[Any, Any]:
    """The adapted model on the meta device, as the run will build it, and the kernels that its base takes."""
    from veneer import get_peft_model
    from veneer.train.bases import load_base
    from veneer.train.idle import leave_out_idle
    from veneer.train.new_tokens import make_rows
    from veneer.train.prepare import adapter_config, model_options

    model, _ = load_base(parts.ref, recipe.task, meta=True, **model_options(parts.plan))
    make_rows(model, parts.tokens)
    model.config.pad_token_id = parts.tokenizer.pad_token_id
    parts.task.check_model(model, parts.plan)
    kernels = kernels_of(model, recipe)
    config = adapter_config(recipe, model, parts)
    try:
        parts.notes += leave_out_idle(recipe, config, model, parts.task)
        return get_peft_model(model, config, low_cpu_mem_usage=True).to("meta"), kernels  # drawn tensors too
    except RecipeError:
        raise
    except ValueError as error:
        raise recipe.error("adapter", problem=str(error)) from error


def _matches(recipe: Recipe, model: Any) -> Matches:
    from veneer.layer import adapted_layers

    names = [name.removeprefix("base_model.model.") for name, _ in adapted_layers(model)]
    layers = Counter(name.rpartition(".")[2] for name in names)
    asked = recipe.adapter.options.get("target_modules")
    patterns = asked if isinstance(asked, list) else []
    unmatched = [p for p in patterns if not any(name == p or name.endswith(f".{p}") for name in names)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Matches(dict(layers), trained, sum(p.numel() for p in model.parameters()), unmatched)


def _rows(recipe: Recipe, parts: Parts) -> Rows:
    train = parts.plan.train
    lengths = sorted(train["length"])
    batches = batches_of(parts, recipe.seed)
    padded = sum(len(batch) * max(batch) for batch in batches)
    least, width = lengths[0], -(-(lengths[-1] - lengths[0] + 1) // BINS)
    bins = Counter((length - least) // width for length in lengths)
    histogram = [((least + b * width, least + (b + 1) * width - 1), bins[b]) for b in range(max(bins) + 1)]
    labels = train["labels"] if "labels" in train.column_names else []
    known = [row for row in labels if isinstance(row, list)]
    learned = sum(label != IGNORE for row in known for label in row) / max(sum(map(len, known)), 1) if known else 1.0
    return Rows(
        number=len(train),
        test=0 if parts.plan.test is None else len(parts.plan.test),
        tokens=sum(lengths),
        longest=lengths[-1],
        middle=lengths[len(lengths) // 2],
        histogram=histogram,
        padding=1 - sum(lengths) / padded,
        learned=learned,
    )


def _some(rows: int) -> list[int]:
    return sorted({0, rows // 2})


def _stream(parts: Parts, number: int) -> Stream:
    """The tokens of a row as the model sees them, and which of them it learns to write or to label."""
    row = parts.plan.train[number]
    side = next((name.removesuffix("input_ids") for name in row if name.endswith("input_ids")), "")
    ids, labels = row[f"{side}input_ids"], row.get(f"{side}labels")
    whole = isinstance(labels, list) and len(labels) == len(ids)
    return [(parts.tokenizer.decode([token]), whole and labels[place] != IGNORE) for place, token in enumerate(ids)]
