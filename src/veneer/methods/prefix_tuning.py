"""Prefix tuning: trained keys and values before those of every attention. Li & Liang 2021, arXiv:2101.00190,
section 4.2; the reparametrisation, section 4.3.

    attention(q, [P_K; K], [P_V; V])            prefix_projection: P = MLP(E), MLP = Linear, tanh, Linear

    prompt_embeddings (num_virtual_tokens, 2 * num_layers * token_dim)   P: keys of a layer, values, the next

token_dim is key/value heads * head width. The file holds the finished P; the MLP is for training alone. An
encoder-decoder gets P in its decoder's self-attention, where layer i reads the pair 2i modulo num_layers with
num_transformer_submodules=2, as the files in circulation have it. It does not merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import PromptLearningConfig
from ..kinds import Prompt
from ..prompts.cache import split
from ..prompts.table import Table


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """prefix_projection: train P through an MLP, encoder_hidden_size wide (default: token_dim).

    init_weights: "zero" starts with P = 0, anything else at random.
    """

    init_weights: str | bool | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "PREFIX_TUNING"
        if isinstance(self.init_weights, str) and self.init_weights != "zero":
            raise ValueError(f'init_weights={self.init_weights!r}: use "zero", or None for random values')


class PrefixEncoder(Table):
    """embedding (n, width); with prefix_projection embedding (n, token_dim) through transform: Linear, tanh, Linear.

    config: a PrefixTuningConfig whose sizes are filled in.
    """

    def __init__(self, config: Any):
        n, width = config.num_virtual_tokens, 2 * config.num_layers * config.token_dim
        if not config.prefix_projection or config.inference_mode:
            super().__init__(n, width)
            last: nn.Module = self.embedding
        else:
            hidden = config.encoder_hidden_size or config.token_dim
            super().__init__(n, config.token_dim)
            first, last = nn.Linear(config.token_dim, hidden), nn.Linear(hidden, width)
            self.transform = nn.Sequential(first, nn.Tanh(), last)
        if config.init_weights == "zero":
            for p in last.parameters():
                nn.init.zeros_(p)


class PrefixTuning(Prompt):
    Config = PrefixTuningConfig
    gives = "cache"

    def encoder(self, cfg: Any, embedding: nn.Module, fill: bool) -> nn.Module:
        cfg.encoder_hidden_size = cfg.encoder_hidden_size or cfg.token_dim
        return PrefixEncoder(cfg)

    def cache(self, encoder: nn.Module, cfg: Any) -> list[tuple[Tensor, Tensor]]:
        return split(encoder(), cfg)
