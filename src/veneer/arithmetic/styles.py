"""LoRA files under other programs' key names, as plain pairs of factors.

peft       base_model.model.<path>.lora_A.weight, .lora_B.weight; the scaling is in adapter_config.json
loralib    <path>.lora_A, <path>.lora_B; the scaling is in the program's own settings
kohya      <prefix>_<path with _ for .>.lora_down.weight, .lora_up.weight, .alpha (scaling = alpha / r)
diffusers  <component>.<path>.lora_A.weight, .lora_B.weight, and .alpha where alpha is not r; also
           .lora.down.weight and .lora.up.weight, and <path>.processor.to_q_lora.down.weight of older files
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AdapterError

__all__ = ["STYLES", "Pair", "named_paths", "read_pairs", "style_of", "write_pairs"]

STYLES = ("peft", "loralib", "kohya", "diffusers")
ROOT = "base_model.model."

_ENDS = {
    "peft": (r"^base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight$",),
    "loralib": (r"^(?P<path>.+)\.lora_(?P<side>[AB])$",),
    "kohya": (r"^(?P<path>lora_[^.]+)\.lora_(?P<side>down|up)\.weight$",),
    "diffusers": (
        r"^(?P<path>.+)\.processor\.(?P<own>to_\w+)_lora\.(?P<side>down|up)\.weight$",
        r"^(?P<path>.+)\.lora\.(?P<side>down|up)\.weight$",
        r"^(?P<path>.+)\.lora_(?P<side>[AB])\.weight$",
    ),
}
_REFUSED = {
    "lora_mid": "a convolution in Tucker form (lora_mid), whose change has no two factors of this shape",
    "hada_w": "LoHa (hada_w...), which is a method of its own",
    "lokr_w": "LoKr (lokr_w...), which is a method of its own",
    "dora_scale": "DoRA (dora_scale), whose change depends on the base's weights",
    "lora_magnitude_vector": "DoRA (lora_magnitude_vector), whose change depends on the base's weights",
}


@dataclass(frozen=True)
class Pair:
    """delta = alpha / r * B @ A, with A (r, in, *kernel) and B (out, r, ...)."""

    A: Tensor
    B: Tensor
    alpha: float

    @property
    def r(self) -> int:
        return self.A.shape[0]


def style_of(tensors: Iterable[str]) -> str:
    """The style of a file by its keys. Raises AdapterError for none that is known, and for forms that are no pair."""
    keys = list(tensors)
    for mark, what in _REFUSED.items():
        hit = next((k for k in keys if mark in k), None)
        if hit is not None:
            raise AdapterError(f"{hit}: this is {what}, so it cannot be read as a LoRA pair")
    for style in STYLES:
        if any(re.match(end, k) for end in _ENDS[style] for k in keys):
            return style
    some = ", ".join(keys[:3]) or "no tensors"
    raise AdapterError(f"these are not LoRA keys of {', '.join(STYLES)}: {some}")


def read_pairs(tensors: Mapping[str, Tensor], alpha: float | None = None) -> dict[str, Pair]:
    """Path as the file writes it -> factors. alpha: where the file does not hold it (loralib); by default r.

    Raises AdapterError for keys that are not LoRA's, and where a factor lacks its other half.
    """
    style = style_of(tensors)
    halves: dict[str, dict[str, Tensor]] = {}
    used = set()
    for key, t in tensors.items():
        found = next((m for end in _ENDS[style] if (m := re.match(end, key))), None)
        if found is not None:
            own = found.groupdict().get("own")
            path = f"{found['path']}.{'to_out.0' if own == 'to_out' else own}" if own else found["path"]
            halves.setdefault(path, {})["A" if found["side"] in ("A", "down") else "B"] = t
            used.add(key)
    alphas = {k.removesuffix(".alpha"): float(t) for k, t in tensors.items() if k.endswith(".alpha")}
    left = [k for k in tensors if k not in used and not k.endswith(".alpha")]
    if left:
        raise AdapterError(f"{len(left)} tensors are not LoRA factors in {style} style, such as {left[0]}")
    out: dict[str, Pair] = {}
    for path, both in halves.items():
        if len(both) != 2:
            raise AdapterError(f"{path} has factor {next(iter(both))} but not the other one")
        r = both["A"].shape[0]
        if both["B"].shape[1] != r:
            raise AdapterError(f"{path}: A has rank {r}, B {both['B'].shape[1]}")
        out[path] = Pair(both["A"], both["B"], alphas.get(path, float(r) if alpha is None else alpha))
    return out


def named_paths(paths: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Kohya's path with underscores -> the module's name with dots, among the base's module names.

    Raises AdapterError where a path fits no module, or more than one.
    """
    by_flat: dict[str, list[str]] = {}
    for name in names:
        by_flat.setdefault(name.replace(".", "_"), []).append(name)
    out = {}
    for path in paths:
        flat = re.sub(r"^lora_(unet|te\d?|transformer|model)_", "", path).removeprefix("lora_")
        found = by_flat.get(flat, [])
        if len(found) != 1:
            why = f"could be {', '.join(found)}" if found else "names no module of the base"
            raise AdapterError(f"{path} {why}")
        out[path] = found[0]
    return out


def write_pairs(pairs: Mapping[str, Pair], style: str, prefix: str | None = None) -> dict[str, Tensor]:
    """Module name -> factors, as a file's tensors. prefix: kohya's ("lora_unet") or diffusers' component.

    peft's and loralib's keys have no place for alpha: there it is folded into B, so that the scaling is 1.
    """
    if style not in STYLES:
        raise AdapterError(f"unknown key style {style!r}; one of {', '.join(STYLES)}")
    out: dict[str, Tensor] = {}
    for path, p in pairs.items():
        if style in ("peft", "loralib"):
            B = p.B if p.alpha == p.r else p.B * (p.alpha / p.r)
            root, end = (ROOT, ".weight") if style == "peft" else ("", "")
            out |= {f"{root}{path}.lora_A{end}": p.A, f"{root}{path}.lora_B{end}": B}
        elif style == "kohya":
            flat = f"{prefix or 'lora_unet'}_{path.replace('.', '_')}"
            down, up = f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"
            out |= {down: p.A, up: p.B, f"{flat}.alpha": torch.tensor(float(p.alpha))}
        else:
            full = f"{prefix or 'transformer'}.{path}"
            out |= {f"{full}.lora_A.weight": p.A, f"{full}.lora_B.weight": p.B}
            if not math.isclose(p.alpha, p.r):
                out[f"{full}.alpha"] = torch.tensor(float(p.alpha))
    return {k: t.contiguous() for k, t in out.items()}
