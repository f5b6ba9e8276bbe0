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
from small_net import BOTH, SIZES, Net
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer.optimizers import create_lorafa_optimizer


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
@pytest.mark.parametrize("top", [False, True])
def test_vblora_counts_what_it_saves(lib: Any, top: bool, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"r": 3, "num_vectors": 10, "vector_length": 4, "topk": 2, "save_only_topk_weights": top}
    config = lib.VBLoRAConfig(target_modules=["lin"], modules_to_save=["head"], **options)
    model = lib.get_peft_model(Net(), config)
    expected = 12 * 10 + 40 if not top else 12 * 1 + 24 // 4 + 40
    assert model.get_nb_savable_parameters() == (expected, 8 * 3 + 3)
    model.print_savable_parameters()
    assert f"params to-be-saved: {expected + 27}" in capsys.readouterr().out


@BOTH
def test_adamss_has_a_callback_for_trainers(lib: Any) -> None:
    from transformers import TrainerCallback

    if lib is veneer:
        from veneer.compat import names

        found = names.modules()["tuners.adamss.asa_callback"]["AdamssAsaCallback"]()
    else:
        from peft.tuners.adamss.asa_callback import AdamssAsaCallback as found
    assert isinstance(found(), TrainerCallback)


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
