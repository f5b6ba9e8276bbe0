"""What is true of a method: read off its file and config, and tried out on small layers."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from .. import registry
from ..config import AdapterConfig, PeftConfig, PromptLearningConfig
from ..context import BASE, Rows
from ..errors import AdapterError, CannotMerge
from ..kinds import Attach, Prompt, Replace
from ..tuner import Tuner
from .layers import LAYERS, Net, language_model

REFUSALS = (ValueError, NotImplementedError, TypeError)  # what a method raises for a layer or a call it does not take


@dataclass(frozen=True)
class Field:
    name: str
    type: str
    default: str


@dataclass(frozen=True)
class Stored:
    """A tensor of the adapter: its key in the file, its shape, whether it is trained and saved."""

    key: str
    shape: tuple[int, ...]
    trained: bool
    saved: bool


@dataclass(frozen=True)
class Facts:
    name: str
    method: Any
    config: type[PeftConfig]
    public: bool
    doc: str
    fields: tuple[Field, ...]
    tensors: tuple[Stored, ...]
    layers: tuple[str, ...]  # kinds of layer it takes
    merges: tuple[str, ...]  # those of them on which it merges
    mixed: bool  # a batch may mix adapters
    several: bool  # several adapters may be active together
    variants: tuple[str, ...]  # registered methods that options of its config select

    @property
    def title(self) -> str:
        title, entry = self.doc.partition(":")[0].strip(), registry.METHODS[self.name]
        shared = not self.public and any(e.module == entry.module and e.public for e in registry.METHODS.values())
        return f"{title} ({entry.method})" if shared else title

    @property
    def summary(self) -> str:
        """The first sentence of the method's file."""
        text = " ".join(self.doc.partition("\n\n")[0].split())
        return text.partition(": ")[2].partition(". ")[0].rstrip(".")

    @property
    def on_layers(self) -> bool:
        return bool(self.layers)


def settings(method: Any) -> dict[str, Any]:
    """What the example and the benchmark give the config beside defaults, on a whole model."""
    own = dict(method.example)
    if "linear" in _kinds(method) and "target_modules" not in own:
        own["target_modules"] = "all-linear"
    if isinstance(method, Prompt):
        own.setdefault("num_virtual_tokens", 8)
    return own


def _kinds(method: Any) -> frozenset[str]:
    return getattr(type(method), "sites", frozenset())


def facts(name: str) -> Facts:
    """Everything about a registered method; tries it on every layer of layers.py."""
    entry, method = registry.METHODS[name], registry.method(name)
    module = import_module(f"veneer.{entry.module}")
    config = method.Config
    same = [n for n, e in registry.METHODS.items() if e.config == entry.config and n != name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _selects(name, config, method)
    takes = {k: m for k in LAYERS if (m := _on_layer(config, method, k)) is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = not takes
        if whole and {"linear", "conv", "embedding"} & _kinds(method) and not needs_others(method):
            raise AdapterError(
                f"{name} takes none of the small layers with {method.example or 'its defaults'}; give it an `example`"
            )
        tensors = _model_tensors(config, method) if whole else _layer_tensors(config, method, next(iter(takes)))
        alone = not whole and _works(config, method, next(iter(takes)), lambda t, x: t(x))  # needs nothing but x
        mixed, several = _together(config, method, next(iter(takes))) if alone else _model_together(config, method)
    return Facts(
        name=name,
        method=method,
        config=config,
        public=entry.public,
        doc=inspect.cleandoc(module.__doc__ or ""),
        fields=own_fields(config),
        tensors=tensors,
        layers=tuple(takes),
        merges=tuple(k for k, merges in takes.items() if merges),
        mixed=mixed,
        several=several,
        variants=tuple(n for n in same if not registry.METHODS[n].public) if entry.public else (),
    )


def _selects(name: str, config: Any, method: Any) -> None:
    """The example's settings must ask for this method, not for the one whose config it shares."""
    cfg = config(task_type="CAUSAL_LM", **settings(method))
    if not needs_others(method) and registry.method_of(cfg) is not method:
        raise AdapterError(f"{name}: its `example` {method.example} selects {registry.method_of(cfg).name}")


def needs_others(method: Any) -> bool:
    """Whether the method acts through other adapters only (a router over LoRAs), so that it has none of its own."""
    return bool(getattr(method, "needs_others", False))


def own_fields(config: type[PeftConfig]) -> tuple[Field, ...]:
    """A config's fields without those that every config of its family has."""
    family = next(c for c in (AdapterConfig, PromptLearningConfig, PeftConfig) if issubclass(config, c))
    common = {f.name: f for f in dataclasses.fields(family)}
    return fields_of([f for f in dataclasses.fields(config) if f.name not in common or _changed(f, common[f.name])])


def _changed(field: Any, common: Any) -> bool:
    return bool(field.default != common.default) and not field.metadata.get("veneer")


def fields_of(listed: Any) -> tuple[Field, ...]:
    out = []
    for f in listed:
        value = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        shown = f"{type(value).__name__}.{value.name}" if hasattr(value, "name") else repr(value)
        out.append(Field(f.name, str(f.type), "required" if value is dataclasses.MISSING else shown))
    return tuple(out)


def _tuner(config: Any, method: Any, layer: str, adapters: int = 1) -> Tuner:
    """A model of one layer with adapters whose trained tensors are random."""
    own = {k: v for k, v in method.example.items() if k != "target_modules"}
    tuner = Tuner(Net(LAYERS[layer][0]), config(target_modules="layer", **own), "0").eval()
    for i in range(1, adapters):
        tuner.add_adapter(str(i), config(target_modules="layer", **own))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in tuner.peft_config:
            for *_, spec, holder, leaf in tuner.tensor_names(name):
                if spec.train:
                    t = getattr(holder, leaf)
                    t.add_(torch.randn(t.shape, generator=generator).to(t) * 0.1)
    return tuner


def _on_layer(config: Any, method: Any, layer: str) -> bool | None:
    """Whether the method merges on a layer; None where it does not take it."""
    if isinstance(method, Prompt | Attach) or needs_others(method):
        return None
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            tuner = _tuner(config, method, layer)
        except REFUSALS:
            return None
        try:
            tuner.merge_adapter()
        except (CannotMerge, ValueError):
            return False
        return True


def _layer_tensors(config: Any, method: Any, layer: str) -> tuple[Stored, ...]:
    tuner = _tuner(config, method, layer)
    return tuple(
        Stored(f"{path}.{key}" if path else key, tuple(getattr(holder, leaf).shape), spec.train, spec.save)
        for path, key, spec, holder, leaf in tuner.tensor_names("0")
    )


def _model_tensors(config: Any, method: Any) -> tuple[Stored, ...]:
    if needs_others(method):
        return ()
    from ..model import get_peft_model
    from ..state import get_peft_model_state_dict

    model = get_peft_model(language_model(), config(task_type="CAUSAL_LM", **settings(method)))
    saved = get_peft_model_state_dict(model)
    return tuple(Stored(k, tuple(t.shape), True, True) for k, t in saved.items())


def _model_together(config: Any, method: Any) -> tuple[bool, bool]:
    """As `_together`, on the whole model."""
    if needs_others(method):
        return False, False
    from ..model import get_peft_model

    ids = torch.ones(3, 5, dtype=torch.long)
    inputs: tuple[dict[str, Any], ...] = ({}, {"task_ids": torch.zeros(3, dtype=torch.long)})

    def works(several: bool = False, **call: Any) -> bool:
        try:
            model = get_peft_model(language_model(), config(task_type="CAUSAL_LM", **settings(method)), "0").eval()
            model.add_adapter("1", config(task_type="CAUSAL_LM", **settings(method)))
            if several:
                model.base_model.set_adapter(["0", "1"])
            with torch.no_grad():
                model(input_ids=ids, **call)
        except (*REFUSALS, AttributeError):
            return False
        return True

    mixing: dict[str, Any] = {"adapter_names": ["0", "1", BASE]}
    return any(works(**mixing, **more) for more in inputs), any(works(several=True, **more) for more in inputs)


def _together(config: Any, method: Any, layer: str) -> tuple[bool, bool]:
    """Whether a batch may mix two adapters and the base, and whether two adapters act together."""
    if isinstance(method, Replace):
        several = False  # the last one runs
    else:
        several = _works(config, method, layer, lambda t, x: (t.set_adapter(["0", "1"]), t(x)))

    def mix(t: Tuner, x: torch.Tensor) -> None:
        with t.host.call(rows=Rows.of(["0", "1", BASE])):
            t(x)

    return _works(config, method, layer, mix), several


def _works(config: Any, method: Any, layer: str, act: Any) -> bool:
    try:
        with torch.no_grad():
            act(_tuner(config, method, layer, adapters=2), LAYERS[layer][1]())
    except REFUSALS:
        return False
    return True
