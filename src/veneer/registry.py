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
    also: tuple[str, ...] = ()  # further public names of the module


METHODS: dict[str, Entry] = {
    "ADAMSS": Entry("methods.adamss", "AdaMSS", "AdamssConfig"),
    "ADALORA": Entry("methods.adalora", "AdaLoRA", "AdaLoraConfig"),
    "ADAPTION_PROMPT": Entry("methods.adaption_prompt", "AdaptionPrompt", "AdaptionPromptConfig"),
    "BEFT": Entry("methods.beft", "BEFT", "BeftConfig"),
    "BOFT": Entry("methods.boft", "BOFT", "BOFTConfig"),
    "C3A": Entry("methods.c3a", "C3A", "C3AConfig"),
    "DEFT": Entry("methods.deft", "DEFT", "DeftConfig"),
    "FROD": Entry("methods.frod", "FRoD", "FrodConfig"),
    "GLORA": Entry("methods.glora", "GLoRA", "GloraConfig"),
    "HIRA": Entry("methods.hira", "HiRA", "HiraConfig"),
    "HRA": Entry("methods.hra", "HRA", "HRAConfig"),
    "FOURIERFT": Entry("methods.fourierft", "FourierFT", "FourierFTConfig"),
    "GRALORA": Entry("methods.gralora", "GraLoRA", "GraloraConfig"),
    "IA3": Entry("methods.ia3", "IA3", "IA3Config"),
    "LILY": Entry("methods.lily", "Lily", "LilyConfig"),
    "LN_TUNING": Entry("methods.ln_tuning", "LNTuning", "LNTuningConfig"),
    "LOHA": Entry("methods.loha", "LoHa", "LoHaConfig"),
    "LOKR": Entry("methods.lokr", "LoKr", "LoKrConfig"),
    "LORA": Entry("methods.lora", "LoRA", "LoraConfig"),
    "ARROW": Entry("methods.arrow", "Arrow", "LoraConfig", public=False),
    "DORA": Entry("methods.dora", "DoRA", "LoraConfig", public=False),
    "ALORA": Entry("methods.alora", "ALoRA", "LoraConfig", public=False),
    "BDLORA": Entry("methods.bdlora", "BdLoRA", "LoraConfig", public=False),
    "KASA": Entry("methods.kasa", "KaSA", "LoraConfig", public=False),
    "MICA": Entry("methods.mica", "MiCA", "LoraConfig", public=False),
    "MONTECLORA": Entry("methods.monteclora", "MonteCLoRA", "LoraConfig", public=False),
    "OSF": Entry("methods.osf", "OSF", "OSFConfig"),
    "QALORA": Entry("methods.qalora", "QALoRA", "LoraConfig", public=False),
    "VELORA": Entry("methods.velora", "VeLoRA", "LoraConfig", public=False),
    "MISS": Entry("methods.miss", "MiSS", "MissConfig"),
    "MISS_BAT": Entry("methods.miss", "MissBat", "MissConfig", public=False),
    "OFT": Entry("methods.oft", "OFT", "OFTConfig"),
    "PEANUT": Entry("methods.peanut", "PEANuT", "PeanutConfig"),
    "POLY": Entry("methods.poly", "Poly", "PolyConfig"),
    "CARTRIDGE": Entry("methods.cartridge", "Cartridge", "CartridgeConfig", also=("CartridgeEncoder",)),
    "CPT": Entry("methods.cpt", "CPT", "CPTConfig", also=("CPTEmbedding",)),
    "MULTITASK_PROMPT_TUNING": Entry(
        "methods.multitask_prompt_tuning",
        "MultitaskPromptTuning",
        "MultitaskPromptTuningConfig",
        also=("MultitaskPromptTuningInit",),
    ),
    "P_TUNING": Entry(
        "methods.p_tuning",
        "PTuning",
        "PromptEncoderConfig",
        also=("PromptEncoder", "PromptEncoderReparameterizationType"),
    ),
    "PREFIX_TUNING": Entry("methods.prefix_tuning", "PrefixTuning", "PrefixTuningConfig", also=("PrefixEncoder",)),
    "PROMPT_TUNING": Entry(
        "methods.prompt_tuning", "PromptTuning", "PromptTuningConfig", also=("PromptEmbedding", "PromptTuningInit")
    ),
    "ROAD": Entry("methods.road", "RoAd", "RoadConfig"),
    "SHIRA": Entry("methods.shira", "SHiRA", "ShiraConfig"),
    "SUPERTUNING": Entry("methods.supertuning", "SuperTuning", "SupertuningConfig"),
    "SHADOW": Entry("methods.shadow", "Shadow", "ShadowConfig"),
    "TRAINABLE_TOKENS": Entry("methods.trainable_tokens", "TrainableTokens", "TrainableTokensConfig"),
    "DELORA": Entry("methods.delora", "DeLoRA", "DeloraConfig"),
    "PSOFT": Entry("methods.psoft", "PSOFT", "PsoftConfig"),
    "PVERA": Entry("methods.pvera", "PVeRA", "PveraConfig"),
    "RANDLORA": Entry("methods.randlora", "RandLoRA", "RandLoraConfig"),
    "TINYLORA": Entry("methods.tinylora", "TinyLoRA", "TinyLoraConfig"),
    "UNILORA": Entry("methods.unilora", "UniLoRA", "UniLoraConfig"),
    "VBLORA": Entry("methods.vblora", "VBLoRA", "VBLoRAConfig"),
    "VERA": Entry("methods.vera", "VeRA", "VeraConfig"),
    "XLORA": Entry("methods.xlora", "XLora", "XLoraConfig"),
    "WAVEFT": Entry("methods.waveft", "WaveFT", "WaveFTConfig"),
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
    return method(key).Config  # type: ignore[no-any-return]


def types() -> list[str]:
    """The peft_type of every public method."""
    return [name for name, e in METHODS.items() if e.public]


def exports() -> dict[str, str]:
    """Public class name -> module, for lazy import."""
    return {name: e.module for e in METHODS.values() if e.public for name in (e.config, *e.also)}


def _near(key: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(key, types(), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
