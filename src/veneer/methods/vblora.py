"""VB-LoRA: both factors are put together from sub-vectors, each a mixture of the top k of one bank of vectors.
Li et al. 2024, arXiv:2405.15179, section 3.2.

    y = W x + B A x,   a sub-vector of A's rows or B's columns = sum_k softmax(top-k logits)_k bank[index_k]

    vblora_logits_A (r, inp / b, h)          b = vector_length, h = num_vectors
    vblora_logits_B (out / b, r, h)
    base_model.vblora_vector_bank (h, b)     trained, one for all layers

The change is small at the start but not zero: a bank of zeros would have no gradient. Merges. With
save_only_topk_weights the file holds k indices and k - 1 weights for each sub-vector; that is enough for
inference, not for going on with training (the logits left out are -inf).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..config import AdapterConfig
from ..kinds import LowRank, Spec
from ..site import Site
from ..view import View

LOGITS = ("vblora_logits_A", "vblora_logits_B")


@dataclass
class VBLoRAConfig(AdapterConfig):
    """r: rank. num_vectors, vector_length: the bank's size; vector_length divides every layer's sizes. topk: vectors
    mixed in a sub-vector. save_only_topk_weights: a smaller file, for inference alone.

    vblora_dropout: on the adapter's input. bias: "none", "all" or "vblora_only". init_vector_bank_bound: the bank
    starts uniform within it. init_logits_std: the logits start normal with it.
    """

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "VBLORA"


def _index_dtype(n: int) -> torch.dtype:
    """The smallest integer type that files use for indices below n."""
    return torch.uint8 if n < 2**8 else torch.int16 if n < 2**15 else torch.int32 if n < 2**31 else torch.int64


class VBLoRA(LowRank):
    Config = VBLoRAConfig
    prefix = "vblora_"
    dropout = "vblora_dropout"
    defaults = "vblora"
    settings: ClassVar[frozenset[str]] = frozenset({"topk"})
    example: ClassVar[dict[str, Any]] = {"vector_length": 4, "num_vectors": 16}
    exempt: ClassVar[dict[str, str]] = {
        "identity at init": "the bank and the logits start random (section 3.2); from zero there is no gradient",
    }

    def check(self, cfg: Any, site: Site) -> None:
        for key in ("r", "topk"):
            if getattr(cfg, key) <= 0:
                raise ValueError(f"`{key}` {getattr(cfg, key)} should be a positive integer value ({site!r})")
        if cfg.topk > cfg.num_vectors:
            raise ValueError(f"`topk` {cfg.topk} is more than the bank's `num_vectors` {cfg.num_vectors} ({site!r})")
        for key, n in (("in_features", site.inp), ("out_features", site.out)):
            if n % cfg.vector_length:
                raise ValueError(f"`{key}` {n} must be divisible by `vector_length` {cfg.vector_length} ({site!r})")

    def shared(self, cfg: Any, sites: Sequence[Site]) -> dict[str, Spec]:
        bound, shape = cfg.init_vector_bank_bound, (cfg.num_vectors, cfg.vector_length)
        return {"vblora_vector_bank": Spec(shape, value=torch.empty(shape).uniform_(-bound, bound))}

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        b, h = cfg.vector_length, cfg.num_vectors
        shapes = {"vblora_logits_A": (cfg.r, site.inp // b, h), "vblora_logits_B": (site.out // b, cfg.r, h)}
        return {key: Spec(shape) for key, shape in shapes.items()}

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        for key in LOGITS:
            p.fill(key, torch.randn_like(getattr(p, key)) * cfg.init_logits_std)
        return None

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        logits = p.vblora_logits_A
        if p.training and logits.requires_grad:
            self._check_whole(p, logits)
        A, B = self.mixed(p, logits), self.mixed(p, p.vblora_logits_B)
        return B.transpose(1, 2).flatten(0, 1), A.flatten(1)

    def _check_whole(self, p: View, logits: Tensor) -> None:
        """Raise RuntimeError where the logits beside the largest are not there."""
        problem = (
            f"{p.site!r}: this adapter was saved with save_only_topk_weights=True, which leaves out the other logits, "
            "so its training cannot go on (infinity values in VB-LoRA logits); train from a full file, or call eval()"
        )
        missing = torch.isinf(logits[0, 0]).any()
        if torch.compiler.is_compiling():
            torch._assert_async(~missing, problem)
        elif missing:
            raise RuntimeError(problem)

    def mixed(self, p: View, logits: Tensor) -> Tensor:
        """Sub-vectors: (..., h) logits -> (..., b)."""
        top, index = logits.topk(p.cfg.topk, dim=-1)
        return (top.softmax(-1).unsqueeze(-1) * p.vblora_vector_bank[index]).sum(-2)

    def to_disk(self, cfg: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The k largest logits as indices and softmax weights; the last weight is what the others leave of one."""
        if not cfg.save_only_topk_weights:
            return tensors
        out = {}
        for key, t in tensors.items():
            if not key.endswith(LOGITS):
                out[key] = t
                continue
            top, index = t.topk(cfg.topk, dim=-1)
            out[f"{key}_topk_indices"] = index.to(_index_dtype(cfg.num_vectors))
            out[f"{key}_topk_weights"] = top.softmax(-1)[..., :-1].contiguous()
        return out

    def from_disk(self, cfg: Any, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The other way: logits are the weights' logarithms, -inf for those that the file leaves out."""
        out = {k: t for k, t in tensors.items() if "_topk_" not in k}
        for key, index in tensors.items():
            if not key.endswith("_topk_indices"):
                continue
            name = key.removesuffix("_topk_indices")
            weights = tensors.get(f"{name}_topk_weights")
            if weights is None:
                continue  # reported as a missing tensor
            last = 1 - weights.sum(-1, keepdim=True)
            logits = torch.full((*index.shape[:-1], cfg.num_vectors), -torch.inf, dtype=weights.dtype)
            out[name] = logits.scatter(-1, index.long(), torch.cat([weights, last], -1).clamp(min=0).log())
        return out
