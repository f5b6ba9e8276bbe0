"""Riemannian preconditioned LoRA: each factor's gradient in the metric of the other. Zhang and Pilanci 2024,
arXiv:2402.02347, section 3.

    grad A <- (B^T B + reg I)^-1 grad A,   grad B <- grad B (A A^T + reg I)^-1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import AdapterError
from .pairs import Pair, group_stacks, pairs, trained


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An `optimizer_cls` over the trained parameters whose step preconditions LoRA's gradients first.

    reg: what is added to the r x r metric's diagonal; it must be positive, since B starts at zero. Further arguments
    go to `optimizer_cls`. Embedding factors and parameters outside LoRA keep their gradients.

    Raises ValueError for a model without a trained pair, or reg <= 0, TypeError where `optimizer_cls` is no optimizer.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, got {optimizer_cls!r}")
    if not reg > 0:
        raise AdapterError(f"reg={reg}: must be above 0, or the metric of a B that starts at zero has no inverse")
    found = [q for q in pairs(model) if q.A.requires_grad and q.B.requires_grad]
    if not found:
        raise AdapterError(
            "create_riemannian_optimizer found no trainable lora_A/lora_B parameter pairs: the preconditioner is for "
            "LoRA adapters whose factors both train"
        )
    optimizer = optimizer_cls(trained(model), **{"lr": lr, **kwargs})

    def before_step(opt: Optimizer, args: tuple[Any, ...], kw: dict[str, Any]) -> tuple[tuple[Any, ...], dict]:
        closure = args[1] if len(args) > 1 else kw.get("closure")  # args begins with the optimizer
        if closure is None:
            _precondition_all(found, reg)
            return args, kw

        def preconditioned() -> Any:  # the gradients are the closure's, so they change after it
            with torch.enable_grad():
                loss = closure()
            _precondition_all(found, reg)
            return loss

        return (args[0], preconditioned, *args[2:]), {k: v for k, v in kw.items() if k != "closure"}

    optimizer.register_step_pre_hook(before_step)
    return optimizer


@torch.no_grad()
def _precondition_all(found: list[Pair], reg: float) -> None:
    for q in found:
        gA, gB = q.A.grad, q.B.grad
        if gA is None or gB is None:
            continue
        A, B = (group_stacks(t.float(), q.site.groups) for t in (q.A, q.B))
        eye = reg * torch.eye(A.shape[1], device=A.device)
        new_A = torch.linalg.solve(B.mT @ B + eye, group_stacks(gA.float(), q.site.groups))
        new_B = torch.linalg.solve(A @ A.mT + eye, group_stacks(gB.float(), q.site.groups), left=False)
        gA.copy_(new_A.reshape(gA.shape))
        gB.copy_(new_B.reshape(gB.shape))
