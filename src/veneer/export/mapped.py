"""A model whose weights stay in its files: parameters are memory-mapped, read when they are used, and the system
may drop their pages again, so that a model larger than memory can be walked and even run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError

__all__ = ["Mapped", "Unmappable", "mapped_model", "shards"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Unmappable(AdapterError):
    """This checkpoint's tensors are not its model's parameters as they stand (other names, other files)."""


@dataclass
class Mapped:
    """model: in evaluation mode. shard_of: parameter or buffer name -> the file it came from, in file order.
    missing: parameters without a tensor (a head that the base lacks); they are on the meta device."""

    model: Any
    shard_of: dict[str, str]
    missing: list[str]


def shards(folder: Path) -> list[str]:
    """The safetensors files of a model folder, in the index's order. Raises Unmappable without any."""
    if (folder / INDEX).is_file():
        named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return list(dict.fromkeys(named.values()))
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise Unmappable(f"{folder} holds no {SINGLE} or {INDEX}")


@contextmanager
def _without_parameters() -> Iterator[None]:
    """Modules made inside have parameters without memory, and their buffers."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), torch.no_grad():
        yield


def mapped_model(folder: Path, cls: Any, **settings: Any) -> Mapped:
    """Build `cls` for the folder's config (settings are put into it) over its mapped files.

    Raises Unmappable where the files' tensors are not the model's, by name or shape; such a model must be loaded.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, **settings)
    make = getattr(cls, "from_config", None) or cls._from_config
    with _without_parameters():
        model: Any = make(config, dtype=config.dtype or torch.float32)
    held = _places(model)
    shard_of: dict[str, str] = {}
    for shard in shards(folder):
        try:
            with safe_open(str(folder / shard), "pt") as file:
                for key in file.keys():  # noqa: SIM118  (a file, not a dict)
                    name = _name(key, held, model.base_model_prefix)
                    if name is not None:
                        _assign(held[name], file.get_tensor(key), key)
                        shard_of[name] = shard
        except (SafetensorError, OSError) as error:
            raise AdapterError(
                f"{folder / shard}: not a complete safetensors file ({error}); download it again"
            ) from error
    model.tie_weights()
    missing = [n for n, p in model.named_parameters() if p.is_meta]
    lost = [n for n in missing if n.startswith(f"{model.base_model_prefix}.")]
    if lost:
        raise Unmappable(f"{folder} has no tensor under the name {lost[0]} ({len(lost)} are missing)")
    return Mapped(model.eval(), shard_of, missing)


Place = tuple[nn.Module, str]


def _places(model: nn.Module) -> dict[str, Place]:
    out: dict[str, Place] = {}
    for path, module in model.named_modules():
        dropped = module._non_persistent_buffers_set
        own = [n for n, p in module._parameters.items() if p is not None]
        own += [n for n, b in module._buffers.items() if b is not None and n not in dropped]
        out |= {f"{path}.{n}" if path else n: (module, n) for n in own}
    return out


def _name(key: str, held: dict[str, Place], prefix: str) -> str | None:
    """The model's name for a file's key: as it is, or with or without the body's prefix; None: not the model's."""
    return next((n for n in (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}.")) if n in held), None)


def _assign(place: Place, value: Tensor, key: str) -> None:
    module, leaf = place
    old = getattr(module, leaf)
    if old.shape != value.shape:
        raise Unmappable(f"{key} is {tuple(value.shape)} in the file and {tuple(old.shape)} in the model")
    if isinstance(old, nn.Parameter):
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value
