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


class Projection(nn.Module):
    """embedding (n, token_dim) through transform: Linear, tanh, Linear, to (n, width)."""

    def __init__(self, n: int, token_dim: int, hidden: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(n, token_dim)
        self.transform = nn.Sequential(nn.Linear(token_dim, hidden), nn.Tanh(), nn.Linear(hidden, width))

    def forward(self) -> Tensor:
        return self.transform(self.embedding.weight)


class PrefixTuning(Prompt):
    Config = PrefixTuningConfig
    gives = "cache"

    def encoder(self, cfg: Any, embedding: nn.Module, fill: bool) -> nn.Module:
        cfg.encoder_hidden_size = cfg.encoder_hidden_size or cfg.token_dim
        n, width = cfg.num_virtual_tokens, 2 * cfg.num_layers * cfg.token_dim
        zero = cfg.init_weights == "zero"
        if not cfg.prefix_projection or cfg.inference_mode:
            table = Table(n, width)
            return _zeroed(table, table.embedding) if zero else table
        made = Projection(n, cfg.token_dim, cfg.encoder_hidden_size, width)
        return _zeroed(made, made.transform[2]) if zero else made

    def cache(self, encoder: nn.Module, cfg: Any) -> list[tuple[Tensor, Tensor]]:
        n, layers, heads = cfg.num_virtual_tokens, cfg.num_layers, cfg.num_attention_heads
        slots = encoder().view(1, n, 2 * layers, heads, cfg.token_dim // heads).permute(2, 0, 3, 1, 4)
        read = [cfg.num_transformer_submodules * i % layers for i in range(layers)]
        return [(slots[2 * i], slots[2 * i + 1]) for i in read]


def _zeroed(module: nn.Module, last: nn.Module) -> nn.Module:
    for p in last.parameters():
        nn.init.zeros_(p)
    return module
