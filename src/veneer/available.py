"""Whether an optional library is there, and how new transformers is."""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib import metadata

from packaging.version import Version


@cache
def has(module: str) -> bool:
    """Whether a module can be imported; it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # a parent is missing, or the name is blocked in sys.modules
        return False


@cache
def _version(distribution: str) -> Version:
    return Version(metadata.version(distribution))


@cache
def at_least(distribution: str, version: str) -> bool:
    """Whether a distribution is installed in this version or a newer one, its development versions counted in."""
    return has(distribution) and _version(distribution) >= Version(f"{version}.dev0")


def is_bnb_available() -> bool:
    return has("bitsandbytes")


def is_bnb_4bit_available() -> bool:
    return has("bitsandbytes") and _version("bitsandbytes") >= Version("0.40")


def is_gptqmodel_available() -> bool:
    return has("gptqmodel")


def is_optimum_available() -> bool:
    return has("optimum")


def is_aqlm_available() -> bool:
    return has("aqlm")


def is_eetq_available() -> bool:
    return has("eetq")


def is_hqq_available() -> bool:
    return has("hqq")


def is_inc_available() -> bool:
    return has("neural_compressor")


def is_torchao_available() -> bool:
    return has("torchao")


def is_torchao_ge_v0_18_0() -> bool:
    return at_least("torchao", "0.18.0")


def is_te_available() -> bool:
    return has("transformer_engine")


def is_te_pytorch_available() -> bool:
    return has("transformer_engine.pytorch")


def is_diffusers_available() -> bool:
    return has("diffusers")


def is_torch_tpu_available() -> bool:
    return has("torch_xla")


def is_xpu_available() -> bool:
    import torch

    return torch.xpu.is_available()


is_transformers_ge_v5 = at_least("transformers", "5.0.0")
is_transformers_ge_v5_1_0 = at_least("transformers", "5.1.0")
is_transformers_ge_v5_4_0 = at_least("transformers", "5.4.0")
is_transformers_ge_v5_6_0 = at_least("transformers", "5.6.0")
is_transformers_ge_v5_13_0 = at_least("transformers", "5.13.0")
is_transformers_ge_v5_17_0 = at_least("transformers", "5.17.0")
is_transformers_le_4_53 = not at_least("transformers", "4.54.0")
