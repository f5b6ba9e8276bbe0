"""peft's class names for layers and tuners: `isinstance` asks what a layer carries, since all are one class here.

`isinstance(m, LoraLayer)`: m is an adapted layer with a LoRA adapter on it; `lora.Linear`: one whose base is a linear
layer. `LoraModel(model, config, "default")` makes the one Tuner.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from .. import registry
from ..layer import Adapted
from ..tuner import Tuner

# what a class is called -> which base layers it stands for
_BASES: dict[str, tuple[str, ...]] = {
    "Linear": ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear"),
    "Conv1d": ("Conv1d",),
    "Conv2d": ("Conv2d",),
    "Conv3d": ("Conv3d",),
    "Embedding": ("Embedding",),
    "MultiheadAttention": ("MultiheadAttention",),
}
KINDS = (*_BASES, "ParamWrapper")


def _type_of(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


class LayerKind(type):
    """The class of classes such as LoraLayer."""

    peft_type: str
    base: str | None

    def __getattr__(cls, name: str) -> Any:
        """The methods of all layers, such as `LoraLayer.merge`."""
        return getattr(Adapted, "add" if name == "update_layer" else name)

    def __instancecheck__(cls, obj: object) -> bool:
        if not isinstance(obj, Adapted) or all(_type_of(e.cfg) != cls.peft_type for e in obj.entries.values()):
            return False
        if cls.base is None:
            return True
        if cls.base == "ParamWrapper" or obj.site.kind == "parameter":
            return cls.base == "ParamWrapper" and obj.site.kind == "parameter"
        names = {c.__name__ for c in type(obj.get_base_layer()).__mro__}
        return not names.isdisjoint(_BASES[cls.base])

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{cls.__module__}.{cls.__name__} names a kind of adapted layer for isinstance; layers are made by "
            "get_peft_model or inject_adapter_in_model"
        )


class ModelKind(type):
    """The class of classes such as LoraModel."""

    peft_type: str

    def __instancecheck__(cls, obj: object) -> bool:
        return isinstance(obj, Tuner) and any(_type_of(c) == cls.peft_type for c in obj.peft_config.values())

    def __call__(cls, model: Any, config: Any, adapter_name: str = "default", **options: Any) -> Tuner:
        first = next(iter(config.values())) if isinstance(config, dict) else config
        made = registry.method_of(first).tuner_class() or Tuner
        return made(model, config, adapter_name, **options)


def _stem(peft_type: str) -> str:
    """ "LORA" -> "Lora", as the config's name has it."""
    return registry.METHODS[peft_type].config.removesuffix("Config")


def names_of(peft_type: str) -> dict[str, str | None]:
    """The layer classes of one method: name -> which base layers, None for all."""
    stem = _stem(peft_type)
    named = {f"{stem}Layer": None, **{k: k for k in KINDS}, **{f"{stem}{k}": k for k in KINDS}}
    return named | ({"SVDLinear": "Linear", "SVDConv2d": "Conv2d"} if peft_type == "ADALORA" else {})


def model_name(peft_type: str) -> str:
    return f"{_stem(peft_type)}Model"


@cache
def layer_class(peft_type: str, name: str) -> Any:
    """The class that answers to `name` ("LoraLayer", "Linear") in a method's modules."""
    facts = {"peft_type": peft_type, "base": names_of(peft_type)[name], "prefix": registry.method(peft_type).prefix}
    return LayerKind(name, (), {**facts, "__module__": f"peft.tuners.{peft_type.lower()}.layer"})


@cache
def model_class(peft_type: str) -> Any:
    """The class that answers to "LoraModel" and its like."""
    facts = {
        "peft_type": peft_type,
        "prefix": registry.method(peft_type).prefix,
        "tuner_layer_cls": layer_class(peft_type, f"{_stem(peft_type)}Layer"),
    }
    name = model_name(peft_type)
    return ModelKind(name, (), {**facts, "__module__": f"peft.tuners.{peft_type.lower()}.model"})
