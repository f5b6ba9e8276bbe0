"""A quantised base made ready for training adapters on it."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .errors import PeftWarning


def _packed(p: Tensor) -> bool:
    """Whether a parameter holds quantised values, whatever its dtype says."""
    kind = type(p)
    ours = kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("optimum.quanto.")
    return ours or not p.is_floating_point()


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a base, cast its half precision parameters (norms, embeddings, head) to float32, and switch gradient
    checkpointing on, for which the embeddings' output is made to require gradients. Returns the model.

    A GPTQ, AQLM, EETQ, HQQ or torchao model keeps its dtypes: their kernels expect them.
    """
    method = str(getattr(model, "quantization_method", "") or "").rpartition(".")[2].lower()
    keeps = method in ("gptq", "aqlm", "eetq", "hqq", "torchao")
    for p in model.parameters():
        p.requires_grad_(False)
        if not keeps and p.dtype in (torch.float16, torch.bfloat16) and not _packed(p):
            p.data = p.data.to(torch.float32)
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    loaded = bool(getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False))
    if use_gradient_checkpointing and (loaded or method):
        _checkpoint(model, gradient_checkpointing_kwargs or {})
    return model


def _checkpoint(model: Any, options: dict[str, Any]) -> None:
    if options.get("use_reentrant", True):
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(_require_grad)
    takes = "gradient_checkpointing_kwargs" in inspect.signature(model.gradient_checkpointing_enable).parameters
    if options and not takes:
        warnings.warn(
            f"gradient_checkpointing_kwargs={options} have no effect: {type(model).__name__} does not take them",
            PeftWarning,
            stacklevel=3,
        )
    model.gradient_checkpointing_enable(**({"gradient_checkpointing_kwargs": options} if takes else {}))


def _require_grad(module: nn.Module, args: tuple, output: Tensor) -> None:
    output.requires_grad_(True)
