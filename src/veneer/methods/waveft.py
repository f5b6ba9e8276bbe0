"""WaveFT: a few trained coefficients of the change's wavelet transform. Bilican et al. 2025, arXiv:2505.12532,
section 3.

    W' = W + scaling idwt2(F),   F (out, inp) zero but for waveft_spectrum at the chosen places

    waveft_spectrum (n_frequency,)    starts at zero

F is cut into quarters [[A, H], [V, D]] after padding by half the wavelet's length less one; one step back gives the
change, cut to the layer's size. With use_idwt=False F is the change itself. The places follow from
random_loc_seed as FourierFT's do. A coefficient reaches length^2 entries of the weight; where that is less work
than the dense transform, they are added directly. Merges. Beyond peft: wavelets from db11, sym11 and coif6 on, whose
filters it does not hold.

wavelets.json holds the low-pass reconstruction filters (Daubechies, Ten Lectures on Wavelets, 1992, chapters 6 and 8).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..config import AdapterConfig
from ..kinds import Additive, Spec
from ..site import Site, site_of
from ..targets import match_targets
from ..view import View
from .fourierft import check_count, places


@lru_cache(maxsize=1)
def wavelets() -> dict[str, list[float]]:
    """Name -> low-pass reconstruction filter."""
    return json.loads(Path(__file__).with_name("wavelets.json").read_text(encoding="utf-8"))


@dataclass
class WaveFTConfig(AdapterConfig):
    """n_frequency: how many coefficients are trained. scaling: multiplies the change. wavelet_family: "db1" to
    "db38", "sym2" to "sym20", "coif1" to "coif17". use_idwt: False takes the coefficients as entries of the change.

    random_loc_seed: chooses their places. n_frequency_pattern: {layer name or regex: value}.
    proportional_parameters: n_frequency is the mean, shared out by the layers' sizes; the pattern is then
    unused. init_weights: False draws at random. bias: "none", "all" or "waveft_only".
    """

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    n_frequency_pattern: dict | None = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    PATTERNS: ClassVar[tuple[tuple[str, str], ...]] = (("n_frequency_pattern", "n_frequency"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "WAVEFT"
        self.counts: dict[str, int] = {}  # layer -> n_frequency, with proportional_parameters
        if self.wavelet_family not in wavelets():
            raise ValueError(
                f"Wavelet family {self.wavelet_family} not supported. Supported wavelet families are: "
                f"{list(wavelets())}"
            )

    def for_layer(self, name: str) -> Any:
        if not self.proportional_parameters:
            return super().for_layer(name)
        out = copy.copy(self)
        out.n_frequency = self.counts.get(name, self.n_frequency)
        return out


@torch.compiler.assume_constant_result
def filters(family: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2, length): low-pass and high-pass, for reconstruction."""
    return _filters(family, dtype, device)


@lru_cache(maxsize=512)
@torch.inference_mode(False)  # kept: a first call for inference makes what training goes on with
def _filters(family: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    low = torch.tensor(wavelets()[family], dtype=torch.float64)
    sign = 1.0 - 2.0 * (torch.arange(len(low)) % 2)
    return torch.stack([low, sign * low.flip(0)]).to(device=device, dtype=dtype)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def reach(out: int, inp: int, n: int, seed: int, length: int) -> Tensor:
    """(n, length^2): the flat positions in the weight that each coefficient adds to; out * inp where outside."""
    positions = []
    for at, size in zip(places(out, inp, n, seed), (out, inp), strict=True):
        middle = (size + 1) // 2
        start = torch.where(at < middle, 2 * at, 2 * (at - middle) - length + 2)
        positions.append(start[:, None] + torch.arange(length))
    rows, columns = positions[0][:, :, None], positions[1][:, None, :]
    inside = (rows >= 0) & (rows < out) & (columns >= 0) & (columns < inp)
    return torch.where(inside, rows * inp + columns, out * inp).flatten(1)


class WaveFT(Additive):
    Config = WaveFTConfig
    prefix = "waveft_"
    defaults = "waveft"
    by_weight = True
    derived: ClassVar[dict[str, Callable[[View], Any]]] = {"waveft_n_frequency": lambda p: p.cfg.n_frequency}

    def prepare(self, cfg: Any, model: nn.Module, model_type: str | None) -> None:
        super().prepare(cfg, model, model_type)
        if cfg.proportional_parameters:
            cfg.counts = self.shares(cfg, model, model_type)

    def shares(self, cfg: Any, model: nn.Module, model_type: str | None) -> dict[str, int]:
        """Layer -> its part of the coefficients, by its size."""
        from ..inject import base_of, candidates

        def view(module: nn.Module) -> Site | None:
            return site_of(base_of(module), "", self.sites)

        found = match_targets(
            model, cfg, model_type=model_type, is_adaptable=lambda m: view(m) is not None, names=candidates(model),
            kind=self.defaults,
        )  # fmt: skip
        sizes = {m.name: s.out * s.inp for m in found if (s := view(m.module)) is not None}
        mean = sum(sizes.values()) / max(len(sizes), 1)
        return {name: max(1, round(cfg.n_frequency * size / mean)) for name, size in sizes.items()}

    def check(self, cfg: Any, site: Site) -> None:
        check_count(cfg, site)

    def direct(self, cfg: Any, site: Site) -> bool:
        return cfg.n_frequency * self.length(cfg) ** 2 <= site.out * site.inp

    def length(self, cfg: Any) -> int:
        return len(wavelets()[cfg.wavelet_family]) if cfg.use_idwt else 1

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        where = (site.out, site.inp, cfg.n_frequency, cfg.random_loc_seed)
        tables = {"waveft_indices": places(*where)}
        if cfg.use_idwt and self.direct(cfg, site):
            tables["waveft_reach"] = reach(*where, self.length(cfg))
        frozen = {k: Spec(tuple(t.shape), train=False, save=False, value=t) for k, t in tables.items()}
        return {"waveft_spectrum": Spec((cfg.n_frequency,), raw=True), **frozen}

    def scaling(self, cfg: Any) -> float:
        return cfg.scaling

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        s = p.waveft_spectrum
        p.fill("waveft_spectrum", torch.zeros_like(s) if cfg.init_weights else torch.randn_like(s) * 0.01)
        return None

    def delta(self, p: View) -> Tensor:
        s = p.waveft_spectrum
        s = s.to(torch.promote_types(s.dtype, torch.float32)) * p.scaling
        if not p.cfg.use_idwt:
            at = p.waveft_indices[0] * p.site.inp + p.waveft_indices[1]
            change = s.new_zeros(p.site.out * p.site.inp).index_add(0, at, s).reshape(p.site.out, p.site.inp)
        else:
            change = self.added(p, s) if p.has("waveft_reach") else self.transformed(p, s)
        return change.to(p.dtype or s.dtype)

    def added(self, p: View, s: Tensor) -> Tensor:
        """Each coefficient's patch, added onto zeros. A column right of the middle is high-pass along the rows' axis, a
        row below it along the columns'."""
        (out, inp), (i, j) = (p.site.out, p.site.inp), p.waveft_indices
        f = filters(p.cfg.wavelet_family, s.dtype, s.device)
        patches = torch.einsum("ra,cb->rcab", f, f).flatten(0, 1).flatten(1)
        kind = 2 * (j >= (inp + 1) // 2).long() + (i >= (out + 1) // 2).long()
        values = s[:, None] * patches[kind]
        flat = s.new_zeros(out * inp + 1).index_add(0, p.waveft_reach.flatten(), values.flatten())
        return flat[:-1].reshape(out, inp)

    def transformed(self, p: View, s: Tensor) -> Tensor:
        """The dense transform: along the rows' axis, then along the columns'."""
        (out, inp), (i, j) = (p.site.out, p.site.inp), p.waveft_indices
        f = filters(p.cfg.wavelet_family, s.dtype, s.device)[:, None]
        cut = f.shape[-1] - 2
        h, w = (out + cut + 1) // 2, (inp + cut + 1) // 2
        F = s.new_zeros(4 * h * w).index_add(0, (i + cut // 2) * 2 * w + j + cut // 2, s).reshape(2, h, 2, w)
        rows = nnf.conv_transpose1d(F.permute(0, 3, 2, 1).reshape(2 * w, 2, h), f, stride=2)
        rows = rows[:, 0, cut : cut + out].reshape(2, w, out)
        return nnf.conv_transpose1d(rows.permute(2, 0, 1), f, stride=2)[:, 0, cut : cut + inp]
