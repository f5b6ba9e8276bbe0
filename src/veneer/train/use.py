"""Use what was trained: load an adapter (its base is found from it), a run's folder, or a base model."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.train.asking import Asking, read_asking
from veneer.train.errors import BaseModelError
from veneer.train.purpose import Purpose, read_purpose

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from veneer.train.data import Table
    from veneer.train.recipe import Recipe
    from veneer.train.tasks import Outcome, Plan, Task

__all__ = ["Loaded", "config_of", "evaluate_on", "find_adapter", "label_names", "load", "read_adapter_config"]


@dataclass
class Loaded:
    """A model ready to run, its tokenizer, and where both came from. ``adapter`` is None for a plain base."""

    model: Any
    tokenizer: Any
    base_name: str
    adapter: Path | None
    purpose: Purpose
    asking: Asking = field(default_factory=Asking)

    @property
    def task(self) -> Task:
        """The task that the model was trained for, with its options."""
        from veneer.train.tasks import task_class

        cls = task_class(self.purpose.task)
        return cls(cls.Options(**self.purpose.options))

    @property
    def label_names(self) -> list[str]:
        """The labels of a classifier, in the order of its outputs."""
        return [name for _, name in sorted(self.model.config.id2label.items())]

    def recipe(self, data: str, overrides: Sequence[str] = (), **flags: Any) -> Recipe:
        """The recipe that the model was trained by, as far as its use needs it, over the file ``data``.

        Raises:
            RecipeError: overrides or flags that a recipe does not take.
        """
        from veneer.train.recipe import build_recipe

        own = {key: value for key, value in self.purpose.data.items() if value is not None}
        values = {"task": self.purpose.task, "options": dict(self.purpose.options), "base": {"name": self.base_name}}
        files = {"train": data, "test": data}
        return build_recipe({**values, "data": {**own, **files}, "eval": dict(self.purpose.eval)}, overrides, flags)

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


def load(name: str, base: str | None = None) -> Loaded:
    """Load an adapter on its base, or a base model alone, ready for inference.

    Raises:
        BaseModelError: the adapter's folder does not say what it needs, its base cannot be loaded, or a head that
            the base lacks is not in the adapter.
    """
    from veneer.train.bases import BaseRef, load_base, load_tokenizer, resolve_base

    folder = find_adapter(name)
    if folder is None:
        ref = resolve_base(name)
        purpose = read_purpose(ref.path if ref.kind == "folder" else None) or Purpose(_task_of_base(ref))
        model, tokenizer = load_base(ref, purpose.task)
        asking = read_asking(ref.path if ref.kind == "folder" else None)
        _pad(model, tokenizer)
        return Loaded(model.eval(), tokenizer, ref.name, None, purpose, asking)
    config = read_adapter_config(folder)
    base = base or config.get("base_model_name_or_path")
    if not base:
        path = folder / "adapter_config.json"
        raise BaseModelError("the adapter does not name its base model", file=path, hint="Give it with --base.")
    purpose = read_purpose(folder) or Purpose(_task_of_type(folder, config))
    ref = resolve_base(str(base))
    model, tokenizer = load_base(ref, purpose.task, **_model_options(folder, purpose))
    if (folder / "tokenizer_config.json").is_file():  # the one it was trained with, its pad token included
        tokenizer = load_tokenizer(BaseRef("folder", str(folder), folder))
    _pad(model, tokenizer)
    missing = [module for module in model.fresh_modules if module not in (config.get("modules_to_save") or ())]
    if missing and "modules_to_save" in config:
        problem = f"the adapter brings no {', '.join(missing)}, which {ref.name} lacks"
        hint = "Its answers would come from random values. Train it again, or give another base with --base."
        raise BaseModelError(problem, file=folder / "adapter_config.json", hint=hint)
    from veneer import PeftModel

    model = PeftModel.from_pretrained(model, str(folder)).eval()
    return Loaded(model, tokenizer, ref.name, folder, purpose, read_asking(folder))


def evaluate_on(loaded: Loaded, recipe: Recipe, table: Table) -> tuple[Plan, Outcome]:
    """The labelled rows of a table as the model was trained to read them, and its scores on them.

    Raises:
        DataError: rows that do not fit, such as labels that the model does not know.
    """
    import datasets

    from veneer.train.tasks import Plan

    task, purpose = loaded.task, loaded.purpose
    names = loaded.label_names if task.named_labels and "num_labels" not in purpose.model_options else None
    options = {"problem_type": loaded.model.config.problem_type} if task.named_labels else {}
    empty = datasets.Dataset.from_dict({})
    plan = Plan(empty, label_names=names, model_options=options | purpose.model_options, facts=purpose.facts)
    few = table if recipe.eval.limit is None else table.select(range(min(recipe.eval.limit, len(table))))
    task.plan_test(plan, recipe, few, loaded.tokenizer, loaded.model.config)
    return plan, task.evaluate(loaded.model, loaded.tokenizer, plan, recipe)


def _pad(model: Any, tokenizer: Any) -> None:
    """A pad token that ends no answer, known to the model too, which may look for the end of a row by it."""
    from veneer.train.bases import safe_pad

    generation = getattr(model, "generation_config", None)  # a model without a decoder has none
    own = None if generation is None else generation.eos_token_id
    safe_pad(tokenizer, {token for token in (own if isinstance(own, list) else [own]) if token is not None})
    model.config.pad_token_id = tokenizer.pad_token_id


def _task_of_type(folder: Path, config: dict[str, Any]) -> str:
    """The task of an adapter without a task.json, from peft's name for it."""
    from veneer.train.tasks import TASKS, task_class

    types = {str(task_class(task).task_type): task for task in reversed(TASKS) if task_class(task).task_type}
    kind = str(config.get("task_type"))
    if kind not in types:
        hint = f"These work here: {', '.join(types)}. In Python, use PeftModel.from_pretrained."
        path = folder / "adapter_config.json"
        raise BaseModelError(f"task_type {config.get('task_type')!r} cannot be run from here", file=path, hint=hint)
    return types[kind]


def _model_options(folder: Path, purpose: Purpose) -> dict[str, Any]:
    """What the base's config is given: the labels, and what the training rows said."""
    from veneer.train.tasks import task_class

    names = task_class(purpose.task).named_labels and "num_labels" not in purpose.model_options
    labels = {"id2label": dict(enumerate(label_names(folder)))} if names else {}
    return {**purpose.model_options, **labels}


def config_of(folder: str) -> dict[str, Any]:
    """What `from_pretrained` of an adapter's base is given so that its head is the one that was trained."""
    where = Path(folder)
    purpose = read_purpose(where)
    options = {} if purpose is None else _model_options(where, purpose)
    if "id2label" in options:
        options["label2id"] = {name: number for number, name in options["id2label"].items()}
    return options | ({"ignore_mismatched_sizes": True} if {"id2label", "num_labels"} & options.keys() else {})


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


#: how the class names of models end -> task
_ENDINGS = {
    "ForTokenClassification": "token-cls",
    "ForSequenceClassification": "seq-cls",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "masked-lm",
}


def _task_of_base(ref: Any) -> str:
    from veneer.train.bases import load_config

    config = load_config(ref)
    name = (config.architectures or [""])[0]
    found = next((task for ending, task in _ENDINGS.items() if name.endswith(ending)), None)
    return found or ("seq2seq" if config.is_encoder_decoder else "causal-lm")
