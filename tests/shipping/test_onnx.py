"""ONNX of merged encoders equals the adapted torch model, at sizes that the export never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from ship_zoo import randomised, save_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from typer.testing import CliRunner

from veneer import LoraConfig, get_peft_model
from veneer.cli.app import app
from veneer.errors import AdapterError
from veneer.export import onnx as exporting
from veneer.export.onnx import export_onnx


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "bert"
    size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    BertModel(config).save_pretrained(folder)
    return folder


def adapted(bert: Path, task: str, seed: int = 1) -> Any:
    cls = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}[task]
    config = LoraConfig(target_modules=["query", "value", "dense"], r=3, task_type=task)
    return randomised(get_peft_model(cls.from_pretrained(bert, num_labels=5), config), seed).eval()


def test_a_classifier_from_the_command(bert: Path, tmp_path: Path) -> None:
    model = adapted(bert, "TOKEN_CLS")
    model.save_pretrained(str(tmp_path / "a"))
    done = CliRunner().invoke(app, ["export", str(tmp_path / "a"), "--out", str(tmp_path / "x")])
    assert done.exit_code == 0, done.output
    assert "largest difference" in done.output
    session = onnxruntime.InferenceSession(str(tmp_path / "x" / "model.onnx"))
    for shape in ((1, 5), (4, 21)):
        ids = torch.randint(3, 200, shape)
        mask = torch.ones_like(ids)
        mask[-1, 3:] = 0
        (got,) = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            want = model(input_ids=ids, attention_mask=mask).logits
        assert got.shape == (*shape, 5)
        assert torch.allclose(torch.from_numpy(got), want, atol=1e-4)
    assert {p.name for p in (tmp_path / "x").iterdir()} >= {"model.onnx", "config.json", "tokenizer.json"}


def test_a_difference_is_found_and_nothing_kept(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = adapted(bert, "SEQ_CLS").merge_and_unload()
    write = exporting._write

    def spoiled(model: Any, path: Path) -> str:
        output = write(model, path)
        model.classifier.bias.data += 0.1  # the graph no longer is the model
        return output

    monkeypatch.setattr(exporting, "_write", spoiled)
    with pytest.raises(AdapterError, match="onnxruntime differs from torch by 0"):
        export_onnx(merged, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="merge_and_unload"):
        export_onnx(adapted(bert, "SEQ_CLS").get_base_model(), tmp_path / "x")
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(AdapterError, match="generates text"):
        export_onnx(llama, tmp_path / "x")
    (tmp_path / "there").mkdir()
    with pytest.raises(AdapterError, match="already exists"):
        export_onnx(llama, tmp_path / "there")
