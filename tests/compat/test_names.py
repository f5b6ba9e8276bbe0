"""Every declared name resolves, peft's own public names are among them, and they act."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import nn

import veneer
from veneer import registry
from veneer.compat import constants, helpers, integrations, kinds, merge, names
from veneer.compat.alias import Alias, AliasFinder


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(6, 8), nn.Linear(8, 4)
        self.conv, self.table = nn.Conv2d(3, 4, 3), nn.Embedding(10, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.lin0(self.table(ids)))


def net(config: Any = None, **options: Any) -> veneer.PeftModel:
    torch.manual_seed(0)
    return veneer.get_peft_model(Net(), config or veneer.LoraConfig(target_modules=["lin0"], **options))


@pytest.fixture(scope="module")
def alias() -> Iterator[Any]:
    """A module as the alias makes it, without taking peft's place in this process."""
    made = AliasFinder().find_spec("peft.tuners.tuners_utils")
    module = made.loader.create_module(made)
    made.loader.exec_module(module)
    return module


@pytest.mark.parametrize("module", sorted(names.modules()))
def test_every_declared_name_resolves(module: str) -> None:
    for name, getter in names.modules()[module].items():
        assert getter() is not None, name


def test_the_top_level_has_pefts_names() -> None:
    assert set(peft.__all__) <= set(names.modules()[""])


PUBLIC = (
    *("functional", "optimizers", "tuners", "utils"),
    *("tuners.lora", "tuners.ia3", "tuners.oft", "tuners.loha", "tuners.lokr", "tuners.vera", "tuners.boft"),
    *("tuners.adalora", "tuners.xlora", "tuners.trainable_tokens", "tuners.fourierft"),
    *("tuners.p_tuning", "tuners.prompt_tuning", "tuners.prefix_tuning"),
)
# parts of peft's inside that have no counterpart: its quantised layers and their helpers, its registry, its allocator
ABSENT = {
    *("GPTQLoraLinear", "SVDQuantLinear", "RankAllocator", "register_peft_method", "set_additional_trainable_modules"),
    *("get_gptqmodel_quant_linear", "get_quantization_kwargs", "quantization_extra_repr"),
    *("resolve_quantization_backend", "map_cache_to_layer_device_map"),
}


@pytest.mark.parametrize("module", PUBLIC)
def test_modules_have_pefts_public_names(module: str) -> None:
    theirs = importlib.import_module(f"peft.{module}")
    wanted = {n for n in theirs.__all__ if not n.startswith("_")} - ABSENT
    assert wanted <= set(names.modules()[module])


@pytest.mark.parametrize("peft_type", registry.types())
def test_every_method_has_its_modules(peft_type: str) -> None:
    at = f"tuners.{peft_type.lower()}"
    config = registry.METHODS[peft_type].config
    assert names.modules()[at][config]() is registry.config_class(peft_type)
    assert config in names.modules()[f"{at}.config"]


def test_prefixes_are_pefts() -> None:
    theirs = {k.value: v for k, v in peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING.items()}
    ours = {k.value: v for k, v in constants.PEFT_TYPE_TO_PREFIX_MAPPING.items()}
    differ = {n for n in theirs if n in ours and theirs[n] != ours[n]}
    assert differ == {"ADAPTION_PROMPT", "FROD", "OSF", "XLORA"}  # these name the tensors more closely


def test_layer_classes_ask_what_a_layer_carries() -> None:
    model = net(veneer.LoraConfig(target_modules=["lin0", "conv", "table"]))
    base = model.get_base_model()
    lora = kinds.layer_class("LORA", "LoraLayer")
    linear, conv = kinds.layer_class("LORA", "Linear"), kinds.layer_class("LORA", "Conv2d")
    assert isinstance(base.lin0, lora)
    assert isinstance(base.conv, lora)
    assert not isinstance(base.lin1, lora)
    assert isinstance(base.lin0, linear)
    assert not isinstance(base.conv, linear)
    assert isinstance(base.conv, conv)
    assert not isinstance(base.lin0, kinds.layer_class("OFT", "OFTLayer"))
    assert isinstance(model.base_model, kinds.model_class("LORA"))
    assert not isinstance(model.base_model, kinds.model_class("OFT"))
    with pytest.raises(TypeError, match="names a kind of adapted layer"):
        linear(nn.Linear(2, 2), "default")


def test_a_model_class_makes_the_tuner() -> None:
    tuner = kinds.model_class("LORA")(Net(), veneer.LoraConfig(target_modules=["lin0"]), "default")
    assert type(tuner).__name__ == "Tuner"
    assert list(tuner.peft_config) == ["default"]


def test_patching_an_alias_patches_veneer(alias: Alias, monkeypatch: pytest.MonkeyPatch) -> None:
    real = helpers.onload_layer
    monkeypatch.setattr(alias, "onload_layer", lambda layer: "patched")
    assert helpers.onload_layer(nn.Identity()) == "patched"  # type: ignore[comparison-overlap]
    monkeypatch.undo()
    assert helpers.onload_layer is real


def test_layers_show_their_settings_by_adapter() -> None:
    layer = net(r=4, lora_alpha=12).get_base_model().lin0
    assert (layer.r, layer.lora_alpha, layer.use_rslora) == ({"default": 4}, {"default": 12}, {"default": False})
    assert set(layer.adapter_layer_names) == {"lora_A", "lora_B"}
    with pytest.raises(AttributeError):
        getattr(layer, "nothing_of_that_name")  # noqa: B009


def test_base_state_dict_is_the_bases_own() -> None:
    plain = Net()
    torch.manual_seed(0)
    model = net(veneer.LoraConfig(target_modules=["lin0", "table"], modules_to_save=["lin1"]))
    found = veneer.get_base_model_state_dict(model)
    assert set(found) == set(plain.state_dict())
    veneer.set_base_model_state_dict(model, plain.state_dict())
    after = veneer.get_base_model_state_dict(model)
    assert all(torch.equal(after[k], v) for k, v in plain.state_dict().items())
    short = {k: v for k, v in plain.state_dict().items() if k != "lin0.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*lin0\.weight"):
        veneer.set_base_model_state_dict(model, short)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        veneer.set_base_model_state_dict(model, {**plain.state_dict(), "x": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch for lin0"):
        veneer.set_base_model_state_dict(model, {"lin0.weight": torch.zeros(1)}, strict=False)
    assert veneer.set_base_model_state_dict(model, short, strict=False).missing_keys == ["lin0.weight"]


@pytest.mark.parametrize(
    "name", ["bloom_model_postprocess_past_key_value", "starcoder_model_postprocess_past_key_value"]
)
def test_prefix_layouts_are_pefts(name: str) -> None:
    given = tuple(torch.randn(2, 3, 2, 4, 5) for _ in range(2))
    theirs, ours = getattr(peft.utils.constants, name)(given), getattr(constants, name)(given)
    for a, b in zip(theirs, ours, strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


def test_shift_tokens_right_is_pefts() -> None:
    ids = torch.tensor([[5, 6, -100, 7], [8, -100, -100, 9]])
    assert torch.equal(helpers.shift_tokens_right(ids, 1, 2), peft.shift_tokens_right(ids, 1, 2))
    with pytest.raises(ValueError, match="pad_token_id"):
        helpers.shift_tokens_right(ids, None, 2)  # type: ignore[arg-type]


CASES = [
    ({"target_modules": ["foo"]}, "foo"), ({"target_modules": ["foo"]}, "foobar"),
    ({"target_modules": ["foo"]}, "a.1.foo"), ({"target_modules": "a.*foo"}, "a.1.foo"),
    ({"target_modules": ["foo"], "layers_to_transform": [1]}, "a.1.foo"),
    ({"target_modules": ["foo"], "layers_to_transform": [1]}, "a.2.foo"),
    ({"target_modules": ["foo"], "layers_to_transform": [1], "layers_pattern": "a"}, "a.1.foo"),
    ({"target_modules": ["foo"], "layers_to_transform": [1], "layers_pattern": "b"}, "a.1.foo"),
    ({"target_modules": ["foo"], "exclude_modules": ["1.foo"]}, "a.1.foo"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "key"), CASES)
def test_check_target_module_exists_is_pefts(settings: dict, key: str) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = bool(check_target_module_exists(peft.LoraConfig(**settings), key))
    assert helpers.check_target_module_exists(veneer.LoraConfig(**settings), key) is theirs


def test_prefixes_select_the_adapters_keys() -> None:
    model = net(veneer.LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"]))
    found = helpers.under_prefixes(model.state_dict(), helpers.adapter_prefixes(model))
    start = "base_model.model.lin0"
    assert sorted(found) == [f"{start}.lora_A.default.weight", f"{start}.lora_B.default.weight"]
    assert helpers.adapter_prefixes(model, "other") == set()
    assert helpers.under_prefixes({"a.bc": 1, "a.b.c": 2}, {"a.b"}) == {"a.b.c": 2}


def test_inspect_matched_modules() -> None:
    found = helpers.inspect_matched_modules(net())
    assert found["matched"] == ["lin0"]
    assert "lin1" in found["unmatched"]


def test_minimal_target_modules_are_pefts() -> None:
    from peft.tuners.tuners_utils import _find_minimal_target_modules

    targets, others = [f"h.{i}.attn.q" for i in range(3)], [f"h.{i}.mlp.q" for i in range(3)] + ["head"]
    assert helpers.minimal_target_modules(targets, others) == _find_minimal_target_modules(targets, others)
    with pytest.raises(ValueError, match="common elements"):
        helpers.minimal_target_modules(["a"], ["a"])


def test_merge_utils_are_pefts() -> None:
    from peft.utils import merge_utils

    torch.manual_seed(0)
    tensors, weights = [torch.randn(5, 7) for _ in range(3)], torch.tensor([0.5, 1.0, 0.2])
    assert torch.allclose(merge.task_arithmetic(tensors, weights), merge_utils.task_arithmetic(tensors, weights))
    for name in ("magnitude_prune", "ties"):
        ours, theirs = getattr(merge, name)(tensors, weights, 0.4), getattr(merge_utils, name)(tensors, weights, 0.4)
        assert torch.allclose(ours, theirs, atol=1e-6), name
    with pytest.raises(ValueError, match="Unknown method"):
        merge.prune(tensors[0], 0.5, "nothing")  # type: ignore[arg-type]


def test_skip_init_on_device() -> None:
    made = integrations.skip_init_on_device(lambda: nn.Linear(2, 2))
    with integrations.init_empty_weights():
        assert made().weight.device.type == "cpu"
        assert nn.Linear(2, 2).weight.is_meta


def test_update_signature() -> None:
    from inspect import signature

    from veneer.signatures import update_signature

    model = net()
    update_signature(model, "forward")
    assert list(signature(model.forward).parameters)[-1] == "ids"
    assert torch.equal(model.forward(torch.tensor([1])), model(torch.tensor([1])))
    with pytest.raises(ValueError, match="not supported"):
        update_signature(model, "other")


def test_fsdp_policy_wraps_what_trains() -> None:
    from veneer.fsdp import fsdp_auto_wrap_policy

    model = net()
    policy = fsdp_auto_wrap_policy(model)
    layer = model.get_base_model().lin0
    ask = lambda module: policy(module, recurse=False, nonwrapped_numel=0)
    assert ask(layer.lora_A["default"])
    assert not ask(layer.base_layer)


def test_a_prepared_base_is_frozen_in_float32() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    from veneer.prepare import prepare_model_for_kbit_training

    config = OPTConfig(vocab_size=20, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2)
    model = OPTForCausalLM(config).to(torch.bfloat16)
    model.is_loaded_in_8bit = True
    model = prepare_model_for_kbit_training(model)
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    assert model.is_gradient_checkpointing


def test_functions_on_an_injected_model() -> None:
    from veneer import functional

    model = veneer.inject_adapter_in_model(veneer.LoraConfig(target_modules=["lin0"]), Net(), "a")
    veneer.inject_adapter_in_model(veneer.LoraConfig(target_modules=["lin1"]), model, "b")
    functional.set_adapter(model, ["a", "b"])
    assert model.lin0.active_adapters == ["a", "b"]
    functional.set_requires_grad(model, "a", False)
    assert not any(p.requires_grad for p in model.lin0.parameters())
    assert functional.delete_adapter(model, "a", prefix="lora_") == ["b"]
    model.lin1.lora_A["b"].half()
    functional.cast_adapter_dtype(model, "b")
    assert model.lin1.lora_A["b"].weight.dtype == torch.float32


def test_a_layer_disabled_by_itself_is_said_and_mended() -> None:
    model = net(veneer.LoraConfig(target_modules=["lin0", "lin1"]))
    base = model.get_base_model()
    base.lin0.enable_adapters(False)
    with (
        pytest.warns(veneer.PeftWarning, match="some adapter layers that are enabled and others"),
        model.disable_adapter(),
    ):
        assert base.lin1.disable_adapters
    assert base.lin0.enabled
    assert base.lin1.enabled
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.disable_adapter():
            pass


def test_the_alias_is_not_imported_with_veneer() -> None:
    code = "import sys, veneer; print([m for m in sys.modules if m.startswith('veneer.compat')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_weighted_sum_of_ia3_is_pefts() -> None:
    made = {}
    for lib in (veneer, peft):
        torch.manual_seed(0)
        settings = {"target_modules": ["lin0", "lin1"], "feedforward_modules": ["lin1"], "init_ia3_weights": False}
        model = lib.get_peft_model(Net(), lib.IA3Config(**settings), "a")
        model.add_adapter("b", lib.IA3Config(**settings))
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "ia3_l" in name:
                    p.copy_(torch.linspace(0.5, 1.5, p.numel()).reshape(p.shape) + (".b" in name))
        model.add_weighted_adapter(["a", "b"], [0.3, 2.0], "sum")
        made[lib.__name__] = {k: v for k, v in model.state_dict().items() if "ia3_l.sum" in k}
    assert len(made["veneer"]) == 2
    assert made["veneer"].keys() == made["peft"].keys()
    assert all(torch.allclose(made["veneer"][k], v) for k, v in made["peft"].items())
    model = net(veneer.IA3Config(target_modules=["lin0"], feedforward_modules=[]))
    model.add_adapter("other", veneer.IA3Config(target_modules=["lin1"], feedforward_modules=[]))
    with pytest.raises(veneer.AdapterError, match="scale different layers"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


def test_nothing_casts_the_input() -> None:
    from veneer.helpers import disable_input_dtype_casting

    model = net().eval()
    layer = model.get_base_model().lin0
    layer.lora_A.half()
    x = torch.randn(2, 6)
    outside = layer(x)
    with disable_input_dtype_casting(model):
        inside = layer(x)
    assert outside.dtype == torch.float32
    assert torch.equal(inside, outside)


def test_every_delta_converts_to_lora() -> None:
    oft = net(veneer.OFTConfig(target_modules=["lin0"], oft_block_size=2, r=0))
    assert oft.supports_lora_conversion()
    assert not net(veneer.LNTuningConfig(target_modules=["lin0"])).supports_lora_conversion()


def test_every_method_on_layers_takes_layer_numbers() -> None:
    for name in registry.types():
        fields = registry.config_class(name).__dataclass_fields__
        if issubclass(registry.config_class(name), veneer.config.AdapterConfig):
            assert {"layers_to_transform", "layers_pattern"} <= set(fields), name


def test_an_encoder_decoder_generates_from_a_named_input() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=20, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    base = BartForConditionalGeneration(config).eval()
    model = veneer.get_peft_model(base, veneer.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj"])).eval()
    ids = torch.tensor([[3, 4, 5]])
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[0] == 1
    with pytest.raises(TypeError, match=r"takes keywords alone, got 1 by position; name the input"):
        model.generate(ids, max_new_tokens=3, do_sample=False)
