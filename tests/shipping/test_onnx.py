"""ONNX of merged encoders equals the adapted torch model, at sizes that the export never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from ship_zoo import randomised, save_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
)
from typer.testing import CliRunner

from veneer import LoraConfig, PeftModel, get_peft_model
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
    write = exporting.write_graph

    def spoiled(graph: Any, folder: Path) -> Path:
        path = write(graph, folder)
        merged.classifier.bias.data += 0.1  # the graph no longer is the model
        return path

    monkeypatch.setattr(exporting, "write_graph", spoiled)
    with pytest.raises(AdapterError, match=r"model\.onnx: onnxruntime differs from torch by 0"):
        export_onnx(merged, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="merge_and_unload"):
        export_onnx(adapted(bert, "SEQ_CLS").get_base_model(), tmp_path / "x")
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    (tmp_path / "there").mkdir()
    with pytest.raises(AdapterError, match="already exists"):
        export_onnx(llama, tmp_path / "there")


@pytest.mark.slow
def test_a_decoder_writes_with_its_cache_as_torch_does(llama: Path, make_adapter: Any, tmp_path: Path) -> None:
    """Prompts of several lengths, then token by token with the cache of the graph itself."""
    folder = make_adapter(LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, task_type="CAUSAL_LM"))
    done = CliRunner().invoke(app, ["export", str(folder), "--out", str(tmp_path / "x"), "--int8"])
    assert done.exit_code == 0, done.output
    assert "int8" in done.output
    session = onnxruntime.InferenceSession(str(tmp_path / "x" / "model.onnx"))
    past = [n for n in session.get_inputs() if n.name.startswith("past_key_values")]
    assert [n.name for n in past[:2]] == ["past_key_values.0.key", "past_key_values.0.value"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(folder)).eval()
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, :5] = 0  # padded on the left
    ids = torch.randint(3, 200, (3, 8), generator=torch.Generator().manual_seed(1)) * mask + 2 * (1 - mask)
    with torch.no_grad():
        want = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=2
        )
    cache = [torch.zeros(3, n.shape[1], 0, n.shape[3]).numpy() for n in past]
    feed, written = ids, []
    for _ in range(10):
        given = {
            "input_ids": feed.numpy(),
            "attention_mask": mask.numpy(),
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -feed.shape[1] :].numpy(),
        }
        logits, *cache = session.run(None, given | {n.name: c for n, c in zip(past, cache, strict=True)})
        scores = torch.from_numpy(logits[:, -1])
        scores[:, 1] = -torch.inf  # min_new_tokens: no end
        feed = scores.argmax(-1, keepdim=True)
        written.append(feed)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    assert torch.equal(torch.cat(written, 1), want[:, 8:])
    held = json.loads((tmp_path / "x" / "int8_certificate.json").read_text())
    assert held["largest_difference"] > 0  # rounding is seen
    assert held["share"] < 0.2
    sizes = [(tmp_path / "x" / name).stat().st_size for name in ("model.int8.onnx", "model.onnx")]
    whole = sizes[1] + sum(p.stat().st_size for p in (tmp_path / "x").glob("model.onnx.data"))
    assert sizes[0] < whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_seq2seq(kind: str, tmp_path: Path) -> None:
    small: dict[str, Any] = {"vocab_size": 99, "d_model": 32}
    if kind == "t5":
        config: Any = T5Config(**small, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
        names = ["q", "v"]
    else:
        config = BartConfig(
            **small, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        )  # fmt: skip
        names = ["q_proj", "v_proj"]
    torch.manual_seed(0)
    adapter = LoraConfig(target_modules=names, r=3, task_type="SEQ_2_SEQ_LM")
    model = randomised(get_peft_model(AutoModelForSeq2SeqLM.from_config(config), adapter), 1).eval()
    source = torch.randint(3, 99, (2, 6), generator=torch.Generator().manual_seed(2))
    target = torch.randint(3, 99, (2, 5), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = model(input_ids=source, decoder_input_ids=target).logits
    done = export_onnx(model.merge_and_unload(), tmp_path / "x")
    assert done.files == ("decoder_model.onnx", "encoder_model.onnx")
    assert done.largest_difference < 1e-4
    encoder, decoder = (
        onnxruntime.InferenceSession(str(tmp_path / "x" / f"{n}_model.onnx")) for n in ("encoder", "decoder")
    )
    mask = torch.ones_like(source).numpy()
    (hidden,) = encoder.run(None, {"input_ids": source.numpy(), "attention_mask": mask})
    past = [n for n in decoder.get_inputs() if n.name.startswith("past_key_values")]
    cache = [torch.zeros(2, n.shape[1], 0, n.shape[3]).numpy() for n in past]
    for i in range(5):
        given = {"input_ids": target[:, i : i + 1].numpy(), "encoder_attention_mask": mask,
                 "encoder_hidden_states": hidden}  # fmt: skip
        logits, *cache = decoder.run(None, given | {n.name: c for n, c in zip(past, cache, strict=True)})
        assert torch.allclose(torch.from_numpy(logits[:, 0]), want[:, i], atol=1e-4)
