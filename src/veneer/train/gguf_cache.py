"""GGUF files as ordinary model folders: dequantised once, kept in the user's cache, found by content."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

from veneer.train.errors import BaseModelError

__all__ = ["cache_folder", "dequantised"]

_FORM = 1  # raise it when the layout of a cached folder changes


def cache_folder() -> Path:
    """Where veneer keeps what it can make again: `VENEER_CACHE`, or the platform's cache folder."""
    if os.environ.get("VENEER_CACHE"):
        return Path(os.environ["VENEER_CACHE"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "veneer"
    if os.name == "nt" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "veneer" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "veneer"


def _key(path: Path, dtype: str) -> str:
    """A name for a file's content: its size, time of change, and a hash of its first and last megabyte."""
    size, edge = path.stat().st_size, 1 << 20
    digest = hashlib.sha256(f"{_FORM} {dtype} {size} {path.stat().st_mtime_ns}".encode())
    with path.open("rb") as stream:
        digest.update(stream.read(edge))
        stream.seek(max(0, size - edge))
        digest.update(stream.read(edge))
    return f"{path.stem}-{dtype}-{digest.hexdigest()[:16]}"


def dequantised(path: Path, dtype: str | None = None) -> Path:
    """The folder (config, safetensors, tokenizer) made from a GGUF file; made on first use, then found.

    Raises:
        BaseModelError: the file cannot be read, `gguf` is not installed, or the cache cannot be written.
    """
    dtype = dtype or "float32"
    home = cache_folder() / "gguf"
    folder = home / _key(path, dtype)
    if folder.is_dir():
        return folder
    try:
        beside = home / f".{folder.name}.{os.getpid()}"
        beside.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "Set VENEER_CACHE to a folder that can be written."
        raise BaseModelError(f"cannot write to the cache {home}: {error}", hint=hint) from error
    try:
        _convert(path, beside, dtype)
        try:
            os.replace(beside, folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first
                raise
    except OSError as error:
        hint = "Free some space, or set VENEER_CACHE to another folder."
        raise BaseModelError(f"cannot keep the dequantised {path.name} in {home}: {error}", hint=hint) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _convert(path: Path, folder: Path, dtype: str) -> None:
    import importlib.util
    from typing import Any

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise BaseModelError(f"reading {path.name} needs the gguf package", hint="Run `pip install gguf`.")
    more = {"gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **more)
        model: Any = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=getattr(torch, dtype), **more)
    except (ValueError, KeyError, NotImplementedError) as error:
        hint = "It may be damaged, or of an architecture that transformers cannot read from GGUF."
        raise BaseModelError(f"cannot read {path}: {error}", hint=hint) from error
    # the weights are plain tensors from here on: forget that they came from a quantised file
    model.hf_quantizer = None
    model.is_quantized = False
    if "quantization_config" in model.config.__dict__:
        del model.config.quantization_config
    tokenizer.init_kwargs.pop("gguf_file", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
