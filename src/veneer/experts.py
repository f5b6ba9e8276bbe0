"""Targets that name the layers of single experts, where the model holds all experts in one parameter.

transformers 5 keeps an expert block's gate and up projections in one 3-D parameter, gate_up_proj, and its
down projections in another. A config that names the single layers (gate_proj, up_proj, down_proj; w1, w3, w2
in Mixtral) is rewritten, as peft 0.21 does it, to target_parameters; the fused projection gets the ranks of
both of its parts.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .parameters import plain_modules
from .targets import ALL_LINEAR, match_targets

FUSED = "gate_up_proj"
_LLAMA_NAMES = {"gate_proj": FUSED, "up_proj": FUSED, "down_proj": "down_proj", "gate": "gate.weight"}
_MIXTRAL_NAMES = {"w1": FUSED, "w3": FUSED, "w2": "down_proj", "gate": "gate.weight"}
NAMES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("minimax", "minimax_m2", "mixtral"), _MIXTRAL_NAMES),
    **dict.fromkeys(
        (
            "afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1",
            "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe",
            "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe", "qwen3_moe",
            "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text", "qwen3_omni_moe_thinker",
            "solar_open",
        ),
        _LLAMA_NAMES,
    ),
}  # fmt: skip


def is_fused(model: nn.Module) -> bool:
    """Whether any module holds the experts' gate and up projections as one 3-D parameter."""
    held = (m._parameters.get(FUSED) for _, m in plain_modules(model))
    return any(p is not None and p.dim() == 3 for p in held)


def to_parameters(cfg: Any, model: nn.Module, model_type: str | None) -> None:
    """Rewrite a config's target_modules in place where they name layers that the model holds fused.

    Regular expressions are left as they are: they name modules by their full paths.

    Raises:
        ValueError: one part of the fused projection is named without the other.
    """
    names = NAMES.get(model_type or "")
    asked = cfg.target_modules
    if names is None or not asked or "target_parameters" not in cfg.__dataclass_fields__:
        return
    everything = isinstance(asked, str) and asked.lower() == ALL_LINEAR
    if (isinstance(asked, str) and not everything) or not is_fused(model):
        return
    if everything:
        matches = match_targets(model, cfg, model_type=model_type, names=plain_modules(model))
        asked = {m.name.rpartition(".")[2] for m in matches} | set(names)
    _rewrite(cfg, set(asked), names)


def _rewrite(cfg: Any, asked: set[str], names: dict[str, str]) -> None:
    fused = {entry: names[tail] for entry in asked if (tail := entry.rpartition(".")[2]) in names}
    if not fused:
        return
    parts = {old for old, new in names.items() if new == FUSED}
    there = {entry.rpartition(".")[2] for entry in fused} & parts
    if there and there != parts:
        missing = ", ".join(sorted(parts - there))
        raise ValueError(
            f"Cannot convert PEFT target(s) {', '.join(sorted(there))} without also targeting {missing} "
            f"because they are fused into {FUSED}. Name all of them in target_modules, or {FUSED!r} in "
            "target_parameters"
        )
    cfg.target_modules = asked - set(fused)
    cfg.target_parameters = sorted({*(cfg.target_parameters or ()), *fused.values()})
    if there:
        key = rf".*\.{FUSED}"
        cfg.rank_pattern = {**(cfg.rank_pattern or {})}
        cfg.alpha_pattern = {**(cfg.alpha_pattern or {})}
        cfg.rank_pattern.setdefault(key, len(parts) * cfg.r)
        cfg.alpha_pattern.setdefault(key, len(parts) * cfg.lora_alpha)
