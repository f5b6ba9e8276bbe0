"""AutoPeftModel: the base and its adapter from the adapter's name alone."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from .config import PeftConfig
from .errors import AdapterError
from .model import TASKS, PeftModel, _plain

_AUTO = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_OWN = frozenset({"subfolder", "adapter_name", "is_trainable", "config", "strict"})
# what an adapter's config may have imported: importing runs code, and the config is the file's word
_LIBRARIES = frozenset({"transformers", "diffusers", "sentence_transformers", "timm"})


class AutoPeftModel:
    """Not instantiated: use from_pretrained."""

    task: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any):
        raise OSError(
            f"{type(self).__name__} is designed to be instantiated using the "
            f"`{type(self).__name__}.from_pretrained(pretrained_model_name_or_path)` method."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] = (),
        **kwargs: Any,
    ) -> Any:
        """Load the base that the adapter's config names (kwargs go there), then the adapter.

        What `veneer train` wrote into the adapter's folder is read too (label names); bundled bases go by their name.
        import_allowlist: modules that the config's auto_mapping may import the base's class from, beside those of
        transformers, diffusers, sentence-transformers and timm. A tokenizer saved beside the adapter decides the
        vocabulary: the base's embeddings are resized to it. Raises ValueError where the adapter is for another task,
        or wants another module imported.
        """
        from .files import HUB_KEYS

        where = {k: v for k, v in kwargs.items() if k in HUB_KEYS | {"subfolder"}}
        cfg = config or PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **where)
        task = _plain(cfg.task_type)
        if cls.task is not None and task not in (cls.task, None):
            raise ValueError(
                f"Expected target PEFT class: {TASKS[cls.task].__name__}, but you have asked for: "
                f"{TASKS.get(task, PeftModel).__name__} make sure that you are loading "
                "the correct model for your task type."
            )
        base_kwargs = {k: v for k, v in kwargs.items() if k not in _OWN}
        source, told = cls._told(pretrained_model_name_or_path, cfg)
        base = cls._base(cfg, task, source, {**told, **base_kwargs}, import_allowlist)
        cls._resize(base, pretrained_model_name_or_path, revision=revision, **where)
        return TASKS.get(task, PeftModel).from_pretrained(
            base,
            pretrained_model_name_or_path,
            adapter_name,
            is_trainable,
            cfg,
            revision=revision,
            **{k: v for k, v in kwargs.items() if k in HUB_KEYS | {"subfolder", "strict"}},
        )

    @classmethod
    def _told(cls, folder: str | os.PathLike, cfg: PeftConfig) -> tuple[str, dict[str, Any]]:
        """Where the base is, and what its config is given beside: labels, and what kind they are."""
        if not cfg.base_model_name_or_path:
            raise AdapterError(
                "the adapter's config names no base model (base_model_name_or_path); load the base yourself"
            )
        name = str(cfg.base_model_name_or_path)
        from .train.bases import BUNDLED, resolve_base, source_of

        if name in BUNDLED and not os.path.exists(name):
            name = source_of(resolve_base(name))
        if not os.path.isfile(os.path.join(os.fspath(folder), "task.json")):
            return name, {}
        from .train.use import config_of

        return name, config_of(os.fspath(folder))

    @classmethod
    def _base(
        cls, cfg: PeftConfig, task: str | None, source: str, kwargs: dict[str, Any], allowed: Sequence[str]
    ) -> Any:
        import transformers

        if task is not None:
            maker: Any = getattr(transformers, _AUTO[task])
        else:
            mapping = cfg.auto_mapping or {}
            if not mapping.get("base_model_class"):
                raise ValueError(
                    "Cannot infer the auto class from the config, please make sure that you are loading "
                    "the correct model for your task type."
                )
            library = str(mapping["parent_library"])
            if library.partition(".")[0] not in _LIBRARIES and library not in allowed:
                raise ValueError(
                    f"The auto mapping wants to import {library!r}, which is not in the import allowlist. Importing "
                    f"runs code: pass import_allowlist=[{library!r}] only if you trust it, or load the base yourself"
                )
            maker = getattr(importlib.import_module(library), mapping["base_model_class"])
        base = maker.from_pretrained(source, revision=cfg.revision or "main", **kwargs)
        if source != cfg.base_model_name_or_path:  # the name that was asked for, not a package's folder
            base.name_or_path = base.config._name_or_path = cfg.base_model_name_or_path
        return base

    @staticmethod
    def _resize(base: Any, source: str | os.PathLike, **where: Any) -> None:
        """where: what says which of a repository's files are meant (revision, subfolder, token, ...)."""
        from .files import locate

        told = locate(source, "tokenizer_config.json", **where) if hasattr(base, "get_input_embeddings") else None
        if told is None:
            return
        from huggingface_hub import constants
        from transformers import AutoTokenizer

        from .grow import grow

        given = {k: v for k, v in where.items() if v is not None}
        if constants.HF_HUB_OFFLINE:  # what is kept of the repository, with no look at what is not
            source, given = os.path.dirname(told), {}
        grow(base, len(AutoTokenizer.from_pretrained(source, **given)))


def _auto(name: str, task: str) -> type[AutoPeftModel]:
    return type(name, (AutoPeftModel,), {"task": task, "__module__": __name__})


AutoPeftModelForCausalLM = _auto("AutoPeftModelForCausalLM", "CAUSAL_LM")
AutoPeftModelForSeq2SeqLM = _auto("AutoPeftModelForSeq2SeqLM", "SEQ_2_SEQ_LM")
AutoPeftModelForSequenceClassification = _auto("AutoPeftModelForSequenceClassification", "SEQ_CLS")
AutoPeftModelForTokenClassification = _auto("AutoPeftModelForTokenClassification", "TOKEN_CLS")
AutoPeftModelForQuestionAnswering = _auto("AutoPeftModelForQuestionAnswering", "QUESTION_ANS")
AutoPeftModelForFeatureExtraction = _auto("AutoPeftModelForFeatureExtraction", "FEATURE_EXTRACTION")
