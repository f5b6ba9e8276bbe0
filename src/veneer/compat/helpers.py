"""The small functions that libraries take from inside peft, over veneer's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..files import locate
from ..graph import compact_names
from ..inject import candidates, save_whole
from ..layer import Adapted
from ..patterns import TargetSpec, layer_index, suffix_or_pattern
from ..replace import SavedModule, Wrapper
from ..targets import ALL_LINEAR, match_targets
from ..tuner import Tuner
from ..tying import tied_with_embedding

__all__ = ["save_whole", "tied_with_embedding"]


# -- tensors ----------------------------------------------------------------------------------------------
def infer_device() -> str:
    """The accelerator's name ("cuda", "mps", "xpu", ...), else "cpu"."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """(rows, n) labels -> decoder inputs: the start token in front, the last token gone, -100 become padding."""
    if pad_token_id is None:
        raise ValueError("self.model.config.pad_token_id has to be defined.")
    start = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What tells whether two tensors share memory."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise ValueError("You have to provide either input_ids or inputs_embeds")
    return given.shape[0]


def create_attention_mask(
    model: Any,
    *,
    model_input: Any,
    attention_mask: Any,
    past_key_values: Any,
    cache_position: Any,
    batch_size: int,
    sequence_length: int,
    position_ids: Any,
) -> Any:
    """transformers' own masks for a generating call of `model`."""
    from transformers.masking_utils import create_masks_for_generate

    make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
    return make(
        config=model.config,
        inputs_embeds=model_input,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
    )


# -- words ------------------------------------------------------------------------------------------------
def str_to_bool(value: str) -> int:
    """1 for yes, true, on and the like, 0 for their opposites. Raises ValueError for another word."""
    word = value.lower()
    if word in ("y", "yes", "t", "true", "on", "1"):
        return 1
    if word in ("n", "no", "f", "false", "off", "0"):
        return 0
    raise ValueError(f"invalid truth value {value!r}; use true or false")


def match_target_against_key(target_pattern: str, key: str) -> re.Match[str] | None:
    return re.fullmatch(target_pattern, key)


def get_pattern_key(pattern_keys: Sequence[str], key_to_match: str) -> str:
    """The first pattern that matches the end of a name, else the name."""
    fits = (k for k in pattern_keys if re.match(rf"(.*\.)?({k})$", key_to_match))
    return next(fits, key_to_match)


def check_file_exists_on_hf_hub(repo_id: str, filename: str, **kwargs: Any) -> bool | None:
    """Whether a repository, or a folder, has a file; None where that cannot be known offline."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    return locate(repo_id, filename, **kwargs) is not None


# -- modules ----------------------------------------------------------------------------------------------
def submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, its name in the parent) of a path."""
    path, _, leaf = key.rpartition(".")
    parent = model.get_submodule(path)
    return parent, model.get_submodule(key), leaf


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The path of a module in a model, "" where it is not in it."""
    return next((name for name, m in model.named_modules() if m is reference_module), "")


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """A copy of a module; share_weights: with the very same parameters."""
    import copy

    shared = {id(p): p for p in module.parameters()} if share_weights else {}
    return copy.deepcopy(module, memo=shared)


def get_device_map(model: Any) -> dict[str, Any]:
    found = getattr(model, "hf_device_map", None)
    return found if found is not None else {"": next(p.device for p in model.parameters())}


def onload_layer(layer: nn.Module) -> Any:
    """A context in which a layer that accelerate has offloaded has its weights."""
    from contextlib import nullcontext

    from accelerate.utils import align_module_device

    return align_module_device(layer) if hasattr(layer, "_hf_hook") else nullcontext()


def get_quantization_config(model: nn.Module, method: str) -> Any:
    """The model's quantisation settings, where it was quantised by `method`."""
    if getattr(model, "quantization_method", None) != method:
        return None
    config: Any = getattr(model, "config", None)
    return getattr(config, "quantization_config", None)


def input_embeddings_name(model: Any, default: str | None = None) -> str | None:
    """The last part of the input embedding's path."""
    if not hasattr(model, "get_input_embeddings"):
        return default
    table = model.get_input_embeddings()
    found = next((name for name, m in model.named_modules() if m is table), None)
    return default if found is None else found.rpartition(".")[2]


def set_whole(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Switch the modules trained whole to an adapter."""
    for module in model.modules():
        if isinstance(module, SavedModule):
            module.set_adapter(adapter_name, inference_mode=inference_mode)


def freeze_adapter(model: nn.Module, adapter_name: str) -> None:
    for module in model.modules():
        if isinstance(module, SavedModule) or (isinstance(module, Adapted) and adapter_name in module.entries):
            module.require_grad(adapter_name, False)


# -- targets ----------------------------------------------------------------------------------------------
def check_target_module_exists(config: Any, key: str) -> bool:
    """Whether a config's patterns and layer numbers name this path."""
    spec = TargetSpec.from_config(config)
    if suffix_or_pattern(spec.exclude_modules, "exclude_modules")(key):
        return False
    if not suffix_or_pattern(spec.target_modules, "target_modules")(key):
        return False
    named = isinstance(spec.target_modules, tuple) and key in spec.target_modules
    if named or not spec.layers_to_transform:
        return True
    return layer_index(key, spec.layers_pattern) in spec.layers_to_transform


def _tuner(model: Any) -> Tuner:
    return model if isinstance(model, Tuner) else model.base_model


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """The paths that an adapter's config matches, and the others."""
    found = _tuner(tuner)
    names = [name for name, _ in candidates(found.model)]
    hit = set(found.targeted[adapter_name])
    return {"matched": [n for n in names if n in hit], "unmatched": [n for n in names if n not in hit]}


def with_all_linear(peft_config: Any, model: nn.Module) -> Any:
    """The config with "all-linear" spelled out: the linear layers' names, the output head left out."""
    wanted = getattr(peft_config, "target_modules", None)
    if not isinstance(wanted, str) or wanted.lower() != ALL_LINEAR:
        return peft_config
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Only instances of PreTrainedModel support `target_modules='{ALL_LINEAR}'` here, and this is a "
            f"{type(model).__name__}"
        )
    names = [m.name for m in match_targets(model, peft_config, names=candidates(model))]
    peft_config.target_modules = {n.rpartition(".")[2] if not n[-1].isdecimal() else n for n in names}
    return peft_config


def minimal_target_modules(target_modules: Iterable[str], other_module_names: Iterable[str]) -> set[str]:
    """The shortest suffixes that name the targets and nothing else.

    Raises ValueError where the targets are no list of names or overlap with the others.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError("target_modules should be a list or set of strings.")
    targets, others = list(target_modules), set(other_module_names)
    if "" in targets:
        raise ValueError("target_modules should not contain an empty string.")
    both = set(targets) & others
    if both:
        raise ValueError(
            "target_modules and other_module_names contain common elements, this should not happen, please open a "
            "GitHub issue at https://github.com/huggingface/peft/issues with the code to reproduce this issue "
            f"({', '.join(sorted(both))})"
        )
    return set(compact_names(targets, others))


def check_adapters_to_merge(module: Adapted, adapter_names: Sequence[str] | None = None) -> list[str]:
    """Of the named (else the active) adapters those that are not merged yet. Raises ValueError for a string."""
    if isinstance(adapter_names, str):
        raise ValueError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    names = list(module.active_adapters if adapter_names is None else adapter_names)
    return [n for n in names if n not in module.merged_adapters]


# -- state dict keys --------------------------------------------------------------------------------------
def adapter_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """Beginnings of the keys in model.state_dict() that hold adapters on layers; of one adapter where it is named."""
    inside = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, Wrapper))
    out: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, Adapted) and not f"{path}.".startswith(inside or ("\0",)):
            names, holds = _containers(e.specs for e in module.entries.values()), set(module.entries)
        elif isinstance(module, Tuner):
            names, holds = _containers(module.shared_specs.values()), set(module.shared_specs)
        else:
            continue
        start = f"{path}." if path else ""
        if adapter_name is None:
            out |= {f"{start}{n}" for n in names}
        elif adapter_name in holds:
            out |= {f"{start}{n}.{adapter_name}" for n in names}
    return out


def _containers(specs: Iterable[dict[str, Any]]) -> set[str]:
    return {key.partition(".")[0] for each in specs for key in each}


def under_prefixes(state_dict: dict[str, Any], prefixes: set[str]) -> dict[str, Any]:
    """The entries whose keys are one of the prefixes or lie below one."""
    below: Callable[[str], bool] = lambda key: any(key == p or key.startswith(f"{p}.") for p in prefixes)
    return {k: v for k, v in state_dict.items() if below(k)}
