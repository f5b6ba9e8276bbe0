"""An adapter and its base into one model folder: streamed where the base's files allow it, then checked, then kept."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import state
from ..config import PeftConfig
from ..errors import AdapterError, CannotMerge, PeftWarning
from ..grow import rows_needed
from ..opened import _labels, adapter_folder, model_class, open_adapter
from .certificate import SAMPLES, Certificate, Outputs, certify, distance, outputs
from .mapped import Mapped, Unmappable, mapped_model, shards
from .streaming import fingerprint_of, stream_merge

__all__ = ["Merged", "merge_to_folder"]

ROUNDING = 0.25  # of the adapter's effect


@dataclass(frozen=True)
class Merged:
    """streamed: shard by shard; otherwise the model was loaded whole, and `why` says the reason. loss: what quantising
    the merged weights cost, where the base is quantised."""

    folder: Path
    certificate: Certificate
    streamed: bool
    why: str = ""
    loss: str = ""


class Different(AdapterError):
    """The merged model does not do what base and adapter do."""


def merge_to_folder(
    adapter: str,
    out: Path,
    base: str | None = None,
    *,
    dtype: str | None = None,
    safe: bool = False,
    tolerance: Mapping[str, float] | None = None,
    samples: Sequence[str] = SAMPLES,
    on_shard: Callable[[str, bool], None] | None = None,
    into: str | None = None,
) -> Merged:
    """Merge an adapter into its base and write an ordinary model folder with a certificate of equality.

    dtype: store as this torch dtype's name. tolerance: dtype name -> difference of a logit as a share of the largest
    that needs no second look; one above it is rounding (which grows with a model's depth) as long as it is below
    `ROUNDING` of what the adapter itself changes. into: "original": the base's own weights, which must not be
    quantised; a name of backends.loading.QUANTISED: the base quantised in this way; None: the base as its files are.
    A cut-off run goes on in `<out>.partial`. Raises Different where the check fails, and CannotMerge, AdapterError or
    BaseModelError; `out` is then not there.
    """
    if out.exists():
        raise AdapterError(f"{out} already exists; name a folder that does not exist yet")
    folder, partial = adapter_folder(adapter), out.with_name(out.name + ".partial")
    config: Any = PeftConfig.from_pretrained(str(folder))
    name = base or config.base_model_name_or_path
    if not name:
        raise AdapterError(f"{folder} does not name its base model; give it with --base")
    packed = _packed(str(name), into, dtype)
    kind = None if dtype is None else getattr(torch, dtype)
    asked = _Asked(adapter, base, str(name), folder, config, partial, kind, safe, samples, into, packed)
    done = _write(asked, on_shard)
    allowed = {packed: math.inf} if packed is not None else tolerance or {}
    try:
        found = _check(done, partial, samples, allowed.get(done.stored, 1e-3), out)
        _finish(partial, folder, done.tokenizer, found, str(name))
        told = _write_loss(partial, done.loss)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Merged(out, found, not done.why, done.why, told)


@dataclass(frozen=True)
class _Asked:
    """base: as it was given; name: of the base that is used. packed: how the merged weights are quantised."""

    adapter: str
    base: str | None
    name: str
    folder: Path
    config: Any
    partial: Path
    dtype: Any
    safe: bool
    samples: Sequence[str]
    into: str | None
    packed: str | None


@dataclass
class _Written:
    """Merged files that are not checked yet. cls reads them; before: outputs of base and adapter; alone: of the base;
    stored: the dtype, or the way of quantising; why: the reason for which it was not streamed."""

    cls: Any
    tokenizer: Any
    before: Outputs
    alone: Callable[[], Outputs]
    stored: str
    why: str = ""
    loss: dict[str, Any] = field(default_factory=dict)


def _write(asked: _Asked, on_shard: Callable[[str, bool], None] | None) -> _Written:
    """The merged weights into `partial`: streamed where that can be."""
    try:
        if asked.packed is not None:
            raise Unmappable(f"its merged weights are quantised anew ({asked.packed})")
        mapped = _map(asked.name, asked.config, asked.folder)
    except Unmappable as error:
        done = _load_whole(asked) if asked.packed is None else _quantised(asked, asked.packed)
        done.why = str(error)
        return done
    return _stream(mapped, asked, on_shard)


def _packed(name: str, into: str | None, dtype: str | None) -> str | None:
    """How the merged weights will be quantised; None where they stay as they are."""
    from ..backends.loading import QUANTISED, load_options, require_library
    from ..train.bases import load_config, resolve_base

    there = require_library(load_config(resolve_base(name)))
    if into not in (None, "original", *QUANTISED):
        raise AdapterError(f"cannot merge into {into!r}; the ways are original, {', '.join(QUANTISED)}")
    if there is not None and into is not None:
        raise AdapterError(
            f"{name} is quantised ({there}), so its files no longer hold the original weights; give the folder or hub "
            f"id of the original model with --base to merge into {into}"
        )
    if into == "hqq":
        raise AdapterError("a model with HQQ layers cannot be written as a folder that transformers loads; try nf4")
    packed = there if into in (None, "original") else into
    if packed is not None and dtype is not None:
        raise AdapterError(f"the merged weights are stored as {packed}; leave out --dtype")
    if into in QUANTISED:
        load_options(str(into), torch.float32)  # its library is installed
    return packed


def _quantised(asked: _Asked, packed: str) -> _Written:
    """As `_load_whole`, and what quantising the merged weights anew cost: layer -> MergeError."""
    opened = open_adapter(asked.adapter, asked.base, need_base=True, quantize=asked.into)
    tokenizer = _tokenizer(opened.folder, None, opened.base_name)
    before, alone = outputs(opened.model, tokenizer, asked.samples), _alone(opened.model, tokenizer, asked.samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)  # said by the caller
        opened.model.merge_adapter(safe_merge=asked.safe)
        loss = opened.model.base_model.merge_errors()
        merged = opened.model.merge_and_unload()
    shutil.rmtree(asked.partial, ignore_errors=True)
    merged.save_pretrained(asked.partial, save_original_format=False)  # transformers cannot go back from packed weights
    return _Written(type(merged), tokenizer, before, lambda: alone, packed, loss=loss)


def _write_loss(partial: Path, loss: dict[str, Any]) -> str:
    if not loss:
        return ""
    from ..backends.quantised import summary

    values = {name: dataclasses.asdict(error) for name, error in loss.items()}
    values = {n: {k: None if math.isnan(v) else v for k, v in e.items()} for n, e in values.items()}
    (partial / "merge_errors.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    return summary(loss)


@dataclass
class _Mapped(Mapped):
    folder: Path = Path()


def _map(name: str, config: Any, folder: Path) -> _Mapped:
    """The base over its files, of the class that the adapter's task needs."""
    from ..train.bases import load_config, resolve_base

    ref = resolve_base(name)
    settings = load_config(ref)
    where = local_folder(ref)
    tensors, _ = state.read(str(folder))
    labels = _labels(tensors)
    more = {} if labels is None else {"num_labels": labels}
    found = mapped_model(where, model_class(config, settings), **more)
    if rows_needed(found.model, config) > found.model.get_input_embeddings().weight.shape[0]:
        raise Unmappable("the adapter adds tokens to the vocabulary")
    return _Mapped(found.model, found.shard_of, found.missing, where)


def local_folder(ref: Any) -> Path:
    """Where a base's files lie: its folder, its dequantised copy, or its snapshot in the hub's cache."""
    from ..train.bases import _loading, _source

    with _loading(ref):
        source, _ = _source(ref)
        if ref.kind != "hub":
            return Path(source)
        from huggingface_hub import snapshot_download

        kinds = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(source, revision=ref.revision, allow_patterns=kinds))


def _stream(mapped: _Mapped, asked: _Asked, on_shard: Callable[[str, bool], None] | None) -> _Written:
    from ..auto import AutoPeftModel
    from ..model import PeftModel

    folder, partial, dtype, safe = asked.folder, asked.partial, asked.dtype, asked.safe
    tokenizer = _tokenizer(folder, mapped.folder)
    AutoPeftModel._resize(mapped.model, folder)
    cls = type(mapped.model)
    model = PeftModel.from_pretrained(mapped.model, str(folder), config=asked.config).eval()
    if model.prompt_configs is not None:
        raise AdapterError(f"{asked.config.peft_type} adds tokens to the input and has no weights to merge")
    mark = fingerprint_of(folder, mapped.folder, shards(mapped.folder), dtype=str(dtype), safe=safe)
    base = model.get_base_model()
    try:
        stream_merge(mapped, base, partial, dtype=dtype, safe=safe, fingerprint=mark, on_shard=on_shard)
    except (ValueError, CannotMerge):  # it would fail again; a run that was cut off keeps what it has
        shutil.rmtree(partial, ignore_errors=True)
        raise
    stored = str(dtype or mapped.model.dtype).removeprefix("torch.")
    before = outputs(model, tokenizer, asked.samples)
    return _Written(cls, tokenizer, before, lambda: _alone(model, tokenizer, asked.samples), stored)


def _load_whole(asked: _Asked) -> _Written:
    """The same with the model in memory, for files that cannot be mapped."""
    opened = open_adapter(asked.adapter, asked.base, need_base=True)
    tokenizer = _tokenizer(opened.folder, None, opened.base_name)
    before, alone = outputs(opened.model, tokenizer, asked.samples), _alone(opened.model, tokenizer, asked.samples)
    merged = opened.model.merge_and_unload(safe_merge=asked.safe)
    merged = merged if asked.dtype is None else merged.to(asked.dtype)
    shutil.rmtree(asked.partial, ignore_errors=True)
    merged.save_pretrained(asked.partial)
    return _Written(type(merged), tokenizer, before, lambda: alone, str(merged.dtype).removeprefix("torch."))


def _alone(model: Any, tokenizer: Any, samples: Sequence[str]) -> Outputs:
    with model.disable_adapter():
        return outputs(model, tokenizer, samples)


def _tokenizer(adapter: Path, base: Path | None, name: str = "") -> Any:
    from ..train.bases import BaseRef, load_tokenizer, resolve_base

    if (adapter / "tokenizer_config.json").is_file():  # the one it was trained with
        return load_tokenizer(BaseRef("folder", str(adapter), adapter))
    return load_tokenizer(resolve_base(name) if base is None else BaseRef("folder", str(base), base))


def _check(done: _Written, partial: Path, samples: Sequence[str], tolerance: float, out: Path) -> Certificate:
    """The written files, read back."""
    model = mapped_or_loaded(done.cls, partial)
    found = certify(done.before, outputs(model, done.tokenizer, samples), done.stored)
    if found.share <= tolerance:
        return found
    alone = done.alone()
    effect = math.nan if alone.values.shape != done.before.values.shape else distance(alone, done.before)
    share = found.distance / effect if effect else math.inf
    if not share <= ROUNDING:
        raise Different(
            f"{out}: the merged logits differ from base + adapter by {found.largest_difference:.3g} "
            f"({100 * found.share:.3g} % of the largest, {100 * share:.3g} % of what the adapter changes); nothing was "
            "kept. Try --dtype float32, or --safe"
        )
    return dataclasses.replace(found, of_effect=share)


def mapped_or_loaded(cls: Any, folder: Path) -> Any:
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return cls.from_pretrained(folder, local_files_only=True, device_map="cpu").eval()
    try:
        return mapped_model(folder, cls).model
    except Unmappable:
        return cls.from_pretrained(folder, local_files_only=True, dtype="auto").eval()


def _finish(partial: Path, adapter: Path, tokenizer: Any, found: Certificate, base: str) -> None:
    tokenizer.save_pretrained(partial)
    for name in ("labels.json", "asking.json", "task.json"):
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, partial / name)
    found.write(partial)
    lines = "\n".join(f"- {line}" for line in found.lines())
    card = (
        f"---\nbase_model: {base!r}\nlibrary_name: transformers\ntags:\n- veneer\n---\n\n# {adapter.resolve().name}, "
        f"merged\n\nAn adapter merged into its base with veneer ({found.dtype}).\n\nChecked against base plus "
        f"adapter on sample text:\n\n{lines}\n"
    )
    (partial / "README.md").write_text(card, encoding="utf-8")
