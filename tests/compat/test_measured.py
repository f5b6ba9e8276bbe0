"""Names and habits of peft's that programs rely on, each measured against peft itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import peft.helpers
import peft.tuners.lora.variants
import pytest
import torch
from small_net import BOTH, SIZES, Net
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer import helpers
from veneer.compat import alora
from veneer.hotswap import hotswap_adapter


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


@BOTH
def test_scalings_that_were_read_stay_when_new_ones_are_set(lib: Any) -> None:
    model = lib.get_peft_model(Net(), lib.LoraConfig(target_modules=["lin"], r=2, lora_alpha=4))
    layer = model.base_model.model.lin
    before = layer.scaling
    rescaled = helpers.rescale_adapter_scale if lib is veneer else peft.helpers.rescale_adapter_scale
    with rescaled(model, 0.5):
        assert dict(before) == {"default": 2.0}
        assert dict(layer.scaling) == {"default": 1.0}
    assert layer.scaling == before
    layer.scaling["default"] = 3.0
    assert dict(layer.scaling) == {"default": 3.0}


CONFIGS = {"VeraConfig": "vera_A", "PveraConfig": "pvera_A", "RandLoraConfig": "randlora_A"}


@BOTH
@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_of_one_key_hold_its_projections_once(lib: Any, name: str) -> None:
    config = getattr(lib, name)(target_modules=["lin"], r=2)
    model = lib.get_peft_model(Net(), config)
    model.add_adapter("second", config)
    held = getattr(model.base_model.model.lin, CONFIGS[name])
    assert held["default"] is held["second"]


def test_projections_held_once_part_where_a_file_or_a_swap_brings_others(tmp_path: Path) -> None:
    def made(key: int) -> Any:
        return veneer.get_peft_model(Net(), veneer.VeraConfig(target_modules=["lin"], r=2, projection_prng_key=key))

    for key in (0, 1):
        made(key).save_pretrained(tmp_path / str(key))
    model = made(0)
    box: Any = model.base_model.vera_A
    first = box["default"].clone()
    model.load_adapter(str(tmp_path / "0"), "same")
    model.load_adapter(str(tmp_path / "1"), "other")
    assert box["same"] is box["default"]
    assert not torch.equal(box["other"], first)
    hotswap_adapter(model, str(tmp_path / "1"), "same")
    assert torch.equal(box["default"], first)
    assert torch.equal(box["same"], box["other"])
    model.delete_adapter("same")
    assert torch.equal(box["default"], first)


INVOCATIONS = [([2, 3], None), ([9], None), (None, None), ([2, 3], ["a", "b", "c"])]


@pytest.mark.parametrize(("tokens", "rows"), INVOCATIONS)
def test_where_alora_begins_is_counted_as_peft_does(tokens: Any, rows: Any) -> None:
    ids = torch.tensor([[1, 2, 3, 2, 3, 9], [2, 3, 4, 5, 6, 7], [5, 5, 5, 5, 5, 5]])
    theirs = peft.tuners.lora.variants

    def offsets(lib: Any, find: Any) -> Any:
        of = lambda t: lib.LoraConfig(task_type="CAUSAL_LM", target_modules=["lin"], alora_invocation_tokens=t)
        return find.calculate_alora_offsets({"a": of(tokens), "b": of([5]), "c": of([5])}, "a", ids, rows)

    assert offsets(veneer, alora) == offsets(peft, theirs)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("given", [{"input_ids": [[1, 2, 3]]}, {"inputs_embeds": [[[0.1] * 16] * 3]}], ids=str)
@pytest.mark.parametrize("tokens", [[2], None])
@pytest.mark.filterwarnings("ignore")
def test_offsets_are_added_to_a_calls_arguments_as_peft_does(call: str, given: Any, tokens: Any) -> None:
    inputs = {k: torch.tensor(v) for k, v in given.items()}

    def added(lib: Any, find: Any) -> Any:
        config = lib.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=tokens)
        out = getattr(find, f"get_alora_offsets_for_{call}")(lib.get_peft_model(llama(), config), **inputs, use_cache=1)
        return {k: v for k, v in out.items() if not torch.is_tensor(v)}, set(out)

    assert added(veneer, alora) == added(peft, peft.tuners.lora.variants)


def test_offsets_without_token_ids_are_warned_of() -> None:
    config = veneer.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[2])
    model = veneer.get_peft_model(llama(), config)
    with pytest.warns(UserWarning, match="only inputs_embeds are provided"):
        alora.get_alora_offsets_for_forward(model, inputs_embeds=torch.ones(1, 3, 16))


@BOTH
def test_a_mixed_model_names_the_adapters_it_lacks(lib: Any) -> None:
    model = lib.get_peft_model(Net(), lib.LoraConfig(target_modules=["lin"]), mixed=True)
    with pytest.raises(ValueError, match=r"Adapter\(s\) \['a', 'b'\] not found, available adapters: \['default'\]"):
        model.set_adapter(["b", "default", "a"])


@BOTH
def test_settings_that_exclude_each_other(lib: Any) -> None:
    with pytest.raises(ValueError, match="DoRA does not support megatron_core"):
        lib.LoraConfig(use_dora=True, megatron_config={"any": 1})
    with pytest.raises(ValueError, match="ADALORA does not support LOFTQ"):
        lib.AdaLoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}, total_step=1)


@BOTH
def test_what_layers_tell_of_their_settings(lib: Any) -> None:
    config = lib.WaveFTConfig(target_modules=["lin"], n_frequency=5, n_frequency_pattern={"lin": 7})
    assert lib.get_peft_model(Net(), config).base_model.model.lin.waveft_n_frequency["default"] == 7
    config = lib.PeanutConfig(target_modules=["lin"], r=2, depth=1)
    assert lib.get_peft_model(Net(), config).base_model.model.lin.res_num["default"] == 1


@BOTH
def test_savable_parameters_count_what_was_unfrozen_by_hand(lib: Any) -> None:
    config = lib.VBLoRAConfig(target_modules=["lin"], num_vectors=8, vector_length=4)
    model = lib.get_peft_model(Net(), config)
    model.base_model.model.head.requires_grad_(True)
    assert model.get_nb_savable_parameters() == (8 * 4 + 2 * 2 * 4 * 8, 8 * 3 + 3)


@BOTH
def test_prompt_encoders_tell_what_they_hold(lib: Any) -> None:
    config = lib.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 4]
    )
    encoder = lib.get_peft_model(llama(), config).prompt_encoder["default"]
    with torch.no_grad():
        encoder.delta_embedding.weight.fill_(1.0)
    norms = encoder.get_projection().norm(dim=1)
    torch.testing.assert_close(encoder.get_epsilon(), torch.tensor([0.1, 0.1, 0.0]) * (16 / 2048) ** 0.5)
    torch.testing.assert_close(norms, encoder.get_epsilon(), atol=1e-6, rtol=1e-5)
    config = lib.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=1)
    encoder = lib.get_peft_model(llama(), config).prompt_encoder["default"]
    assert torch.equal(encoder.weight, torch.cat([encoder.frozen_embedding, encoder.trainable_embedding]))


class PlainConfig(dict):
    vocab_size = 10


class NoWords(nn.Module):
    """A model that says no more of itself than a prefix needs."""

    device = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self.config, self.lin = PlainConfig(), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
        return self.lin(x)

    def prepare_inputs_for_generation(self) -> None: ...


@BOTH
def test_a_prefix_needs_no_embedding(lib: Any) -> None:
    config = lib.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=4, num_attention_heads=2
    )
    encoder = lib.get_peft_model(NoWords(), config).prompt_encoder["default"]
    assert encoder.embedding.weight.shape == (3, 2 * 2 * 4)


def test_factors_are_not_tied_where_the_config_says_that_words_are_not() -> None:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    config = veneer.LoraConfig(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    with pytest.warns(UserWarning, match="no tied modules were found in the model"):
        base = veneer.get_peft_model(model, config).get_base_model()
    assert base.lm_head.lora_A["default"].weight.requires_grad
    table = base.model.embed_tokens.lora_embedding_B["default"]
    assert base.lm_head.lora_A["default"].weight.data_ptr() != table.data_ptr()


@BOTH
def test_an_expert_that_is_loaded_later_is_routed_to(lib: Any, tmp_path: Path) -> None:
    from peft.tuners.lora import ArrowConfig as Theirs
    from peft.tuners.lora import create_arrow_model as theirs

    from veneer.methods.arrow import ArrowConfig as Ours
    from veneer.methods.arrow import create_arrow_model as ours

    (config, create) = (Ours, ours) if lib is veneer else (Theirs, theirs)
    paths = [str(tmp_path / str(i)) for i in range(3)]
    for i, path in enumerate(paths):
        torch.manual_seed(i)
        options = {"target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        model = lib.get_peft_model(llama(), lib.LoraConfig(r=2, **options))
        torch.manual_seed(i)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn_like(p))
        model.save_pretrained(path)
    whole = create(llama(), paths, config(top_k=2)).eval()
    ids = torch.tensor([[1, 2, 3]])
    grown = create(llama(), paths[:2], config(top_k=2)).eval()
    grown(ids)
    grown.load_adapter(paths[2], "third")
    grown.set_adapter("arrow_router")
    torch.testing.assert_close(grown.eval()(ids).logits, whole(ids).logits, atol=1e-5, rtol=1e-5)


def test_arrow_refuses_other_layers_and_a_merge(tmp_path: Path) -> None:
    from veneer.methods.arrow import ArrowConfig, create_arrow_model

    path = str(tmp_path / "table")
    veneer.get_peft_model(llama(), veneer.LoraConfig(target_modules=["embed_tokens"])).save_pretrained(path)
    with pytest.raises(TypeError, match=r"must only target Linear layers.*embed_tokens is Embedding"):
        create_arrow_model(llama(), [path], ArrowConfig(top_k=1))
    path = str(tmp_path / "query")
    veneer.get_peft_model(llama(), veneer.LoraConfig(target_modules=["q_proj"])).save_pretrained(path)
    with pytest.raises(RuntimeError, match="Cannot merge an active Arrow router adapter"):
        create_arrow_model(llama(), [path], ArrowConfig(top_k=1)).merge_and_unload()


def test_hooks_on_a_base_layer_run_under_methods_that_work_on_its_weight() -> None:
    """peft's SHiRA leaves them out, with a warning."""
    model = veneer.get_peft_model(Net(), veneer.ShiraConfig(target_modules=["lin"], r=2))
    ids, seen = torch.tensor([[1, 2]]), []
    before = model(ids)
    layer = model.base_model.model.lin.get_base_layer()
    layer.register_forward_hook(lambda m, args, out: seen.append("forward"))
    torch.testing.assert_close(model(ids), before)
    torch.testing.assert_close(model.eval()(ids), before)
    assert seen == ["forward", "forward"]


@BOTH
@pytest.mark.parametrize("name", ["TinyLoraConfig", "VBLoRAConfig"])
def test_shared_tensors_are_drawn_again(lib: Any, name: str) -> None:
    tiny = name == "TinyLoraConfig"
    sizes = {"r": 2, "u": 4} if tiny else {"num_vectors": 8, "vector_length": 4}
    make = lambda **options: getattr(lib, name)(target_modules=["lin"], **sizes, **options)
    model = lib.get_peft_model(Net(), make())
    part = "tinylora_v" if tiny else "vector_bank"
    held = lambda: next(p for n, p in model.named_parameters() if part in n)
    before = held().detach().clone()
    if tiny:
        model.base_model._init_tinylora_v(make(init_weights=False), "default")
    else:
        model._init_vblora_vector_bank(make(), "default")
    assert held().requires_grad
    assert not torch.equal(held(), before)
    assert 0 < float(held().detach().abs().max()) <= 0.02


@BOTH
def test_an_adapted_parameter_says_which_it_is(lib: Any) -> None:
    model = lib.get_peft_model(Net(), lib.LoraConfig(target_parameters=["lin.weight"]))
    text = repr(model.base_model.model.lin)
    assert text.startswith("lora.ParamWrapper(")
    assert "parameter_name='weight'" in text
