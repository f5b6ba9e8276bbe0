"""Prompt tuning: trained virtual tokens before the input. Lester et al. 2021, arXiv:2104.08691, section 2.

    y = model([P; embed(x)])

    prompt_embeddings (num_virtual_tokens * num_transformer_submodules, token_dim)   P

P starts random, from the words of a text, or from vocabulary entries drawn at random (section 3.2). An
encoder-decoder gets P in its encoder; the file's second half, for its decoder, is stored and not read. It
does not merge.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PromptLearningConfig
from ..errors import AdapterError, PeftWarning
from ..kinds import Prompt
from ..prompts.table import Table


class PromptTuningInit(str, Enum):
    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """prompt_tuning_init: "RANDOM", "TEXT" or "SAMPLE_VOCAB". With "TEXT": prompt_tuning_init_text, and
    tokenizer_name_or_path with tokenizer_kwargs to split it; a tokenizer's own code is never run.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "PROMPT_TUNING"
        given = self.prompt_tuning_init
        init = str(getattr(given, "value", given)).upper()
        if init not in PromptTuningInit.__members__:
            known = ", ".join(PromptTuningInit.__members__)
            raise ValueError(f"prompt_tuning_init={given!r} is not one of {known}")
        self.prompt_tuning_init = PromptTuningInit[init]
        check_text(self)


def check_text(cfg: Any) -> None:
    """Raise ValueError where the fields of an initial text do not go with prompt_tuning_init."""
    if cfg.prompt_tuning_init != "TEXT":
        if cfg.tokenizer_kwargs:
            raise ValueError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")
        return
    for key in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
        if not getattr(cfg, key):
            raise ValueError(f"When prompt_tuning_init='TEXT', {key} can't be None.")


class PromptEmbedding(Table):
    """A Table with the config's initial values. config: a PromptTuningConfig whose sizes are filled in;
    word_embeddings: the base's input embedding."""

    def __init__(self, config: Any, word_embeddings: nn.Module, fill: bool = True):
        super().__init__(config.num_virtual_tokens * config.num_transformer_submodules, config.token_dim)
        if fill and not config.inference_mode:
            fill_table(config, self.embedding, word_embeddings)


def fill_table(cfg: Any, table: nn.Embedding, embedding: nn.Module) -> None:
    """Rows of the base's embedding into the prompt, where the config says so: a text's, or drawn at random."""
    weight: Any = embedding.weight
    if cfg.prompt_tuning_init == "TEXT":
        rows = text_rows(cfg, len(table.weight), len(weight))
    elif cfg.prompt_tuning_init == "SAMPLE_VOCAB":
        rows = torch.randint(0, len(weight), (len(table.weight),))
    else:
        return
    with torch.no_grad():
        table.weight.copy_(embedding(rows.to(weight.device)))


class PromptTuning(Prompt):
    Config = PromptTuningConfig

    def encoder(self, cfg: Any, embedding: nn.Module, fill: bool) -> nn.Module:
        return PromptEmbedding(cfg, embedding, fill)


def text_rows(cfg: Any, n: int, vocabulary: int) -> Tensor:
    """Token ids of the text, cut to n or repeated from its start."""
    from transformers import AutoTokenizer

    options = dict(cfg.tokenizer_kwargs or {})
    if options.pop("trust_remote_code", False):
        warnings.warn(
            "tokenizer_kwargs asks for trust_remote_code, which an adapter's config never gets; the "
            "tokenizer is loaded without it",
            PeftWarning,
            stacklevel=2,
        )
    tokenizer = AutoTokenizer.from_pretrained(cfg.tokenizer_name_or_path, trust_remote_code=False, **options)
    ids = tokenizer(cfg.prompt_tuning_init_text)["input_ids"]
    if not ids or max(ids) >= vocabulary:
        what = "to no token" if not ids else f"to token {max(ids)}, and the base has {vocabulary}"
        raise AdapterError(
            f"prompt_tuning_init_text={cfg.prompt_tuning_init_text!r} comes {what} with the tokenizer "
            f"{cfg.tokenizer_name_or_path!r}; use the base's own tokenizer and a text that is not empty"
        )
    return torch.tensor((ids * -(-n // len(ids)))[:n])
