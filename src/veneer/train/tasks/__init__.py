"""The tasks a recipe can name: one line each here, one file each beside this one."""

from __future__ import annotations

import functools
import importlib
from typing import cast

from veneer.train.tasks.base import Outcome, Plan, Task

__all__ = ["TASKS", "Outcome", "Plan", "Task", "get_task"]

TASKS = {
    "causal-lm": "veneer.train.tasks.causal_lm:CausalLM",
    "token-cls": "veneer.train.tasks.token_cls:TokenCls",
}


@functools.cache
def get_task(name: str) -> Task:
    """The task of that name. Importing it does not import torch."""
    module, _, cls = TASKS[name].partition(":")
    return cast(Task, getattr(importlib.import_module(module), cls)())
