"""Which modules a method adapts when the user does not say.

First a table of facts by architecture, so that a config without ``target_modules`` means the same modules
here and in files written elsewhere; then, for every other model, a look at the module graph
(:mod:`veneer.graph`).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from veneer.graph import derive_targets, linear_names, name_tails

Targets = str | list[str]

_GEMMA4 = r".*language_model\..*\.(q_proj|v_proj)"  # a full-match pattern: its vision tower has the same names
_LLAMAS = "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3"

# one line per choice: the modules, then the architectures (transformers' model_type) it holds for
_LORA = {
    "q_proj v_proj": f"{_LLAMAS} bart opt gptj gpt_neo stablelm",
    "q_proj v_proj fc1 fc2": "phi",
    "q v": "t5 mt5",
    "q v q_proj v_proj": "blip-2",
    "query value": "bert roberta xlm-roberta electra layoutlm",
    "query_proj value_proj": "deberta-v2",
    "in_proj": "deberta",
    "query_key_value": "bloom gpt_neox chatglm RefinedWeb RefinedWebModel falcon",
    "c_attn": "gpt2 gpt_bigcode",
    "c_proj c_attn": "btlm",
    "qkv_proj": "codegen",
    "Wqkv": "mpt",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "key value receptance output": "rwkv",
    "r_proj k_proj v_proj o_proj key value": "rwkv7",
    _GEMMA4: "gemma4",
}

# the feed-forward module of each choice stands last
_IA3 = {
    "q_proj v_proj down_proj": "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
    "k_proj v_proj down_proj": "llama mistral",
    "k_proj v_proj w2": "mixtral",
    "q_proj v_proj fc2": "bart phi",
    "q_proj k_proj fc2": "opt",
    "q_proj v_proj fc_out": "gptj",
    "q_proj v_proj c_proj": "gpt_neo",
    "k v wo": "t5",
    "k v wi_1": "mt5",  # multiplied at its output, so not a feed-forward module in IA3's sense
    "key value output.dense": "bert roberta",
    "key_proj value_proj output.dense": "deberta-v2",
    "in_proj output.dense": "deberta",
    "query_key_value dense_4h_to_h": "gpt_neox RefinedWeb RefinedWebModel falcon",
    "query_key_value mlp.dense_4h_to_h": "bloom",
    "c_attn mlp.c_proj": "gpt2 gpt_bigcode",
}

_GEMMA_NORMS = "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm"
_LN_TUNING = {
    "input_layernorm post_attention_layernorm norm": "llama mistral gemma",
    _GEMMA_NORMS: "gemma2 gemma3_text",
    "post_attention_layernorm": "qwen2 qwen3",
    "multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head": "llava",
    "input_layernorm post_attention_layernorm ln_f": "bloom falcon",
    "input_layernorm final_layernorm": "phi",
    "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
    "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
    "layer_norm final_layer_norm": "t5 mt5",
    "ln_1 ln_2 ln_f": "gpt2",
    "ln_1 ln_f": "gptj",
}

_ALL_ENCODER = {
    "q k v o wi wo": "t5",
    "q k v o wi_0 wi_1 wo": "mt5",
    "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt",
    "query_proj key_proj value_proj dense": "deberta-v2",
}
_PHI = {"q_proj v_proj": "phi"}
_GPT2_MLP = {"mlp.c_proj": "gpt2 gpt_bigcode"}
_VISION = {"query value": "vit"}

# where a method's usual choice is not LoRA's
_OF_METHOD: dict[str, dict[str, str]] = {
    "adalora": {**_ALL_ENCODER, "query key value dense": "roberta"},
    "vblora": _ALL_ENCODER,
    "vera": _PHI,
    "shira": _PHI,
    "pvera": {**_PHI, "query value": "dinov2"},
    "frod": {**_PHI, **_VISION},
    "adamss": _VISION,
    "c3a": _GPT2_MLP,
    "fourierft": _GPT2_MLP,
    "waveft": _GPT2_MLP,
    "beft": {
        "v": "t5 mt5",
        "value": "bert roberta",
        "value_proj": "deberta-v2",
        "v_proj": f"{_LLAMAS} phi opt gptj gpt_neo bart",
    },
    "osf": {
        "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj": f"{_LLAMAS} phi",
        "q_proj k_proj v_proj out_proj fc1 fc2": "opt",
        "q_proj k_proj v_proj out_proj fc_in fc_out": "gptj",
        "query_key_value dense_4h_to_h": "bloom gpt_neox falcon",
        "c_attn c_proj": "gpt2 gpt_bigcode",
    },
}


def _by_architecture(lines: Mapping[str, str]) -> dict[str, Targets]:
    return {
        arch: modules if modules == _GEMMA4 else modules.split()
        for modules, archs in lines.items()
        for arch in archs.split()
    }


def target_table(kind: str = "lora") -> dict[str, Targets]:
    """Architecture -> its usual targets for one kind: a method's name, "ia3_feedforward" or "ln_tuning".

    Methods without a table of their own use LoRA's. A value is a list of names or a full-match pattern.
    """
    if kind == "ia3_feedforward":
        table = {arch: names[-1:] for arch, names in _by_architecture(_IA3).items()}
        return {**table, "mt5": []}
    if kind in ("ia3", "ln_tuning"):
        return _by_architecture(_IA3 if kind == "ia3" else _LN_TUNING)
    return {**_by_architecture(_LORA), **_by_architecture(_OF_METHOD.get(kind, {}))}


def default_targets(model: nn.Module, model_type: str | None, kind: str = "lora") -> Targets:
    """The usual targets of ``kind`` for this model: the table's, else those derived from its graph.

    Args:
        model: the base model; only names, classes and shapes are read.
        model_type: transformers' name of the architecture, or None if it has none.
        kind: "ln_tuning", "ia3", "ia3_feedforward" or a method's name; without a table of its own a method
            uses LoRA's: the query and value projections of attention, or the fused one.

    Returns:
        Names to match as suffixes, or one full-match pattern. Empty only for "ia3_feedforward".

    Raises:
        ValueError: neither the table nor the graph knows what to adapt.
    """
    known = target_table(kind).get(model_type or "")
    if isinstance(known, str) or (known is not None and (not known or _present(model, known))):
        return known
    derived = derive_targets(model, kind) or (linear_names(model) if kind == "osf" else [])
    if not derived and kind != "ia3_feedforward":  # none is an answer there
        shown = ", ".join(sorted({name.rpartition(".")[2] for name in linear_names(model)})[:12])
        what = "layer norms" if kind == "ln_tuning" else "attention projections"
        raise ValueError(
            f"no default targets for {type(model).__name__} (model_type {model_type!r}): the architecture is "
            f"not in the table and no {what} were found in it. Please specify `target_modules`"
            + (f", for example from its linear layers: {shown}" if shown else "")
        )
    return derived


def _present(model: nn.Module, names: list[str]) -> bool:
    """A release may rename an architecture's modules; then the table says nothing about this model."""
    wanted = set(names)
    return any(not wanted.isdisjoint(name_tails(path)) for path, _ in model.named_modules())
