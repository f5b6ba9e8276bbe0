"""Files in and out: strict loading and its report, damage, old formats, folders, no network, writing beside."""

from __future__ import annotations

import json
import os
import pickle
import socket
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from api_zoo import adapted, llama, logits, lora, moved, saved
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import veneer
from veneer import LoadError, PeftConfig, PeftModel, PeftWarning

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
OTHER = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def edit(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- strict --------------------------------------------------------------------------------------------------
def test_round_trip(tmp_path: Path) -> None:
    folder, y = saved(tmp_path)
    assert sorted(os.listdir(folder)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    model = PeftModel.from_pretrained(llama(), folder)
    assert type(model) is veneer.PeftModelForCausalLM
    assert torch.equal(logits(model), y)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_is_trainable(tmp_path: Path) -> None:
    folder, y = saved(tmp_path)
    model = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in n for n in trained)
    assert model.training
    assert torch.equal(logits(model.eval()), y)


def test_missing_unexpected_and_misshapen_tensors_are_each_named(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[KEY]
        tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 32)
        tensors[OTHER] = torch.ones(3, 4)

    edit(folder, damage)
    with pytest.raises(LoadError) as caught:
        PeftModel.from_pretrained(llama(), folder)
    assert caught.value.report["missing"] == [KEY]
    assert caught.value.report["unexpected"] == ["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"]
    assert caught.value.report["mismatched"] == [f"{OTHER}: file (3, 4), model (16, 4)"]
    for part in (KEY, "layers.9", "(3, 4)", "(16, 4)", "strict=False", str(folder)):
        assert part in str(caught.value)


def test_strict_false_keeps_what_fits(tmp_path: Path) -> None:
    folder, y = saved(tmp_path)
    edit(folder, lambda t: t.pop(KEY))
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(llama(), folder, strict=False)
    assert not any(p.is_meta for p in model.parameters())
    found = veneer.get_peft_model_state_dict(model)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(found[k], t) for k, t in tensors.items())
    assert found[KEY].abs().sum() > 0
    assert not torch.equal(logits(model), y)


def test_load_adapter_reports_and_a_failure_leaves_the_model(tmp_path: Path) -> None:
    folder, y = saved(tmp_path)
    model = adapted("a")
    before = logits(model)
    report = model.load_adapter(folder, "b")
    assert report.ok
    assert report.loaded == 8
    assert torch.equal(logits(model), before), "a loaded adapter is not active before set_adapter"
    model.set_adapter("b")
    assert torch.equal(logits(model), y)
    model.set_adapter("a")
    edit(folder, lambda t: t.pop(KEY))
    with pytest.raises(LoadError, match="1 missing from the file"):
        model.load_adapter(folder, "c")
    assert list(model.peft_config) == ["a", "b"]
    assert torch.equal(logits(model), before)
    assert not any(p.is_meta for p in model.parameters())
    report = model.load_adapter(folder, "c", strict=False)
    assert report.missing_keys == [KEY]


def test_an_adapter_for_another_model_says_so(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    with pytest.raises(LoadError, match=r"file \(4, 32\), model \(4, 64\)"):
        PeftModel.from_pretrained(llama(hidden_size=64), folder)
    with pytest.raises((LoadError, ValueError), match="layers"):
        PeftModel.from_pretrained(llama(num_hidden_layers=3), folder)


def test_set_state_dict_reports(tmp_path: Path) -> None:
    model = adapted("default")
    tensors = dict(veneer.get_peft_model_state_dict(model))
    tensors["nonsense"] = torch.ones(1)
    removed = tensors.pop(KEY)
    report = veneer.set_peft_model_state_dict(model, tensors)
    assert (report.missing_keys, report.unexpected_keys) == ([KEY], ["nonsense"])
    tensors[KEY] = removed[:2]
    with pytest.raises(LoadError, match=r"file \(2, 32\), model \(4, 32\)"):
        veneer.set_peft_model_state_dict(model, tensors)
    veneer.set_peft_model_state_dict(model, tensors, ignore_mismatched_sizes=True)


# -- damaged and old files -------------------------------------------------------------------------------------
def test_a_truncated_file_says_so(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not a complete safetensors file"):
        PeftModel.from_pretrained(llama(), folder)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        PeftModel.from_pretrained(llama(), folder)


def test_broken_json_says_where(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    (folder / "adapter_config.json").write_text('{\n  "r": 4,\n  "peft_type" "LORA"\n}')
    with pytest.raises(ValueError, match=r"adapter_config\.json:3: not valid JSON"):
        PeftModel.from_pretrained(llama(), folder)


@pytest.mark.parametrize("package", [veneer, peft], ids=["veneer", "peft"])
def test_old_bin_files(package: Any, tmp_path: Path) -> None:
    model = moved(
        package.get_peft_model(llama(), package.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    )
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert "adapter_model.bin" in os.listdir(tmp_path)
    assert "adapter_model.safetensors" not in os.listdir(tmp_path)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model), atol=1e-6, rtol=1e-6
    )


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def test_a_bin_file_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved(tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    torch.save({**tensors, "x": Code()}, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="could run code"):
        PeftModel.from_pretrained(llama(), folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Code()))
    with pytest.raises(ValueError, match=r"adapter_model\.bin"):
        PeftModel.from_pretrained(llama(), folder)
    assert not (tmp_path / "ran").exists()


def test_keys_with_an_adapters_name_are_read(tmp_path: Path) -> None:
    """Old files and gathered state dicts: the adapter's name in the key, wrappers' prefixes."""
    folder, y = saved(tmp_path)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for i, key in enumerate(list(tensors)):
            prefix = ("", "module.", "_orig_mod.")[i % 3]
            tensors[prefix + key.removesuffix(".weight") + ".default.weight"] = tensors.pop(key)

    edit(folder, rename)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder)), y)


def test_key_mapping(tmp_path: Path) -> None:
    folder, y = saved(tmp_path)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("model.model.layers", "model.old.blocks")] = tensors.pop(key)

    edit(folder, rename)
    with pytest.raises(LoadError, match="nearest pair"):
        PeftModel.from_pretrained(llama(), folder)
    model = PeftModel.from_pretrained(llama(), folder, key_mapping={r"^old\.blocks": "model.layers"})
    assert torch.equal(logits(model), y)


# -- configs -----------------------------------------------------------------------------------------------------
def test_unknown_config_keys_are_one_clear_warning(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    edit_config(folder, brand_new_option=3, another_one=None, peft_version="9.9.9")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = PeftConfig.from_pretrained(folder)
    (warning,) = [w for w in caught if issubclass(w.category, UserWarning)]
    assert warning.category is PeftWarning
    for part in ("brand_new_option", "another_one", "9.9.9", "LoraConfig"):
        assert part in str(warning.message)
    assert config.r == 4


def test_what_peft_writes_by_default_is_no_warning(tmp_path: Path) -> None:
    model = moved(peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(llama(), tmp_path)


def test_an_adapter_whose_initial_values_came_from_data_loads(tmp_path: Path) -> None:
    folder, y = saved(tmp_path)
    edit_config(folder, init_lora_weights="eva", eva_config={"rho": 2.0})
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder)), y)
    with pytest.raises(ValueError, match="Unknown initialization init_lora_weights='evo'"):
        veneer.get_peft_model(llama(), lora(init_lora_weights="evo"))


@pytest.mark.parametrize("package", [veneer, peft], ids=["veneer", "peft"])
def test_a_second_adapter_loaded_to_be_trained(package: Any, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    model = package.PeftModel.from_pretrained(llama(), folder, adapter_name="x")
    model.load_adapter(folder, "y", is_trainable=True)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 8
    assert all(".y." in n for n in trained)


def test_unknown_type_names_the_known(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    edit_config(folder, peft_type="LORRA")
    with pytest.raises(ValueError, match=r"unknown adapter type 'LORRA'.*did you mean LORA"):
        PeftConfig.from_pretrained(folder)


def test_config_round_trip(tmp_path: Path) -> None:
    config = lora(
        rank_pattern={"q_proj": 2}, exclude_modules=["x"], task_type=veneer.TaskType.CAUSAL_LM, revision="abc"
    )
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is veneer.LoraConfig
    assert again.to_dict() == config.to_dict()
    theirs = peft.PeftConfig.from_pretrained(tmp_path)
    assert (theirs.rank_pattern, theirs.target_modules, theirs.revision) == ({"q_proj": 2}, {"q_proj", "v_proj"}, "abc")
    assert PeftConfig.from_pretrained(tmp_path, r=7).r == 7
    assert (
        veneer.get_peft_config(json.loads((tmp_path / "adapter_config.json").read_text())).to_dict() == config.to_dict()
    )


def test_same_config_writes_the_same_bytes(tmp_path: Path) -> None:
    for name, targets in (("a", ["q_proj", "v_proj", "o_proj"]), ("b", ["o_proj", "v_proj", "q_proj"])):
        lora(target_modules=targets).save_pretrained(tmp_path / name)
    assert (tmp_path / "a/adapter_config.json").read_bytes() == (tmp_path / "b/adapter_config.json").read_bytes()


# -- folders, hub arguments, network --------------------------------------------------------------------------------
def test_several_adapters_into_folders(tmp_path: Path) -> None:
    model = adapted("default", "b")
    model.save_pretrained(tmp_path)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(os.listdir(tmp_path / "b"))
    model.set_adapter("b")
    y = logits(model)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, subfolder="b")
    assert torch.equal(logits(loaded), y)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, subfolder="b")
    torch.testing.assert_close(logits(theirs), y, atol=1e-6, rtol=1e-6)
    loaded.load_adapter(tmp_path, "first")
    loaded.set_adapter("first")
    model.set_adapter("default")
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="selected_adapters"):
        model.save_pretrained(tmp_path, selected_adapters=["nope"])


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(llama(), tmp_path)
    folder, _ = saved(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither adapter_model\.safetensors nor adapter_model\.bin"):
        PeftModel.from_pretrained(llama(), folder)


def test_revision_and_friends_go_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, y = saved(tmp_path / "real" / "inner")
    asked: list[tuple[str, str, dict[str, Any]]] = []

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        asked.append((repo_id, filename, kwargs))
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = PeftModel.from_pretrained(llama(), "someone/adapter", revision="v2", token="t", subfolder="inner")
    assert torch.equal(logits(model), y)
    assert [a[:2] for a in asked] == [
        ("someone/adapter", "adapter_config.json"), ("someone/adapter", "adapter_model.safetensors")
    ]  # fmt: skip
    assert all(a[2] == {"revision": "v2", "token": "t", "subfolder": "inner"} for a in asked)


def test_the_bases_revision_travels(tmp_path: Path) -> None:
    model = veneer.get_peft_model(llama(), lora(), revision="abc")
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).revision == "abc"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was asked")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)


@pytest.mark.usefixtures("no_network")
def test_local_paths_and_saving_never_touch_the_network(tmp_path: Path) -> None:
    base = llama()
    base.config._name_or_path = base.name_or_path = "someone/somewhere"
    model = moved(veneer.get_peft_model(base, lora(target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")))
    for embeddings in ("auto", True, False):
        model.save_pretrained(tmp_path / str(embeddings), save_embedding_layers=embeddings)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "auto")
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="Can't find"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_auto_model(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = moved(veneer.get_peft_model(base, lora(task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "adapter")
    y = logits(model)
    for cls in (veneer.AutoPeftModelForCausalLM, veneer.AutoPeftModel):
        loaded = cls.from_pretrained(tmp_path / "adapter")
        assert type(loaded) is veneer.PeftModelForCausalLM
        assert torch.equal(logits(loaded), y)
    half = veneer.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", dtype=torch.bfloat16, is_trainable=True
    )
    assert half.get_base_model().dtype == torch.bfloat16
    assert any(p.requires_grad for p in half.parameters())
    with pytest.raises(ValueError, match="PeftModelForSequenceClassification"):
        veneer.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="from_pretrained"):
        veneer.AutoPeftModel()


def test_auto_model_without_a_task_uses_the_class_it_was_made_from(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    LlamaModel(LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
    model = veneer.get_peft_model(LlamaModel.from_pretrained(tmp_path / "base"), lora())
    model.save_pretrained(tmp_path / "adapter")
    loaded = veneer.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is LlamaModel
    assert type(peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").get_base_model()) is LlamaModel
