"""Which of veneer's names stand behind which of peft's: one table, module -> source -> names.

A source is a module of veneer; "there=here" gives a name that is called otherwise in veneer. The methods' own modules
(`peft.tuners.lora.layer` and the like) follow from the registry.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import veneer

from .. import registry

PEFT = "peft"

_WRAPPERS = "AuxiliaryTrainingWrapper=Wrapper ModulesToSaveWrapper=SavedModule TrainableTokensWrapper=TokenHolder"
_CONSTANTS = (
    "EMBEDDING_LAYER_NAMES SEQ_CLS_HEAD_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND TOKENIZER_CONFIG_NAME "
    "DUMMY_TARGET_MODULES DUMMY_MODEL_CONFIG MIN_TARGET_MODULES_FOR_OPTIMIZATION ALLOWED_COMPUTE_DTYPES UPCAST_DTYPES "
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING bloom_model_postprocess_past_key_value "
    "starcoder_model_postprocess_past_key_value"
)
_MAPPINGS = "PEFT_TYPE_TO_TUNER_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING"
_ERRORS = "PeftError NoMatchingPeftModuleError"
_MODELS = (
    "PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
    "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification"
)
_AUTO = _MODELS.replace("PeftModel", "AutoPeftModel")
_STATE = "get_peft_model_state_dict set_peft_model_state_dict"
_BASE_STATE = "get_base_model_state_dict set_base_model_state_dict"
_FILES = "WEIGHTS_NAME=BIN_NAME SAFETENSORS_WEIGHTS_NAME=SAFE_NAME"
_HELPERS = (
    "infer_device shift_tokens_right transpose _get_submodules=submodules _get_batch_size=batch_size str_to_bool "
    "id_tensor_storage match_target_against_key get_pattern_key check_file_exists_on_hf_hub _set_trainable=save_whole "
    "_set_adapter=set_whole _freeze_adapter=freeze_adapter _get_module_names_tied_with_embedding=tied_with_embedding "
    "get_quantization_config create_attention_mask _get_input_embeddings_name=input_embeddings_name"
)
_INITS = {
    "inits.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "inits.lora_ga": "preprocess_loraga",
    "inits.settings": "CordaConfig EvaConfig LoftQConfig LoraGAConfig",
    "methods.arrow": "ArrowConfig create_arrow_model",
    "methods.lora_options": "BdLoraConfig KasaConfig LoraRuntimeConfig MontecloraConfig VeloraConfig",
    "to_lora": "convert_to_lora save_as_lora",
}

TABLE: dict[str, dict[str, str]] = {
    "auto": {
        "auto": _AUTO,
        "model": "MODEL_TYPE_TO_PEFT_MODEL_MAPPING=TASKS",
        "compat.constants": "TOKENIZER_CONFIG_NAME",
    },
    "config": {
        "config": "__version__=PEFT_FORMAT CONFIG_NAME PeftConfig PeftConfigMixin=PeftConfig PromptLearningConfig "
        "_get_commit_hash=commit_of",
    },
    "functional": {
        "functional": "cast_adapter_dtype delete_adapter set_adapter set_requires_grad",
        "in_place": "inject_adapter_in_model",
        "state": _STATE,
    },
    "helpers": {
        "helpers": "DoraCaching KappaTuneSelector MontecloraTrainerMixin check_if_peft_model "
        "disable_input_dtype_casting find_kappa_target_modules rescale_adapter_scale",
        "signatures": "update_forward_signature update_generate_signature update_signature",
    },
    "import_utils": {
        "available": "is_aqlm_available is_bnb_4bit_available is_bnb_available is_diffusers_available "
        "is_eetq_available is_gptqmodel_available is_hqq_available is_inc_available is_optimum_available "
        "is_te_available is_te_pytorch_available is_torch_tpu_available is_torchao_available is_torchao_ge_v0_18_0 "
        "is_xpu_available is_transformers_ge_v5 is_transformers_ge_v5_1_0 is_transformers_ge_v5_4_0 "
        "is_transformers_ge_v5_6_0 is_transformers_ge_v5_13_0 is_transformers_ge_v5_17_0 is_transformers_le_4_53",
    },
    "mapping": {
        "api": "PEFT_TYPE_TO_CONFIG_MAPPING get_peft_config",
        "compat.constants": _MAPPINGS,
        "in_place": "inject_adapter_in_model",
    },
    "mapping_func": {
        "model": "get_peft_model MODEL_TYPE_TO_PEFT_MODEL_MAPPING=TASKS",
        "api": "PEFT_TYPE_TO_CONFIG_MAPPING",
        "compat.constants": "PEFT_TYPE_TO_PREFIX_MAPPING",
    },
    "mixed_model": {"mixed": "PeftMixedModel"},
    "optimizers": {
        "optimizers": "create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer",
    },
    "optimizers.lorafa": {"optimizers.lorafa": "LoraFAOptimizer create_lorafa_optimizer"},
    "optimizers.loraplus": {"optimizers.loraplus": "create_loraplus_optimizer"},
    "optimizers.riemannian": {"optimizers.riemannian": "create_riemannian_optimizer"},
    "peft_model": {
        "model": _MODELS,
        "api": "PEFT_TYPE_TO_CONFIG_MAPPING get_layer_status get_model_status",
        "status": "TunerLayerStatus=LayerStatus TunerModelStatus=ModelStatus",
        "compat.constants": f"{_MAPPINGS} DUMMY_MODEL_CONFIG",
        "compat.helpers": "create_attention_mask",
        "files": _FILES,
    },
    "tuners": {"mixed": "MixedModel=MixedTuner", "methods.multitask_prompt_tuning": "MultitaskPromptEmbedding"},
    "tuners._buffer_dict": {"storage": "BufferDict"},
    "tuners.mixed": {"mixed": "MixedModel=MixedTuner"},
    "tuners.mixed.model": {"mixed": "MixedModel=MixedTuner"},
    "tuners.lycoris_utils": {
        "config": "LycorisConfig=AdapterConfig",
        "layer": "LycorisLayer=Adapted",
        "tuner": "LycorisTuner=Tuner",
    },
    "tuners.tuners_utils": {
        "tuner": "BaseTuner=Tuner",
        "layer": "BaseTunerLayer=Adapted",
        "storage": "BufferDict",
        "compat.constants": f"PEFT_TYPE_TO_PREFIX_MAPPING {_CONSTANTS}",
        "errors": "NoMatchingPeftModuleError",
        "functional": "cast_adapter_dtype delete_adapter set_adapter set_requires_grad",
        "replace": "AuxiliaryTrainingWrapper=Wrapper",
        "compat.helpers": "check_adapters_to_merge check_target_module_exists inspect_matched_modules clone_module "
        "_find_minimal_target_modules=minimal_target_modules _maybe_include_all_linear_layers=with_all_linear "
        "_get_tuner_state_dict_key_prefixes=adapter_prefixes _filter_state_dict_by_key_prefixes=under_prefixes "
        f"find_parameter_name_by_module get_device_map onload_layer {_HELPERS}",
    },
    "tuners.adamss.asa_callback": {"compat.callbacks": "AdamssAsaCallback"},
    "tuners.lora": {**_INITS, "available": "is_bnb_4bit_available is_bnb_available is_eetq_available"},
    "tuners.lora.arrow": {"methods.arrow": "create_arrow_model"},
    "tuners.lora.config": {k: v for k, v in _INITS.items() if k in ("inits.settings", "methods.lora_options")}
    | {"methods.arrow": "ArrowConfig"},
    "tuners.lora.conversion": {"to_lora": "convert_to_lora save_as_lora"},
    "tuners.lora.corda": {"inits.corda": "preprocess_corda"},
    "tuners.lora.dora": {},
    "tuners.lora.eva": {"inits.eva": "get_eva_state_dict initialize_lora_eva_weights"},
    "tuners.lora.intruders": {"intruders": "reduce_intruder_dimension"},
    "tuners.lora.loraga": {"inits.lora_ga": "preprocess_loraga"},
    "tuners.lora.variants": {
        "compat.alora": "calculate_alora_offsets get_alora_offsets_for_forward get_alora_offsets_for_generate",
    },
    "tuners.cartridge.utils": {
        "prompts.initial_cache": "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values "
        "initialize_kv_prefix_from_text prompt_embeddings_from_past_key_values",
    },
    "tuners.lokr.layer": {"methods.lokr": "factorization"},
    "tuners.multitask_prompt_tuning.model": {"methods.multitask_prompt_tuning": "MultitaskPromptEmbedding"},
    "tuners.shira.mask_functions": {"methods.shira": "random_mask"},
    "tuners.xlora.classifier": {},
    "utils": {
        "config": "CONFIG_NAME PeftType TaskType",
        "files": _FILES,
        "errors": f"{_ERRORS} PeftWarning",
        "replace": _WRAPPERS,
        "state": _STATE,
        "api": "cast_mixed_precision_params load_peft_weights",
        "base_state": _BASE_STATE,
        "prepare": "prepare_model_for_kbit_training",
        "inits.loftq": "replace_lora_weights_loftq",
        "compat.constants": _CONSTANTS,
        "compat.helpers": _HELPERS,
        "to_lora": "convert_to_lora save_as_lora",
    },
    "utils.constants": {"compat.constants": _CONSTANTS, "files": _FILES, "config": "CONFIG_NAME"},
    "utils.error": {"errors": _ERRORS},
    "utils.hotswap": {
        "hotswap": "hotswap_adapter hotswap_adapter_from_state_dict check_hotswap_configs_compatible=compatible",
        "hotswap_room": "prepare_model_for_compiled_hotswap",
    },
    "utils.incremental_pca": {"compat.pca": "IncrementalPCA"},
    "utils.integrations": {
        "compat.integrations": "check_deepspeed_zero3_enabled gather_params_ctx init_empty_weights skip_init_on_device "
        "get_layer_device_map dequantize_module_weight",
    },
    "utils.loftq_utils": {"inits.loftq": "replace_lora_weights_loftq"},
    "utils.merge_utils": {"compat.merge": "dare_linear dare_ties magnitude_prune prune task_arithmetic ties"},
    "utils.other": {
        "config": "CONFIG_NAME",
        "files": _FILES,
        "replace": _WRAPPERS,
        "compat.constants": _CONSTANTS,
        "prepare": "prepare_model_for_kbit_training",
        "api": "cast_mixed_precision_params",
        "fsdp": "fsdp_auto_wrap_policy _get_no_split_modules=no_split_modules",
        "compat.helpers": _HELPERS,
    },
    "utils.peft_types": {"config": "PeftType TaskType"},
    "utils.quantization_utils": {},
    "utils.save_and_load": {
        "state": _STATE,
        "api": "load_peft_weights",
        "base_state": _BASE_STATE,
        "files": f"{_FILES} torch_load=read_tensors",
    },
    "utils.transformers_weight_conversion": {"compat.weights": "build_peft_weight_mapping"},
    "utils.warning": {"errors": "PeftWarning"},
}

Getter = Callable[[], Any]


Names = dict[str, Getter]


def _parse(sources: dict[str, str]) -> Names:
    out: dict[str, Getter] = {}
    for module, names in sources.items():
        for item in names.split():
            there, _, here = item.partition("=")
            out[there] = partial(_fetch, module, here or there)
    return out


def source(module: str, name: str) -> tuple[str, str] | None:
    """(veneer's module, its name for it) of a declared name."""
    getter = modules().get(module, {}).get(name)
    if isinstance(getter, partial) and getter.func is _fetch:
        return f"veneer.{getter.args[0]}", getter.args[1]
    return None


def _fetch(module: str, name: str) -> Any:
    return getattr(import_module(f"veneer.{module}"), name)


def _target_tables() -> dict[str, Getter]:
    """TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING and its like."""
    out: dict[str, Getter] = {}
    for peft_type in registry.types():
        kind = peft_type.lower()
        out[f"TRANSFORMERS_MODELS_TO_{peft_type.replace('_', '')}_TARGET_MODULES_MAPPING"] = partial(_table, kind)
    return {**out, "TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING": partial(_table, "ia3_feedforward")}


def _table(kind: str) -> Any:
    from ..defaults import target_table

    return target_table(kind)


def _layers(peft_type: str) -> dict[str, Getter]:
    from . import kinds

    return {name: partial(kinds.layer_class, peft_type, name) for name in kinds.names_of(peft_type)}


def _method_modules(peft_type: str) -> dict[str, dict[str, Getter]]:
    """`tuners.lora` and its parts, of one method."""
    from ..kinds import Prompt
    from . import kinds

    entry = registry.METHODS[peft_type]
    own: Names = {n: partial(_fetch, entry.module, n) for n in (entry.config, *entry.also)}
    config = {n: g for n, g in own.items() if not n.endswith("Encoder")}
    at = f"tuners.{peft_type.lower()}"
    if isinstance(registry.method(peft_type), Prompt):
        return {at: own, f"{at}.config": config, f"{at}.model": own}
    model: dict[str, Getter] = {kinds.model_name(peft_type): partial(kinds.model_class, peft_type)}
    tables = {k: v for k, v in _target_tables().items() if f"_{peft_type.replace('_', '')}_" in k}
    layers = _layers(peft_type)
    whole: Names = {**own, **model, **layers}
    return {at: whole, f"{at}.config": config, f"{at}.layer": layers, f"{at}.model": {**model, **tables}}


@cache
def modules() -> dict[str, dict[str, Getter]]:
    """Every module under the name peft ("" for peft itself, "tuners.lora.layer"): name -> what gets it."""
    out: dict[str, dict[str, Getter]] = {}
    for peft_type in registry.types():
        for name, found in _method_modules(peft_type).items():
            out[name] = {**out.get(name, {}), **found}
    tuners = {n: g for at, found in out.items() if at.count(".") == 1 for n, g in found.items() if _is_public(n)}
    for name, sources in TABLE.items():
        out[name] = {**out.get(name, {}), **_parse(sources)}
    exports = {n: partial(getattr, veneer, n) for n in registry.exports()}
    out["tuners"] = {**tuners, **_parse(_INITS), **out["tuners"], **out["tuners.cartridge.utils"], **exports}
    for name in ("utils", "utils.constants", "utils.other"):
        out[name] = {**_target_tables(), **out[name]}
    models = {n: g for n, g in tuners.items() if n.endswith("Model")}
    mapped = _parse({"compat.constants": _MAPPINGS, "model": "MODEL_TYPE_TO_PEFT_MODEL_MAPPING=TASKS"})
    rest = {n: g for n, g in out["utils"].items() if n in _TOP_LEVEL}
    out[""] = {**models, **mapped, **rest, **{n: partial(getattr, veneer, n) for n in veneer.__all__ if n[0] != "_"}}
    return out


# of peft.utils, what peft has at its top as well
_TOP_LEVEL = frozenset(
    f"{_ERRORS} {_BASE_STATE} prepare_model_for_kbit_training shift_tokens_right "
    "bloom_model_postprocess_past_key_value TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING".split()
)


def _is_public(name: str) -> bool:
    return name.endswith(("Config", "Model", "Init", "Embedding", "Encoder", "Type"))
