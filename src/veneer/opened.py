"""An adapter's folder (or hub id) opened for reading: on its base where that can be had, else on a skeleton of
the layers that its file names, which knows their shapes but no weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import state
from .config import PeftConfig
from .errors import AdapterError

__all__ = ["Opened", "adapter_folder", "base_model", "open_adapter", "skeleton", "skeleton_of"]

ROOT = "base_model.model."


@dataclass
class Opened:
    """model: a PeftModel, or a Tuner over a skeleton where has_base is False. note: why the base is absent."""

    model: Any
    folder: Path
    config: Any
    base_name: str
    has_base: bool
    note: str = ""


def adapter_folder(name: str) -> Path:
    """The folder of an adapter: itself, `adapter` inside a run's folder, or a hub id's snapshot.

    Raises AdapterError where there is none.
    """
    from .files import locate
    from .train.use import find_adapter

    found = find_adapter(name)
    if found is not None:
        return found
    try:
        path = None if Path(name).exists() else locate(name, "adapter_config.json")
    except (ValueError, OSError) as error:
        raise AdapterError(f"{name}: no adapter here, and none on the hub under this name ({error})") from None
    if path is None:
        raise AdapterError(f"{name}: there is no adapter_config.json here; name the folder that holds it")
    return Path(path).parent


def open_adapter(name: str, base: str | None = None, *, need_base: bool = False, quantize: str | None = None) -> Opened:
    """Open an adapter for reading, in evaluation mode.

    base: use this base, not the one that the adapter names. need_base: never fall back to a skeleton. quantize: load
    the base quantised in this way (backends/loading.py). Without
    its base only plain LoRA can be opened. Raises BaseModelError or AdapterError, which say what is missing.
    """
    from .model import PeftModel
    from .train.errors import BaseModelError

    folder = adapter_folder(name)
    config: Any = PeftConfig.from_pretrained(str(folder))
    tensors, _ = state.read(str(folder))
    wanted = base or config.base_model_name_or_path
    try:
        if not wanted:
            raise BaseModelError("the adapter does not name its base model", hint="Give it with --base.")
        model = base_model(str(wanted), config, tensors, quantize)
    except BaseModelError as error:
        if need_base or base is not None:
            raise
        held = skeleton(config, tensors, f"{error}")
        note = f"The base is not available, so sizes relative to it are left out: {error}"
        return Opened(held, folder, config, str(wanted or ""), False, note)
    opened = PeftModel.from_pretrained(model, str(folder), config=config).eval()
    return Opened(opened, folder, config, str(wanted), True)


def base_model(name: str, config: Any, tensors: dict[str, Tensor], quantize: str | None = None) -> nn.Module:
    """The base of an adapter, of the class that its task needs, in the dtype of its files.

    tensors: the adapter's, which tell a classifier's number of labels. Raises BaseModelError.
    """
    from .backends.loading import load_options, require_library
    from .train.bases import _loading, _source, load_config, resolve_base

    ref = resolve_base(name)
    settings = load_config(ref)
    require_library(settings)
    labels = _labels(tensors)
    more: dict[str, Any] = {} if labels is None else {"num_labels": labels}
    if quantize is not None:
        more |= load_options(quantize, torch.float32)
    cls = model_class(config, settings)
    with _loading(ref):
        source, where = _source(ref)
        model = cls.from_pretrained(source, dtype="auto", ignore_mismatched_sizes=labels is not None, **more, **where)
    if not name.lower().endswith(".gguf"):
        model.name_or_path = model.config._name_or_path = ref.name
    return model.eval()


def model_class(config: Any, settings: Any) -> Any:
    """The transformers class for an adapter: by its task type, by the class it names, or by the base's own."""
    import transformers

    from .auto import _AUTO

    task = str(getattr(config.task_type, "value", config.task_type))
    if task in _AUTO:
        return getattr(transformers, _AUTO[task])
    named = (getattr(config, "auto_mapping", None) or {}).get("base_model_class")
    for candidate in (named, *(settings.architectures or [])):
        if isinstance(candidate, str) and isinstance(getattr(transformers, candidate, None), type):
            return getattr(transformers, candidate)
    return transformers.AutoModel


def _labels(tensors: dict[str, Tensor]) -> int | None:
    """How many outputs a saved head has; None without one."""
    heads = [k for k in tensors if re.search(r"(^|\.)(classifier|score)(\.\w+)*\.weight$", k) and ".lora_" not in k]
    return int(tensors[heads[-1]].shape[0]) if heads else None


# -- without the base ---------------------------------------------------------------------------------------------
def skeleton(config: Any, tensors: dict[str, Tensor], why: str = "") -> Any:
    """A Tuner over layers without weights, made from the shapes of a plain LoRA's tensors.

    Raises AdapterError for other methods and for tensors of parameters, whose layers a file does not tell.
    """
    from . import registry

    name = getattr(registry.method_of(config), "name", "")
    if name != "LORA" or getattr(config, "target_parameters", None):
        raise AdapterError(
            f"a {name.lower()} adapter can only be read on its base model, which is not available ({why}); give it "
            "with --base"
        )
    return skeleton_of({"default": (config, tensors)})


def skeleton_of(adapters: dict[str, tuple[Any, dict[str, Tensor]]], zeros: bool = False) -> Any:
    """A Tuner that holds plain LoRA adapters, (config, tensors) by name, over layers without weights.

    zeros: give the layers zeros that take no memory, on the CPU, so that adapters can be added beside. Raises
    AdapterError where a file holds no pair of factors, or two files disagree on a layer's shape.
    """
    from .methods.lora import LoraConfig
    from .tuner import Tuner

    root, found = nn.Module(), {name: _layers(tensors) for name, (_, tensors) in adapters.items()}
    shapes: dict[str, tuple[str, str]] = {}
    for name, layers in found.items():
        for path, module in layers.items():
            if path not in shapes:
                _place(root, path, _zeroed(module) if zeros else module)
            elif shapes[path][1] != repr(module):
                other, shape = shapes[path]
                raise AdapterError(f"{path} is {shape} in {other!r} and {module!r} in {name!r}: they have other bases")
            shapes.setdefault(path, (name, repr(module)))
    kept = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias")
    plain: dict[str, Any] = {
        name: LoraConfig(
            target_modules=list(found[name]), init_lora_weights=False, inference_mode=True,
            **{k: getattr(config, k) for k in kept},
        )
        for name, (config, _) in adapters.items()
    }  # fmt: skip
    tuner = Tuner(root, plain, low_cpu_mem_usage=True, fill=False)
    for name, (_, tensors) in adapters.items():
        state.put(tuner, name, {k: t for k, t in tensors.items() if ".lora_" in k}).check(f"the file of {name!r}")
    return tuner.eval()


def _layers(tensors: dict[str, Tensor]) -> dict[str, nn.Module]:
    """Layer path -> a layer of the right shape on the meta device."""
    found: dict[str, nn.Module] = {}
    for key, A in tensors.items():
        for leaf, other in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            if key.endswith(leaf):
                path = key.removesuffix(leaf)
                B = tensors.get(path + other)
                if B is None:
                    raise AdapterError(f"the adapter's file has {key} but no {path + other}")
                found[path.removeprefix(ROOT)] = _layer(A, B, "embedding" in leaf)
    if not found:
        raise AdapterError(f"the adapter's file holds no pair of lora_A and lora_B ({len(tensors)} tensors)")
    return found


def _layer(A: Tensor, B: Tensor, embedding: bool) -> nn.Module:
    with torch.device("meta"):
        if embedding:
            return nn.Embedding(A.shape[1], B.shape[0])
        if A.dim() == 2:
            return nn.Linear(A.shape[1], B.shape[0])
        cls: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[A.dim() - 3]
        return cls(A.shape[1], B.shape[0], tuple(A.shape[2:]), groups=max(A.shape[0] // B.shape[1], 1))


def _zeroed(module: nn.Module) -> nn.Module:
    for name, p in module._parameters.items():
        if p is not None:
            module._parameters[name] = nn.Parameter(torch.zeros(()).expand(p.shape), requires_grad=False)
    return module


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        inner = root._modules[part]
        assert inner is not None
        root = inner
    root.add_module(leaf, module)
