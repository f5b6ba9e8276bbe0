"""Adapters from one program's form into another's: any method to LoRA, and LoRA under other key names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from ..files import read_tensors, write_bin, write_tensors
from ..methods.lora import LoraConfig
from .folders import Result, atomic_folder, check_new, read_source, write_folder
from .styles import ROOT, Pair, named_paths, read_pairs, style_of, write_pairs

__all__ = ["convert_file", "export_style", "import_style", "to_lora_folder"]


def to_lora_folder(adapter: str | Path, out: str | Path, rank: int | float, base: str | None = None) -> Result:
    """Write any adapter that has a delta as a LoRA adapter; the base is needed for it.

    rank: an integer, or the share of each delta's energy to keep. Raises AdapterError with the reason where no
    LoRA can stand in for the adapter.
    """
    from ..opened import open_adapter
    from ..to_lora import save_as_lora

    path = check_new(out)
    opened = open_adapter(str(adapter), base, need_base=True)
    made: dict[str, Any] = {}

    def write(partial: Path) -> None:
        made["done"] = save_as_lora(str(partial), opened.model, rank)

    atomic_folder(path, write)
    _, tensors = made["done"]
    ranks = {
        k.removeprefix(ROOT).rpartition(".lora_")[0]: t.shape[0]
        for k, t in tensors.items()
        if re.search(r"\.lora_(embedding_)?A(\.weight)?$", k)
    }
    return Result(path, made["done"].errors, ranks)


def export_style(adapter: str | Path, out: str | Path, style: str, prefix: str | None = None) -> Path:
    """Write a plain LoRA adapter as one file with another program's keys: .safetensors, or .pt for loralib.

    Raises AdapterError for adapters that the style has no place for (embeddings, biases, modules_to_save).
    """
    path = check_new(out)
    if path.suffix not in (".safetensors", ".pt"):
        raise AdapterError(f"{path}: name a .safetensors file, or .pt")
    source = read_source(adapter, "adapter")
    odd = [k for k in (*source.whole, *source.lora) if not re.search(r"\.lora_[AB]\.weight$", k)]
    if odd:
        raise AdapterError(f"{style} files have no place for {odd[0]} ({len(odd)} such tensors)")
    pairs = {}
    for name, p in read_pairs(source.lora).items():
        cfg = source.config.for_layer(name)
        scaling = cfg.lora_alpha / (cfg.r**0.5 if cfg.use_rslora else cfg.r)
        pairs[name] = Pair(p.A, p.B, scaling * p.r)
    tensors = write_pairs(pairs, style, prefix)
    if path.suffix == ".pt":
        write_bin(os.fspath(path), tensors)
    else:
        write_tensors(os.fspath(path), tensors)
    return path


def import_style(
    file: str | Path,
    out: str | Path,
    *,
    alpha: float | None = None,
    modules: Iterable[str] | None = None,
    strip: str | None = None,
    base: str | None = None,
    task_type: str | None = None,
) -> Result:
    """Write a file of any style as a LoRA adapter's folder.

    alpha: for files that do not hold it. modules: the base's module names, needed for kohya's keys, which lost
    their dots. strip: a component's name at the start of diffusers' keys ("unet"). Raises AdapterError.
    """
    path, source = check_new(out), Path(file)
    if not source.is_file():
        raise AdapterError(f"{source}: no such file")
    tensors = read_tensors(os.fspath(source))
    style, pairs = style_of(tensors), read_pairs(tensors, alpha)
    if style == "kohya":
        if modules is None:
            raise AdapterError(
                f"{source}: kohya's keys have underscores for dots, so the base's module names are needed; give the "
                "base with --base"
            )
        names = named_paths(pairs, modules)
        pairs = {names[k]: p for k, p in pairs.items()}
    elif strip:
        odd = next((k for k in pairs if not k.startswith(f"{strip}.")), None)
        if odd is not None:
            raise AdapterError(f"{odd} does not begin with {strip!r}")
        pairs = {k.removeprefix(f"{strip}."): p for k, p in pairs.items()}
    config = _config(pairs, base, task_type)
    kept = {f"{ROOT}{n}.lora_{s}.weight": t.contiguous() for n, p in pairs.items() for s, t in (("A", p.A), ("B", p.B))}
    write_folder(path, config, kept)
    return Result(path, dict.fromkeys(pairs, 0.0), {n: p.r for n, p in pairs.items()})


def _config(pairs: dict[str, Pair], base: str | None, task_type: str | None) -> LoraConfig:
    from collections import Counter

    r = Counter(p.r for p in pairs.values()).most_common(1)[0][0]
    alpha = Counter(p.alpha for p in pairs.values()).most_common(1)[0][0]
    whole: Any = lambda a: int(a) if float(a).is_integer() else a
    return LoraConfig(
        r=r,
        lora_alpha=whole(alpha),
        rank_pattern={f"^{re.escape(n)}": p.r for n, p in pairs.items() if p.r != r},
        alpha_pattern={f"^{re.escape(n)}": whole(p.alpha) for n, p in pairs.items() if p.alpha != alpha},
        target_modules=list(pairs),
        base_model_name_or_path=base,
        task_type=task_type,
    )


def module_names(base: str) -> list[str]:
    """The names of a base model's layers, without reading its weights."""
    import torch
    import transformers

    from ..train.bases import load_config, resolve_base

    settings = load_config(resolve_base(base))
    name = (settings.architectures or [""])[0]
    cls = getattr(transformers, name, None) or transformers.AutoModel
    with torch.device("meta"):
        model: Any = cls._from_config(settings) if hasattr(cls, "_from_config") else cls.from_config(settings)
    return [n for n, m in model.named_modules() if not list(m.children())]


def convert_file(
    adapter: str | Path,
    out: str | Path,
    *,
    to: str = "peft",
    rank: int | float | None = None,
    base: str | None = None,
    alpha: float | None = None,
    prefix: str | None = None,
    task_type: str | None = None,
) -> Result | Path:
    """Convert by what is given: a file of another style comes in as a folder; a folder goes out as `to`, or with a
    rank as a LoRA of that rank.

    Raises AdapterError where nothing is asked for, or the conversion does not exist, with the reason.
    """
    if Path(adapter).is_file():
        if to != "peft" or rank is not None:
            raise AdapterError("a file is read into a peft folder first; convert that folder in a second step")
        held = style_of(read_tensors(os.fspath(adapter)))
        names = module_names(base) if held == "kohya" and base else None
        return import_style(
            adapter, out, alpha=alpha, modules=names, strip=prefix, base=base, task_type=task_type
        )  # fmt: skip
    if to != "peft":
        if rank is not None:
            raise AdapterError(f"a rank makes a LoRA folder; convert that one to {to} in a second step")
        return export_style(adapter, out, to, prefix)
    if rank is None:
        raise AdapterError("name the rank of the LoRA to make (--rank), or another key style (--to)")
    return to_lora_folder(adapter, out, rank, base)
