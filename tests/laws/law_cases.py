"""Every method of the registry, with small settings, on every kind of layer it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from law_sites import SITES
from torch import Tensor, nn

from veneer import registry
from veneer.kinds import Attach, Prompt
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
    "BOFT": {"": {"boft_block_size": 4}, "butterfly": {"boft_block_size": 2, "boft_n_butterfly_factor": 2}},
    "HRA": {"": {"r": 4}},
    "OSF": {"": {"effective_rank": 4}, "half": {}},
    "FROD": {"": {"sparse_rate": 0.1, "progressbar": False}},
    "HIRA": {"": {"r": 4}, "gaussian": {"r": 4, "init_weights": "gaussian"}},
    "DEFT": {"": {"r": 4}, "alpha": {"r": 4, "alpha": 6}},
    "PEANUT": {"": {"r": 4, "act_fn": "gelu"}, "deep": {"r": 4, "depth": 2, "act_fn": "silu", "scaling": 0.7}},
    "GLORA": {
        "": {"r": 4},
        "vector": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        "constant": {"config_A_B": "constant", "config_C": "none"},
        "none": {"r": 4, "config_A_B": "none", "config_D_E": "none"},
    },
    "SUPERTUNING": {"": {"sparsity": 0.9}, "supra": {"sparsity": 0.9, "r": 4, "lora_alpha": 6}},
    "ROAD": {v: {"group_size": 8, "variant": f"road_{v or 1}"} for v in ("", "2", "4")},
    "C3A": {"": {"block_size": 4, "init_weights": True}},
    "FOURIERFT": {"": {"n_frequency": 40, "scaling": 60.0, "init_weights": True}},
    "WAVEFT": {
        "": {"n_frequency": 40, "scaling": 2.0},
        "long": {"n_frequency": 40, "scaling": 2.0, "wavelet_family": "sym4"},
        "plain": {"n_frequency": 40, "scaling": 2.0, "use_idwt": False},
        "proportional": {"n_frequency": 40, "scaling": 2.0, "proportional_parameters": True},
    },
    "LOKR": {
        "": {"r": 4, "alpha": 6},
        "both": {"r": 3, "alpha": 12, "decompose_both": True, "decompose_factor": 8},
        "tucker": {"r": 1, "alpha": 8, "decompose_factor": 2, "use_effective_conv2d": True},
        "pattern": {"r": 2, "rank_pattern": {"second": 1}, "alpha_pattern": {"first": 3}, "init_weights": "lycoris"},
    },
    "GRALORA": {
        "": {"r": 4, "alpha": 4},
        "hybrid": {"r": 4, "alpha": 4, "hybrid_r": 2},
        "k": {"r": 4, "gralora_k": 4, "alpha": 2},
    },
    "MISS": {"": {"r": 4}, "padded": {"r": 5}, "mini": {"r": 4, "mini_r": 2, "init_weights": "mini"}},
    "MISS_BAT": {"": {"r": 4, "init_weights": "bat"}},
    "SHIRA": {"": {"r": 2, "random_seed": 5}},
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
    "ALORA": {"": {"r": 4, "alora_invocation_tokens": [5, 6]}},
    "BDLORA": {
        "": {"r": 4, "use_bdlora": {"target_modules_bd_a": ["first"], "target_modules_bd_b": ["sec"], "nblocks": 2}},
        "loose": {"r": 4, "use_bdlora": {"target_modules_bd_b": ["first"], "nblocks": 4, "match_strict": False}},
    },
    "KASA": {"": {"r": 4, "kasa_config": {"beta": 1e-3}}},
    "MICA": {"": {"r": 4, "init_lora_weights": "mica"}},
    "MONTECLORA": {"": {"r": 4, "monteclora_config": {"num_samples": 3, "sample_scaler": 0.1}}},
    "QALORA": {"": {"r": 4, "use_qalora": True, "qalora_group_size": 8}},
    "VELORA": {"": {"r": 4, "velora_config": {"num_groups": 5}}},
    "ADALORA": {"": {"init_r": 4, "target_r": 2, "lora_alpha": 20, "tinit": 2, "tfinal": 8, "total_step": 40}},
    "ADAMSS": {
        "": {"r": 6, "num_subspaces": 3, "subspace_rank": 2},
        "dynamic": {"r": 6, "num_subspaces": 4, "subspace_rank": 5, "use_dynamic_rank": True, "svd_threshold": 0.3},
    },
    "DELORA": {"": {"r": 4, "delora_lambda": 0.05}},  # normed directions: a first step is as large as lambda
    "PSOFT": {
        "": {"r": 4, "psoft_alpha": 6},
        "neumann": {"r": 4, "use_cayley_neumann": True, "ab_svd_init": "pissa_init"},
        "free": {"r": 4, "psoft_orth": False, "psoft_mag_a": False, "psoft_svd": "lowrank"},
    },
    "PVERA": {"": {"r": 4, "projection_prng_key": 3}},
    "RANDLORA": {
        "": {"r": 3, "randlora_alpha": 6, "projection_prng_key": 3},
        "sparse": {"r": 3, "randlora_alpha": 6, "sparse": True},
        "very-sparse": {"r": 3, "randlora_alpha": 6, "very_sparse": True, "save_projection": False},
    },
    "TINYLORA": {
        "": {"r": 3, "u": 8},
        "tied": {"r": 3, "u": 8, "weight_tying": 1.0, "save_projection": False},
    },
    "UNILORA": {"": {"theta_d_length": 48}, "indices": {"theta_d_length": 48, "save_indices": True}},
    "VBLORA": {"": {"num_vectors": 10, "vector_length": 4, "topk": 3, "init_vector_bank_bound": 0.05}},
    "VERA": {"": {"r": 4, "d_initial": 0.1, "projection_prng_key": 3}},
    "OFT": {"": {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}, "neumann": {"r": 0, "oft_block_size": 4}},
    "IA3": {"": {"feedforward_modules": []}, "feedforward": {"feedforward_modules": ["first"]}},
    "TRAINABLE_TOKENS": {"": {"token_indices": [1, 3, 10]}},
    "LILY": {"": {"r": 4, "num_B": 3, "scaling": 0.7}},
    "POLY": {"": {"r": 4, "n_skills": 3, "n_splits": 2}},
    "LOHA": {"": {"r": 4, "alpha": 6}, "conv": {"r": 4, "use_effective_conv2d": True}},
}

PLAIN = {"Linear", "Conv2d", "Embedding"}  # where a variant of the settings runs too, beside "" on every site


def built(name: str) -> bool:
    """Whether the registry's method is one that adapts layers, and can do so alone."""
    method = registry.method(name)
    return not isinstance(method, Attach | Prompt) and not getattr(method, "needs_others", False)


def fits(name: str, cfg_kwargs: dict[str, Any], site_name: str) -> bool:
    """Whether the method takes such a layer: its kind is listed and `check` does not refuse it."""
    method: Any = registry.method(name)
    layer = SITES[site_name]
    module = layer.module()
    site = site_of(module, "first", method.sites)
    if site is None or (layer.kind == "module") != (site.kind == "module"):
        return False
    cfg = method.Config(target_modules=["first", "second"], **cfg_kwargs)
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
FALLS_BACK = "peft takes one factor where its compiled extension is absent"
NOT_LINEAR = "peft has this initial value for linear layers only"
BEYOND_PEFT: dict[str, str] = {
    **dict.fromkeys([f"{m}-Conv1D" for m in ("OSF", "PEANUT", "GLORA", "SUPERTUNING")], NOT_SUPPORTED),
    "HIRA-Conv2d-groups": NOT_SUPPORTED,
    **dict.fromkeys(["BOFT-Conv1D", "BOFT-Conv1d", "BOFT-Conv1d-circular", "BOFT-Conv3d"], NOT_SUPPORTED),
    **dict.fromkeys(["BOFT-butterfly-Linear", "BOFT-butterfly-Conv2d"], FALLS_BACK),
    **dict.fromkeys(
        ["HRA-Conv1D", "HRA-Conv1d", "HRA-Conv1d-circular", "HRA-Conv2d-groups", "HRA-Conv3d"], NOT_SUPPORTED
    ),
    **dict.fromkeys(["ROAD-Conv1D", "ROAD-Conv1d", "ROAD-Conv1d-circular", "ROAD-Conv2d"], NOT_SUPPORTED),
    **dict.fromkeys(["ROAD-Conv2d-1x1", "ROAD-Conv3d", "ROAD-Embedding"], NOT_SUPPORTED),
    **dict.fromkeys([f"ROAD-{v}-{s}" for v in "24" for s in ("Conv2d", "Embedding")], NOT_SUPPORTED),
    **dict.fromkeys(["BEFT-Conv1D", "BEFT-Conv1d", "BEFT-Conv1d-circular", "BEFT-Conv3d"], NOT_SUPPORTED),
    **dict.fromkeys(["BEFT-Conv2d", "BEFT-Conv2d-1x1", "BEFT-Conv2d-groups"], NOT_SUPPORTED),
    **dict.fromkeys(["MISS-Conv1D", "MISS_BAT-Conv1D", "SHIRA-Conv1D"], NOT_SUPPORTED),
    **dict.fromkeys(["C3A-Conv1D", "LOKR-Conv1D", "LOKR-Conv3d"], NOT_SUPPORTED),
    **dict.fromkeys([f"LOKR{v}-Embedding" for v in ("", "-both", "-tucker", "-pattern")], NOT_SUPPORTED),
    "LOKR-Conv1d-circular": NOT_ITS_MERGE,
    **dict.fromkeys([f"ADALORA-{s}" for s in ("Conv1d", "Conv1d-circular", "Conv3d", "Embedding")], NOT_SUPPORTED),
    **dict.fromkeys(["ADAMSS-Conv1D", "DELORA-Conv1D", "DELORA-Embedding", "PSOFT-Conv1D"], NOT_SUPPORTED),
    "POLY-Conv1D": NOT_SUPPORTED,
    "LILY-Conv1D": NOT_SUPPORTED,
    "POLY-Linear-no-bias": "peft takes inputs of three axes only",
    **dict.fromkeys(["IA3-Conv1d", "IA3-Conv1d-circular", "IA3-Embedding"], NOT_SUPPORTED),
    **dict.fromkeys(["LOHA-Conv1D", "LOHA-Conv3d", "LOHA-Embedding", "LOHA-conv-Embedding"], NOT_SUPPORTED),
    **dict.fromkeys(["OFT-Conv1D", "OFT-Conv1d", "OFT-Conv1d-circular", "OFT-Conv3d"], NOT_SUPPORTED),
    **dict.fromkeys(["OFT-Conv2d", "OFT-neumann-Conv2d", "OFT-Conv2d-groups"], NOT_ITS_MERGE),
    **dict.fromkeys([f"LORA-{i}-Conv2d" for i in ("orthogonal", "pissa", "pissa-fast", "olora")], NOT_LINEAR),
    "LORA-pissa-fast-Linear": "peft draws the randomised decomposition anew on loading, from the global random state",
    **dict.fromkeys(["BDLORA-Conv1D", "KASA-Conv1D"], NOT_SUPPORTED),
    **dict.fromkeys(
        [f"ALORA-{s}" for s in ("Linear", "Linear-no-bias", "Conv1D")], "peft's acts in language models only"
    ),
    "QALORA-Conv1d-circular": "peft cannot run dilations and padding modes other than zeros",
    "LORA-Conv1d-circular": "peft cannot run dilations and padding modes other than zeros",
    "DORA-Conv2d-groups": "peft divides by another length than that of W + B A",
    "DORA-Conv1d-circular": "peft cannot run dilations and padding modes other than zeros",
    "LOHA-Conv1d-circular": NOT_ITS_MERGE,
    "TRAINABLE_TOKENS-Linear": NOT_ITS_MERGE,
    "HIRA-Conv1d-circular": NOT_ITS_MERGE,
    "TRAINABLE_TOKENS-Conv1D": NOT_SUPPORTED,
}

# What a call of peft's model must be given beside the input, by method.
GIVEN: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "POLY": lambda x: {"task_ids": torch.zeros(len(x), dtype=torch.long)},
}

# Where 20 training steps differ from peft's on purpose: "method-variant-layer" -> why, in the words of departures.md.
PARITY_DIFFERS: dict[str, str] = {
    **dict.fromkeys(
        [f"MONTECLORA-{s}" for s in ("Linear", "Linear-no-bias", "Conv1D")],
        "the noise is drawn as one Gaussian of the same distribution",
    ),
    "LOHA-conv-Conv2d": "wrong gradients for the Tucker form",
}

# What peft's file holds once a layer although layers share it, and veneer's once: method -> names.
COPIED = {"RANDLORA": ("randlora_A", "randlora_B")}
