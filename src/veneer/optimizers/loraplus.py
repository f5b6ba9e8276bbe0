"""LoRA+: B learns faster than A. Hayou et al. 2024, arXiv:2402.12354, section 4.

lr(A) = lr,   lr(B) = loraplus_lr_ratio * lr
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..errors import AdapterError
from .pairs import named_trained


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An `optimizer_cls` over the trained parameters in four groups.

    A factors and whatever matrices else train: `lr`. Embedding factors: `loraplus_lr_embedding` (1e-6). B factors
    and vectors: `lr * loraplus_lr_ratio`, biases and normalisation layers' parameters among them without weight
    decay. `loraplus_weight_decay` (or `weight_decay`) is that of the others, 0 by default. Further arguments go to
    `optimizer_cls`.

    Raises ValueError where nothing trains or the ratio is not positive.
    """
    if not loraplus_lr_ratio > 0:
        raise AdapterError(f"loraplus_lr_ratio={loraplus_lr_ratio}: must be above 0; the paper uses 2**4 = 16")
    decay = kwargs.pop("weight_decay", 0.0)
    decay = kwargs.pop("loraplus_weight_decay", decay)
    embedding_lr = kwargs.pop("loraplus_lr_embedding", 1e-6)
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B without decay": []}
    undecayed = _undecayed(model)
    for name, p in named_trained(model):
        groups[_group(name, p, undecayed)].append(p)
    if not any(groups.values()):
        raise AdapterError("no parameter trains; call model.set_adapter(name) or load with is_trainable=True")
    rates = {
        "A": (lr, decay),
        "embedding": (embedding_lr, decay),
        "B": (lr * loraplus_lr_ratio, decay),
        "B without decay": (lr * loraplus_lr_ratio, 0.0),
    }
    listed = [{"params": groups[k], "lr": rate, "weight_decay": wd} for k, (rate, wd) in rates.items()]
    return optimizer_cls(listed, **{"lr": lr, **kwargs})


def _group(name: str, p: nn.Parameter, undecayed: set[int]) -> str:
    if "lora_embedding_" in name:
        return "embedding"
    if "lora_B" in name or p.dim() == 1:
        return "B without decay" if id(p) in undecayed else "B"
    return "A"


def _undecayed(model: nn.Module) -> set[int]:
    """Biases, and all that normalisation layers hold."""
    out: set[int] = set()
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower()
        own = module.named_parameters(recurse=False)
        out |= {id(p) for leaf, p in own if norm or "bias" in leaf}
    return out
