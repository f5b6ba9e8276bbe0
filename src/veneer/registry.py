"""One line a method. Exports, the enum of types, command-line choices and tests derive from it."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import AdapterError

if TYPE_CHECKING:
    from .config import PeftConfig


class Entry(NamedTuple):
    module: str  # under veneer.
    method: str
    config: str
    public: bool = True  # False: reached by an option of another type's config (DoRA by LoRA's use_dora)


METHODS: dict[str, Entry] = {
    "IA3": Entry("methods.ia3", "IA3", "IA3Config"),
    "LN_TUNING": Entry("methods.ln_tuning", "LNTuning", "LNTuningConfig"),
    "LOHA": Entry("methods.loha", "LoHa", "LoHaConfig"),
    "LORA": Entry("methods.lora", "LoRA", "LoraConfig"),
    "DORA": Entry("methods.dora", "DoRA", "LoraConfig", public=False),
    "OFT": Entry("methods.oft", "OFT", "OFTConfig"),
    "PREFIX_TUNING": Entry("methods.prefix_tuning", "PrefixTuning", "PrefixTuningConfig"),
    "PROMPT_TUNING": Entry("methods.prompt_tuning", "PromptTuning", "PromptTuningConfig"),
    "TRAINABLE_TOKENS": Entry("methods.trainable_tokens", "TrainableTokens", "TrainableTokensConfig"),
    "VERA": Entry("methods.vera", "VeRA", "VeraConfig"),
}


@cache
def method(name: str) -> Any:
    """The method's one instance; `name` is a peft_type such as "LORA", in any case."""
    key = str(getattr(name, "value", name)).upper()
    entry = METHODS.get(key)
    if entry is None:
        raise AdapterError(f"unknown adapter type {name!r}; known: {', '.join(types())}{_near(key)}")
    made = getattr(import_module(f"veneer.{entry.module}"), entry.method)()
    made.__class__.name = key
    return made


def method_of(cfg: PeftConfig) -> Any:
    """The method a config asks for, its variants resolved."""
    made = method(str(getattr(cfg.peft_type, "value", cfg.peft_type)))
    variant = made.variant(cfg) if hasattr(type(made), "variant") else None
    return method(variant) if variant else made


def config_class(name: str) -> type[PeftConfig]:
    key = str(getattr(name, "value", name)).upper()
    entry = METHODS.get(key)
    if entry is None or not entry.public:
        raise AdapterError(f"unknown adapter type {name!r}; known: {', '.join(types())}{_near(key)}")
    return getattr(import_module(f"veneer.{entry.module}"), entry.config)


def types() -> list[str]:
    """The peft_type of every public method."""
    return [name for name, e in METHODS.items() if e.public]


def exports() -> dict[str, str]:
    """Public class name -> module, for lazy import."""
    return {e.config: e.module for e in METHODS.values() if e.public}


def _near(key: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(key, types(), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
