"""Errors and warnings that scripts written for peft catch by their class and their words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, ResNetConfig, ResNetModel

import veneer
from veneer import helpers, hotswap, hotswap_room
from veneer.optimizers import create_riemannian_optimizer
from veneer.storage import BufferDict


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.head, self.conv = nn.Linear(6, 6), nn.Linear(6, 4), nn.Conv2d(4, 4, 3, groups=2)
        self.top = nn.Parameter(torch.ones(3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(input=self.lin(x)) if x.dim() == 2 else self.conv(x)


def llama(tie: bool = True) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=tie, **sizes)).eval()


def lora(lib: Any = veneer, **options: Any) -> Any:
    return lib.LoraConfig(**{"target_modules": ["lin"], **options})


BOTH = pytest.mark.parametrize("lib", [veneer, peft], ids=["veneer", "peft"])


@BOTH
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target_modules": ["conv"], "r": 1}, ValueError, "divisible by groups.*do not target this specific layer"),
        ({"exclude_modules": ["lin"]}, ValueError, "All modules were excluded|No modules were targeted"),
        ({"target_modules": [], "target_parameters": ["top"]}, ValueError, "on the top-level module is not supported"),
        ({"target_parameters": ["lin.weight"]}, ValueError, "Trying to wrap an `nn.Parameter` of layer 'lin' of type"),
    ],
)
def test_configs_that_fit_no_layer(lib: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        lib.get_peft_model(Net(), lora(lib, **options))


@BOTH
def test_adapter_names_of_another_length(lib: Any) -> None:
    model = lib.get_peft_model(llama(), lora(lib, target_modules=["q_proj"])).eval()
    with pytest.raises(ValueError, match=r"Length of `adapter_names` should be the same as the number of inputs"):
        model(torch.tensor([[1], [2]]), adapter_names=["default"])


@BOTH
@pytest.mark.parametrize("name", ["out_proj", "conv1d"])
def test_layers_that_mambas_kernels_read_past(lib: Any, name: str) -> None:
    base = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="is incompatible with Mamba-based models"):
        lib.get_peft_model(base, lora(lib, target_modules=[name, "x_proj"]))


def test_all_linear_layers_of_a_mamba_leave_them_out() -> None:
    base = MambaForCausalLM(MambaConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, state_size=4))
    model = veneer.get_peft_model(base, lora(target_modules="all-linear"))
    assert {n.rpartition(".")[2] for n in model.base_model.targeted["default"]} == {"in_proj", "x_proj", "dt_proj"}


@BOTH
def test_eva_without_settings_says_so(lib: Any) -> None:
    with pytest.warns(UserWarning, match="`eva_config` is not specified"):
        lora(lib, init_lora_weights="eva")


@BOTH
def test_another_revision_than_the_configs_says_so(lib: Any) -> None:
    with pytest.warns(UserWarning, match="already set base model revision to a, overwriting with revision b"):
        model = lib.get_peft_model(Net(), lora(lib, revision="a"), revision="b")
    assert model.peft_config["default"].revision == "b"


@BOTH
def test_tied_tokens_in_a_model_that_ties_nothing_say_so(lib: Any) -> None:
    config = lora(lib, target_modules=["q_proj"], trainable_token_indices=[1], ensure_weight_tying=True)
    with pytest.warns(UserWarning, match="but the model does not have tied weights"):
        lib.get_peft_model(llama(tie=False), config)


def test_a_tied_layer_under_a_method_that_cannot_tie_says_so() -> None:
    with pytest.warns(
        UserWarning, match=r"embed_tokens holds the same weight as lm_head, and no implementation exists to tie"
    ):
        veneer.get_peft_model(llama(), veneer.LoKrConfig(target_modules=["embed_tokens"]))


@BOTH
def test_a_state_dict_that_does_not_fit_the_config_says_so(lib: Any) -> None:
    made = lib.inject_adapter_in_model(lora(lib), Net())
    tensors = lib.get_peft_model_state_dict(made)
    with pytest.warns(RuntimeWarning, match=r"The PEFT config contained these additional target modules: \['head'\]"):
        found = lib.inject_adapter_in_model(lora(lib, target_modules=["lin", "head"]), Net(), state_dict=tensors)
    assert not hasattr(found.head, "lora_A")
    with pytest.warns(RuntimeWarning, match=r"The state_dict contained these additional target modules: \['lin'\]"):
        lib.inject_adapter_in_model(lora(lib, target_modules=["head"]), Net(), state_dict=tensors)
    config = lora(lib, target_modules=[], target_parameters=["lin.weight"])
    with pytest.raises(ValueError, match="from a state_dict but the PEFT config uses `target_parameters`"):
        lib.inject_adapter_in_model(config, Net(), state_dict=tensors)


def test_an_adapter_goes_into_a_compiled_model() -> None:
    compiled = torch.compile(Net())
    made = veneer.inject_adapter_in_model(lora(), compiled)
    tensors = veneer.get_peft_model_state_dict(veneer.inject_adapter_in_model(lora(), Net()))
    assert made is compiled
    assert veneer.set_peft_model_state_dict(made, tensors).ok


@BOTH
def test_a_module_trained_whole_takes_its_input_by_name(lib: Any) -> None:
    model = lib.get_peft_model(Net(), lora(lib, modules_to_save=["head"])).eval()
    x = torch.ones(1, 6)
    assert torch.equal(model(x), model.base_model.model.head(input=model.base_model.model.lin(x)))


def test_rows_of_several_adapters_need_that_input_by_position() -> None:
    model = veneer.get_peft_model(Net(), lora(modules_to_save=["head"])).eval()
    with pytest.raises(veneer.AdapterError, match="head: adapter_names needs the module's input by position"):
        model(torch.ones(1, 6), adapter_names=["default"])


def _folder(tmp_path: Path, **fields: Any) -> Path:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    veneer.get_peft_model(base, lora(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return tmp_path / "adapter"


@BOTH
@pytest.mark.parametrize("name", ["AutoPeftModel", "AutoPeftModelForCausalLM"])
def test_a_config_imports_no_module_of_its_own_choice(lib: Any, name: str, tmp_path: Path) -> None:
    folder = _folder(tmp_path, auto_mapping={"base_model_class": "Base", "parent_library": "made_up_module"})
    (tmp_path / "made_up_module.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match=r"wants to import 'made_up_module',? which is not in the import allowlist"):
        getattr(lib, name).from_pretrained(folder)
    with pytest.raises(ModuleNotFoundError):  # allowed by name, it is looked for
        getattr(lib, name).from_pretrained(folder, import_allowlist=["made_up_module"])


def test_a_task_class_loads_an_adapter_without_a_task(tmp_path: Path) -> None:
    model = veneer.AutoPeftModelForCausalLM.from_pretrained(_folder(tmp_path))
    assert isinstance(model.get_base_model(), LlamaForCausalLM)


def test_a_folder_with_a_broken_config_is_no_adapter(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    for text, there in [("{", False), ("[]", False), ("{}", False), ('{"peft_type": "LORA"}', True)]:
        path.write_text(text)
        assert helpers.check_if_peft_model(tmp_path) is there


def test_a_model_without_tokens_saves_and_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    base = ResNetModel(config).eval()
    model = veneer.get_peft_model(base, lora(target_modules=["convolution"], init_lora_weights=False)).eval()
    x = torch.randn(1, 3, 16, 16)
    before = model(x).last_hidden_state
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    assert torch.equal(again(x).last_hidden_state, before)
    assert os.listdir(tmp_path)


def test_a_grouped_convolution_pads_each_groups_rank() -> None:
    model = veneer.get_peft_model(Net(), lora(target_modules=["conv"], r=2, init_lora_weights=False)).eval()
    x = torch.randn(1, 4, 5, 5)
    before = model(x)
    hotswap_room.prepare_model_for_compiled_hotswap(model, target_rank=6)
    assert model.base_model.model.conv.lora_A["default"].weight.shape[0] == 6
    assert torch.allclose(model(x), before, atol=1e-6)
    other = veneer.get_peft_model(Net(), lora(target_modules=["conv"], r=4, init_lora_weights=False)).eval()
    other.base_model.model.conv.base_layer.load_state_dict(model.base_model.model.conv.base_layer.state_dict())
    tensors = veneer.get_peft_model_state_dict(other)
    hotswap.hotswap_adapter_from_state_dict(model, tensors, "default", other.peft_config["default"])
    assert torch.allclose(model(x), other(x), atol=1e-6)
    with pytest.raises(ValueError, match="groups=2 to target rank 7, but the target rank is not divisible by 2"):
        hotswap_room.prepare_model_for_compiled_hotswap(model, target_rank=7)


def test_shared_tensors_are_found_on_every_layer() -> None:
    model = veneer.get_peft_model(Net(), veneer.VeraConfig(target_modules=["lin", "head"]))
    base = model.get_base_model()
    assert base.lin.vera_A["default"] is base.head.vera_A["default"] is model.base_model.vera_A["default"]
    with pytest.raises(AttributeError, match="no attribute 'vera_Z'"):
        getattr(base.lin, "vera_Z")  # noqa: B009


def test_the_riemannian_optimizer_wants_an_optimizer() -> None:
    model = veneer.get_peft_model(Net(), lora())
    with pytest.raises(TypeError, match=r"must be a subclass of torch\.optim\.Optimizer"):
        create_riemannian_optimizer(model, dict, lr=0.1)  # type: ignore[arg-type]


def test_a_dict_of_buffers_takes_pairs() -> None:
    held = BufferDict()
    held.update({"a": torch.ones(2)}.items())
    assert list(held) == ["a"]
