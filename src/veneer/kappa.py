"""KappaTune: adapt the layers whose weights are best conditioned. 2025, arXiv:2506.16289, section 3.

kappa = largest / smallest singular value. A small kappa says that a layer spreads over its directions evenly, so that
it can learn without losing what it knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .site import site_of

MOE_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


def condition_number(W: Tensor) -> float:
    """kappa of a matrix, or the mean over a stack of matrices (experts, ...); infinite for a singular one."""
    values = torch.linalg.svdvals(W.detach().float())
    kappas = torch.where(values[..., -1] > 0, values[..., 0] / values[..., -1].clamp(min=1e-30), torch.inf)
    return float(kappas.mean())


class KappaTuneSelector:
    """Layers of a model by condition number. Linear layers, and 3-D expert weights whose name ends in
    `moe_param_suffixes`; those with a side above max_dim_size_to_analyze are passed over.

    show_progress: print a line every tenth layer, as the decompositions of a large model take minutes.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ):
        self.model, self.largest, self.show_progress = model, max_dim_size_to_analyze, show_progress
        self.suffixes = tuple(moe_param_suffixes or MOE_SUFFIXES)
        self._modules: dict[str, float] | None = None
        self._parameters: dict[str, float] | None = None

    def _layers(self) -> Iterator[tuple[str, Tensor]]:
        for name, m in self.model.named_modules():
            site = site_of(m, name, frozenset({"linear"}))
            if site is not None and max(site.size()) <= self.largest:
                yield name, site.weight()

    def _experts(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.model.named_parameters():
            if p.dim() == 3 and name.endswith(self.suffixes) and max(p.shape[1:]) <= self.largest:
                yield name, p

    def _kappas(self, found: Iterator[tuple[str, Tensor]], what: str) -> dict[str, float]:
        out: dict[str, float] = {}
        for name, W in found:
            out[name] = condition_number(W)
            if self.show_progress and len(out) % 10 == 0:
                print(f"condition numbers of {len(out)} {what}", flush=True)
        return out

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Layer names, best conditioned first: num_modules of them, else the fraction top_p (at least one), else those
        up to `threshold`, else all."""
        if self._modules is None:
            self._modules = self._kappas(self._layers(), "layers")
        return _best(self._modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The same for expert weights."""
        if self._parameters is None:
            self._parameters = self._kappas(self._experts(), "expert weights")
        return _best(self._parameters, top_p, num_modules, threshold)


def _best(kappas: dict[str, float], top_p: float | None, count: int | None, threshold: float | None) -> list[str]:
    order = sorted(kappas, key=kappas.__getitem__)
    if count is not None:
        return order[:count]
    if top_p is not None:
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
        return order[: max(1, int(len(order) * top_p))]
    return order if threshold is None else [n for n in order if kappas[n] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, Any]:
    """{"target_modules": names, "target_parameters": names or None} of the best conditioned fraction, for a LoraConfig.

    Raises ValueError for a top_p outside (0, 1].
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p),
        "target_parameters": selector.get_best_target_parameters(top_p) or None,
    }
