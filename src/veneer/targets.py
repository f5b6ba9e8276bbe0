"""Which modules of a model a config adapts, and which of its patterns says so.

Pure functions: nothing is wrapped or changed. The rules are those of PEFT's configs: ``target_modules`` as
a list holds name suffixes (whole components), as a string a pattern that must match the full name, or
"all-linear"; ``exclude_modules`` likewise, and it wins; ``layers_to_transform`` keeps numbered layers. On
top, ``layers`` picks layers in words (:mod:`veneer.words`), and a pattern that matches nothing is an error.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from veneer.backends.refused import why_not
from veneer.defaults import default_targets
from veneer.errors import NoMatchingPeftModuleError, PeftWarning
from veneer.graph import is_linear, is_transformers_model, name_tails, output_head
from veneer.patterns import (
    TargetSpec,
    compile_pattern,
    layer_index,
    near_names,
    number_ranges,
    resolve_pattern,
    suffix_or_pattern,
    unused_patterns,
)
from veneer.words import find_stacks, place_of, select_layers

__all__ = [
    "Match",
    "NoMatchingPeftModuleError",
    "TargetSpec",
    "default_targets",
    "describe",
    "layer_index",
    "match_parameters",
    "match_targets",
    "resolve_pattern",
    "unused_patterns",
]

ALL_LINEAR = "all-linear"
_CLASSIFIER_HEADS = ("score", "classifier")


@dataclass(frozen=True)
class Match:
    """One module to adapt: its full ``name``, the ``module`` itself, and the ``pattern`` that matched."""

    name: str
    module: nn.Module
    pattern: str


def match_targets(
    model: nn.Module,
    config: Any,
    *,
    model_type: str | None = None,
    is_adaptable: Callable[[nn.Module], bool] | None = None,
    names: Iterable[tuple[str, nn.Module]] | None = None,
    skip: Callable[[str, nn.Module], bool] | None = None,
    kind: str = "lora",
) -> list[Match]:
    """The modules of ``model`` that ``config`` adapts, in the model's order.

    Args:
        model: the base model; its names, classes and shapes are read.
        config: any object with PEFT's targeting fields, see :class:`TargetSpec`.
        model_type: the architecture's name, used where ``target_modules`` is None.
        is_adaptable: says which modules the method supports; a pattern that names another is an error.
        names: the candidates, instead of ``model.named_modules()``.
        skip: candidates to pass over (parts of adapters).
        kind: whose default targets to use, see :func:`veneer.defaults.default_targets`.

    Raises:
        NoMatchingPeftModuleError: a given pattern, a layer number or a ``layers_pattern`` matches nothing
            (silenced by ``config.allow_unmatched`` while any pattern matches), or nothing is left.
        ValueError: a pattern is no regular expression; a matched module is not supported; ``layers`` is
            malformed or picks nothing; no default is known.
    """
    spec = TargetSpec.from_config(config)
    modules = model.named_modules() if names is None else names
    candidates = [(n, m) for n, m in modules if n and not (skip is not None and skip(n, m))]
    wanted = spec.target_modules
    given = wanted is not None
    if not wanted:
        if spec.target_parameters:
            return []
        if given:
            raise NoMatchingPeftModuleError("No `target_modules` passed but also no `target_parameters` found.")
        default = default_targets(model, model_type, kind)
        wanted = default if isinstance(default, str) else tuple(default)
    return _Search(model, spec, candidates, wanted, given, is_adaptable).run()


@dataclass
class _Search:
    """One pass over the candidates, with what the error messages need to know."""

    model: nn.Module
    spec: TargetSpec
    candidates: list[tuple[str, nn.Module]]
    wanted: str | tuple[str, ...]
    given: bool
    is_adaptable: Callable[[nn.Module], bool] | None
    matched: set[str] = field(default_factory=set)  # patterns that match a module of the chosen layers
    elsewhere: dict[str, str] = field(default_factory=dict)  # pattern -> a module of another layer
    indices: set[int] = field(default_factory=set)  # layer numbers of the modules that match
    excluded: int = 0
    named_out: bool = False  # whether exclude_modules left out any

    def run(self) -> list[Match]:
        match, in_layer = self._matcher(), self._layer_filter()
        is_out = suffix_or_pattern(self.spec.exclude_modules, "exclude_modules")
        saved = _saved_pattern(self.spec.modules_to_save)
        found = []
        for name, module in self.candidates:
            patterns = match(name, module)
            if not patterns:
                continue
            if not in_layer(name):
                self.elsewhere.update(dict.fromkeys(patterns, name))
                continue
            self.matched.update(patterns)
            out = is_out(name)
            self.named_out |= bool(out)
            if out or (saved is not None and saved.search(name)):
                self.excluded += 1
            elif self._supported(name, module, patterns[0]):
                found.append(Match(name, module, patterns[0]))
        self._check(found)
        return found

    def _matcher(self) -> Callable[[str, nn.Module], list[str]]:
        """(name, module) -> the patterns that match, the most specific first."""
        wanted = self.wanted
        if not isinstance(wanted, str):
            entries = frozenset(wanted)
            return lambda name, module: [tail for tail in name_tails(name) if tail in entries]
        if wanted.lower() == ALL_LINEAR:
            from .layer import Adapted

            heads = _heads(self.model, self.spec.task_type)
            itself: Any = lambda m: m.get_base_layer() if isinstance(m, Adapted) else m
            return lambda name, module: [wanted] if is_linear(itself(module)) and module not in heads else []
        rule = compile_pattern(wanted, "target_modules")
        return lambda name, module: [wanted] if rule.fullmatch(name) else []

    def _layer_filter(self) -> Callable[[str], bool]:
        spec = self.spec
        if spec.layers:
            stacks = find_stacks(self.model)
            places = select_layers(stacks, spec.layers)
            return lambda name: place_of(name, stacks) in places
        if not spec.layers_to_transform:
            return lambda name: True
        exact = frozenset(() if isinstance(self.wanted, str) else self.wanted)
        numbers = frozenset(spec.layers_to_transform)
        # a bare model's stack stands at the top ("layers.0.x"), where the usual rule sees no number
        top = not spec.layers_pattern and all(layer_index(name) is None for name, _ in self.candidates)

        def in_layer(name: str) -> bool:
            index = layer_index(name, spec.layers_pattern, top_level=top)
            if index is not None:
                self.indices.add(index)
            return name in exact or index in numbers

        return in_layer

    def _supported(self, name: str, module: nn.Module, pattern: str) -> bool:
        if self.is_adaptable is None or self.is_adaptable(module):
            return True
        reason = why_not(module)
        if reason is not None:
            raise ValueError(f"Target module {name} ({type(module).__name__}, matched by {pattern!r}): {reason}")
        if not self.given or pattern.lower() == ALL_LINEAR:
            return False
        raise ValueError(
            f"Target module {name} ({type(module).__name__}, matched by {pattern!r}) is not supported by "
            "this method; name the layers inside it, or put it in `exclude_modules`"
        )

    def _check(self, found: list[Match]) -> None:
        wanted = (self.wanted,) if isinstance(self.wanted, str) else self.wanted
        missing = [pattern for pattern in wanted if pattern not in self.matched]
        lenient = not self.given or self.spec.allow_unmatched
        if missing and (len(missing) == len(wanted) or not lenient):
            nothing = "" if found else " No modules were targeted for adaptation."
            raise NoMatchingPeftModuleError(self._unmatched(missing) + nothing)
        out = sorted(set(self.spec.layers_to_transform) - self.indices)
        if out and not self.spec.allow_unmatched and self.indices:
            raise NoMatchingPeftModuleError(
                f"layers_to_transform asks for {number_ranges(out)}, but the targeted modules are in layers "
                f"{number_ranges(sorted(self.indices))}"
            )
        if not found:
            raise NoMatchingPeftModuleError(
                "No modules were targeted for adaptation. This might be caused by a combination of `target_modules` "
                "with `exclude_modules`, `modules_to_save` or what the method can adapt, which left out all "
                f"{self.excluded or 'modules'} that {list(wanted)} matched. All modules were excluded"
            )
        if self.spec.exclude_modules and not self.named_out:
            warnings.warn(
                f"You have passed exclude_modules={self.spec.exclude_modules!r} but no modules were excluded: none of "
                "the modules that target_modules names matches it",
                PeftWarning,
                stacklevel=2,
            )

    def _unmatched(self, missing: Sequence[str]) -> str:
        text = f"Target modules {set(missing)} not found in the base model ({type(self.model).__name__})."
        names = [name for name, _ in self.candidates]
        for pattern in missing:
            if pattern in self.elsewhere:
                which = f"layers={','.join(self.spec.layers)!r}" if self.spec.layers else self._numbered()
                text += f" {pattern!r} matches {self.elsewhere[pattern]!r}, but {which} leaves that out."
            else:
                near = near_names(pattern, names)
                text += f" {pattern!r} matches nothing{near}{'' if near.endswith('?') else '.'}"
        return text + " (allow_unmatched=True passes over patterns that match nothing beside some that do.)"

    def _numbered(self) -> str:
        asked = f"layers_to_transform={list(self.spec.layers_to_transform)}"
        if self.indices:
            return f"{asked} (the targeted modules are in layers {number_ranges(sorted(self.indices))})"
        if self.spec.layers_pattern:
            return f"layers_pattern={list(self.spec.layers_pattern)} is found in no name, so {asked}"
        return f"no name has a layer number, so {asked}"


def _heads(model: nn.Module, task_type: str | None) -> set[nn.Module]:
    """What "all-linear" leaves out: the output head, and the new head of a sequence classifier."""
    head = output_head(model)
    if head is not None:
        return {head}
    if task_type == "SEQ_CLS" and is_transformers_model(model):
        children = dict(model.named_children())
        return set([children[name] for name in _CLASSIFIER_HEADS if name in children][:1])
    return set()


def _saved_pattern(modules_to_save: tuple[str, ...]) -> re.Pattern[str] | None:
    """Modules that are trained in full, and all inside them. Entries match name endings: "classifier" is
    also "pre_classifier", as the files of such adapters have it."""
    if not modules_to_save:
        return None
    return re.compile(rf"(?:{'|'.join(map(re.escape, modules_to_save))})(?:\.|$)")


def match_parameters(
    model: nn.Module,
    target_parameters: Sequence[str],
    *,
    names: Iterable[tuple[str, nn.Module]] | None = None,
    allow_unmatched: bool = False,
    modules_given: bool = False,
) -> list[tuple[str, nn.Module, str]]:
    """The 2-D and 3-D parameters (expert weights, say) that ``target_parameters`` names by suffix.

    Returns:
        (module name, module, parameter name), in the model's order, whatever the order of the entries.

    Raises:
        TypeError: ``target_parameters`` is a single string.
        NoMatchingPeftModuleError: an entry matches nothing.
        ValueError: an entry matches a parameter that is neither 2-D nor 3-D.
    """
    if isinstance(target_parameters, str):
        raise TypeError(f"target_parameters must be a list of names, not the string {target_parameters!r}")
    entries, seen, known, found = set(target_parameters), set(), [], []
    for module_name, module in model.named_modules() if names is None else names:
        for own, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{own}" if module_name else own
            known.append(full)
            hits = entries.intersection(name_tails(full))
            if hits and parameter.ndim not in (2, 3):
                raise ValueError(
                    f"target_parameters: {full} ({'x'.join(map(str, parameter.shape))}, matched by "
                    f"{min(hits)!r}) has {parameter.ndim} dimensions; only 2 and 3 are supported"
                )
            if hits:
                found.append((module_name, module, own))
            seen |= hits
    missing = [entry for entry in target_parameters if entry not in seen]
    _check_named(model, missing, known, lenient=bool(found) and allow_unmatched, alone=not found and not modules_given)
    return found


def _check_named(model: nn.Module, missing: list[str], known: list[str], *, lenient: bool, alone: bool) -> None:
    """Raise NoMatchingPeftModuleError for entries that matched nothing. alone: nothing else is targeted either."""
    top = [own for own, _ in model.named_parameters(recurse=False) if own in missing]
    if top:
        raise NoMatchingPeftModuleError(
            f"Targeting an nn.Parameter on the top-level module is not supported (parameter {top[0]!r}): put it into a "
            "submodule"
        )
    if missing and not lenient:
        listed = "; ".join(f"{entry!r} matches nothing{near_names(entry, known)}" for entry in missing)
        nothing = (
            "No `target_modules` passed but also no `target_parameters` found. Please check the values for these "
            "arguments."
        )
        raise NoMatchingPeftModuleError(
            f"target_parameters not found in {type(model).__name__}: {listed}{f'. {nothing}' if alone else ''}"
        )


def describe(matches: Sequence[Match], unmatched: Sequence[str] = ()) -> str:
    """One line per group of like-named modules: how many, which layers, matched by what; then what matched
    nothing."""
    groups: dict[tuple[str, str], list[str]] = {}
    for match in matches:
        shape = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", match.name)
        groups.setdefault((shape, match.pattern), []).append(match.name)
    width = max((len(shape) for shape, _ in groups), default=0)
    lines = [f"{len(matches)} modules adapted"]
    for (shape, pattern), members in groups.items():
        indices = sorted({i for name in members if (i := layer_index(name, top_level=True)) is not None})
        where = f"  layers {number_ranges(indices)}" if indices else ""
        lines.append(f"  {shape:<{width}}  x{len(members)}{where}  by {pattern!r}")
    lines += [f"  {pattern!r} matched nothing" for pattern in unmatched]
    return "\n".join(lines)
