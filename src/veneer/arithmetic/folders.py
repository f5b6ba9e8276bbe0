"""LoRA adapters read from folders, checked for arithmetic, and written back whole or not at all."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import registry, state
from ..config import PeftConfig
from ..errors import AdapterError
from ..files import SAFE_NAME, write_tensors

__all__ = ["Result", "Source", "check_new", "common_base", "read_source", "write_folder"]

COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "labels.json",
          "asking.json", "task.json")  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One adapter's files. lora: its factors and biases; whole: tensors of modules_to_save and embeddings."""

    name: str
    folder: Path
    config: Any
    lora: dict[str, Tensor]
    whole: dict[str, Tensor]


@dataclass(frozen=True)
class Result:
    """errors: layer -> share of the exact change's norm by which the written one differs; ranks by layer."""

    folder: Path
    errors: dict[str, float]
    ranks: dict[str, int]

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)


def read_source(folder: str | Path, name: str) -> Source:
    """Read an adapter for arithmetic. Raises AdapterError where its change is not a plain product of factors."""
    from ..opened import adapter_folder

    path = adapter_folder(str(folder))
    config: Any = PeftConfig.from_pretrained(str(path))
    why = _refusal(config)
    if why:
        raise AdapterError(f"{path}: {why}")
    tensors, _ = state.read(str(path))
    lora = {k: t for k, t in tensors.items() if ".lora_" in k}
    return Source(name, path, config, lora, {k: t for k, t in tensors.items() if k not in lora})


def _refusal(config: Any) -> str:
    method = registry.method_of(config)
    if method.name == "DORA":
        return (
            "DoRA rescales the whole weight, so its change is not the product of its factors; `veneer convert` makes "
            "a plain LoRA of it"
        )
    if method.name != "LORA":
        return f"{method.name.lower()} is not plain LoRA; `veneer convert ADAPTER --rank N` makes one of it"
    if method.changes_base(config):
        return (
            f"init_lora_weights={config.init_lora_weights!r} changed the base's weights, and this file counts from "
            "there; save it with path_initial_model_for_weight_conversion first"
        )
    for field, what in (
        ("trainable_token_indices", "trains token rows, which do not add up"),
        ("target_parameters", "adapts parameters, whose layers its file does not tell"),
        ("ensure_weight_tying", "ties factors between layers, which a sum of products need not be"),
    ):
        if getattr(config, field, None):
            return f"it {what} ({field})"
    if getattr(config, "bias", "none") not in ("none", None):
        return f"bias={config.bias!r} trained biases of the base itself, which its file holds whole"
    return ""


def common_base(sources: Sequence[Source], base: str | None) -> str | None:
    """The base that the result names: the one given, else the one all sources name; AdapterError where they
    differ."""
    named = list(dict.fromkeys(s.config.base_model_name_or_path for s in sources))
    if base is None and len(named) > 1:
        raise AdapterError(
            f"the adapters name other bases: {', '.join(map(str, named))}; where these are one model under several "
            "names, say which with --base"
        )
    return base or named[0]


def check_new(folder: str | Path) -> Path:
    """The folder, which must not exist yet."""
    path = Path(folder)
    if path.exists():
        raise AdapterError(f"{path} already exists; name a folder that does not exist yet")
    return path


def write_folder(
    folder: Path, config: Any, tensors: dict[str, Tensor], like: Path | None = None, card: str = ""
) -> None:
    """Config, tensors and card into a new folder, made beside and renamed; what goes with an adapter's text
    (tokenizer, labels) is copied from `like`."""

    def write(partial: Path) -> None:
        write_tensors(os.fspath(partial / SAFE_NAME), tensors)
        made = copy.copy(config)
        made.inference_mode = True
        made.save_pretrained(os.fspath(partial))
        for name in COPIED:
            if like is not None and (like / name).is_file():
                shutil.copyfile(like / name, partial / name)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")

    atomic_folder(folder, write)


def atomic_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """write(a new folder beside), then rename it into place; nothing is left where `write` raises."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
