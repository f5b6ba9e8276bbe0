"""Behaviour that scripts written for peft count on, beside the names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import veneer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.act, self.lin1 = nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.act(self.lin0(x)))


def net(config: Any, lib: Any = veneer, name: str = "default") -> Any:
    torch.manual_seed(0)
    return lib.get_peft_model(Net(), config, name)


def both(make: Any) -> tuple[Any, Any]:
    return make(veneer), make(peft)


def test_layer_status_counts_modules_trained_whole() -> None:
    def status(lib: Any) -> Any:
        config = lib.LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"])
        model = net(config, lib)
        return [vars(s) for s in model.get_layer_status()], vars(model.get_model_status())

    ours, theirs = both(status)
    assert ours == theirs


def test_model_status_knows_layers_that_lack_an_adapter() -> None:
    def merged(lib: Any) -> Any:
        model = net(lib.LoraConfig(target_modules=["lin0"]), lib)
        model.add_adapter("other", lib.LoraConfig(target_modules=["lin0", "lin1"]))
        model.merge_adapter(["default"])
        found = [model.get_model_status().merged_adapters]
        model.unmerge_adapter()
        model.base_model.model.lin0.merge(adapter_names=["other"])
        return [*found, model.get_model_status().merged_adapters]

    ours, theirs = both(merged)
    assert ours == theirs == [["default"], "irregular"]


def test_what_the_wrapper_calls_its_own_does_not_hide_the_bases() -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    base = LlamaForCausalLM(config).model
    base.shared = nn.Identity()
    layers, shared = base.layers, base.shared
    model = veneer.get_peft_model(base, veneer.LoraConfig(target_modules=["q_proj"]))
    assert model.layers is layers
    assert model.base_model.layers is layers
    assert model.shared is shared


@pytest.mark.parametrize("name", ["default", "nowhere"])
def test_deleting_what_cannot_be_deleted(name: str) -> None:
    model = net(veneer.LoraConfig(target_modules=["lin0"]))
    model.merge_adapter()
    wanted = "while they are merged" if name == "default" else "Adapter nowhere does not exist"
    with pytest.raises(ValueError, match=wanted):
        model.delete_adapter(name)
    assert list(model.peft_config) == ["default"]
    assert model.get_base_model().lin0.merged_adapters == ["default"]


def test_merging_again_is_said() -> None:
    model = net(veneer.LoraConfig(target_modules=["lin0"]))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()


def test_one_copy_of_a_module_is_active() -> None:
    config = veneer.LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"])
    model = net(config)
    model.add_adapter("other", config)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time for ModulesToSaveWrapper"):
        model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]


def test_a_second_loaded_adapter_trains_once_it_is_active(tmp_path: Path) -> None:
    net(veneer.LoraConfig(target_modules=["lin0"], modules_to_save=["lin1"])).save_pretrained(str(tmp_path))
    model = veneer.PeftModel.from_pretrained(Net(), str(tmp_path), is_trainable=True)
    model.load_adapter(str(tmp_path), "other", is_trainable=True)
    trained = lambda: {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained() == {"default"}
    model.set_adapter("other")
    assert trained() == {"other"}


def test_peft_type_is_of_the_enum() -> None:
    config = veneer.LoraConfig()
    assert config.peft_type is veneer.PeftType.LORA
    assert config.peft_type == "LORA"
    assert config.to_file_dict()["peft_type"] == "LORA"


def test_a_config_is_the_same_as_its_file(tmp_path: Path) -> None:
    config = veneer.LoraConfig()
    config.save_pretrained(tmp_path)
    assert veneer.LoraConfig.from_json_file(tmp_path / "adapter_config.json") == config.to_dict()


def test_a_file_without_a_type_is_no_adapters(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"foo": 1}')
    with pytest.raises(TypeError, match="missing required keys"):
        veneer.LoraConfig.from_pretrained(tmp_path)


def test_osf_without_targets_takes_every_linear_layer() -> None:
    names = lambda lib: net(lib.OSFConfig(), lib).peft_config["default"].target_modules
    ours, theirs = both(names)
    assert ours == theirs == {"lin0", "lin1"}


@pytest.mark.parametrize("how", [None, False])
def test_adamss_starts_at_random_when_asked(how: Any) -> None:
    def start(lib: Any) -> float:
        config = lib.AdamssConfig(target_modules=["lin0"], init_weights=how, num_subspaces=2)
        drawn = [p.flatten() for n, p in net(config, lib).named_parameters() if "adamss_B" in n]
        return float(torch.cat(drawn).std())

    ours, theirs = both(start)
    assert 0.5 < ours / theirs < 2


def test_a_sum_of_activated_loras() -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "init_lora_weights": False}
    torch.manual_seed(0)
    made = lambda tokens: veneer.LoraConfig(r=2, alora_invocation_tokens=tokens, **settings)
    model = veneer.get_peft_model(LlamaForCausalLM(config), made([3, 4]), "a").eval()
    model.add_adapter("b", made([3, 4]))
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "sum", combination_type="cat")
    assert model.peft_config["sum"].alora_invocation_tokens == [3, 4]
    layer = dict(model.base_model.adapted_layers())["model.layers.0.self_attn.q_proj"]
    delta = lambda n: layer.scaling[n] * layer.lora_B[n].weight @ layer.lora_A[n].weight
    assert torch.allclose(delta("sum"), 0.5 * delta("a") + 2.0 * delta("b"), atol=1e-6)
    model.add_adapter("c", made([5]))
    with pytest.raises(veneer.AdapterError, match="act on different tokens"):
        model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "other", combination_type="cat")


@pytest.fixture
def process_group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_state_dict_of_a_sharded_model(use_dora: bool, process_group: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    config = veneer.LoraConfig(
        target_modules=["lin0"], modules_to_save=["lin1"], init_lora_weights=False, use_dora=use_dora
    )
    model = net(config)
    wanted = {k: v.clone() for k, v in veneer.get_peft_model_state_dict(model).items()}
    sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    found = veneer.get_peft_model_state_dict(sharded)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], v) for k, v in wanted.items())


def test_biases_in_a_state_dict_are_taken() -> None:
    trained = net(veneer.LoraConfig(target_modules=["lin0"], bias="all"))
    with torch.no_grad():
        trained.get_base_model().lin1.bias.fill_(1.5)
    model = net(veneer.LoraConfig(target_modules=["lin0"]))
    veneer.set_peft_model_state_dict(model, veneer.get_peft_model_state_dict(trained))
    assert bool((model.get_base_model().lin1.bias == 1.5).all())
