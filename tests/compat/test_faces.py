"""Attributes, warnings and errors by which scripts written for peft look at a model."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer import config as config_module
from veneer.compat.pca import IncrementalPCA
from veneer.methods.dora import DoraCaching
from veneer.tuner import Tuner


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 4)
        self.parts = nn.ModuleList([nn.Linear(4, 4)])
        self.held = nn.ParameterDict({"a": nn.Parameter(torch.ones(2))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts[0](self.lin1(self.lin0(x)))


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=True, **sizes)).eval()


def lora(**options: Any) -> veneer.LoraConfig:
    return veneer.LoraConfig(**{"target_modules": ["lin0"], **options})


@pytest.mark.parametrize("commit", ["abc123", None])
def test_a_development_versions_commit_goes_into_the_config(
    commit: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(config_module, "PEFT_FORMAT", "0.30.0.dev1")
    monkeypatch.setattr(config_module, "commit_of", lambda name: commit)
    made = lora()
    assert made.peft_version == f"0.30.0.dev1@{commit or 'UNKNOWN'}"
    made.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_version"] == made.peft_version


def test_a_commit_that_cannot_be_read_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("unreadable")

    monkeypatch.setattr(config_module, "PEFT_FORMAT", "0.30.0.dev1")
    monkeypatch.setattr(config_module, "commit_of", broken)
    with pytest.warns(UserWarning, match="commit hash: OSError: unreadable"):
        assert lora().peft_version == "0.30.0.dev1@UNKNOWN"


def test_the_commit_is_the_one_that_the_installer_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = {"url": "https://example.org/x.git", "vcs_info": {"vcs": "git", "commit_id": "f00"}}
    found = SimpleNamespace(read_text=lambda name: json.dumps(noted) if name == "direct_url.json" else None)
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: found)
    assert config_module.commit_of("peft") == "f00"


def test_the_names_that_were_targeted_are_listed_once() -> None:
    model = veneer.get_peft_model(Net(), lora(target_modules=["lin1"]))
    model.add_adapter("other", lora(target_modules=["lin0", "lin1"]))
    assert model.base_model.targeted_module_names == ["lin1", "lin0"]
    assert model.base_model.targeted_parameter_names == []
    by_parameter = veneer.get_peft_model(Net(), lora(target_modules=[], target_parameters=["lin0.weight"]))
    assert by_parameter.base_model.targeted_parameter_names == ["lin0.weight"]


@dataclasses.dataclass
class Settings:
    model_type: str = "mine"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"model_type": "a"}, "a"),
        (Settings(), "mine"),
        (LlamaConfig(), "llama"),
        (None, "custom"),
    ],
)
def test_a_models_config_is_read_as_a_dict(given: Any, wanted: str) -> None:
    model = nn.Linear(2, 2)
    if given is not None:
        model.config = given
    assert Tuner.get_model_config(model)["model_type"] == wanted


def test_modules_tied_with_the_embedding_are_named_unless_the_config_unties_them() -> None:
    model = veneer.get_peft_model(llama(), lora(target_modules=["q_proj"]))
    assert model._get_module_names_tied_with_embedding() == ["lm_head"]
    model.config.tie_word_embeddings = False
    assert model._get_module_names_tied_with_embedding() == []


def test_trained_tokens_show_the_rows_that_they_replace() -> None:
    base = llama()
    before = base.model.embed_tokens.weight.detach().clone()
    model = veneer.get_peft_model(base, lora(target_modules=["q_proj"], trainable_token_indices=[3, 1]))
    layer = model.base_model.model.model.embed_tokens.token_adapter
    with torch.no_grad():
        layer.trainable_tokens_delta["default"].add_(1)
    assert torch.equal(layer.trainable_tokens_original["default"], before[[3, 1]])
    model.delete_adapter("default")
    assert layer.trainable_tokens_original == {}


@pytest.mark.parametrize("name", ["parts", "held"])
def test_a_container_cannot_be_saved_whole(name: str) -> None:
    with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
        veneer.get_peft_model(Net(), lora(modules_to_save=[name]))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("init", "title"), [("pissa", "PiSSA"), ("olora", "OLoRA")])
def test_initial_values_out_of_the_base_warn_beside_other_adapters(init: str, title: str, first: bool) -> None:
    configs = [lora(init_lora_weights=init), lora()]
    model = veneer.get_peft_model(Net(), configs[0 if first else 1])
    with pytest.warns(UserWarning, match=f"^{title} changes the base weights of the model"):
        model.add_adapter("other", configs[1 if first else 0])


def test_exclude_modules_that_exclude_nothing_warn() -> None:
    with pytest.warns(UserWarning, match="exclude_modules=.*nowhere.* but no modules were excluded"):
        veneer.get_peft_model(Net(), lora(exclude_modules=["nowhere"]))
    with pytest.raises(ValueError, match=r"No modules were targeted for adaptation.*All modules were excluded"):
        veneer.get_peft_model(Net(), lora(exclude_modules=["lin0"]))
    with pytest.raises(ValueError, match="No modules were targeted for adaptation"):
        veneer.get_peft_model(Net(), lora(target_modules=["lin0", "nowhere"], exclude_modules=["lin0"]))


def test_an_adaption_prompt_takes_over_when_it_is_added() -> None:
    options = {"adapter_layers": 1, "adapter_len": 3}
    model = veneer.get_peft_model(llama(), veneer.AdaptionPromptConfig(**options))
    with model.disable_adapter():
        model.add_adapter("second", veneer.AdaptionPromptConfig(**options))
    assert model.active_adapters == ["second"]
    trained = {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"second"}


def test_dora_caching_is_switched_by_a_call() -> None:
    try:
        DoraCaching()(enabled=True)
        assert DoraCaching.on
    finally:
        DoraCaching()(enabled=False)
    assert not DoraCaching.on


def test_principal_components_in_batches_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    X = torch.randn(60, 5) @ torch.diag(torch.tensor([5.0, 3.0, 1.0, 0.1, 0.01])) + 2
    _, S, V = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    found = IncrementalPCA(n_components=2, batch_size=20).fit(X)
    torch.testing.assert_close(found.components_.abs(), V[:2].abs(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.explained_variance_ratio_, (S**2 / S.square().sum())[:2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.transform(X).abs(), ((X - X.mean(0)) @ V[:2].T).abs(), rtol=5e-2, atol=5e-2)
    parts = IncrementalPCA(n_components=2)
    for batch in X.split(20):
        parts.partial_fit(batch)
    torch.testing.assert_close(parts.components_, found.components_)
    assert IncrementalPCA().fit(X[:, :3]).n_components == 3
    ragged = IncrementalPCA(n_components=4, batch_size=29).fit(X)  # the last two rows cannot stand alone
    assert ragged.n_samples_seen_ == 60


def test_principal_components_say_what_does_not_fit() -> None:
    X = torch.tensor([[0, 1, 0], [1, 0, 0]])
    with pytest.raises(ValueError, match="n_components=4 invalid for n_features=3"):
        IncrementalPCA(4, batch_size=10).fit(X)
    with pytest.raises(ValueError, match="n_components=3 must be less or equal to the batch number of samples 2"):
        IncrementalPCA(n_components=3).partial_fit(X)
    with pytest.raises(ValueError, match="nothing was fitted"):
        IncrementalPCA(2).transform(X)
    fitted = IncrementalPCA(n_components=2).partial_fit(X)
    with pytest.raises(ValueError, match="2 columns"):
        fitted.partial_fit(X[:, :2])


def test_a_mixed_model_deletes_several_adapters_or_none() -> None:
    model = veneer.get_peft_model(Net(), lora(), "a", mixed=True)
    model.add_adapter("b", veneer.LoHaConfig(target_modules=["lin1"]))
    model.base_model.merge_adapter(adapter_names=["b"])
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['b'\] while they are merged"):
        model.delete_adapter(["a", "b"])
    with pytest.raises(ValueError, match=r"Adapter\(s\) \['c'\] not found, available adapters: \['a', 'b'\]"):
        model.delete_adapter(["a", "c"])
    assert set(model.peft_config) == {"a", "b"}
    model.base_model.unmerge_adapter()
    model.delete_adapter(["a", "b"])
    assert not model.peft_config
    with pytest.raises(ValueError, match="'PROMPT_TUNING' is not compatible with the `PeftMixedModel`"):
        model.add_adapter("p", veneer.PromptTuningConfig(num_virtual_tokens=2))


def test_models_without_adapters_on_layers_have_no_status() -> None:
    with pytest.raises(ValueError, match="No adapter layers found in the model"):
        veneer.get_layer_status(Net())
    prompt = veneer.get_peft_model(llama(), veneer.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(TypeError, match=r"get_layer_status\(\) got an invalid PeftModel instance"):
        veneer.get_layer_status(prompt)
    with pytest.raises(TypeError, match=r"get_model_status\(\) got an invalid PeftModel instance"):
        veneer.get_model_status(prompt)


@pytest.mark.parametrize("asked", [True, False])
def test_tied_modules_that_would_come_apart_are_warned_of(asked: bool) -> None:
    config = lora(target_modules=["embed_tokens"], ensure_weight_tying=asked)
    if asked:
        veneer.get_peft_model(llama(), config)  # both are adapted: nothing to say
        with pytest.warns(UserWarning, match="no tied modules are added"):
            veneer.get_peft_model(llama(), lora(target_modules=["q_proj"], ensure_weight_tying=True))
        with pytest.warns(UserWarning, match="no tied modules were found in the model"):
            veneer.get_peft_model(Net(), lora(ensure_weight_tying=True))
        return
    with pytest.warns(UserWarning, match="embed_tokens holds the same weight as lm_head, and `ensure_weight_tying`"):
        veneer.get_peft_model(llama(), config)


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("patterns", [{"rank_pattern": {"lin1": 2}}, {"alpha_pattern": {"lin0": 3}}], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_conversion_against_the_first_base_keeps_patterns(
    init: str, patterns: dict[str, Any], rslora: bool, tmp_path: Path
) -> None:
    """Also under rsLoRA, without a warning at the config: every layer's scaling stays as it was."""
    torch.manual_seed(0)
    base = Net()
    x = torch.randn(3, 10)
    options = {"r": 4, "use_rslora": rslora, **patterns}
    model = veneer.get_peft_model(
        copy.deepcopy(base), lora(init_lora_weights=init, target_modules=["lin0", "lin1"], **options)
    )
    model.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    back = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    torch.testing.assert_close(back(x), model(x))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    torch.testing.assert_close(theirs(x), model(x))


def test_two_adalora_adapters_may_both_train() -> None:
    config = veneer.AdaLoraConfig(target_modules=["lin0"], total_step=10)
    model = veneer.get_peft_model(Net(), config)
    model.add_adapter("other", veneer.AdaLoraConfig(target_modules=["lin1"], total_step=10))
    model.base_model.set_adapter(["default", "other"])
    model(torch.randn(2, 10)).square().sum().backward()
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {"default", "other"}
