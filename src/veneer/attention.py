"""nn.MultiheadAttention as a layer to adapt: its input projections are one map, (3 * embed_dim, embed_dim).

The module reads in_proj_weight and out_proj.weight itself and calls neither, so adapted weights stand in for
the call; its fused inference kernels read the same ones. The output projection is adapted with it, as a layer
of its own.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .errors import AdapterError, PeftWarning
from .site import Site

# Modules that read the weights of the layers in them: in every call, or in their fused inference kernels.
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class AttentionSite(Site):
    """The query, key and value projections, stacked: W (3 * embed_dim, embed_dim)."""

    kind = "attention"
    names = ("in_proj_weight", "in_proj_bias")
    substitutes = True
    private = frozenset({"_qkv_same_embed_dim"})

    def size(self) -> tuple[int, int]:
        embed_dim = self.module.embed_dim
        return 3 * embed_dim, embed_dim  # type: ignore[operator,return-value]

    def check(self, dropout: float) -> None:
        if self.module._parameters.get("in_proj_weight") is None:
            raise AdapterError(
                f"{self!r}: this MultiheadAttention has kdim={self.module.kdim}, vdim={self.module.vdim} "
                f"beside embed_dim={self.module.embed_dim}, so its projections are three separate weights. Only same "
                "embed for query/key/value is supported as of now for MultiheadAttention: take it out of "
                "target_modules (its out_proj can be named alone)"
            )
        if dropout > 0:
            warnings.warn(
                f"{self!r}: dropout on an adapter's input has no effect inside MultiheadAttention, which "
                "reads weights and shows no input; it is ignored on this layer",
                PeftWarning,
                stacklevel=2,
            )

    def op(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, W, b)


def projection_config(cfg: Any) -> Any:
    """The config of the output projection that is adapted along with an attention: LoRA's change counts
    double.

    peft 0.21.2 adds it twice, in the forward pass and on merging alike, so adapters trained there mean it so;
    to compute the same from their files, lora_alpha is doubled here. DoRA, which peft lacks here, is left as
    is.
    """
    if getattr(cfg, "use_dora", True):
        return cfg
    out = copy.copy(cfg)
    out.lora_alpha = 2 * cfg.lora_alpha
    return out
