"""QALoRA: A reads the mean of each group of inputs, as the base's quantisation has one scale a group. Xu et al. 2023,
arXiv:2309.14717, section 3.3.

    y = W x + s B A (L / G) pool(x),   pool: sums over groups of G inputs, L = inp / G of them

    lora_A.weight (r, inp / G)  on a base quantised in groups, G = qalora_group_size
    lora_A.weight (r, inp)      elsewhere, where it is plain LoRA, as in the files of peft
    lora_B.weight (out, r)
Merges.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from ..kinds import Spec
from ..site import Site
from ..view import View
from .lora import DENSE, LoraFactors, lora_check, lora_factors, lora_tensors


class QALoRA(LoraFactors):
    sites = DENSE
    example: ClassVar[dict[str, Any]] = {"use_qalora": True}
    exempt: ClassVar[dict[str, str]] = {
        "forward == merged with groups": "A reads every channel and a grouped kernel does not, so merging is refused",
    }

    def check(self, cfg: Any, site: Site) -> None:
        lora_check(cfg, site)
        if site.grouped and (cfg.qalora_group_size < 1 or site.inp % cfg.qalora_group_size):
            raise ValueError(
                f"`use_qalora=True` requires `module.in_features` ({site.inp}) to be divisible by 'qalora_group_size' "
                f"({cfg.qalora_group_size}) ({site!r})"
            )

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        out = lora_tensors(cfg, site)
        if site.grouped:
            out["lora_A.weight"] = replace(out["lora_A.weight"], shape=(cfg.r, site.inp // cfg.qalora_group_size))
        return out

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        B, A = lora_factors(p)
        if p.site.grouped:
            size = p.cfg.qalora_group_size
            A = A.repeat_interleave(size, 1) * (A.shape[1] / size)
        return B, A
