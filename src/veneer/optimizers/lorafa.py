"""LoRA-FA: A stays as it was drawn, B trains. Zhang et al. 2023, arXiv:2308.03303, section 3; the gradient of B is
projected so that the step of the weight is closest to a full one (LoRA-Pro, arXiv:2407.18242, section 3).

    grad B <- grad B (A A^T)^-1 / s^2,   s the scaling;   then AdamW

A frozen A needs no input for its gradient, so the layer's input is not kept for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import AdapterError
from ..layer import adapted_layers
from .pairs import Pair, group_stacks, named_trained, pairs

JITTER = 1e-8  # keeps A A^T invertible where rows of A coincide


class LoraFAOptimizer(Optimizer):
    """AdamW that projects the gradients of the B factors in `pairs` (id of the parameter -> its pair)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ):
        if lr < 0 or eps < 0 or not all(0 <= b < 1 for b in betas):
            raise AdapterError(f"lr={lr}, eps={eps}, betas={betas}: lr and eps must be >= 0, betas in [0, 1)")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)
        self.pairs: dict[int, Pair] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    pair = self.pairs.get(id(p))
                    self._update(p, p.grad if pair is None else projected(pair, p.grad), group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        (b1, b2), t = group["betas"], state["step"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(b1).add_(grad, alpha=1 - b1)
        square.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - b2**t) / (1 - b1**t)
        p.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0:
            p.mul_(1 - group["lr"] * group["weight_decay"])


def projected(pair: Pair, grad: Tensor) -> Tensor:
    """grad (A A^T)^-1 / s^2, in float32, group by group on a convolution."""
    if pair.scaling == 0:
        return grad
    A = group_stacks(pair.A.float(), pair.site.groups)
    metric = A @ A.mT + JITTER * torch.eye(A.shape[1], device=A.device)
    g = group_stacks(grad.float(), pair.site.groups)
    return (torch.linalg.solve(metric, g, left=False) / pair.scaling**2).reshape(grad.shape).to(grad.dtype)


def _scalings(model: nn.Module) -> dict[int, float]:
    """id of a LoRA factor -> the scaling of its adapter on its layer, of the active adapters."""
    active = ((layer, name) for _, layer in adapted_layers(model) for name in layer.active_adapters)
    return {
        id(getattr(*where)): layer.scaling[name]
        for layer, name in active
        if name in layer.entries
        for key, where in layer.entries[name].where.items()
        if key in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    }


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """Freeze the A of every active LoRA adapter and return the optimizer of what still trains.

    r, lora_alpha, use_rslora: those of the adapters' configs; the scaling of each layer is read off the layer, so
    patterns and scales set by hand count. Embeddings train both factors: their input is ids, and their A starts at
    zero. The one group has the parameters' `names` and `scaling_factors` (None beside LoRA) along.

    Raises ValueError where there is no LoRA pair, or use_rslora contradicts a config.
    """
    configs = getattr(model, "peft_config", {})
    active = list(getattr(model, "active_adapters", configs))
    if use_rslora is not None:
        odd = [n for n in active if bool(getattr(configs.get(n), "use_rslora", False)) != use_rslora]
        if odd:
            raise AdapterError(
                f"use_rslora={use_rslora} was passed to create_lorafa_optimizer, and the config of "
                f"{', '.join(map(repr, odd))} says otherwise; set it in LoraConfig and leave it out here"
            )
    found = [q for q in pairs(model) if q.B.requires_grad]
    scalings = _scalings(model)
    if not found and not any(p.requires_grad and id(p) in scalings for p in model.parameters()):
        raise AdapterError(
            "create_lorafa_optimizer found no active lora_A and lora_B: LoRA-FA freezes A and trains B, so it needs a "
            "LoRA adapter on linear, convolution or embedding layers"
        )
    for q in found:
        q.A.requires_grad_(False)
    named = named_trained(model)
    group = {
        "params": [p for _, p in named],
        "names": [n for n, _ in named],
        "scaling_factors": [scalings.get(id(p)) for _, p in named],
    }
    optimizer = LoraFAOptimizer([group], lr=lr, weight_decay=weight_decay)
    optimizer.pairs = {id(q.B): q for q in found}
    return optimizer
