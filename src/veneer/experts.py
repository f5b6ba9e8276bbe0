"""Targets that name the layers of single experts, where the model holds all experts in one parameter.

transformers 5 keeps an expert block's gate and up projections in one 3-D parameter, gate_up_proj, and its
down projections in another. A config that names the single layers (gate_proj, up_proj, down_proj; w1, w3, w2
in Mixtral) is rewritten, as peft 0.21 does it, to target_parameters; the fused projection gets the ranks of
both of its parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
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
    return any(_holds_experts(m) for _, m in plain_modules(model))


def _holds_experts(module: nn.Module) -> bool:
    held = module._parameters.get(FUSED)
    return held is not None and held.dim() == 3


def to_parameters(cfg: Any, model: nn.Module, model_type: str | None) -> None:
    """Rewrite a config's target_modules in place where they name layers that the model holds fused.

    A regular expression is tried on the paths that the single layers would have, with the expert's number and without
    it, and becomes the names that it matches: the last parts where those mean the same layers, else whole paths.

    Raises:
        ValueError: one part of the fused projection is named without the other.
    """
    names = NAMES.get(model_type or "")
    asked = cfg.target_modules
    if names is None or not asked or "target_parameters" not in cfg.__dataclass_fields__:
        return
    everything = isinstance(asked, str) and asked.lower() == ALL_LINEAR
    if not is_fused(model):
        return
    if isinstance(asked, str) and not everything:
        _from_regex(cfg, model, asked, names)
        return
    if everything:
        matches = match_targets(model, cfg, model_type=model_type, names=plain_modules(model))
        asked = {m.name.rpartition(".")[2] for m in matches} | set(names)
    _rewrite(cfg, set(asked), names)


def _rewrite(cfg: Any, asked: set[str], names: dict[str, str]) -> None:
    fused = {entry: names[tail] for entry in asked if (tail := entry.rpartition(".")[2]) in names}
    if not fused:
        return
    there = {entry.rpartition(".")[2] for entry in fused}
    _to_fused(cfg, there, names, fused.values())
    cfg.target_modules = asked - set(fused)


def _from_regex(cfg: Any, model: nn.Module, pattern: str, names: dict[str, str]) -> None:
    """Take a regular expression apart into names of modules and of parameters; one that matches nothing stays."""
    matches = re.compile(pattern).fullmatch
    paths = [path for path, _ in plain_modules(model)]
    holders = [path for path, m in plain_modules(model) if _holds_experts(m)]
    routers = [f"{h.rpartition('.')[0]}.gate" for h in holders]
    hits: dict[str, list[str]] = {"gate": [r for r in routers if matches(r)]}
    for old in names.keys() - {"gate"}:
        hits[old] = [h for h in holders if matches(f"{h}.{old}") or matches(f"{h}.0.{old}")]
    modules = [path for path in paths if matches(path) and path not in hits["gate"]]
    if not modules and not any(hits.values()):
        return
    found: set[str] = set()
    for old, where in hits.items():
        whole = len(where) == len(holders)
        leaf = "weight" if old == "gate" else names[old]
        found |= {names[old]} if whole else {f"{path}.{leaf}" for path in where}
    _to_fused(cfg, {old for old, where in hits.items() if where}, names, found)
    cfg.target_modules = _shortest(modules, paths)


def _shortest(chosen: list[str], paths: list[str]) -> set[str]:
    """The last parts of the chosen paths, or the whole paths where a last part is another module's, too."""
    leaves = {path.rpartition(".")[2] for path in chosen}
    also = {path for path in paths if path.rpartition(".")[2] in leaves}
    return leaves if also == set(chosen) else set(chosen)


def _to_fused(cfg: Any, there: set[str], names: dict[str, str], parameters: Iterable[str]) -> None:
    """Add the experts' parameters to a config. there: the single layers' names that were asked for."""
    if not there:
        return
    parts = {old for old, new in names.items() if new == FUSED}
    there = there & parts
    if there and there != parts:
        missing = ", ".join(sorted(parts - there))
        raise ValueError(
            f"Cannot convert PEFT target(s) {', '.join(sorted(there))} without also targeting {missing} "
            f"because they are fused into {FUSED}. Name all of them in target_modules, or {FUSED!r} in "
            "target_parameters"
        )
    cfg.target_parameters = sorted({*(cfg.target_parameters or ()), *parameters})
    if there:
        key = rf".*\.{FUSED}"
        cfg.rank_pattern = {**(cfg.rank_pattern or {})}
        cfg.alpha_pattern = {**(cfg.alpha_pattern or {})}
        cfg.rank_pattern.setdefault(key, len(parts) * cfg.r)
        cfg.alpha_pattern.setdefault(key, len(parts) * cfg.lora_alpha)
