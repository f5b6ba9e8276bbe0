"""Use what was trained: load an adapter (its base is found from it), a run's folder, or a base model."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.train.asking import Asking, read_asking
from veneer.train.errors import BaseModelError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Loaded", "find_adapter", "label_names", "load", "read_adapter_config"]


@dataclass
class Loaded:
    """A model ready to run, its tokenizer, and where both came from. ``adapter`` is None for a plain base."""

    model: Any
    tokenizer: Any
    base_name: str
    task_type: str
    adapter: Path | None
    asking: Asking = field(default_factory=Asking)

    def without_adapter(self) -> AbstractContextManager[Any]:
        """Inside it the model is its base."""
        if self.adapter is None:
            return nullcontext()
        disable: Callable[[], AbstractContextManager[Any]] = self.model.disable_adapter
        return disable()


def find_adapter(name: str) -> Path | None:
    """The adapter folder that ``name`` means: itself, or ``adapter`` inside a run's folder, or None."""
    for folder in (Path(name), Path(name) / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    return None


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json as plain values."""
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"not valid JSON: {error}", file=path, hint="Train or copy the adapter again.") from None
    if not isinstance(config, dict):
        raise BaseModelError("not a JSON object", file=path, hint="Train or copy the adapter again.")
    return config


TASK_OF = {"CAUSAL_LM": "causal-lm", "TOKEN_CLS": "token-cls"}


def load(name: str, base: str | None = None) -> Loaded:
    """Load an adapter on its base, or a base model alone, ready for inference.

    Raises:
        BaseModelError: the adapter's folder does not say what it needs, or its base cannot be loaded.
    """
    from veneer.train.bases import BaseRef, load_base, load_tokenizer, resolve_base

    folder = find_adapter(name)
    if folder is None:
        ref = resolve_base(name)
        model, tokenizer = load_base(ref, _task_of_base(ref))
        kind = "TOKEN_CLS" if type(model).__name__.endswith("ForTokenClassification") else "CAUSAL_LM"
        return Loaded(model.eval(), tokenizer, ref.name, kind, None)
    config = read_adapter_config(folder)
    path = folder / "adapter_config.json"
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise BaseModelError("the adapter does not name its base model", file=path, hint="Give it with --base.")
    task = TASK_OF.get(str(config.get("task_type")))
    if task is None:
        hint = f"These work here: {', '.join(TASK_OF)}. In Python, use PeftModel.from_pretrained."
        raise BaseModelError(f"task_type {config.get('task_type')!r} cannot be run from here", file=path, hint=hint)
    ref = resolve_base(str(base))
    labels = dict(enumerate(label_names(folder))) if task == "token-cls" else None
    model, tokenizer = load_base(ref, task, id2label=labels)
    if (folder / "tokenizer_config.json").is_file():  # the one it was trained with, its pad token included
        tokenizer = load_tokenizer(BaseRef("folder", str(folder), folder))
    from veneer import PeftModel

    model = PeftModel.from_pretrained(model, str(folder)).eval()
    return Loaded(model, tokenizer, ref.name, str(config["task_type"]), folder, read_asking(folder))


def label_names(folder: Path) -> list[str]:
    """The labels of a token classifier, in the order of its outputs: labels.json in the adapter's folder."""
    path = folder / "labels.json"
    hint = 'Write the label names there in the order of the outputs, as ["O", "B-PER"].'
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError("the adapter does not name its labels: no such file", file=path, hint=hint) from None
    except ValueError as error:
        raise BaseModelError(f"not valid JSON: {error}", file=path, hint=hint) from None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise BaseModelError("not a list of label names", file=path, hint=hint)
    return names


def _task_of_base(ref: Any) -> str:
    from veneer.train.bases import load_config

    architectures = load_config(ref).architectures or [""]
    return "token-cls" if architectures[0].endswith("ForTokenClassification") else "causal-lm"
