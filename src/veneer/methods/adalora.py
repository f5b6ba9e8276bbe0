"""AdaLoRA: singular-value-like factors whose ranks go where they matter. Zhang et al. 2023, arXiv:2303.10512,
sections 3.1 to 3.3.

    y = W x + (alpha / (init_r + 1e-5)) B diag(E) A x

    lora_A (init_r, inp)   lora_E (init_r, 1), starts at zero   lora_B (out, init_r);  a convolution: its patch for inp

Training adds orth_reg_weight * mean(|A A^T - I|, |B^T B - I|) to the model's output loss. After each optimizer step t
(schedule.py): importances s = mean|p grad| * its deviation (equations 8 to 11); from tinit on, every deltaT steps all
but the best b(t) triplets have their E zeroed, b falling by a cube from init_r to target_r a layer; at total_step -
tfinal what is kept becomes rank_pattern, {layer.lora_E: [kept?]}, and the rest stays zero. Files hold the kept
triplets alone. Merges. Departures from peft: the loss is added in training, not in evaluation; beyond it: every
convolution and embeddings.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import AdapterError, PeftWarning
from ..kinds import LowRank, Spec
from ..sharded import refuse
from ..site import Site
from ..view import View
from .lora import LoraConfig

PARTS = ("lora_A", "lora_E", "lora_B")
_UNUSED = ("use_dora", "use_rslora", "lora_bias")


@dataclass
class AdaLoraConfig(LoraConfig):
    """init_r: rank at the start. target_r: average rank at the end. total_step: optimizer steps of the training.

    tinit: steps before ranks are cut. tfinal: steps at the end with ranks fixed. deltaT: steps between two cuts. beta1,
    beta2: memory of importance and deviation. orth_reg_weight: weight of the orthogonality loss. lora_alpha: the
    change is scaled by lora_alpha / init_r. rank_pattern: written by training. r has no effect.
    """

    rank_pattern: dict | None = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    PATTERNS: ClassVar = ()
    kept: ClassVar[int | None] = None  # of one layer's config: the triplets that its file holds

    def __post_init__(self) -> None:
        if self.init_lora_weights == "loftq":
            raise ValueError("PeftType.ADALORA does not support LOFTQ; use LoraConfig, or init_lora_weights=True.")
        super().__post_init__()
        self.peft_type = "ADALORA"
        if self.use_dora:
            raise ValueError("PeftType.ADALORA does not support DoRA.")
        if self.total_step is None or self.total_step <= 0:
            raise ValueError("AdaLoRA does not work when `total_step` is None, supply a value > 0.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or "
                f"increase `total_step` (tinit={self.tinit}, tfinal={self.tfinal}, total_step={self.total_step})."
            )
        if self.orth_reg_weight < 0:
            raise ValueError(
                f"`orth_reg_weight` should be greater than or equal to 0, but the value passed is "
                f"{self.orth_reg_weight}"
            )
        if self.r != type(self).r:
            warnings.warn(
                f"Note that `r` is not used in AdaLora and will be ignored (r={self.r}). If you intended to set the "
                f"initial rank, use `init_r` instead (init_r={self.init_r}).",
                PeftWarning,
                stacklevel=3,
            )
        if self.use_rslora or self.lora_bias:
            warnings.warn("AdaLoRA has no use_rslora and no lora_bias; they are ignored", PeftWarning, stacklevel=3)

    def for_layer(self, name: str) -> Any:
        """This config with the number of triplets that rank_pattern keeps on one layer."""
        mask = pattern_of(self, name)
        if mask is None:
            return self
        out = copy.copy(self)
        out.kept = sum(mask)  # type: ignore[misc]
        return out


def pattern_of(cfg: Any, path: str) -> list[bool] | None:
    """Which triplets of a layer are kept, where that is settled."""
    table = cfg.rank_pattern or {}
    found = table.get(f"{path}.lora_E", table.get(f"base_model.model.{path}.lora_E"))
    return list(found) if isinstance(found, list | tuple) else None


def budget(cfg: Any, step: int, start: int, end: int) -> int:
    """How many triplets all layers together keep after `step`: from `start`, by a cube, to `end` (section 3.3)."""
    last = cfg.total_step - cfg.tfinal
    if step <= cfg.tinit:
        return start
    left = max(0.0, 1 - (step - cfg.tinit) / (last - cfg.tinit))
    return int((start - end) * left**3 + end)


class AdaLoRA(LowRank):
    Config = AdaLoraConfig
    sites = frozenset({"linear", "conv", "embedding"})
    prefix = "lora_"
    dropout = "lora_dropout"
    defaults = "adalora"
    example: ClassVar[dict[str, Any]] = {"total_step": 100}
    settings: ClassVar[frozenset[str]] = frozenset({"init_r"})
    schedule_fields = ("rank_pattern",)

    def check(self, cfg: Any, site: Site) -> None:
        for key in ("init_r", "deltaT"):
            if getattr(cfg, key) <= 0:
                raise ValueError(
                    f"`{key}` should be a positive integer value but the value passed is {getattr(cfg, key)} ({site!r})"
                )
        if site.groups > 1:
            raise AdapterError(
                f"AdaLoRA on {site!r}: its factors read whole patches, and each of the {site.groups} groups reads a "
                "part; take the layer out of target_modules"
            )

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        r = cfg.init_r if cfg.kept is None else cfg.kept
        columns = site.inp * math.prod(site.kernel)
        return {"lora_A": Spec((r, columns)), "lora_E": Spec((r, 1)), "lora_B": Spec((site.out, r))}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        first = [torch.randn_like(getattr(p, key)) for key in PARTS]  # peft draws twice: one seed, the same start
        torch.randn(1)
        for key, t in zip(PARTS, first, strict=True):
            zero = key == "lora_E" and cfg.init_lora_weights is not False
            p.fill(key, t.zero_() if zero else t.normal_(0, 0.02))
        return None

    def scaling(self, cfg: Any) -> float:
        alpha = cfg.lora_alpha if cfg.lora_alpha > 0 else float(cfg.init_r)
        return alpha / (cfg.init_r + 1e-5)

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        A = p.lora_A * p.lora_E
        if p.site.kernel:
            A = A.reshape(-1, p.site.inp, *p.site.kernel)
            return p.lora_B.reshape(*p.lora_B.shape, *[1] * len(p.site.kernel)), A
        return p.lora_B, A

    def output_loss(self, ps: Sequence[View]) -> Tensor | None:
        """The orthogonality loss (equation 4), a mean over all A and B."""
        weight = ps[0].cfg.orth_reg_weight
        if not weight:
            return None
        refuse(ps[0].lora_A, self.name, "its loss reads all factors after the blocks that hold them")
        squares = [t for p in ps for t in (p.lora_A @ p.lora_A.mT, p.lora_B.mT @ p.lora_B)]
        norms = [torch.linalg.norm(t - torch.eye(len(t), dtype=t.dtype, device=t.device)) for t in squares]
        return weight * torch.stack([n.to(norms[0].device) for n in norms]).mean()

    # -- the schedule ------------------------------------------------------------------------------------
    def scheduled(self, cfg: Any) -> bool:
        return not cfg.inference_mode

    def on_step(self, cfg: Any, ps: dict[str, View], step: int, memory: dict[str, Tensor]) -> None:
        last = cfg.total_step - cfg.tfinal
        if step > last:
            for path, p in ps.items():
                _keep(p, pattern_of(cfg, path))
            return
        if step < last:
            self.remember(cfg, ps, memory)
        if step == last or (step > cfg.tinit and step % cfg.deltaT == 0):
            kept = self.allocate(cfg, ps, step, memory)
            if step == last:
                cfg.rank_pattern = {f"{path}.lora_E": mask for path, mask in kept.items()}
                memory.clear()

    def remember(self, cfg: Any, ps: dict[str, View], memory: dict[str, Tensor]) -> None:
        """Running means of |p grad| and of its deviation (equations 9 and 10)."""
        for path, p in ps.items():
            for key in PARTS:
                t = getattr(p, key)
                now = torch.zeros_like(t) if t.grad is None else (t * t.grad).abs()
                mean, unsure = f"{path}.{key}.importance", f"{path}.{key}.uncertainty"
                if mean not in memory:
                    memory[mean], memory[unsure] = torch.zeros_like(t), torch.zeros_like(t)
                memory[mean] = memory[mean].to(t).lerp(now, 1 - cfg.beta1)
                memory[unsure] = memory[unsure].to(t).lerp((now - memory[mean]).abs(), 1 - cfg.beta2)

    def allocate(self, cfg: Any, ps: dict[str, View], step: int, memory: dict[str, Tensor]) -> dict[str, list[bool]]:
        """Zero E outside the best triplets of all layers together; what is kept, by layer."""
        if not memory:
            return {path: [True] * len(p.lora_E) for path, p in ps.items()}
        scores = {path: _score(memory, path) for path in ps}
        every = torch.cat([s.cpu() for s in scores.values()])
        cut = len(every) - budget(cfg, step, len(every), cfg.target_r * len(ps))
        if cut <= 0:
            return {path: [True] * len(s) for path, s in scores.items()}
        threshold = every.kthvalue(cut).values.item()
        kept = {path: (s > threshold).tolist() for path, s in scores.items()}
        for path, p in ps.items():
            _keep(p, kept[path])
        return kept

    # -- files ---------------------------------------------------------------------------------------------
    def to_disk(self, cfg: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = dict(tensors)
        for key, t in tensors.items():
            path, _, part = key.removeprefix("base_model.model.").rpartition(".")
            mask = pattern_of(cfg, path) if part in PARTS else None
            axis = 1 if part == "lora_B" else 0
            if mask is not None and t.shape[axis] == len(mask):
                rows = torch.tensor([i for i, on in enumerate(mask) if on], device=t.device, dtype=torch.long)
                out[key] = t.index_select(axis, rows)
        return out

    def from_disk(self, cfg: Any, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """A file with fewer triplets fits a model with more: those left over are zero."""
        out = dict(tensors)
        for key, t in tensors.items():
            wanted = shapes.get(key)
            if wanted is None or not key.endswith(PARTS) or t.dim() != 2:
                continue
            axis = 1 if key.endswith("lora_B") else 0
            if t.shape[axis] < wanted[axis] and t.shape[1 - axis] == wanted[1 - axis]:
                out[key] = t.new_zeros(wanted)
                out[key].narrow(axis, 0, t.shape[axis]).copy_(t)
        return out


def _keep(p: View, mask: list[bool] | None) -> None:
    if mask is not None and len(mask) == len(p.lora_E):
        p.lora_E.data[~torch.tensor(mask, device=p.lora_E.device)] = 0.0


def _score(memory: dict[str, Tensor], path: str) -> Tensor:
    """One number a triplet: its value's importance and the means of its vectors' (equation 8)."""
    A, E, B = (memory[f"{path}.{k}.importance"] * memory[f"{path}.{k}.uncertainty"] for k in PARTS)
    return E.flatten() + A.mean(dim=1) + B.mean(dim=0)
