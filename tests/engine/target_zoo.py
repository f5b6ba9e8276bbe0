"""Tiny models of many architectures on the meta device: names, classes and shapes, no weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

BASE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 48,
}
GROUPED = {**BASE, "num_key_value_heads": 2, "head_dim": 4}
NARROW = {**BASE, "num_key_value_heads": 2}
GPT = {"n_embd": 16, "n_layer": 3, "n_head": 4, "vocab_size": 48, "n_positions": 32}
IMAGE = {**{k: v for k, v in BASE.items() if k != "vocab_size"}, "image_size": 8, "patch_size": 4}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 3, "num_heads": 4, "vocab_size": 48}
BART = {
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 48,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# architecture -> (config class, settings, the auto class that builds it)
ZOO: dict[str, tuple[type, dict[str, Any], str]] = {
    "llama": (tf.LlamaConfig, GROUPED, "CausalLM"),
    "mistral": (tf.MistralConfig, GROUPED, "CausalLM"),
    "mixtral": (tf.MixtralConfig, {**GROUPED, "num_local_experts": 2}, "CausalLM"),
    "qwen2": (tf.Qwen2Config, NARROW, "CausalLM"),
    "qwen3": (tf.Qwen3Config, GROUPED, "CausalLM"),
    "gemma": (tf.GemmaConfig, GROUPED, "CausalLM"),
    "gemma2": (tf.Gemma2Config, GROUPED, "CausalLM"),
    "gemma3_text": (tf.Gemma3TextConfig, GROUPED, "CausalLM"),
    "phi": (tf.PhiConfig, BASE, "CausalLM"),
    "stablelm": (tf.StableLmConfig, NARROW, "CausalLM"),
    "gpt2": (tf.GPT2Config, GPT, "CausalLM"),
    "gpt_bigcode": (tf.GPTBigCodeConfig, GPT, "CausalLM"),
    "gptj": (tf.GPTJConfig, {**GPT, "rotary_dim": 4}, "CausalLM"),
    "codegen": (tf.CodeGenConfig, {**GPT, "rotary_dim": 4}, "CausalLM"),
    "gpt_neox": (tf.GPTNeoXConfig, BASE, "CausalLM"),
    "gpt_neo": (
        tf.GPTNeoConfig,
        {
            "hidden_size": 16,
            "num_layers": 3,
            "num_heads": 4,
            "vocab_size": 48,
            "attention_types": [[["global"], 3]],
        },
        "CausalLM",
    ),
    "bloom": (tf.BloomConfig, {"hidden_size": 16, "n_layer": 3, "n_head": 4, "vocab_size": 48}, "CausalLM"),
    "falcon": (tf.FalconConfig, BASE, "CausalLM"),
    "mpt": (tf.MptConfig, {"d_model": 16, "n_layers": 3, "n_heads": 4, "vocab_size": 48}, "CausalLM"),
    "opt": (tf.OPTConfig, {**BASE, "ffn_dim": 24, "word_embed_proj_dim": 16}, "CausalLM"),
    "bert": (tf.BertConfig, BASE, "MaskedLM"),
    "roberta": (tf.RobertaConfig, BASE, "MaskedLM"),
    "xlm-roberta": (tf.XLMRobertaConfig, BASE, "MaskedLM"),
    "electra": (tf.ElectraConfig, {**BASE, "embedding_size": 16}, "MaskedLM"),
    "deberta": (tf.DebertaConfig, BASE, "MaskedLM"),
    "deberta-v2": (tf.DebertaV2Config, BASE, "MaskedLM"),
    "layoutlm": (tf.LayoutLMConfig, BASE, "MaskedLM"),
    "t5": (tf.T5Config, T5, "Seq2SeqLM"),
    "mt5": (tf.MT5Config, T5, "Seq2SeqLM"),
    "bart": (tf.BartConfig, BART, "Seq2SeqLM"),
    "whisper": (
        tf.WhisperConfig,
        {**BART, **SPECIAL, "num_mel_bins": 8, "decoder_start_token_id": 1},
        "SpeechSeq2Seq",
    ),
    "vit": (tf.ViTConfig, IMAGE, "ImageClassification"),
    "rwkv": (tf.RwkvConfig, {"hidden_size": 16, "num_hidden_layers": 3, "vocab_size": 48}, "CausalLM"),
    # in no table: derived from the graph
    "phi3": (tf.Phi3Config, {**NARROW, "pad_token_id": 0}, "CausalLM"),
    "distilbert": (
        tf.DistilBertConfig,
        {"dim": 16, "hidden_dim": 24, "n_layers": 3, "n_heads": 4, "vocab_size": 48},
        "MaskedLM",
    ),
    "albert": (tf.AlbertConfig, {**BASE, "embedding_size": 16}, "MaskedLM"),
    "modernbert": (
        tf.ModernBertConfig,
        {**BASE, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2},
        "MaskedLM",
    ),
    "dinov2": (tf.Dinov2Config, IMAGE, "ImageClassification"),
}


def build(arch: str, task: str | None = None) -> torch.nn.Module:
    """A tiny model; ``task`` names another auto class ("" is the bare model)."""
    config_class, settings, usual = ZOO[arch]
    task = usual if task is None else task
    auto = getattr(tf, f"AutoModelFor{task}" if task else "AutoModel")
    with torch.device("meta"):
        return auto.from_config(config_class(**settings))
