"""Writing adapters: beside and renamed, only what was asked, nothing half-written; embeddings and dtypes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from api_zoo import adapted, llama, logits, lora, moved, saved
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

import veneer
from veneer import PeftModel


@pytest.mark.parametrize("broken", ["safetensors.torch.save_file", "os.replace"])
def test_a_failed_save_leaves_the_old_file(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, y = saved(tmp_path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        if broken != "os.replace":
            Path(args[1]).write_bytes(b"half of it")
        raise OSError("no space left on device")

    model = moved(adapted("default"), seed=5)
    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(OSError, match="no space"):
            model.save_pretrained(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), folder)), y)


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ValueError, match="should be a directory"):
        adapted("default").save_pretrained(str(path))
    assert path.read_text() == "mine"


def test_tensors_without_memory_are_not_saved(tmp_path: Path) -> None:
    model = veneer.get_peft_model(llama(), lora(), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="holds no data"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_saving_a_given_state_dict(tmp_path: Path) -> None:
    """As trainers do after gathering shards: the full state dict is given, one adapter's tensors are written."""
    model = adapted("default")
    full = {k: v.clone() + 1 for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=full)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    now = veneer.get_peft_model_state_dict(model)
    assert tensors.keys() == now.keys()
    assert all(torch.equal(tensors[k], now[k] + 1) for k in now)
    full.pop(next(k for k in full if "lora_A" in k))
    with pytest.raises(ValueError, match="1 tensors are missing"):
        model.save_pretrained(tmp_path, state_dict=full)


def test_saving_does_not_change_the_model(tmp_path: Path) -> None:
    model = adapted("default")
    config = model.peft_config["default"].to_dict()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].to_dict() == config
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True


def test_a_model_card_that_is_there_is_kept(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    assert "library_name: peft" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    adapted("default").save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


# -- embeddings, memory ---------------------------------------------------------------------------------------------
def test_resized_embeddings_travel(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")

    def base() -> Any:
        return LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()

    bigger = base()
    torch.manual_seed(1)
    bigger.resize_token_embeddings(53)
    for package in (veneer, peft):
        model = moved(
            package.get_peft_model(bigger, package.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        )
        folder = tmp_path / package.__name__
        model.save_pretrained(folder)
        y = logits(model)
        tensors = load_file(folder / "adapter_model.safetensors")
        assert {k for k in tensors if "lora" not in k} == {
            "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
        }  # fmt: skip
        again = base()
        again.resize_token_embeddings(53)
        loaded = PeftModel.from_pretrained(again, folder)
        torch.testing.assert_close(logits(loaded), y, atol=1e-6, rtol=1e-6)
        with pytest.raises(ValueError, match=r"resize_token_embeddings\(53\)"):
            PeftModel.from_pretrained(base(), folder)
        bigger = model.unload()


def test_loading_does_not_draw_or_disturb_random_numbers(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path)
    base = llama()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    PeftModel.from_pretrained(base, folder)
    assert torch.equal(torch.rand(3), expected)


def test_half_precision_masters(tmp_path: Path) -> None:
    """Over a bf16 base loaded adapters are float32, or bf16 on request; the file's own dtype does not decide."""
    folder, _ = saved(tmp_path)
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = PeftModel.from_pretrained(llama().to(torch.bfloat16), folder, autocast_adapter_dtype=autocast)
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {dtype}
        assert logits(model).dtype == torch.bfloat16


def test_any_module_can_be_a_base(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))

    model = moved(veneer.get_peft_model(make(), lora(target_modules=["0"], modules_to_save=["2"])))
    x = torch.randn(3, 8)
    model.save_pretrained(tmp_path)
    for package in (veneer, peft):
        torch.testing.assert_close(package.PeftModel.from_pretrained(make(), tmp_path)(x), model(x))
