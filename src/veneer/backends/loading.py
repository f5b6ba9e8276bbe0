"""Bases quantised while they load, by a short name: what `base: {quantize: nf4}` in a recipe means.

nf4            bitsandbytes, 4-bit NormalFloat in blocks of 64, scales quantised too (QLoRA)
fp4            the same with 4-bit floats
int8           bitsandbytes LLM.int8, one scale a row
int8-torchao   torchao, weight only, one scale a row
int4-torchao   torchao, weight only, groups of 32; CPUs hold each 4-bit number in a byte
hqq            HQQ, 4 bits, groups of up to 64
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..available import has
from ..errors import AdapterError, MissingExtra

__all__ = ["QUANTISED", "load_options", "require_library", "to_hqq"]

#: name -> the library that it needs
QUANTISED = {
    "nf4": "bitsandbytes",
    "fp4": "bitsandbytes",
    "int8": "bitsandbytes",
    "int8-torchao": "torchao",
    "int4-torchao": "torchao",
    "hqq": "hqq",
}

#: quant_method of a base's config -> (the library that reads its files, what to install)
READERS = {
    "bitsandbytes": ("bitsandbytes", "'veneer[quant]'"),
    "torchao": ("torchao", "'veneer[quant]'"),
    "hqq": ("hqq", "'veneer[quant]'"),
    "quanto": ("optimum.quanto", "'veneer[quant]'"),
    "aqlm": ("aqlm", "'veneer[quant]'"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
}


def load_options(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a base quantised in this way, to compute in `dtype`; none for hqq, which
    `to_hqq` applies to the loaded model.

    Raises MissingExtra where the library is not installed, AdapterError for an unknown name.
    """
    if name not in QUANTISED:
        raise AdapterError(f"quantize={name!r} is not one of {', '.join(QUANTISED)}")
    if not has(QUANTISED[name]):
        raise MissingExtra(f"quantize: {name} needs {QUANTISED[name]}: pip install 'veneer[quant]'")
    if name == "hqq":
        return {}
    config = _torchao(name) if name.endswith("torchao") else _bitsandbytes(name, dtype)
    return {"quantization_config": config, "device_map": {"": _device()}}


def require_library(settings: Any) -> str | None:
    """The way in which a base's files are quantised, by its config; None where they are not.

    Raises MissingExtra where the library that reads them is known and not installed.
    """
    given: Any = getattr(settings, "quantization_config", None)
    if given is None:
        return None
    values = given if isinstance(given, dict) else given.to_dict()
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    library, install = READERS.get(method, (None, ""))
    if library is not None and not has(library):
        raise MissingExtra(f"the base's files are quantised ({method}) and need {library}: pip install {install}")
    return method


def _device() -> str:
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def _bitsandbytes(name: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=name == "nf4",
        bnb_4bit_compute_dtype=dtype,
    )


def _torchao(name: str) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    if name == "int8-torchao":
        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(32)))  # type: ignore[attr-defined]


def to_hqq(model: Any, bits: int = 4, group_size: int = 64) -> Any:
    """Quantise the linear layers of a loaded model in place, all but its head; returns it.

    group_size: at most so many inputs share a scale; fewer where that does not divide a layer's.
    """
    if not has("hqq"):
        raise MissingExtra("HQQ layers need hqq: pip install 'veneer[quant]'")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    kept = {id(m) for m in (model.get_output_embeddings(), *model.children()) if m is not None}
    for path, layer in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and id(m) not in kept]:
        size = group_size
        while layer.in_features % size:
            size //= 2
        if size < 8:
            raise AdapterError(f"{path} ({layer.out_features}x{layer.in_features}): no group of 8 inputs or more")
        parent, _, leaf = path.rpartition(".")
        config = BaseQuantizeConfig(nbits=bits, group_size=size)
        new = HQQLinear(layer, config, compute_dtype=layer.weight.dtype, device=str(layer.weight.device))
        setattr(model.get_submodule(parent), leaf, new)
    model.is_quantized, model.quantization_method = True, "hqq"
    return model
