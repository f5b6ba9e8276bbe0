"""A merged model of Llama's kind as one .gguf file, tokenizer included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from .gguf_lora import GgufFile, _check_path, write_gguf
from .gguf_names import Names, gguf_library

__all__ = ["export_gguf", "pre_tokenizer_of"]


def export_gguf(model: Any, path: str | Path, tokenizer: Any, *, dtype: str = "float16") -> GgufFile:
    """Write a plain transformers model, adapters merged. dtype: of the matrices: float32, float16, bfloat16 or q8_0
    (rows that q8_0's blocks of 32 do not divide stay float16); vectors are float32.

    Raises AdapterError for architectures other than ARCHITECTURES, scaled rotary positions, tokenizers that are not
    byte-level BPE or whose splitting is not known here, and where the file exists.
    """
    out = Path(path)
    _check_path(out)
    if any(getattr(m, "is_adapter_wrapper", False) for m in model.modules()):
        raise AdapterError(f"{type(model).__name__} has adapters in it; call merge_and_unload() first")
    names = Names(model.config)
    words = _words(tokenizer, model.config.vocab_size)
    rope = _rope(model.config)
    tied = model.config.tie_word_embeddings
    tensors = []
    for key, t in model.state_dict().items():
        if key == "lm_head.weight" and tied:
            continue  # llama.cpp takes the embedding where there is no output
        layer, _, leaf = key.rpartition(".")
        tensors.append((f"{names.name(layer)}.{leaf}", names.rows(layer, t)))

    def settings(writer: Any) -> None:
        _add_shape(writer, model.config, rope, dtype)
        _add_tokenizer(writer, tokenizer, words)

    return write_gguf(out, names.architecture, settings, tensors, dtype)


def _rope(config: Any) -> float:
    """The base of the rotary positions. Raises AdapterError where they are scaled."""
    settings = getattr(config, "rope_parameters", None) or {}
    kind = settings.get("rope_type", "default")
    if kind != "default":
        raise AdapterError(f"rotary positions of type {kind!r} are not written to GGUF here; use llama.cpp's converter")
    return float(settings.get("rope_theta", getattr(config, "rope_theta", 10000.0)))


def _add_shape(writer: Any, config: Any, rope: float, dtype: str) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = gguf_library().LlamaFileType
    files = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_name(Path(str(getattr(config, "_name_or_path", "") or "model")).name)
    writer.add_file_type(kinds[files[dtype]])
    writer.add_quantization_version(gguf_library().GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(rope)
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)


def _words(tokenizer: Any, size: int) -> dict[str, Any]:
    """The tokenizer's tables. Raises AdapterError for one that has no form here."""
    if tokenizer is None or not getattr(tokenizer, "is_fast", False):
        raise AdapterError("GGUF needs the model's fast tokenizer (tokenizer.json)")
    held = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = pre_tokenizer_of(held)
    types = gguf_library().TokenType
    vocabulary = {i: word for word, i in tokenizer.get_vocab().items()}
    added = {a["id"]: a["special"] for a in held["added_tokens"]}
    tokens, kinds = [], []
    for i in range(size):
        tokens.append(vocabulary.get(i, f"[PAD{i}]"))  # rows of the embedding that no word has
        kind = types.UNUSED if i not in vocabulary else types.NORMAL
        kinds.append(int((types.CONTROL if added[i] else types.USER_DEFINED) if i in added else kind))
    merges = [m if isinstance(m, str) else " ".join(m) for m in held["model"]["merges"]]
    if max(vocabulary) >= size:
        raise AdapterError(f"the tokenizer has tokens up to {max(vocabulary)}, the model rows for {size}")
    return {"pre": pre, "tokens": tokens, "types": kinds, "merges": merges}


def pre_tokenizer_of(held: dict[str, Any]) -> str:
    """llama.cpp's name for how tokenizer.json splits text before BPE. Raises AdapterError for one not known here."""
    model = held["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise AdapterError("only byte-level BPE tokenizers are written to GGUF here; use llama.cpp's converter")
    pre = held.get("pre_tokenizer") or {}
    parts = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    kinds = [p.get("type") for p in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    pattern = str(parts[0].get("pattern", {}).get("Regex", ""))
    if kinds == ["Split", "ByteLevel"] and r"\p{N}{1,3}" in pattern and "(?i:'s|'t" in pattern:
        return "llama-bpe"
    if kinds == ["Split", "ByteLevel"] and r"|\p{N}|" in pattern and "(?i:'s|'t" in pattern:
        return "qwen2"
    raise AdapterError(f"how this tokenizer splits text ({', '.join(map(str, kinds))}) has no name known here")


def _add_tokenizer(writer: Any, tokenizer: Any, words: dict[str, Any]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words["pre"])
    writer.add_token_list(words["tokens"])
    writer.add_token_types(words["types"])
    writer.add_token_merges(words["merges"])
    for add, found in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if found is not None:
            add(found)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
