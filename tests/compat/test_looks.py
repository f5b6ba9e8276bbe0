"""Names, words and kinds of errors by which scripts written for peft look at what they made."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import peft.optimizers
import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer.optimizers import create_lorafa_optimizer

SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BOTH = pytest.mark.parametrize("lib", [veneer, peft], ids=["veneer", "peft"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.lin, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.lin(self.table(ids)))


def llama(name: str = "org/name") -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.name_or_path = model.config._name_or_path = name
    return model


@BOTH
def test_a_card_has_the_tags_by_which_the_hub_finds_adapters(lib: Any, tmp_path: Path) -> None:
    base = llama()
    base.add_model_tags(["mine"])
    lib.get_peft_model(base, lib.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md").data
    assert {"mine", "lora", "transformers", "base_model:adapter:org/name"} <= set(card.tags)
    assert card.pipeline_tag == "text-generation"
    assert card.base_model == "org/name"


def test_a_card_of_a_plain_module_names_no_library_and_no_base(tmp_path: Path) -> None:
    veneer.get_peft_model(Net(), veneer.LoHaConfig(target_modules=["lin"])).save_pretrained(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.tags == ["loha", "veneer"]


@BOTH
def test_lorafa_names_its_parameters_and_their_scalings(lib: Any) -> None:
    config = lib.LoraConfig(target_modules=["table", "lin"], r=4, lora_alpha=8, rank_pattern={"lin": 2})
    model = lib.get_peft_model(Net(), config)
    if lib is veneer:
        optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    else:
        optimizer = peft.optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    group = optimizer.param_groups[0]
    found = dict(zip(group["names"], group["scaling_factors"], strict=True))
    assert found["base_model.model.lin.lora_B.default.weight"] == 4
    assert found["base_model.model.table.lora_embedding_A.default"] == 2


def test_lorafa_trains_embeddings_alone_too() -> None:
    model = veneer.get_peft_model(Net(), veneer.LoraConfig(target_modules=["table"]))
    optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=1e-2)
    before = model(torch.arange(4)).detach()
    model(torch.arange(4)).sum().backward()
    optimizer.step()
    assert not torch.equal(model(torch.arange(4)), before)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masters", [True, False])
def test_a_converted_adapter_has_the_dtype_of_its_source(lib: Any, dtype: torch.dtype, masters: bool) -> None:
    config = lib.LoKrConfig(target_modules=["lin"], init_weights=False)
    model = lib.get_peft_model(Net().to(dtype), config, autocast_adapter_dtype=masters)
    _, tensors = lib.convert_to_lora(model, rank=2)
    assert {t.dtype for t in tensors.values()} == {torch.float32 if masters else dtype}


@BOTH
@pytest.mark.parametrize(
    ("rank", "kind", "words"),
    [
        (
            123.0,
            ValueError,
            "If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got 123",
        ),
        (0, ValueError, "Passing a rank of 0 doesn't make sense"),
        (50, ValueError, r"The chosen rank 50 is larger than the weight shape \(8\), please choose a lower rank"),
    ],
)
def test_a_rank_that_cannot_be_is_said(lib: Any, rank: Any, kind: type[Exception], words: str) -> None:
    model = lib.get_peft_model(Net(), lib.LoKrConfig(target_modules=["lin"], init_weights=False))
    with pytest.raises(kind, match=words):
        lib.convert_to_lora(model, rank=rank)


@BOTH
def test_what_cannot_be_converted_is_a_type_error_or_a_value_error(lib: Any) -> None:
    with pytest.raises(TypeError, match="Could not detect any layer that supports LoRA conversion"):
        lib.convert_to_lora(Net(), rank=2)
    with pytest.raises(TypeError):
        lib.convert_to_lora(lib.get_peft_model(Net(), lib.LNTuningConfig(target_modules=["lin"])), rank=2)
    with pytest.raises(ValueError, match="config sets bias=all, this is not supported right now"):
        lib.convert_to_lora(lib.get_peft_model(Net(), lib.LoraConfig(target_modules=["lin"], bias="all")), rank=2)


@BOTH
def test_a_lora_converted_to_lora_warns(lib: Any) -> None:
    model = lib.get_peft_model(Net(), lib.LoraConfig(target_modules=["lin"], init_lora_weights=False))
    with pytest.warns(UserWarning, match="Converting a PEFT adapter to LoRA that is already a LoRA adapter"):
        lib.convert_to_lora(model, rank=2)


@BOTH
def test_a_config_that_names_another_base_is_renamed_with_a_warning(lib: Any) -> None:
    config = lib.LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path="other")
    with pytest.warns(UserWarning, match="was renamed from 'other' to 'org/name'"):
        lib.get_peft_model(llama(), config)
    assert config.base_model_name_or_path == "org/name"


def test_a_config_keeps_the_name_of_a_base_that_has_none() -> None:
    config = veneer.LoraConfig(target_modules=["lin"], base_model_name_or_path="mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        veneer.get_peft_model(Net(), config)
    assert config.base_model_name_or_path == "mine"


@BOTH
def test_adalora_says_that_it_has_no_r(lib: Any) -> None:
    with pytest.warns(UserWarning, match="Note that `r` is not used in AdaLora and will be ignored"):
        lib.AdaLoraConfig(r=10, total_step=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lib.AdaLoraConfig(init_r=12, total_step=1)


@BOTH
def test_trained_tokens_of_a_layer_that_is_taken(lib: Any) -> None:
    adapted = lib.LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[1])
    with pytest.raises(TypeError, match="trainable_token_indices cannot be applied to modules of type"):
        lib.get_peft_model(llama(), adapted)
    options = {"modules_to_save": ["embed_tokens"], "trainable_token_indices": {"embed_tokens": [1]}}
    with pytest.raises(ValueError, match="The embedding layer is already marked to be trained fully"):
        lib.get_peft_model(llama(), lib.LoraConfig(target_modules=["q_proj"], **options))


@BOTH
def test_trained_tokens_show_their_base_and_their_rows(lib: Any) -> None:
    model = lib.get_peft_model(llama(), lib.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]))
    holder = model.base_model.model.model.embed_tokens
    assert type(holder.original_module) is nn.Embedding
    assert torch.equal(holder.token_adapter.trainable_tokens_original.default, holder.original_module.weight[[1]])
    with pytest.raises(AttributeError):
        _ = holder.token_adapter.trainable_tokens_original.other


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
def test_words_for_rows_of_adapters_and_for_names_in_use(lib: Any) -> None:
    model = lib.get_peft_model(Net(), lib.LoraConfig(target_modules=["lin"])).eval()
    with pytest.raises(ValueError, match="Adapter with name 'default' already exists"):
        model.add_adapter("default", lib.LoraConfig(target_modules=["lin"]))
    with pytest.raises(ValueError, match=r"Trying to infer with non-existing adapter\(s\): nope"):
        model(torch.arange(2), adapter_names=["default", "nope"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
        model(torch.arange(2), adapter_names=["default", "default"])


@BOTH
def test_modules_saved_whole_are_those_of_the_adapters_that_are_left(lib: Any) -> None:
    model = lib.get_peft_model(Net(), lib.LoraConfig(target_modules=["lin"], modules_to_save=["head"]))
    model.add_adapter("other", lib.LoraConfig(target_modules=["lin"]))
    assert model.modules_to_save == {"head"}
    model.delete_adapter("default")
    assert not model.modules_to_save


@BOTH
def test_a_printed_layer_names_its_method_and_its_kind(lib: Any) -> None:
    model = lib.get_peft_model(Net(), lib.LoraConfig(target_modules=["lin", "table"])).get_base_model()
    assert repr(model.lin).startswith("lora.Linear(")
    assert repr(model.table).startswith("lora.Embedding(")
    assert "default" in repr(model.lin)


def test_prompts_can_be_frozen_by_name() -> None:
    """peft refuses with a TypeError."""
    model = veneer.get_peft_model(llama(), veneer.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    model.set_requires_grad("default", False)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "lora_embedding_A",
        "quantization_backend",
        "frozen_peft_weight_names",
        "is_feedforward",
        "update_importance",
        "exp_avg_ipt_A",
        "covariance_matrix",
        "sample_count",
        "get_maybe_topk_scalings",
        "pvera_generator",
        "_active_adapter",
        "_restore_weights",
        "_cached_merge_factor",
        "_osf_U_high",
        "_sparse_activation_mm",
    ],
)
def test_a_layer_has_the_containers_of_its_own_tensors_alone(name: str) -> None:
    layer = veneer.get_peft_model(Net(), veneer.LoraConfig(target_modules=["lin"])).get_base_model().lin
    assert not hasattr(layer, name)
    assert hasattr(layer, "lora_A")


def test_hot_swap_takes_other_methods_than_lora_and_leaves_a_silent_layers_a_alone(tmp_path: Path) -> None:
    config = {"target_modules": ["lin"], "init_weights": False}
    veneer.get_peft_model(Net(), veneer.LoHaConfig(**config)).save_pretrained(tmp_path)
    model = veneer.get_peft_model(Net(), veneer.LoHaConfig(**config))
    from veneer.hotswap import hotswap_adapter

    hotswap_adapter(model, tmp_path, "default")
    saved = veneer.load_peft_weights(tmp_path)
    assert all(torch.equal(v, saved[k]) for k, v in veneer.get_peft_model_state_dict(model).items())


@BOTH
def test_tensors_that_wait_on_the_meta_device_are_in_the_state_dict(lib: Any) -> None:
    model = lib.inject_adapter_in_model(lib.LoraConfig(target_modules=["lin"]), Net(), low_cpu_mem_usage=True)
    found = lib.get_peft_model_state_dict(model)
    assert {k: (tuple(t.shape), t.is_meta) for k, t in found.items()} == {
        "lin.lora_A.weight": ((8, 8), True),
        "lin.lora_B.weight": ((8, 8), True),
    }


def test_a_second_frod_adapter_may_have_another_key() -> None:
    options = {"target_modules": ["lin"], "init_weights": False}
    model = veneer.get_peft_model(Net(), veneer.FrodConfig(**options)).eval()
    first = model(torch.arange(3))
    model.add_adapter("other", veneer.FrodConfig(**options, projection_prng_key=9, save_projection=False))
    model.set_adapter("other")
    second = model(torch.arange(3))
    model.set_adapter("default")
    assert not torch.equal(first, second)
    assert torch.equal(model(torch.arange(3)), first)


def test_a_file_for_another_base_does_not_load_where_its_shapes_say_so(tmp_path: Path) -> None:
    """AdaMSS takes its shapes from the base's weights."""
    veneer.get_peft_model(Net(), veneer.AdamssConfig(target_modules=["lin"])).save_pretrained(tmp_path)
    other = Net()
    torch.manual_seed(5)
    nn.init.normal_(other.lin.weight)
    with pytest.raises(veneer.LoadError, match="Load it into the model it was trained on"):
        veneer.PeftModel.from_pretrained(other, tmp_path)


def test_tensors_that_layers_share_never_wait_on_the_meta_device() -> None:
    model = veneer.inject_adapter_in_model(veneer.TinyLoraConfig(target_modules=["lin"]), Net(), low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in model.parameters())


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
