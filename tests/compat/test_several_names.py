"""Modules under several names: files of old names, experts that are fused in memory, embeddings tied to heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import veneer

SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BOTH = pytest.mark.parametrize("lib", [veneer, peft], ids=["veneer", "peft"])


class Parts(nn.Module):
    """Qwen2-VL's parts under the names of before and of now."""

    def __init__(self, now: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        text, image = nn.ModuleList([nn.Linear(4, 4)]), nn.ModuleDict({"attn": nn.Linear(4, 4)})
        if now:
            inner = nn.ModuleDict({"visual": image, "language_model": nn.ModuleDict({"layers": text})})
            self._checkpoint_conversion_mapping = {
                "^visual": "model.visual",
                r"^model(?!\.(language_model|visual))": "model.language_model",
            }
        else:
            inner = nn.ModuleDict({"layers": text})
            self.visual = image
        self.model = inner


def filled(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p for n, p in model.named_parameters() if "lora_" in n}
    with torch.no_grad():
        for i, p in enumerate(found.values()):
            p.fill_(i + 1)
    return found


@BOTH
@pytest.mark.parametrize("written_now", [True, False])
def test_a_file_of_the_old_names_loads_into_the_new_model(lib: Any, written_now: bool, tmp_path: Path) -> None:
    model = lib.get_peft_model(Parts(written_now), lib.LoraConfig(target_modules=["attn", "layers.0"]))
    sums = {float(p.sum()) for p in filled(model).values()}
    model.save_pretrained(tmp_path)
    loaded = lib.PeftModel.from_pretrained(Parts(True), tmp_path)
    found = [p for n, p in loaded.named_parameters() if "lora_" in n]
    assert {float(p.sum()) for p in found} == sums
    assert len(sums) == 4


def test_a_transformers_models_own_renamings_serve_too(tmp_path: Path) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {**SIZES, "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16}

    def base() -> Any:
        torch.manual_seed(0)
        return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))

    model = veneer.get_peft_model(base(), veneer.LoraConfig(target_modules=["q_proj", "qkv"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    tensors = veneer.load_peft_weights(
        tmp_path, key_mapping={r"^model\.visual": "visual", r"^model\.language_model": "model"}
    )
    assert {k.split(".")[2] for k in tensors} == {"visual", "model"}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    loaded = veneer.PeftModel.from_pretrained(base(), tmp_path)
    ours, theirs = veneer.get_peft_model_state_dict(model), veneer.get_peft_model_state_dict(loaded)
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "moe_intermediate_size": 8, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2))


@BOTH
@pytest.mark.parametrize(
    ("pattern", "modules", "parameters"),
    [
        (r".*\.(q_proj|gate_proj|up_proj|down_proj)", {"q_proj"}, {"gate_up_proj", "down_proj"}),
        (r"^(model(?=\.).*\.(v_proj|gate_proj|up_proj))$", {"v_proj"}, {"gate_up_proj"}),
        (r".*\.down_proj", set(), {"down_proj"}),
        (r".*\.gate", set(), {"gate.weight"}),
        (r".*\.(q|k)_proj", {"q_proj", "k_proj"}, set()),
    ],
)
def test_a_regex_names_fused_experts_too(lib: Any, pattern: str, modules: set[str], parameters: set[str]) -> None:
    config = lib.get_peft_model(moe(), lib.LoraConfig(target_modules=pattern)).peft_config["default"]
    assert config.target_modules == modules
    assert set(config.target_parameters or ()) == parameters
    fused = {r".*\.gate_up_proj": 2 * config.r} if "gate_up_proj" in parameters else {}
    assert config.rank_pattern == fused


def test_a_regex_for_one_layer_keeps_to_it() -> None:
    """peft takes the names' last parts, and so adapts every layer."""
    pattern = r".*layers\.0\..*(q_proj|experts\.\d+\.gate_proj|experts\.\d+\.up_proj)"
    made = veneer.get_peft_model(moe(), veneer.LoraConfig(target_modules=pattern))
    assert made.peft_config["default"].target_modules == {"model.layers.0.self_attn.q_proj"}
    assert made.peft_config["default"].target_parameters == ["model.layers.0.mlp.experts.gate_up_proj"]
    assert all("layers.0." in n for n, p in made.named_parameters() if p.requires_grad)


@BOTH
def test_a_regex_for_a_part_of_what_is_fused_is_an_error(lib: Any) -> None:
    config = lib.LoraConfig(target_modules=r".*\.up_proj")
    with pytest.raises(ValueError, match=r"Cannot convert PEFT target\(s\) up_proj without also targeting gate_proj"):
        lib.get_peft_model(moe(), config)


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


@BOTH
def test_tied_modules_are_named_in_order(lib: Any) -> None:
    model = lib.get_peft_model(t5(), lib.LoraConfig(target_modules=["q"]))
    names = ["decoder.embed_tokens", "encoder.embed_tokens", "lm_head"]
    assert model._get_module_names_tied_with_embedding() == names


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [1, 2]},
        {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_four_tied_modules_are_one_weight_again_when_merged(lib: Any, options: dict[str, Any]) -> None:
    model = lib.get_peft_model(t5(), lib.LoraConfig(**{"target_modules": ["q"], **options}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "trainable_tokens" in name:
                p.add_(1)
    merged = model.merge_and_unload()
    found = {
        id(m.weight)
        for m in (merged.shared, merged.lm_head, *(s.embed_tokens for s in (merged.encoder, merged.decoder)))
    }
    assert len(found) == 1
    assert merged.config.tie_word_embeddings


@BOTH
def test_the_head_of_an_encoder_decoder_shares_the_first_embeddings_factors(lib: Any, tmp_path: Path) -> None:
    """The file has every pair; peft does not find its own output again."""
    config = lib.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False)
    model = lib.get_peft_model(t5(), config).eval()
    base = model.get_base_model()
    A, B = base.lm_head.lora_A["default"].weight, base.lm_head.lora_B["default"].weight
    assert torch.equal(A, base.shared.lora_embedding_B["default"].T)
    assert torch.equal(B, base.shared.lora_embedding_A["default"].T)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2]])
    for other in (veneer, peft) if lib is veneer else (veneer,):
        back = other.PeftModel.from_pretrained(t5(), tmp_path).eval()
        found, wanted = (m(input_ids=ids, decoder_input_ids=ids).logits for m in (back, model))
        torch.testing.assert_close(found, wanted)
