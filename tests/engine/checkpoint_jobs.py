"""Small models with one adapter each, for the tests that pass files between veneer and peft."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from api_zoo import bert, gpt2, llama, t5
from transformers import BertForQuestionAnswering, BertForSequenceClassification, BertModel


class Job(NamedTuple):
    base: Callable[[], Any]
    config: str
    options: dict[str, Any]


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def classifier() -> Any:
    return bert(BertForSequenceClassification)


def answers() -> Any:
    return bert(BertForQuestionAnswering, num_labels=2)


def encoder() -> Any:
    return bert(BertModel)


LM = {"task_type": "CAUSAL_LM", "r": 4}
NER = {"task_type": "TOKEN_CLS", "r": 4}
JOBS = {
    "defaults": Job(llama, "LoraConfig", {"task_type": "CAUSAL_LM"}),
    "all-linear": Job(llama, "LoraConfig", {**LM, "target_modules": "all-linear"}),
    "patterns": Job(
        llama,
        "LoraConfig",
        {
            **LM,
            "target_modules": ["q_proj", "o_proj"],
            "rank_pattern": {"q_proj": 2, r"^model\.layers\.0\..*o_proj": 6},
            "alpha_pattern": {"o_proj": 3, "layers.1.self_attn.q_proj": 5},
            "use_rslora": True,
        },
    ),
    "regex": Job(llama, "LoraConfig", {**LM, "target_modules": r".*layers\.1\..*(q|v)_proj"}),
    "excluded": Job(
        llama, "LoraConfig", {**LM, "target_modules": "all-linear", "exclude_modules": ["up_proj", "0.mlp.down_proj"]}
    ),
    "some layers": Job(
        llama,
        "LoraConfig",
        {**LM, "target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "embedding": Job(llama, "LoraConfig", {**LM, "target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "tied embedding": Job(tied, "LoraConfig", {**LM, "target_modules": ["embed_tokens", "q_proj"]}),
    "dora": Job(
        llama, "LoraConfig", {**LM, "use_dora": True, "target_modules": ["q_proj", "down_proj", "embed_tokens"]}
    ),
    "dora rslora": Job(gpt2, "LoraConfig", {**LM, "use_dora": True, "use_rslora": True, "fan_in_fan_out": True}),
    "gpt2": Job(gpt2, "LoraConfig", {**LM, "fan_in_fan_out": True}),
    "lora bias": Job(llama, "LoraConfig", {**LM, "lora_bias": True, "target_modules": ["q_proj"]}),
    "pissa": Job(
        llama, "LoraConfig", {**LM, "init_lora_weights": "pissa", "target_modules": ["q_proj", "embed_tokens"]}
    ),
    "olora": Job(llama, "LoraConfig", {**LM, "init_lora_weights": "olora"}),
    "orthogonal": Job(llama, "LoraConfig", {**LM, "init_lora_weights": "orthogonal"}),
    "gaussian": Job(llama, "LoraConfig", {**LM, "init_lora_weights": "gaussian"}),
    "dora pissa": Job(llama, "LoraConfig", {**LM, "init_lora_weights": "pissa", "use_dora": True}),
    "saved modules": Job(llama, "LoraConfig", {**LM, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "saved norms": Job(llama, "LoraConfig", {**LM, "modules_to_save": ["input_layernorm"]}),
    "tokens": Job(llama, "LoraConfig", {**LM, "trainable_token_indices": [1, 7, 30]}),
    "tied tokens": Job(tied, "LoraConfig", {**LM, "trainable_token_indices": {"embed_tokens": [2, 40]}}),
    "bias all": Job(bert, "LoraConfig", {**NER, "bias": "all"}),
    "bias lora_only": Job(bert, "LoraConfig", {**NER, "bias": "lora_only", "target_modules": ["query", "dense"]}),
    "sequence": Job(classifier, "LoraConfig", {"task_type": "SEQ_CLS", "r": 4}),
    "question": Job(answers, "LoraConfig", {"task_type": "QUESTION_ANS", "r": 4}),
    "features": Job(encoder, "LoraConfig", {"task_type": "FEATURE_EXTRACTION", "r": 4}),
    "seq2seq": Job(t5, "LoraConfig", {"task_type": "SEQ_2_SEQ_LM", "r": 4, "target_modules": ["q", "v", "wo"]}),
    "no task": Job(llama, "LoraConfig", {"r": 4}),
    "vera": Job(
        llama, "VeraConfig", {"task_type": "CAUSAL_LM", "r": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    ),
    "vera unsaved": Job(
        llama, "VeraConfig", {"r": 16, "target_modules": ["q_proj", "up_proj"], "save_projection": False}
    ),
    "vera bert": Job(
        bert, "VeraConfig", {"task_type": "TOKEN_CLS", "r": 16, "target_modules": ["query"], "bias": "vera_only"}
    ),
    "oft": Job(
        llama, "OFTConfig", {"task_type": "CAUSAL_LM", "oft_block_size": 4, "target_modules": ["q_proj", "down_proj"]}
    ),
    "oft shared": Job(
        llama, "OFTConfig", {"oft_block_size": 0, "r": 4, "block_share": True, "target_modules": ["q_proj"]}
    ),
    "oft bias": Job(
        bert,
        "OFTConfig",
        {"task_type": "TOKEN_CLS", "oft_block_size": 8, "target_modules": ["query"], "bias": "oft_only"},
    ),
    "ia3": Job(llama, "IA3Config", {"task_type": "CAUSAL_LM"}),
    "ia3 bert": Job(
        bert,
        "IA3Config",
        {"task_type": "TOKEN_CLS", "target_modules": ["key", "dense"], "feedforward_modules": ["dense"]},
    ),
    "loha": Job(
        llama, "LoHaConfig", {"r": 3, "alpha": 5, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}
    ),
    "ln tuning": Job(bert, "LNTuningConfig", {"task_type": "TOKEN_CLS", "target_modules": ["LayerNorm"]}),
    "rms norm": Job(llama, "LNTuningConfig", {"task_type": "CAUSAL_LM"}),
    "trainable tokens": Job(llama, "TrainableTokensConfig", {"token_indices": [3, 4, 31]}),
    "trainable tokens tied": Job(
        tied, "TrainableTokensConfig", {"token_indices": [3, 4, 31], "task_type": "CAUSAL_LM"}
    ),
    "prompt tuning": Job(llama, "PromptTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}),
    "prefix tuning": Job(llama, "PrefixTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}),
    "prefix projection": Job(
        gpt2,
        "PrefixTuningConfig",
        {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 16},
    ),
    "prompt bert": Job(classifier, "PromptTuningConfig", {"task_type": "SEQ_CLS", "num_virtual_tokens": 3}),
}
