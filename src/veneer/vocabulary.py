"""The base's embedding and head in an adapter's file, where they were resized or are asked for: an adapter with new
tokens needs the rows that it was trained beside.

Keys are those that peft gives them: `...embed_tokens.weight`, of a layer that carries an adapter
`...embed_tokens.base_layer.weight`, of one with trained rows `...embed_tokens.token_adapter.base_layer.weight`.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .errors import AdapterError
from .grow import path_of, trains_rows, vocabulary_modules
from .layer import Adapted
from .replace import SavedModule, TokenHolder

if TYPE_CHECKING:
    from .model import PeftModel

_START = "base_model.model."
_INSIDE = (".token_adapter.base_layer", ".base_layer", ".original_module", "")


def embeddings(model: PeftModel, adapter: str, mode: str | bool) -> dict[str, Tensor]:
    """File key -> the base's own table and head; none unless mode is True, or "auto" and their size is not that of
    the base's config. A module that the adapter saves whole is left out: its copy travels as the adapter's."""
    base: Any = model.get_base_model()
    if mode is False or model.prompt_configs is not None:
        return {}
    wanted = vocabulary_modules(base)
    if mode == "auto":
        config = model.peft_config[adapter]
        before = own_size(config.base_model_name_or_path, config.revision)
        now = getattr(getattr(base, "config", None), "vocab_size", None)
        if before is None or now is None or before == now:
            return {}
        if all(trains_rows(m, adapter, range(before, now)) for m in wanted):
            return {}  # the new rows travel as the adapter's own
    out = {}
    for module in wanted:
        if not (isinstance(module, SavedModule) and adapter in module.modules_to_save):
            key = f"{_START}{path_of(base, module)}{_inside(module, adapter)}.weight"
            out[key] = _weight(module).detach()
    return out


def _inside(module: nn.Module, adapter: str) -> str:
    """Where a model that has this adapter alone keeps the module's own weight."""
    if isinstance(module, TokenHolder):
        return ".token_adapter.base_layer" if adapter in module.token_adapter.entries else ""
    return ".base_layer" if isinstance(module, Adapted) and adapter in module.entries else ""


def _weight(module: Any) -> Any:
    """The base's own parameter inside the wrappers."""
    if isinstance(module, SavedModule | TokenHolder):
        return _weight(module.original_module)
    return module.get_base_layer().weight if isinstance(module, Adapted) else module.weight


def own_size(name: str | None, revision: str | None) -> int | None:
    """The size of the vocabulary in the base's own config, in its folder or where the hub's files are kept; no
    network."""
    if not name:
        return None
    path: Any = os.path.join(name, "config.json")
    if not os.path.isdir(name):
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            path = try_to_load_from_cache(name, "config.json", revision=revision)
        except HFValidationError:  # no hub id, but a name of one's own
            return None
    if not isinstance(path, str) or not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as f:
        found: int | None = json.load(f).get("vocab_size")
    return found


def take(base: nn.Module, key: str, value: Tensor) -> bool:
    """Put a file's tensor into the base's embedding or head; False for another key.

    Raises AdapterError where the sizes differ. A second copy of a module saved whole, which peft's files have beside
    the first, is passed over.
    """
    path, _, leaf = key.removeprefix(_START).rpartition(".")
    modules = {path_of(base, m): m for m in vocabulary_modules(base)} if leaf == "weight" else {}
    spare = modules.get(path.removesuffix(".modules_to_save"))
    if isinstance(spare, SavedModule) and path.endswith(".modules_to_save"):
        return True
    found = next((modules[path.removesuffix(s)] for s in _INSIDE if path.removesuffix(s) in modules), None)
    if found is None:
        return False
    weight = _weight(found)
    if weight.shape != value.shape:
        raise AdapterError(
            f"{key}: the file's embedding is {tuple(value.shape)}, the model's {tuple(weight.shape)}; call "
            f"model.resize_token_embeddings({value.shape[0]}) on the base before loading"
        )
    weight.data = value.to(weight)
    return True
