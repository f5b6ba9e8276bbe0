"""Adapters in a model itself, without a PeftModel around it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from torch import Tensor, nn

from .errors import AdapterError, NoMatchingPeftModuleError


def inject_adapter_in_model(
    peft_config: Any,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Adapt a model's layers in place and return the model itself, not a PeftModel.

    state_dict: adapt exactly the layers that a saved adapter holds. Raises ValueError for prompt methods, which act
    on the whole model.
    """
    from .config import PromptLearningConfig
    from .tuner import Tuner

    if isinstance(peft_config, PromptLearningConfig):
        raise ValueError("`create_and_replace` does not support prompt learning and adaption prompt yet.")
    given, model = model, getattr(model, "_orig_mod", model)  # inside what torch.compile gave
    if state_dict is not None:
        peft_config = _only_saved(peft_config, state_dict, model)
    held = model.__dict__.get("_veneer_tuner")
    if held is not None:
        held[0].add_adapter(adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage)
        held[0].set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        model.__dict__["peft_config"] = held[0].peft_config
    else:
        tuner = Tuner(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        model.__dict__["_veneer_tuner"] = (tuner,)  # a tuple: not registered as a child, which would be a cycle
        model.__dict__["peft_config"] = tuner.peft_config
    return given


def _only_saved(config: Any, state_dict: dict[str, Tensor], model: nn.Module) -> Any:
    """The config with the layers that the tensors are for. Warns where it names others itself."""
    from .registry import method_of

    if getattr(config, "target_parameters", None):
        raise ValueError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`, whose "
            "place the tensors' names do not tell; inject it without state_dict and load the tensors afterwards"
        )
    prefix = method_of(config).prefix
    named = {k.partition(f".{prefix}")[0].removeprefix("base_model.model.") for k in state_dict if f".{prefix}" in k}
    if not named:
        raise AdapterError(f"state_dict holds no key of a {config.peft_type} adapter ('.{prefix}...')")
    _compare(config, named, model)
    out = copy.copy(config)
    out.target_modules = named
    return out


def _compare(config: Any, named: set[str], model: nn.Module) -> None:
    from .inject import candidates
    from .registry import method_of
    from .targets import match_targets

    if not config.target_modules:
        return
    try:
        kind = method_of(config).defaults
        wanted = {m.name for m in match_targets(model, config, names=candidates(model), kind=kind)}
    except NoMatchingPeftModuleError:
        wanted = set()
    for whose, more in (("PEFT config", wanted - named), ("state_dict", named - wanted)):
        if more:
            warnings.warn(
                "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the "
                "provided state_dict. This is not necessarily an issue and can be ignored if this was the intent. The "
                f"{whose} contained these additional target modules: {sorted(more)}. Adapters were made "
                "where the state_dict has tensors.",
                RuntimeWarning,
                stacklevel=3,
            )
