"""Methods whose layers share tensors, or draw frozen ones from a seed: peft's bits, options and files."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer.methods.adamss import clustered, decomposed
from veneer.site import LinearSite


class Net(nn.Module):
    """Layers of several shapes, one after another."""

    def __init__(self, *sizes: int):
        super().__init__()
        torch.manual_seed(0)
        self.ls = nn.ModuleList([nn.Linear(a, b) for a, b in pairwise(sizes)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.ls:
            x = layer(x)
        return x


SIZES = (33, 17, 41, 20)


def make(package: Any, name: str, sizes: tuple[int, ...] = SIZES, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    targets = [str(i) for i in range(len(sizes) - 1)]
    cfg = getattr(package, name)(**{"target_modules": targets, **kwargs})
    return package.get_peft_model(Net(*sizes), cfg).eval()


def buffers(model: Any) -> dict[str, Tensor]:
    """Frozen tensors of the adapter by name, without the adapter's own name."""
    return {k.replace(".default", ""): v for k, v in model.named_buffers()}


SEEDED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("PveraConfig", {"r": 5, "projection_prng_key": 7}, ("pvera_A", "pvera_B")),
    ("RandLoraConfig", {"r": 3, "projection_prng_key": 7}, ("randlora_A", "randlora_B")),
    ("RandLoraConfig", {"r": 4, "sparse": True}, ("randlora_A", "randlora_B")),
    ("RandLoraConfig", {"r": 4, "very_sparse": True, "sparse": True}, ("randlora_A", "randlora_B")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "kwargs", "keys"), SEEDED, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(SEEDED)])
def test_shared_projections_are_pefts_bits(name: str, kwargs: Any, keys: tuple[str, ...], dtype: torch.dtype) -> None:
    def of(package: Any) -> dict[str, Tensor]:
        torch.manual_seed(3)
        cfg = getattr(package, name)(target_modules=["0", "1", "2"], **kwargs)
        return buffers(package.get_peft_model(Net(*SIZES).to(dtype), cfg))

    ours, theirs = of(veneer), of(peft)
    for key in keys:
        mine = next(v for k, v in ours.items() if k.endswith(key))
        other = next(v for k, v in theirs.items() if k.endswith(f"ls.0.{key}"))
        assert torch.equal(mine.float(), other.float()), key


PER_LAYER: list[tuple[str, dict[str, Any], str]] = [
    ("TinyLoraConfig", {"r": 2, "u": 5, "projection_seed": 9}, "tinylora_"),
    ("TinyLoraConfig", {"r": 30, "u": 3, "weight_tying": 0.5}, "tinylora_"),
    ("UniLoraConfig", {"r": 3, "theta_d_length": 64, "proj_seed": 4}, "unilora_"),
    ("UniLoraConfig", {"r": 2, "theta_d_length": 37}, "unilora_"),
    ("UniLoraConfig", {"r": 2, "theta_d_length": 5000}, "unilora_"),
]


@pytest.mark.parametrize(
    ("name", "kwargs", "prefix"), PER_LAYER, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(PER_LAYER)]
)
def test_layers_frozen_tensors_are_pefts_bits(name: str, kwargs: Any, prefix: str) -> None:
    ours, theirs = buffers(make(veneer, name, **kwargs)), buffers(make(peft, name, **kwargs))
    compared = [k for k in theirs if f".{prefix}" in k and ".ls." in k]
    assert len(compared) >= 9
    for key in compared:
        assert torch.equal(ours[key], theirs[key]), key


def test_psoft_subspaces_are_pefts() -> None:
    for kwargs in ({}, {"ab_svd_init": "pissa_init"}, {"psoft_svd": "lowrank", "random_seed": 3}):
        ours, theirs = (make(p, "PsoftConfig", r=4, psoft_alpha=6, **kwargs) for p in (veneer, peft))
        a, b = buffers(ours), buffers(theirs)
        for layer in range(3):
            for side in "AB":
                mine = a[f"base_model.model.ls.{layer}.psoft_{side}"]
                assert torch.equal(mine, b[f"base_model.model.ls.{layer}._psoft_{side}_cache"])


@pytest.mark.parametrize("kwargs", [{}, {"random_seed": 5, "r": 9}, {"num_subspaces": 60}], ids=str)
def test_adamss_clusters_are_pefts(kwargs: dict[str, Any]) -> None:
    settings = {"r": 6, "num_subspaces": 4, **kwargs}
    theirs = make(peft, "AdamssConfig", **settings)
    cfg = veneer.AdamssConfig(**settings)
    for i, layer in enumerate(theirs.base_model.model.ls):
        U, V = decomposed(cfg, LinearSite(layer.base_layer))
        rows = clustered(U, min(cfg.num_subspaces, layer.out_features))
        assert rows == [r.tolist() for r in layer.seg_result["default"].values()], i
        assert torch.equal(V, layer.adamss_newB["default"])


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_adamss_dynamic_ranks_are_pefts(threshold: float) -> None:
    settings = {"r": 8, "num_subspaces": 3, "subspace_rank": 8, "use_dynamic_rank": True, "svd_threshold": threshold}
    ours, theirs = make(veneer, "AdamssConfig", **settings), make(peft, "AdamssConfig", **settings)
    shape = lambda sd: {k: tuple(v.shape) for k, v in sd.items()}
    assert shape(veneer.get_peft_model_state_dict(ours)) == shape(peft.get_peft_model_state_dict(theirs))


@pytest.mark.parametrize("layers", [1, 2, 3, 5, 7])
def test_tinylora_ties_as_peft_does(layers: int) -> None:
    sizes = (12,) * (layers + 1)
    for tying in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        ours, theirs = (make(p, "TinyLoraConfig", sizes, u=4, weight_tying=tying) for p in (veneer, peft))
        groups = [layer.entries["default"].cfg.group for layer in ours.base_model.model.ls]
        assert groups == [int(layer._tinylora_v_key["default"]) for layer in theirs.base_model.model.ls], tying
        assert {k for k in veneer.get_peft_model_state_dict(ours) if "_v." in k} == {
            k for k in peft.get_peft_model_state_dict(theirs) if "_v." in k
        }


def test_tinylora_without_initial_zeros_is_finite() -> None:
    model = make(veneer, "TinyLoraConfig", init_weights=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(0 < p.abs().max() <= 0.02 for p in trained)


def test_pvera_draws_as_peft_does() -> None:
    """In training, and in inference with sample_at_inference; from the global generator, or one a layer."""
    x = torch.randn(3, 5, 33)
    settings: dict[str, Any] = {"r": 4, "init_weights": False, "target_modules": ["0"]}
    for kwargs in (
        {},
        {"generator_seed": 3},
        {"sample_at_inference": True},
        {"sample_at_inference": True, "generator_seed": 3},
    ):
        ours, theirs = (make(p, "PveraConfig", **settings, **kwargs) for p in (veneer, peft))
        for mode in (True, False):
            outputs = []
            for m in (ours, theirs):
                m.train(mode)
                torch.manual_seed(8)
                outputs.append([m(x), m(x)])
            for a, b in zip(*outputs, strict=True):
                assert torch.allclose(a, b, atol=1e-5)
            drawn = not torch.equal(*outputs[0])
            assert drawn == (mode or bool(kwargs.get("sample_at_inference")))


def test_pvera_generator_survives_a_copy() -> None:
    model = make(veneer, "PveraConfig", r=4, init_weights=False, generator_seed=3).train()
    x = torch.randn(2, 33)
    model(x)
    other = copy.deepcopy(model)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize(("k", "vectors"), [(1, 20), (2, 20), (3, 300)])
def test_vblora_topk_file_both_ways(k: int, vectors: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "r": 2, "topk": k, "num_vectors": vectors, "vector_length": 4, "save_only_topk_weights": True,
        "init_vector_bank_bound": 0.5, "init_logits_std": 1.0,
    }  # fmt: skip
    x, sizes = torch.randn(3, 12), (12, 8, 16)
    models = {p.__name__: make(p, "VBLoRAConfig", sizes, **settings) for p in (veneer, peft)}
    files = {n: (veneer if n == "veneer" else peft).get_peft_model_state_dict(m) for n, m in models.items()}
    kinds = {n: {key: (tuple(t.shape), t.dtype) for key, t in f.items()} for n, f in files.items()}
    assert kinds["veneer"] == kinds["peft"]
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        for package in (veneer, peft):
            loaded = package.PeftModel.from_pretrained(Net(*sizes), tmp_path / name).eval()
            assert torch.allclose(loaded(x), model(x), atol=1e-5), (name, package.__name__)
    again = veneer.PeftModel.from_pretrained(Net(*sizes), tmp_path / "peft", is_trainable=True)
    with pytest.raises(RuntimeError, match="save_only_topk_weights"):
        again.train()(x)


def test_randlora_file_holds_its_bases_once(tmp_path: Path) -> None:
    model = make(veneer, "RandLoraConfig", r=3)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    held = [k for k in load_file(tmp_path / "adapter_model.safetensors") if k.endswith(("randlora_A", "randlora_B"))]
    assert held == ["base_model.randlora_A", "base_model.randlora_B"]
    assert len([k for k in peft.get_peft_model_state_dict(make(peft, "RandLoraConfig", r=3)) if k.endswith("_A")]) > 2


PSOFT: list[dict[str, Any]] = [
    {}, {"psoft_orth": False}, {"psoft_mag_a": False}, {"psoft_mag_b": False}, {"use_cayley_neumann": True},
    {"use_cayley_neumann": True, "cayley_neumann_eps": 0.3}, {"use_cayley_neumann": True, "cayley_neumann_eps": 0.99},
    {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3}, {"cayley_neumann_eps": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("kwargs", PSOFT, ids=str)
def test_psoft_modes_are_pefts(kwargs: dict[str, Any]) -> None:
    ours, theirs = (make(p, "PsoftConfig", r=4, psoft_alpha=6, **kwargs) for p in (veneer, peft))
    generator = torch.Generator().manual_seed(2)
    tensors = {
        k: v + 0.3 * torch.randn(v.shape, generator=generator)
        for k, v in peft.get_peft_model_state_dict(theirs).items()
    }
    peft.set_peft_model_state_dict(theirs, tensors)
    veneer.set_peft_model_state_dict(ours, tensors)
    x = torch.randn(4, 33)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("DeloraConfig", {"r": 0}), ("PsoftConfig", {"r": 0}), ("PsoftConfig", {"r": 18}),
    ("PsoftConfig", {"ab_svd_init": "x"}), ("PsoftConfig", {"psoft_svd": "x"}),
    ("PsoftConfig", {"num_cayley_neumann_terms": 0}), ("PsoftConfig", {"cayley_neumann_eps": 1.5}),
    ("PveraConfig", {"r": 0}), ("TinyLoraConfig", {"r": 0}), ("TinyLoraConfig", {"u": 0}),
    ("TinyLoraConfig", {"weight_tying": 1.5}), ("UniLoraConfig", {"r": 0}), ("UniLoraConfig", {"theta_d_length": 0}),
    ("UniLoraConfig", {"init_theta_d_bound": 0}), ("VBLoRAConfig", {"vector_length": 5}),
    ("VBLoRAConfig", {"r": 0, "vector_length": 1}), ("VBLoRAConfig", {"topk": 0, "vector_length": 1}),
    ("AdaLoraConfig", {"total_step": None}), ("AdaLoraConfig", {"total_step": 0}),
    ("AdaLoraConfig", {"total_step": 9, "tinit": 5, "tfinal": 4}),
    ("AdaLoraConfig", {"total_step": 9, "use_dora": True}),
    ("AdaLoraConfig", {"total_step": 9, "orth_reg_weight": -1}), ("AdamssConfig", {"r": 0}),
    ("AdamssConfig", {"init_weights": "x"}), ("AdamssConfig", {"use_asa": True, "mask_interval": 0}),
    ("AdamssConfig", {"use_asa": True, "init_warmup": 9, "final_warmup": 9}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs"), WRONG, ids=[f"{n}-{k}" for n, k in WRONG])
def test_wrong_settings_are_refused_by_both(name: str, kwargs: dict[str, Any]) -> None:
    for package in (veneer, peft):
        with pytest.raises(ValueError, match=r"\w"):
            make(package, name, **kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("VBLoRAConfig", {"vector_length": 1, "num_vectors": 4, "topk": 5}), ("RandLoraConfig", {"r": 0})],
)
def test_wrong_settings_that_peft_lets_through(name: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"topk|`r`"):
        make(veneer, name, **kwargs)
