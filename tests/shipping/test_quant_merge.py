"""`veneer merge` with a quantised base: into its packed weights with the loss told, or into the original ones."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ship_zoo import probe, save_adapter, save_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

from veneer import AutoPeftModelForCausalLM, LoraConfig
from veneer.cli.app import app

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install veneer[quant]"
)


def merge(*args: Any) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, args)])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(probe()).logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the other tests' model, and wide enough for a block of 64 in each row."""
    return save_llama(tmp_path_factory.mktemp("models") / "wide", width=64)


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return save_adapter(llama, config, tmp_path / "adapter")


@pytest.fixture
def packed(llama: Path, tmp_path: Path) -> Path:
    """The model as nf4 files."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "packed")
    for file in llama.glob("token*"):
        (tmp_path / "packed" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "packed"


@pytest.mark.parametrize("way", ["nf4", "int8"])
def test_into_a_base_quantised_now(way: str, adapter: Path, tmp_path: Path) -> None:
    done = merge(adapter, "-o", tmp_path / "merged", "--merge-into", way)
    assert done.exit_code == 0, done.output
    assert "quantising anew moved the merged weights by" in done.output
    errors = json.loads((tmp_path / "merged" / "merge_errors.json").read_text())
    assert len(errors) == 4
    assert all(0 < e["weight"] < (0.1 if way == "nf4" else 0.01) for e in errors.values())
    certificate = json.loads((tmp_path / "merged" / "merge_certificate.json").read_text())
    assert certificate["dtype"] == way
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu")
    assert model.is_quantized
    adapted = AutoPeftModelForCausalLM.from_pretrained(str(adapter))
    off = float((logits(model) - logits(adapted)).norm() / logits(adapted).norm())
    assert 0 < off < (0.6 if way == "nf4" else 0.1)


def test_into_a_base_whose_files_are_quantised(packed: Path, adapter: Path, tmp_path: Path) -> None:
    done = merge(adapter, "-o", tmp_path / "merged", "--base", packed)
    assert done.exit_code == 0, done.output
    assert "quantising anew" in done.output
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", device_map="cpu").is_quantized


def test_into_the_original_weights(packed: Path, llama: Path, adapter: Path, tmp_path: Path) -> None:
    refused = merge(adapter, "-o", tmp_path / "m", "--base", packed, "--merge-into", "original")
    assert refused.exit_code == 2, refused.output
    assert "is quantised (bitsandbytes)" in refused.output
    assert "--base" in refused.output
    assert not (tmp_path / "m").exists()
    done = merge(adapter, "-o", tmp_path / "m", "--base", llama, "--merge-into", "original")
    assert done.exit_code == 0, done.output
    assert "loaded whole" not in done.output
    adapted = AutoPeftModelForCausalLM.from_pretrained(str(adapter))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits(adapted))


@pytest.mark.parametrize(("more", "said"), [
    (["--merge-into", "nf5"], "cannot merge into 'nf5'"), (["--merge-into", "hqq"], "HQQ"),
    (["--merge-into", "nf4", "--dtype", "float16"], "leave out --dtype"),
])  # fmt: skip
def test_what_cannot_be_is_refused(more: list[str], said: str, adapter: Path, tmp_path: Path) -> None:
    done = merge(adapter, "-o", tmp_path / "m", *more)
    assert done.exit_code == 2, done.output
    assert said in done.output
    assert not (tmp_path / "m").exists()
    assert not (tmp_path / "m.partial").exists()


def test_a_missing_library_is_told(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.backends.loading.has", lambda library: False)
    done = merge(adapter, "-o", tmp_path / "m", "--merge-into", "nf4")
    assert done.exit_code == 2
    assert "pip install 'veneer[quant]'" in done.output
