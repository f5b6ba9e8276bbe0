"""P-tuning: virtual tokens that a small network makes. Liu et al. 2021, arXiv:2103.10385, section 3.

    y = model([P; embed(x)])     MLP: P = L3 relu(L2 relu(L1 E))     LSTM: P = L2 relu(L1 biLSTM(E))

    prompt_embeddings (num_virtual_tokens * num_transformer_submodules, token_dim)   P

E (as P), the LSTM (encoder_hidden_size a direction, encoder_num_layers deep) and the linear maps are for training
alone; the file holds the finished P, made without dropout. A loaded P trains on as it is. It does not merge.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn

from ..config import PromptLearningConfig
from ..errors import PeftWarning
from ..kinds import Prompt
from ..prompts.table import Table


class PromptEncoderReparameterizationType(str, Enum):
    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """encoder_reparameterization_type: "MLP" or "LSTM". encoder_hidden_size: its width (default: token_dim).

    encoder_num_layers: depth of the LSTM. encoder_dropout: between its layers. The MLP has three linear maps and no
    dropout, whatever these say.
    """

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int = None  # type: ignore[assignment]
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "P_TUNING"
        given = self.encoder_reparameterization_type
        kind = str(getattr(given, "value", given)).upper()
        if kind not in PromptEncoderReparameterizationType.__members__:
            raise ValueError(f"encoder_reparameterization_type={given!r} is not one of MLP, LSTM")
        self.encoder_reparameterization_type = PromptEncoderReparameterizationType[kind]


class PromptEncoder(nn.Module):
    """embedding (n, token_dim) through lstm_head and mlp_head; the call returns P (n, token_dim). indices (rows, k):
    those tokens alone, (rows, k, token_dim).

    config: a PromptEncoderConfig whose sizes are filled in.
    """

    def __init__(self, config: Any):
        super().__init__()
        dim, hidden = config.token_dim, config.encoder_hidden_size or config.token_dim
        self.embedding = nn.Embedding(config.num_virtual_tokens * config.num_transformer_submodules, dim)
        self.lstm_head: nn.LSTM | None = None
        kind = str(getattr(config.encoder_reparameterization_type, "value", config.encoder_reparameterization_type))
        if kind == "LSTM":
            deep, drop = config.encoder_num_layers, config.encoder_dropout
            self.lstm_head = nn.LSTM(dim, hidden, deep, dropout=drop, bidirectional=True, batch_first=True)
            wide = 2 * hidden
            self.mlp_head = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, dim))
        else:
            if config.encoder_num_layers != type(config).encoder_num_layers:
                said = "for MLP, the argument `encoder_num_layers` is ignored. Exactly 2 MLP layers are used."
                warnings.warn(said, PeftWarning, stacklevel=2)
            ends = nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim)
            self.mlp_head = nn.Sequential(*ends)

    def forward(self, indices: Tensor | None = None) -> Tensor:
        x = self.embedding.weight[None] if indices is None else self.embedding(indices)
        if self.lstm_head is not None:
            x, _ = self.lstm_head(x)
        x = self.mlp_head(x)
        return x[0] if indices is None else x


class PTuning(Prompt):
    Config = PromptEncoderConfig

    def encoder(self, cfg: Any, embedding: nn.Module, fill: bool) -> nn.Module:
        cfg.encoder_hidden_size = cfg.encoder_hidden_size or cfg.token_dim
        if cfg.inference_mode:
            return Table(cfg.num_virtual_tokens * cfg.num_transformer_submodules, cfg.token_dim)
        return PromptEncoder(cfg)
