"""Cartridge: a trained key/value cache that stands for a long text. Eyuboglu et al. 2025, arXiv:2506.06266, section 3.

    attention(q, [P_K; K], [P_V; V])     P = [frozen_embedding; trainable_embedding]

    prompt_embeddings (num_virtual_tokens, 2 * num_layers * token_dim)   P: keys of a layer, values, the next

token_dim is key/value heads * head width. P starts random; initialize_kv_prefix_from_text and
initialize_kv_prefix_from_past_key_values (section 3.2) start it from a text's own cache. The first num_frozen_tokens
rows are not trained, for stability: they draw much of the attention. Where each layer reads is as in prefix tuning.
It does not merge; compose_cartridge_adapters joins several, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PromptLearningConfig
from ..kinds import Prompt
from ..prompts.cache import split
from ..prompts.table import fits
from ..sharded import like


@dataclass
class CartridgeConfig(PromptLearningConfig):
    """num_frozen_tokens: how many tokens at the front are not trained."""

    num_frozen_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "CARTRIDGE"
        frozen, n = self.num_frozen_tokens, self.num_virtual_tokens
        if frozen < 0:
            raise ValueError(f"`num_frozen_tokens` must be >= 0, got {frozen}.")
        if isinstance(n, int) and frozen > n:
            raise ValueError(
                f"`num_frozen_tokens` must be <= `num_virtual_tokens`, got num_frozen_tokens={frozen} and "
                f"num_virtual_tokens={n}."
            )


class CartridgeEncoder(nn.Module):
    """frozen_embedding (num_frozen_tokens, width), if any, and trainable_embedding (the other tokens, width), drawn
    from a standard normal; the call returns both, (n, width).

    config: a CartridgeConfig whose sizes are filled in.
    """

    frozen_embedding: nn.Parameter | None

    def __init__(self, config: Any):
        super().__init__()
        frozen, width = config.num_frozen_tokens, 2 * config.num_layers * config.token_dim
        self.frozen_embedding = nn.Parameter(torch.randn(frozen, width), requires_grad=False) if frozen else None
        self.trainable_embedding = nn.Parameter(torch.randn(config.num_virtual_tokens - frozen, width))

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """indices (rows, k): those tokens, (rows, k, width)."""
        parts: list[Tensor] = [p for p in (self.frozen_embedding, self.trainable_embedding) if p is not None]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return whole if indices is None else whole[indices]

    @property
    def weight(self) -> Tensor:
        """(n, width), both parts."""
        return self()  # type: ignore[no-any-return]

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Put (n, width) into both. Raises AdapterError for another shape."""
        fits("CARTRIDGE", "prompt_embeddings", prompt_embeddings, tuple(self().shape))
        frozen = 0 if self.frozen_embedding is None else len(self.frozen_embedding)
        with torch.no_grad():
            if self.frozen_embedding is not None:
                self.frozen_embedding.copy_(like(prompt_embeddings[:frozen], self.frozen_embedding))
            self.trainable_embedding.copy_(like(prompt_embeddings[frozen:], self.trainable_embedding))


class Cartridge(Prompt):
    Config = CartridgeConfig
    gives = "cache"

    def encoder(self, cfg: Any, embedding: nn.Module, fill: bool) -> nn.Module:
        cfg.__post_init__()  # num_virtual_tokens may have been set since
        return CartridgeEncoder(cfg)

    def trained(self, encoder: Any) -> list[nn.Parameter]:
        return [encoder.trainable_embedding]

    def cache(self, encoder: nn.Module, cfg: Any) -> list[tuple[Tensor, Tensor]]:
        return split(encoder(), cfg)

    def loaded(self, encoder: Any, cfg: Any, tensors: dict[str, Tensor]) -> nn.Module:
        encoder.load_prompt_embeddings(tensors["prompt_embeddings"])
        return encoder
