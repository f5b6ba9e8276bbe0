"""The tasks a recipe can name: one line each here, one file each beside this one."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

from veneer.train.tasks.base import Outcome, Plan, Task

if TYPE_CHECKING:
    from veneer.train.recipe import Recipe

__all__ = ["TASKS", "Outcome", "Plan", "Task", "get_task", "task_class", "task_of"]

TASKS = {
    "causal-lm": "veneer.train.tasks.causal_lm:CausalLM",
    "masked-lm": "veneer.train.tasks.masked_lm:MaskedLM",
    "seq2seq": "veneer.train.tasks.seq2seq:Seq2Seq",
    "seq-cls": "veneer.train.tasks.seq_cls:SeqCls",
    "token-cls": "veneer.train.tasks.token_cls:TokenCls",
    "question-answering": "veneer.train.tasks.question_answering:QuestionAnswering",
    "embedding": "veneer.train.tasks.embedding:Embedding",
    "dpo": "veneer.train.tasks.dpo:DPO",
    "reward": "veneer.train.tasks.reward:Reward",
}


def task_class(name: str) -> type[Task]:
    """The class of the task of that name. Importing it does not import torch."""
    module, _, cls = TASKS[name].partition(":")
    found: type[Task] = getattr(importlib.import_module(module), cls)
    return found


@functools.cache
def get_task(name: str) -> Task:
    """The task of that name with its usual options."""
    return task_class(name)()


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe, with the recipe's options.

    Raises:
        ValueError: options that do not fit together.
    """
    cls = task_class(recipe.task)
    return cls(cls.Options(**recipe.options))
