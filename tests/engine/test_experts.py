"""Configs that name single experts' layers, on models that hold all experts in one parameter."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import veneer

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
LATENT = {
    "n_routed_experts": 4, "first_k_dense_replace": 1, "moe_intermediate_size": 24, "kv_lora_rank": 8,
    "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1,
    "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=3)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**(SIZES | LATENT))),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, num_experts=3, moe_intermediate_size=24)),
}
IDS = torch.tensor([[1, 2, 3, 4], [7, 8, 9, 5]])
LLAMA = ["gate_proj", "up_proj", "down_proj"]
CASES = [
    ("mixtral", {"target_modules": ["w1", "w2", "w3", "q_proj"]}),
    ("mixtral", {"target_modules": ["w2", "gate"], "lora_alpha": 3}),
    ("olmoe", {"target_modules": LLAMA, "lora_alpha": 6, "alpha_pattern": {"q_proj": 4}}),
    ("olmoe", {"target_modules": LLAMA[:2], "target_parameters": ["down_proj"], "use_rslora": True}),
    ("olmoe", {"target_modules": "all-linear"}),
    ("deepseek_v3", {"target_modules": LLAMA}),
    ("deepseek_v3", {"target_modules": "all-linear"}),
    ("qwen2_moe", {"target_modules": LLAMA}),
]


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_equals_peft_in_config_names_and_outputs(name, options, tmp_path):
    options = {**options, "r": 2, "task_type": "CAUSAL_LM"}
    mine, other = veneer.LoraConfig(**copy.deepcopy(options)), peft.LoraConfig(**copy.deepcopy(options))
    ours = veneer.get_peft_model(build(name), mine).eval()
    theirs = peft.get_peft_model(build(name), other).eval()
    found = veneer.get_peft_model_state_dict(ours)
    names = peft.get_peft_model_state_dict(theirs)
    assert {k: t.shape for k, t in names.items()} == {k: t.shape for k, t in found.items()}
    for key in ("target_modules", "target_parameters"):
        assert set(getattr(mine, key) or ()) == set(getattr(other, key) or ()), key
    assert (mine.rank_pattern, mine.alpha_pattern) == (other.rank_pattern, other.alpha_pattern)
    torch.manual_seed(1)
    values = {k: torch.randn_like(t) * 0.2 for k, t in found.items()}
    peft.set_peft_model_state_dict(theirs, dict(values))
    assert veneer.set_peft_model_state_dict(ours, values).ok
    y = ours(IDS).logits
    assert torch.allclose(y, theirs(IDS).logits, atol=1e-5)
    ours.save_pretrained(tmp_path)
    assert torch.allclose(veneer.PeftModel.from_pretrained(build(name), tmp_path)(IDS).logits, y, atol=1e-5)
    assert torch.allclose(peft.PeftModel.from_pretrained(build(name), tmp_path)(IDS).logits, y, atol=1e-5)


def test_a_part_of_a_fused_projection_is_refused():
    with pytest.raises(ValueError, match="without also targeting w3"):
        veneer.get_peft_model(build("mixtral"), veneer.LoraConfig(target_modules=["w1", "q_proj"]))
