"""Adaption prompt (LLaMA-Adapter): trained tokens that the last layers' attentions read, through a gate that starts
shut. Zhang et al. 2023, arXiv:2303.16199, section 3.2.

    y = attention(x) + W_o (g * softmax(q K^T / sqrt(d)) V)     q: the attention's own; K = W_k P, V = W_v P

    adaption_prompt (1, adapter_len, hidden)   P         adaption_gate (1,)   g, 0 at first

W_o, W_k, W_v are the attention's own projections, without W_o's bias; GPT-2's prompt is added without W_o, as the files
in circulation have it. P has no positions. Several adapters add up. It acts on the call, so it does not merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import PeftConfig
from ..kinds import Attach, Spec
from ..site import Site
from ..view import View

ATTENTIONS = {"llama": "self_attn", "mistral": "self_attn", "qwen2": "self_attn", "gpt2": "attn"}


@dataclass
class AdaptionPromptConfig(PeftConfig):
    """adapter_len: how many tokens. adapter_layers: how many layers, counted from the last. target_modules: the
    attentions' name (default: by architecture)."""

    target_modules: str = None  # type: ignore[assignment]
    adapter_len: int = None  # type: ignore[assignment]
    adapter_layers: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "ADAPTION_PROMPT"

    @property
    def is_adaption_prompt(self) -> bool:
        return True

    def for_layer(self, name: str) -> AdaptionPromptConfig:
        return self


class AdaptionPrompt(Attach):
    Config = AdaptionPromptConfig
    prefix = "adaption_"
    example: ClassVar = {"adapter_len": 4, "adapter_layers": 1}

    def prepare(self, cfg: Any, model: nn.Module, model_type: str | None) -> None:
        if model_type not in ATTENTIONS:
            raise ValueError(
                f"Unsupported model type for adaption prompt: {model_type!r}; it knows the attentions of "
                f"{', '.join(ATTENTIONS)}"
            )
        for key in ("adapter_len", "adapter_layers"):
            value = getattr(cfg, key)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{key}={value!r} must be a whole number of at least 1")
        cfg.target_modules = cfg.target_modules or ATTENTIONS[model_type]

    def targets(self, cfg: Any, names: Iterable[tuple[str, nn.Module]]) -> list[str]:
        found = [n for n, _ in names if n == cfg.target_modules or n.endswith(f".{cfg.target_modules}")]
        if len(found) < cfg.adapter_layers:
            raise ValueError(
                f"Config specifies more adapter layers '{cfg.adapter_layers}' than the model has '{len(found)}' "
                f"modules named {cfg.target_modules!r}."
            )
        return found[-cfg.adapter_layers :]

    def check(self, cfg: Any, site: Site) -> None:
        if not {"q_proj", "k_proj", "v_proj", "o_proj"} <= site.module._modules.keys() and not _fused(site.module):
            raise ValueError(f"{site!r} is not an attention whose projections are known; target_modules names it")

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        own: Any = site.module
        width = own.embed_dim if _fused(own) else own.config.hidden_size
        return {"adaption_prompt": Spec((1, cfg.adapter_len, width)), "adaption_gate": Spec((1,))}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> None:
        nn.init.normal_(p.adaption_prompt)
        nn.init.zeros_(p.adaption_gate)

    def act(self, ps: Sequence[View], base: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        out = base(*args, **kwargs)
        y, *rest = out if isinstance(out, tuple) else (out,)
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        attention: Any = ps[0].site.module
        q = queries(attention, x, args, kwargs)
        for p in ps:
            y = y + read(attention, q, p.adaption_prompt.to(x.dtype), p.adaption_gate).to(y.dtype)
        return (y, *rest) if isinstance(out, tuple) else y


def _fused(attention: nn.Module) -> bool:
    return "c_attn" in attention._modules and "q_attn" not in attention._modules


def queries(attention: Any, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """(rows, heads, length, head width), with their positions."""
    if _fused(attention):
        return _heads(attention.c_attn(x)[..., : attention.embed_dim], attention.head_dim)
    q = _heads(attention.q_proj(x), attention.head_dim)
    given = kwargs.get("position_embeddings", args[1] if len(args) > 1 else None)
    assert given is not None  # these attentions are never called without
    cos, sin = (t[:, None] for t in given)
    first, second = q.chunk(2, dim=-1)
    return q * cos + torch.cat([-second, first], dim=-1) * sin


def read(attention: Any, q: Tensor, prompt: Tensor, gate: Tensor) -> Tensor:
    """What the queries take from the prompt (1, n, hidden), gated: (rows, length, hidden)."""
    if _fused(attention):
        k, v = attention.c_attn(prompt)[..., attention.embed_dim :].chunk(2, dim=-1)
    else:
        k, v = attention.k_proj(prompt), attention.v_proj(prompt)
    k, v = _heads(k, attention.head_dim), _heads(v, attention.head_dim)
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    scores = (q @ k.mT * attention.head_dim**-0.5).softmax(dim=-1, dtype=torch.float32)
    taken = ((gate * scores).to(v.dtype) @ v).transpose(1, 2).flatten(2)
    if _fused(attention):
        return taken
    y = attention.o_proj(taken)
    return y if attention.o_proj.bias is None else y - attention.o_proj.bias


def _heads(x: Tensor, width: int) -> Tensor:
    """(rows, length, heads * width) -> (rows, heads, length, width)"""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)
