"""Multitask prompt tuning: one shared prompt, changed for each task by a low-rank factor. Wang et al. 2023,
arXiv:2303.02861, section 3.1.

    y = model([P * (C[task] R[task]); embed(x)])     * elementwise

    prompt_embeddings (n, token_dim)           P
    prefix_task_cols  (num_tasks, n, num_ranks)           C
    prefix_task_rows  (num_tasks, num_ranks, token_dim)   R

n is num_virtual_tokens * num_transformer_submodules. A call needs task_ids, one task number a row, where there are
several tasks. For a new task (section 3.3) P comes from a file of source tasks, C and R as their mean or as one of
theirs. It does not merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PromptLearningConfig
from ..errors import AdapterError
from ..files import read_tensors
from ..kinds import Prompt
from ..prompts.table import fits
from .prompt_tuning import PromptTuningConfig, PromptTuningInit, check_text, fill_table

KEYS = ("prefix_task_cols", "prefix_task_rows")


class MultitaskPromptTuningInit(str, Enum):
    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


SOURCES = tuple(MultitaskPromptTuningInit)[2:]


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """num_tasks, num_ranks: how many tasks, and the rank of each one's factor. prompt_tuning_init: "RANDOM", "TEXT"
    and "SAMPLE_VOCAB" as in prompt tuning, or from the file at prompt_tuning_init_state_dict_path:
    "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK" (number prompt_tuning_init_task), or "ONLY_SOURCE_SHARED", P alone.
    """

    prompt_tuning_init: MultitaskPromptTuningInit | PromptTuningInit | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1

    def __post_init__(self) -> None:
        PromptLearningConfig.__post_init__(self)
        self.peft_type = "MULTITASK_PROMPT_TUNING"
        given = self.prompt_tuning_init
        init = str(getattr(given, "value", given)).upper()
        known = {"SAMPLE_VOCAB": PromptTuningInit.SAMPLE_VOCAB, **MultitaskPromptTuningInit.__members__}
        if init not in known:
            raise ValueError(f"prompt_tuning_init={given!r} is not one of {', '.join(known)}")
        self.prompt_tuning_init = known[init]
        check_text(self)
        for key in ("num_ranks", "num_tasks"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{key}={value!r} must be a whole number of at least 1")


class MultitaskPromptEmbedding(nn.Module):
    """embedding.weight (n, width), prefix_task_cols (tasks, n, ranks), prefix_task_rows (tasks, ranks, width); the call
    with tasks (rows,) returns (rows, n, width)."""

    def __init__(self, n: int, width: int, tasks: int, ranks: int):
        super().__init__()
        self.embedding = nn.Embedding(n, width)
        self.prefix_task_cols = nn.Parameter(torch.empty(tasks, n, ranks))
        self.prefix_task_rows = nn.Parameter(torch.empty(tasks, ranks, width))

    def forward(self, tasks: Tensor) -> Tensor:
        return self.embedding.weight * (self.prefix_task_cols[tasks] @ self.prefix_task_rows[tasks])


class MultitaskPromptTuning(Prompt):
    Config = MultitaskPromptTuningConfig

    def encoder(self, cfg: Any, embedding: nn.Module, fill: bool) -> nn.Module:
        n = cfg.num_virtual_tokens * cfg.num_transformer_submodules
        made = MultitaskPromptEmbedding(n, cfg.token_dim, cfg.num_tasks, cfg.num_ranks)
        if fill:
            fill_table(cfg, made.embedding, embedding)
        for factor in (made.prefix_task_cols, made.prefix_task_rows):
            nn.init.normal_(factor, std=0.02)
        if fill and cfg.prompt_tuning_init in SOURCES:
            self.loaded(made, cfg, {**self.saved(made, cfg), **_from_sources(cfg)})
        return made

    def prompt(self, encoder: Any, cfg: Any, tasks: Tensor | None) -> Tensor:
        if tasks is None and cfg.num_tasks == 1:
            tasks = torch.zeros(1, dtype=torch.long, device=encoder.embedding.weight.device)
        if tasks is None:
            raise AdapterError("task_ids cannot be None: give one task number a row, model(..., task_ids=...)")
        if bool(((tasks < 0) | (tasks >= cfg.num_tasks)).any()):
            raise AdapterError(f"task_ids {tasks.tolist()}: this adapter has tasks 0 to {cfg.num_tasks - 1}")
        return encoder(tasks.long())

    def saved(self, encoder: Any, cfg: Any) -> dict[str, Tensor]:
        return {"prompt_embeddings": encoder.embedding.weight, **{k: getattr(encoder, k) for k in KEYS}}

    def loaded(self, encoder: Any, cfg: Any, tensors: dict[str, Tensor]) -> nn.Module:
        mine = self.saved(encoder, cfg)
        for key, value in tensors.items():
            fits(self.name, key, value, tuple(mine[key].shape))
        with torch.no_grad():
            for key, value in tensors.items():
                mine[key].copy_(value)
        return encoder


def _from_sources(cfg: Any) -> dict[str, Tensor]:
    """The initial tensors that the source tasks' file gives."""
    path, init = cfg.prompt_tuning_init_state_dict_path, MultitaskPromptTuningInit(cfg.prompt_tuning_init)
    if path is None:
        raise AdapterError(f"prompt_tuning_init_state_dict_path needs to be specified with {init.value} init method")
    source = read_tensors(path)
    whole = init is not MultitaskPromptTuningInit.ONLY_SOURCE_SHARED
    wanted = ("prompt_embeddings", *(KEYS if whole else ()))
    if missing := [k for k in wanted if k not in source]:
        raise AdapterError(f"{path} has no {missing[0]}: give the adapter_model file of a multitask prompt")
    out = {k: source[k] for k in wanted}
    if not whole:
        return out
    if cfg.num_tasks != 1:
        raise AdapterError(f"num_tasks={cfg.num_tasks}: {init.value} makes the prompt of one new task; use num_tasks=1")
    at, tasks = cfg.prompt_tuning_init_task, len(source[KEYS[0]])
    if init is MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
        return out | {k: out[k].mean(0, keepdim=True) for k in KEYS}
    if not 0 <= at < tasks:
        raise AdapterError(f"prompt_tuning_init_task={at}: {path} has tasks 0 to {tasks - 1}")
    return out | {k: out[k][at : at + 1] for k in KEYS}
