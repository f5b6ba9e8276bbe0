"""veneer: parameter-efficient fine-tuning for Hugging Face models, a thin layer over a solid base.

`import veneer as peft` keeps a peft script working. Names load when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from . import registry
from .version import __version__

_NAMES: dict[str, str] = {
    **dict.fromkeys(["PeftConfig", "PromptLearningConfig", "PeftType", "TaskType"], "config"),
    **dict.fromkeys(
        ["PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering",
         "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification", "PeftModelForTokenClassification",
         "get_peft_model"],
        "model",
    ),
    **dict.fromkeys(
        ["AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
         "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification",
         "AutoPeftModelForTokenClassification"],
        "auto",
    ),
    **dict.fromkeys(["get_peft_model_state_dict", "set_peft_model_state_dict"], "state"),
    "inject_adapter_in_model": "in_place",
    "LoadReport": "load_report",
    **dict.fromkeys(
        ["AdapterError", "CannotMerge", "LoadError", "NoMatchingPeftModuleError", "PeftError", "PeftWarning"], "errors"
    ),
    **dict.fromkeys(["get_base_model_state_dict", "set_base_model_state_dict"], "base_state"),
    "prepare_model_for_kbit_training": "prepare",
    **dict.fromkeys(
        ["PEFT_TYPE_TO_CONFIG_MAPPING", "cast_mixed_precision_params", "get_layer_status", "get_model_status",
         "get_peft_config", "load_peft_weights"],
        "api",
    ),
    **dict.fromkeys(
        ["BdLoraConfig", "KasaConfig", "LoraRuntimeConfig", "MontecloraConfig", "VeloraConfig"], "methods.lora_options"
    ),
    "hotswap_adapter": "hotswap",
    "prepare_model_for_compiled_hotswap": "hotswap_room",
    "find_kappa_target_modules": "kappa",
    **dict.fromkeys(["ArrowConfig", "create_arrow_model"], "methods.arrow"),
    "PeftMixedModel": "mixed",
    **dict.fromkeys(["CordaConfig", "EvaConfig", "LoftQConfig", "LoraGAConfig"], "inits.settings"),
    **dict.fromkeys(["get_eva_state_dict", "initialize_lora_eva_weights"], "inits.eva"),
    "preprocess_corda": "inits.corda",
    "preprocess_loraga": "inits.lora_ga",
    "replace_lora_weights_loftq": "inits.loftq",
    **dict.fromkeys(["convert_to_lora", "save_as_lora"], "to_lora"),
    "reduce_intruder_dimension": "intruders",
    **dict.fromkeys(
        ["compose_cartridge_adapters", "initialize_kv_prefix_from_past_key_values", "initialize_kv_prefix_from_text",
         "prompt_embeddings_from_past_key_values"],
        "prompts.initial_cache",
    ),
    "base_kernels": "fused",
    "matrices": "layer_matrices",
    "Matrices": "layer_matrices",
    "LayerwiseHandoff": "handoff",
    "hand_off": "handoff",
}  # fmt: skip


_NAMES.update(registry.exports())


def __getattr__(name: str) -> Any:
    module = _NAMES.get(name)
    if module is None:
        raise AttributeError(f"module 'veneer' has no attribute {name!r}")
    value = getattr(import_module(f"veneer.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})


__all__ = ["__version__", *_NAMES]  # noqa: PLE0604  (the lazy names, so that `from veneer import *` works)
