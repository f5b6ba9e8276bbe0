"""X-LoRA: a classifier over hidden states mixes LoRA experts, token by token. Buehler and Buehler 2024,
arXiv:2402.07148, section 2.

    y = W x + g * sum_i c_i(h) s_i B_i A_i x,   c = softmax(classifier(h) / T),   h: last hidden state of a first pass

    base_model.internal_xlora_classifier.layers.0.weight (width, hidden), .bias    linear, ReLU, dropout; at the end
    base_model.internal_xlora_classifier.layers.3.weight (n, width), .bias         linear, n = experts
                                                                  (times adapted layers with layerwise_scalings)

The experts "0", "1", ... are LoRA adapters read from the folders in `adapters`; they lie on the same model and in
folders of their names beside the classifier's file. The model's side (first pass, cache, logs) is in veneer/xlora.py.
Does not merge: the mixture depends on the token.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..config import CONFIG_NAME, AdapterConfig, veneer_field
from ..errors import AdapterError
from ..kinds import Routed, Spec
from ..layer import Adapted
from ..site import Site
from ..view import View

SCALINGS, FIRST_PASS = "xlora_scalings", "xlora_first_pass"  # of a call's data


@dataclass
class XLoraConfig(AdapterConfig):
    """hidden_size: of the base; None: its config says. adapters: {name: folder or hub id} of the experts.

    enable_softmax: over the experts, at softmax_temperature. top_k_lora: experts a token keeps; enable_softmax_topk:
    a softmax over those. layerwise_scalings: a mixture for each layer. xlora_depth, xlora_size, xlora_dropout_p: the
    classifier's layers, width and dropout. use_trainable_adapters: train the experts, too. scaling_pass_value: weight
    of each expert in the first pass. global_scaling_weight: of the whole change.
    """

    hidden_size: int | None = None
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0
    target_modules: list[str] | str | None = veneer_field()
    exclude_modules: list[str] | str | None = veneer_field()
    layers_to_transform: list[int] | int | None = veneer_field()
    layers_pattern: list[str] | str | None = veneer_field()
    modules_to_save: list[str] | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "XLORA"
        self.beside: dict[int, str] = {}  # expert -> its folder, where one lies beside the config's file
        if self.adapters is None:
            warnings.warn("No value was provided for `adapters`; X-LoRA has nothing to mix without.", stacklevel=2)
            self.adapters = {}
        if all(k.isdigit() for k in self.adapters):  # a file's keys may be sorted as words, "10" before "2"
            self.adapters = {k: self.adapters[k] for k in sorted(self.adapters, key=int)}
        if self.enable_softmax_topk and self.top_k_lora is None:
            warnings.warn("`enable_softmax_topk` enabled `top_k_lora` is not set", stacklevel=2)
        if self.enable_softmax_topk and self.enable_softmax:
            warnings.warn(
                "`enable_softmax_topk` and `enable_softmax` are both enabled. This will result in worse performance.",
                stacklevel=2,
            )
        if self.top_k_lora is not None and self.top_k_lora < 1:
            raise ValueError(f"`top_k_lora` value must be at least 1, got {self.top_k_lora}.")
        if self.xlora_depth < 1:
            raise ValueError("X-LoRA depth must be strictly positive.")

    def located(self, source: str | os.PathLike, subfolder: str | None = None, **hub: Any) -> None:
        """Find the experts that lie beside the file, in folders named by their numbers."""
        from ..files import SAFE_NAME, locate

        for i in range(len(self.adapters or {})):
            path = locate(source, CONFIG_NAME, subfolder=os.path.join(subfolder or "", str(i)), **hub)
            if path is not None:
                locate(source, SAFE_NAME, subfolder=os.path.join(subfolder or "", str(i)), **hub)
                self.beside[i] = os.path.dirname(path)


class XLora(Routed):
    Config = XLoraConfig
    sites = frozenset({"linear", "embedding"})
    prefix = "lora_"
    needs_others = True
    reads = frozenset({SCALINGS})

    def tuner_class(self) -> Any:
        from ..xlora import XLoraTuner

        return XLoraTuner

    def prepare(self, cfg: Any, model: nn.Module, model_type: str | None) -> None:
        own = {str(i) for i in range(len(cfg.adapters))}
        names = [n for n, m in model.named_modules() if isinstance(m, Adapted) and own & set(m.entries)]
        if not names:
            raise AdapterError("XLoraConfig(adapters=...) names no expert; give {name: folder of a LoRA adapter}")
        cfg.target_modules = set(names)
        cfg.layer_at = {n: i for i, n in enumerate(names)}
        if cfg.hidden_size is None:
            cfg.hidden_size = getattr(getattr(model, "config", None), "hidden_size", None)
        if cfg.hidden_size is None:
            raise AdapterError("XLoraConfig: the base's config names no hidden_size; set it")
        if cfg.top_k_lora is not None and cfg.top_k_lora > len(own):
            raise ValueError(f"top_k_lora={cfg.top_k_lora} with {len(own)} experts; it is at most their number")

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        return {}

    def shared(self, cfg: Any, sites: Sequence[Site]) -> dict[str, Spec]:
        last = len(cfg.adapters) * (len(cfg.layer_at) if cfg.layerwise_scalings else 1)
        widths = [cfg.hidden_size, *[cfg.xlora_size] * (cfg.xlora_depth - 1), last]
        out = {}
        for i, (inp, width) in enumerate(pairwise(widths)):
            for leaf, value in nn.Linear(inp, width).named_parameters():
                key = f"internal_xlora_classifier.layers.{3 * i}.{leaf}"
                out[f"xlora_{i}.{leaf}"] = Spec(tuple(value.shape), file=key, value=value.detach())
        return out

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        if FIRST_PASS in ps[0].data:
            return base(x, *args, **kwargs)
        return super().forward(ps, x, base, args, kwargs)

    def side(self, p: View, x: Tensor) -> Tensor:
        given = p.data.get(SCALINGS)
        if given is None:
            raise AdapterError(
                f"{p.site!r}: X-LoRA's layers work within a call of the model, which finds their scalings"
            )
        c = given[..., p.cfg.layer_at[p.site.name], :]
        y: Any = 0.0
        for i, v in self.experts(p):
            part = v.method.side(v, v.drop(x))
            y = y + part * _fitted(c[..., i], part, p.site)
        return y * p.cfg.global_scaling_weight

    def bias_delta(self, p: View) -> Tensor | None:
        found = [b for _, v in self.experts(p) if (b := v.method.bias_delta(v)) is not None]
        return sum(found) * p.cfg.global_scaling_weight if found else None

    def experts(self, p: View) -> list[tuple[int, Any]]:
        """The experts of this layer with their numbers."""
        names = map(str, range(len(p.cfg.adapters)))
        return [(i, p.layer.view(n, p.dtype)) for i, n in enumerate(names) if n in p.layer.entries]


def _fitted(c: Tensor, part: Tensor, site: Site) -> Tensor:
    """Weights (rows, tokens), shaped for the change (..., out) of a layer that may see rows and tokens as one axis."""
    if c.numel() == 1:
        return c.reshape(())
    if c.numel() != part.shape[:-1].numel():
        raise AdapterError(
            f"{site!r}: X-LoRA has scalings for {tuple(c.shape)} tokens and the layer sees {tuple(part.shape[:-1])}; "
            "leave this layer out of the experts' target_modules"
        )
    return c.reshape(part.shape[:-1])[..., None].to(part.dtype)


def mixture(cfg: Any, h: Tensor, layers: Sequence[tuple[Tensor, Tensor]], training: bool) -> Tensor:
    """The classifier: hidden states (rows, tokens, hidden) -> scalings (rows, tokens, adapted layers, experts)."""
    for W, b in layers[:-1]:
        h = torch.dropout(torch.relu(nn.functional.linear(h, W, b)), cfg.xlora_dropout_p, training)
    z = nn.functional.linear(h, *layers[-1])
    n = len(cfg.layer_at)
    z = z.unflatten(-1, (n, -1)) if cfg.layerwise_scalings else z[..., None, :].expand(*z.shape[:-1], n, -1)
    return torch.softmax(z / cfg.softmax_temperature, -1) if cfg.enable_softmax else z


def kept(cfg: Any, c: Tensor) -> Tensor:
    """The scalings that act: the top_k_lora largest, and a softmax over those that are not zero if asked."""
    if cfg.top_k_lora is not None:
        at = c.topk(cfg.top_k_lora, -1).indices
        c = c * torch.zeros_like(c).scatter(-1, at, 1.0)
    if cfg.enable_softmax_topk:
        there = c != 0
        c = torch.where(there, torch.softmax(c.masked_fill(~there, -torch.inf), -1), 0.0)
    return c
