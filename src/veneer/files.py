"""Files: found locally or on the hub, read without running code, written beside and renamed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import AdapterError

SAFE_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"

HUB_KEYS = frozenset(
    {"revision", "cache_dir", "force_download", "token", "local_files_only", "proxies", "local_dir",
     "use_auth_token", "resume_download", "repo_type", "user_agent", "headers", "etag_timeout", "endpoint"}
)  # fmt: skip
_PASSED = ("revision", "cache_dir", "force_download", "token", "local_files_only", "repo_type", "endpoint")


def locate(source: str | os.PathLike, filename: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """Path of `filename` in a local folder, else in a hub repository; None where it does not exist.

    A local folder is never looked up on the hub, even when the file is not in it.
    """
    root = os.fspath(source)
    if os.path.isdir(root):
        path = os.path.join(root, subfolder, filename) if subfolder else os.path.join(root, filename)
        return path if os.path.isfile(path) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    if "use_auth_token" in hub:
        hub["token"] = hub.pop("use_auth_token")
    try:
        return hf_hub_download(
            root, filename, subfolder=subfolder or None, **{k: hub[k] for k in _PASSED if hub.get(k) is not None}
        )
    except HFValidationError as e:
        raise ValueError(f"Can't find '{filename}' at '{root}': no such folder here, and not a hub id ({e})") from e
    except RepositoryNotFoundError as e:
        raise ValueError(f"Can't find '{filename}' at '{root}': no such folder here, no such repository there") from e
    except EntryNotFoundError:
        return None


def write_atomic(path: str, write: Callable[[str], None]) -> None:
    """Call write(temporary path) in the same folder, then rename: readers see the old file or the new one."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=folder, prefix="." + os.path.basename(path) + ".")
    os.close(fd)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def write_text(path: str, text: str) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)

    write_atomic(path, write)


def write_json(path: str, data: Any) -> None:
    write_text(path, json.dumps({k: data[k] for k in sorted(data)}, indent=2))


def write_tensors(path: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file; tensors that share memory are written apart."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    out = {}
    for name, t in tensors.items():
        t = t.detach().contiguous()
        key = t.untyped_storage().data_ptr()
        if key in seen or t.untyped_storage().nbytes() != t.numel() * t.element_size():
            t = t.clone()
        seen.add(key)
        out[name] = t
    write_atomic(path, lambda temporary: save_file(out, temporary, metadata={"format": "pt", **(metadata or {})}))


def write_bin(path: str, tensors: dict[str, Tensor]) -> None:
    write_atomic(path, lambda temporary: torch.save(tensors, temporary))


def read_tensors(path: str | os.PathLike, device: str = "cpu") -> dict[str, Tensor]:
    """Tensors of a .safetensors file (memory-mapped) or an old .bin file (weights only: one that holds code is
    refused)."""
    path = os.fspath(path)
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path, device=device)
        except SafetensorError as e:
            raise AdapterError(f"{path}: not a complete safetensors file ({e}); download or save it again") from e
    import pickle

    try:
        return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as e:
        raise AdapterError(
            f"{path}: this .bin file holds more than tensors and could run code when opened, so it is refused; "
            f"load it where it is trusted and save it again as safetensors ({str(e).splitlines()[0]})"
        ) from e


def sha256(path: str | os.PathLike) -> str:
    """The hash of a file's bytes, in hexadecimal; read in pieces."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()
