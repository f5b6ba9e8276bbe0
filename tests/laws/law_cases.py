"""Every method of the registry, with small settings, on every kind of layer it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

from law_sites import SITES
from torch import Tensor, nn

from veneer import registry
from veneer.kinds import Prompt
from veneer.site import site_of


class Case(NamedTuple):
    method_name: str
    cfg_kwargs: dict[str, Any]
    site_name: str
    make_module: Callable[[], nn.Module]
    make_input: Callable[[], Tensor]
    variant: str = ""

    @property
    def id(self) -> str:
        return "-".join(x for x in (self.method_name, self.variant, self.site_name) if x)

    @property
    def kind(self) -> str:
        return SITES[self.site_name].kind


# Settings by method: variant -> config. A method that is not here runs with its config's defaults.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "LORA": {
        "": {"r": 4, "lora_alpha": 6},
        "rslora": {"r": 4, "use_rslora": True},
        "bias": {"r": 4, "lora_bias": True},
        "gaussian": {"r": 4, "init_lora_weights": "gaussian"},
        "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
        "pissa": {"r": 4, "init_lora_weights": "pissa"},
        "pissa-fast": {"r": 4, "init_lora_weights": "pissa_niter_16"},
        "olora": {"r": 4, "init_lora_weights": "olora"},
        "pattern": {"r": 4, "rank_pattern": {"second": 8}, "alpha_pattern": {"first": 3}},
    },
    "DORA": {"": {"r": 4, "use_dora": True}},
    "VERA": {"": {"r": 4, "d_initial": 0.1, "projection_prng_key": 3}},
    "OFT": {"": {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}, "neumann": {"r": 0, "oft_block_size": 4}},
    "IA3": {"": {"feedforward_modules": []}, "feedforward": {"feedforward_modules": ["first"]}},
    "TRAINABLE_TOKENS": {"": {"token_indices": [1, 3, 10]}},
    "LOHA": {"": {"r": 4, "alpha": 6}, "conv": {"r": 4, "use_effective_conv2d": True}},
}

PLAIN = {"Linear", "Conv2d", "Embedding"}  # where a variant of the settings runs too, beside "" on every site


def built(name: str) -> bool:
    """Whether the registry's method is one that adapts layers."""
    return not isinstance(registry.method(name), Prompt)


def fits(name: str, cfg_kwargs: dict[str, Any], site_name: str) -> bool:
    """Whether the method takes such a layer: its kind is listed and `check` does not refuse it."""
    method: Any = registry.method(name)
    layer = SITES[site_name]
    module = layer.module()
    site = site_of(module, "first", method.sites)
    if site is None or (layer.kind == "module") != (site.kind == "module"):
        return False
    entry = registry.METHODS[name]
    cfg = getattr(import_module(f"veneer.{entry.module}"), entry.config)(
        target_modules=["first", "second"], **cfg_kwargs
    )
    try:
        method.check(cfg, site)
    except ValueError:
        return False
    return True


def _cases() -> Iterator[Case]:
    for name in registry.METHODS:
        if not built(name):
            continue
        for variant, kwargs in SETTINGS.get(name, {"": {}}).items():
            for site_name, layer in SITES.items():
                if (not variant or site_name in PLAIN) and fits(name, kwargs, site_name):
                    yield Case(name, kwargs, site_name, layer.module, layer.input, variant)


CASES = list(_cases())

# Where peft 0.21.2 has no right file to compare with: "method-variant-layer" -> why.
NOT_SUPPORTED, NOT_ITS_MERGE = "peft refuses the layer", "peft's forward pass is not that of its merged weight"
NOT_LINEAR = "peft has this initial value for linear layers only"
BEYOND_PEFT: dict[str, str] = {
    **dict.fromkeys(["IA3-Conv1d", "IA3-Conv1d-circular", "IA3-Embedding"], NOT_SUPPORTED),
    **dict.fromkeys(["LOHA-Conv1D", "LOHA-Conv3d", "LOHA-Embedding", "LOHA-conv-Embedding"], NOT_SUPPORTED),
    **dict.fromkeys(["OFT-Conv1D", "OFT-Conv1d", "OFT-Conv1d-circular", "OFT-Conv3d"], NOT_SUPPORTED),
    **dict.fromkeys(["OFT-Conv2d", "OFT-neumann-Conv2d", "OFT-Conv2d-groups"], NOT_ITS_MERGE),
    **dict.fromkeys([f"LORA-{i}-Conv2d" for i in ("orthogonal", "pissa", "pissa-fast", "olora")], NOT_LINEAR),
    "LORA-pissa-fast-Linear": "peft draws the randomised decomposition anew on loading, from the global random state",
    "LORA-Conv1d-circular": "peft cannot run dilations and padding modes other than zeros",
    "DORA-Conv1d-circular": "peft cannot run dilations and padding modes other than zeros",
    "LOHA-Conv1d-circular": NOT_ITS_MERGE,
    "TRAINABLE_TOKENS-Linear": NOT_ITS_MERGE,
    "TRAINABLE_TOKENS-Conv1D": NOT_SUPPORTED,
}
