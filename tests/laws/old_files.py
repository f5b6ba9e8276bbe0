"""adapter_config.json as older versions of peft wrote it: the keys of that version, with values that are not defaults.

"TYPE version" -> the file. Keys that a version did not have yet are absent, which is what makes them worth a test.
"""

from __future__ import annotations

from typing import Any

COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": "some/base",
    "inference_mode": True,
    "revision": None,
    "task_type": "CAUSAL_LM",
}
LAYERS: dict[str, Any] = {"layers_pattern": None, "layers_to_transform": None, "modules_to_save": None}
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
LORA_0_6: dict[str, Any] = {
    **COMMON, **LAYERS, **TARGETS, "peft_type": "LORA", "alpha_pattern": {}, "bias": "none", "fan_in_fan_out": False,
    "init_lora_weights": True, "lora_alpha": 32, "lora_dropout": 0.05, "r": 16, "rank_pattern": {"q_proj": 4},
}  # fmt: skip
LORA_0_10: dict[str, Any] = {
    **LORA_0_6, "loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core", "use_rslora": True,
    "use_dora": False, "layer_replication": None,
}  # fmt: skip
LORA_0_15: dict[str, Any] = {
    **LORA_0_10, "exclude_modules": None, "eva_config": None, "corda_config": None, "lora_bias": False,
    "trainable_token_indices": None,
}  # fmt: skip
LORA_0_18: dict[str, Any] = {
    **LORA_0_15, "use_qalora": False, "qalora_group_size": 16, "target_parameters": None,
    "alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False, "peft_version": "0.18.0",
}  # fmt: skip
LYCORIS: dict[str, Any] = {
    **COMMON, **LAYERS, **TARGETS, "alpha_pattern": {}, "rank_pattern": {"v_proj": 2}, "init_weights": True,
    "module_dropout": 0.1, "r": 4,
}  # fmt: skip
PROMPT: dict[str, Any] = {
    **COMMON, "num_attention_heads": 4, "num_layers": 2, "num_transformer_submodules": 1, "num_virtual_tokens": 6,
    "token_dim": 32,
}  # fmt: skip
TUNING: dict[str, Any] = {
    **PROMPT, "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None,
}  # fmt: skip

OLD: dict[str, dict[str, Any]] = {
    "LORA 0.6": LORA_0_6,
    "LORA 0.10": LORA_0_10,
    "LORA 0.15": LORA_0_15,
    "LORA 0.18": LORA_0_18,
    "ADALORA 0.6": {
        **LORA_0_6, "peft_type": "ADALORA", "rank_pattern": None, "r": 8, "init_r": 12, "target_r": 4, "tinit": 10,
        "tfinal": 20, "deltaT": 5, "beta1": 0.85, "beta2": 0.85, "orth_reg_weight": 0.5, "total_step": 100,
    },
    "LOHA 0.6": {**LYCORIS, "peft_type": "LOHA", "alpha": 6, "rank_dropout": 0.0, "use_effective_conv2d": True},
    "LOKR 0.6": {
        **LYCORIS, "peft_type": "LOKR", "alpha": 6, "rank_dropout": 0.0, "use_effective_conv2d": False,
        "decompose_both": True, "decompose_factor": 4,
    },
    "OFT 0.7": {**LYCORIS, "peft_type": "OFT", "coft": True, "eps": 6e-5, "block_share": False},
    "IA3 0.6": {
        **COMMON, "peft_type": "IA3", "fan_in_fan_out": False, "feedforward_modules": ["down_proj"],
        "init_ia3_weights": True, "modules_to_save": None, "target_modules": ["k_proj", "down_proj"],
    },
    "PREFIX_TUNING 0.6": {
        **PROMPT, "peft_type": "PREFIX_TUNING", "encoder_hidden_size": 32, "prefix_projection": False,
    },
    "PROMPT_TUNING 0.6": {**TUNING, "peft_type": "PROMPT_TUNING"},
    "PROMPT_TUNING 0.9": {**TUNING, "peft_type": "PROMPT_TUNING", "tokenizer_kwargs": None},
    "MULTITASK_PROMPT_TUNING 0.6": {
        **TUNING, "peft_type": "MULTITASK_PROMPT_TUNING", "num_ranks": 1, "num_tasks": 3,
        "prompt_tuning_init_state_dict_path": None, "prompt_tuning_init_task": 0,
    },
    "P_TUNING 0.6": {
        **PROMPT, "peft_type": "P_TUNING", "encoder_dropout": 0.0, "encoder_hidden_size": 16, "encoder_num_layers": 2,
        "encoder_reparameterization_type": "LSTM",
    },
    "ADAPTION_PROMPT 0.6": {
        **COMMON, "peft_type": "ADAPTION_PROMPT", "adapter_layers": 2, "adapter_len": 5, "target_modules": None,
    },
    "POLY 0.8": {
        **COMMON, **TARGETS, "peft_type": "POLY", "init_weights": True, "modules_to_save": None, "n_skills": 4,
        "n_splits": 1, "n_tasks": 3, "poly_type": "poly", "r": 4,
    },
    "LN_TUNING 0.10": {
        **COMMON, "peft_type": "LN_TUNING", "modules_to_save": None, "target_modules": ["input_layernorm"],
    },
    "BOFT 0.10": {
        **COMMON, **LAYERS, **TARGETS, "peft_type": "BOFT", "bias": "none", "boft_block_num": 0, "boft_block_size": 4,
        "boft_dropout": 0.0, "boft_n_butterfly_factor": 2, "fan_in_fan_out": False, "init_weights": True,
    },
    "VERA 0.11": {
        **COMMON, **LAYERS, **TARGETS, "peft_type": "VERA", "bias": "none", "d_initial": 0.1, "fan_in_fan_out": False,
        "init_weights": True, "projection_prng_key": 3, "r": 64, "save_projection": True, "vera_dropout": 0.0,
    },
    "FOURIERFT 0.12": {
        **COMMON, **LAYERS, **TARGETS, "peft_type": "FOURIERFT", "bias": "none", "fan_in_fan_out": False,
        "init_weights": False, "n_frequency": 500, "n_frequency_pattern": {}, "random_loc_seed": 7, "scaling": 100.0,
    },
    "VBLORA 0.12": {
        **COMMON, **LAYERS, **TARGETS, "peft_type": "VBLORA", "bias": "none", "fan_in_fan_out": False,
        "init_logits_std": 0.1, "init_vector_bank_bound": 0.02, "num_vectors": 90, "r": 4,
        "save_only_topk_weights": False, "topk": 2, "vblora_dropout": 0.0, "vector_length": 64,
    },
    "HRA 0.13": {
        **COMMON, **LAYERS, **TARGETS, "peft_type": "HRA", "apply_GS": True, "bias": "none", "init_weights": True,
        "r": 4,
    },
}  # fmt: skip
