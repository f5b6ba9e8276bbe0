"""GGUF files read back: with gguf's own reader, and with transformers' loading of GGUF, to the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from ship_zoo import probe, randomised, save_llama, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.cli.app import app
from veneer.errors import AdapterError
from veneer.export.gguf_lora import export_gguf_lora
from veneer.export.gguf_model import export_gguf, pre_tokenizer_of

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]


def command(*words: Any) -> str:
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    return done.output


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    reader = gguf.GGUFReader(str(path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(probe()).logits


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_llama(tied: bool, tmp_path: Path) -> None:
    base = save_llama(tmp_path / "llama", tied=tied)
    config = LoraConfig(target_modules=TARGETS, r=4, lora_alpha=32, task_type="CAUSAL_LM")
    model = randomised(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config), 1)
    model.save_pretrained(str(tmp_path / "a"))
    says = command("export", tmp_path / "a", "--to", "gguf", "--out", tmp_path / "m.gguf", "--dtype", "float32")
    assert "(float32)" in says
    want = logits(model)
    back = loaded(tmp_path / "m.gguf")
    assert torch.allclose(logits(back), want, atol=1e-5 * float(want.abs().max()))
    fields, tensors = read(tmp_path / "m.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert ("output.weight" in tensors) is not tied


def test_q8_0_is_smaller_and_close(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "llama", width=64)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    want = logits(model)
    sizes = {}
    for kind, within in (("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 5e-2), ("q8_0", 5e-2)):
        made = export_gguf(model, tmp_path / f"{kind}.gguf", tokenizer, dtype=kind)
        gap = float((logits(loaded(made.path)) - want).abs().max() / want.abs().max())
        assert gap < within, (kind, gap)
        sizes[kind] = made.size
    assert sizes["q8_0"] < sizes["float16"] < sizes["float32"]


def test_the_tokenizer_comes_back(llama: Path, tmp_path: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    export_gguf(model, tmp_path / "m.gguf", tokenizer)
    back = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("please send me two red apples", "Ada, Bob & Eve: 12 plums?"):
        assert back(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert back.eos_token_id == tokenizer.eos_token_id
    assert back.chat_template == tokenizer.chat_template


def test_qwen2_whose_rows_are_not_reordered(tmp_path: Path) -> None:
    size = save_tokenizer(tmp_path)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_()
    made = export_gguf(model, tmp_path / "q.gguf", AutoTokenizer.from_pretrained(tmp_path), dtype="float32")
    want = logits(model)
    assert torch.allclose(logits(loaded(made.path)), want, atol=1e-5 * float(want.abs().max()))


# -- the LoRA alone ---------------------------------------------------------------------------------------------------
def test_a_lora_alone_added_to_the_bases_file_is_the_merged_file(
    llama: Path, make_adapter: Any, tmp_path: Path
) -> None:
    """llama.cpp's own sum, base + alpha / r * B A tensor by tensor, loaded by transformers."""
    config = LoraConfig(
        target_modules=TARGETS, r=4, lora_alpha=32, task_type="CAUSAL_LM", rank_pattern={"v_proj": 2},
        alpha_pattern={"k_proj": 5},
    )  # fmt: skip
    folder = make_adapter(config)
    says = command("export", folder, "--to", "gguf-lora", "--out", tmp_path / "a.gguf", "--dtype", "float32")
    assert "16 tensors" in says
    fields, factors = read(tmp_path / "a.gguf")
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["general.architecture"] == "llama"
    alpha = fields["adapter.lora.alpha"]
    base, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    export_gguf(base, tmp_path / "base.gguf", tokenizer, dtype="float32")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(folder)).eval()
    want = logits(adapted)
    export_gguf(adapted.merge_and_unload(), tmp_path / "merged.gguf", tokenizer, dtype="float32")
    plain, merged = read(tmp_path / "base.gguf")[1], read(tmp_path / "merged.gguf")[1]
    changed = {name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")}
    assert len(changed) == 8
    for name, weight in plain.items():
        if name in changed:
            A, B = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
            assert A.shape[0] == B.shape[1] == (2 if "attn_v" in name else 4)
            weight = weight + alpha / A.shape[0] * (B @ A)
        assert torch.allclose(weight, merged[name], atol=1e-5), name
    back = logits(loaded(tmp_path / "merged.gguf"))
    assert torch.allclose(back, want, atol=1e-5 * float(want.abs().max()))


def test_refusals_leave_nothing(llama: Path, make_adapter: Any, tmp_path: Path) -> None:
    plain = make_adapter(LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), "plain")
    dora = make_adapter(LoraConfig(target_modules=["q_proj"], use_dora=True), "dora")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    (tmp_path / "there.gguf").write_bytes(b"")
    out = tmp_path / "x.gguf"
    cases: list[tuple[Any, str]] = [
        (lambda: export_gguf_lora(str(dora), out), "more than a product B A"),
        (lambda: export_gguf_lora(str(plain), tmp_path / "x.bin"), r"ends in \.gguf"),
        (lambda: export_gguf_lora(str(plain), tmp_path / "there.gguf"), "already exists"),
        (lambda: export_gguf_lora(str(plain), out, dtype="int3"), "'int3' is not one of"),
        (lambda: export_gguf_lora(str(plain), out, config=BertConfig()), "this is a bert model"),
        (lambda: export_gguf(BertModel(BertConfig(hidden_size=12)), out, tokenizer), "this is a bert model"),
        (lambda: export_gguf(model, out, None), "needs the model's fast tokenizer"),
    ]
    for act, says in cases:
        with pytest.raises(AdapterError, match=says):
            act()
        assert not list(tmp_path.glob("x.*"))
    model.config.rope_parameters = {"rope_type": "llama3", "rope_theta": 1e4}
    with pytest.raises(AdapterError, match="'llama3' are not written"):
        export_gguf(model, out, tokenizer)


def test_splitting_is_named_or_refused() -> None:
    def of(pre: Any, **more: Any) -> str:
        return pre_tokenizer_of({"model": {"type": "BPE", **more}, "pre_tokenizer": pre})

    bytes_ = {"type": "ByteLevel", "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert of(bytes_) == "gpt-2"
    assert of({"type": "Sequence", "pretokenizers": [digits, bytes_]}) == "smollm"
    with pytest.raises(AdapterError, match="byte-level BPE"):
        of(bytes_, byte_fallback=True)
    with pytest.raises(AdapterError, match="no name known here"):
        of({"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, bytes_]})
