"""Each method beside peft: the same base and the same tensors give the same outputs and gradients."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from veneer import registry
from veneer.tuner import Tuner


class Layer(NamedTuple):
    make: Callable[[], nn.Module]
    input: Callable[[], Tensor]


LAYERS = {
    "linear": Layer(lambda: nn.Linear(24, 16), lambda: torch.randn(3, 5, 24)),
    "no-bias": Layer(lambda: nn.Linear(16, 24, bias=False), lambda: torch.randn(4, 16)),
    "conv1d-hf": Layer(lambda: Conv1D(16, 24), lambda: torch.randn(3, 5, 24)),
    "embedding": Layer(lambda: nn.Embedding(11, 16), lambda: torch.randint(0, 11, (3, 5))),
    "conv1": Layer(lambda: nn.Conv1d(12, 8, 3, padding=1), lambda: torch.randn(3, 12, 7)),
    "conv2": Layer(lambda: nn.Conv2d(12, 8, 3, stride=2, padding=1), lambda: torch.randn(3, 12, 5, 6)),
    "conv2-1x1": Layer(lambda: nn.Conv2d(12, 8, 1, bias=False), lambda: torch.randn(3, 12, 4, 3)),
    "conv2-groups": Layer(lambda: nn.Conv2d(12, 8, 3, groups=4), lambda: torch.randn(3, 12, 4, 5)),
    "conv3": Layer(lambda: nn.Conv3d(12, 8, 2), lambda: torch.randn(2, 12, 3, 3, 3)),
    "layernorm": Layer(lambda: nn.LayerNorm(16), lambda: torch.randn(3, 5, 16)),
    "rmsnorm": Layer(lambda: nn.RMSNorm(16), lambda: torch.randn(3, 5, 16)),
    "batchnorm": Layer(lambda: nn.BatchNorm1d(16), lambda: torch.randn(3, 16)),
}
DENSE = "linear no-bias conv1d-hf embedding conv1 conv2 conv2-1x1 conv2-groups conv3"
LINEAR = "linear no-bias conv1d-hf"


class Row(NamedTuple):
    config: str
    kwargs: dict[str, Any]
    layers: str
    several: bool = True  # peft's own forward pass agrees with its merged model for two active adapters
    by_merging: bool = False  # peft's forward pass of one adapter does not: take its merged model
    gradients: bool = True  # peft has gradients, and they agree with finite differences


OFT4 = {"oft_block_size": 4}
ROWS: dict[str, Row] = {
    "lora": Row("LoraConfig", {"r": 4, "lora_alpha": 6}, DENSE),
    "lora-gaussian": Row("LoraConfig", {"r": 4, "init_lora_weights": "gaussian"}, "linear embedding"),
    "lora-orthogonal": Row("LoraConfig", {"r": 4, "init_lora_weights": "orthogonal"}, "linear"),
    "lora-bias": Row("LoraConfig", {"r": 4, "lora_bias": True}, "linear conv1d-hf conv2"),
    "lora-patterns": Row(
        "LoraConfig", {"r": 4, "rank_pattern": {"first": 3}, "alpha_pattern": {"second": 5}}, "linear"
    ),
    "rslora": Row("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}, "linear embedding conv2"),
    "dora": Row(
        "LoraConfig",
        {"r": 4, "use_dora": True},
        "linear no-bias conv1d-hf embedding conv1 conv2 conv2-1x1 conv3",
        several=False,
    ),
    "vera": Row("VeraConfig", {"r": 5, "projection_prng_key": 3}, LINEAR),
    "vera-nosave": Row("VeraConfig", {"r": 5, "save_projection": False}, "linear"),
    "oft": Row("OFTConfig", OFT4, "linear no-bias embedding"),
    "oft-conv": Row("OFTConfig", OFT4, "conv2 conv2-1x1", several=False, by_merging=True, gradients=False),
    "oft-exact": Row("OFTConfig", {**OFT4, "use_cayley_neumann": False}, "linear no-bias embedding"),
    "oft-shared": Row("OFTConfig", {**OFT4, "block_share": True}, "linear embedding"),
    "oft-r": Row("OFTConfig", {"r": 3, "oft_block_size": 0}, "linear"),
    "oft-odd-size": Row("OFTConfig", {"oft_block_size": 5}, "linear embedding"),
    "oft-odd-r": Row("OFTConfig", {"r": 5, "oft_block_size": 0}, "linear embedding"),
    "coft": Row("OFTConfig", {**OFT4, "coft": True, "eps": 0.3}, "linear embedding"),
    **{f"oft-{n}-terms": Row("OFTConfig", {**OFT4, "num_cayley_neumann_terms": n}, "linear") for n in (2, 3, 4, 6, 7)},
    "ia3": Row("IA3Config", {"feedforward_modules": []}, f"{LINEAR} conv2 conv2-groups conv3"),
    "ia3-feedforward": Row("IA3Config", {"feedforward_modules": ["first"]}, f"{LINEAR} conv2 conv2-groups conv3"),
    "loha": Row("LoHaConfig", {"r": 3, "alpha": 5}, "linear no-bias conv1 conv2 conv2-1x1 conv2-groups"),
    "loha-effective": Row(
        "LoHaConfig",
        {"r": 3, "alpha": 5, "use_effective_conv2d": True},
        "conv1 conv2 conv2-1x1 conv2-groups",
        gradients=False,
    ),
    "loha-patterns": Row(
        "LoHaConfig", {"r": 3, "rank_pattern": {"first": 2}, "alpha_pattern": {"second": 7}}, "linear"
    ),
    "ln-tuning": Row("LNTuningConfig", {}, "layernorm rmsnorm batchnorm linear embedding", several=False),
}
CASES = [pytest.param(name, layer, id=f"{name}-{layer}") for name, r in ROWS.items() for layer in r.layers.split()]
TWO = [c for c in CASES if ROWS[c.values[0]].several]
SMOOTH = [c for c in CASES if ROWS[c.values[0]].gradients]
# LoRA's A reads all channels of a convolution with groups: no weight of its shape equals it
MERGEABLE = [c for c in CASES if c.values != ("lora", "conv2-groups")]
HALF = [c for c in CASES if c.values[1] in ("linear", "conv2", "embedding", "layernorm")]

pytestmark = pytest.mark.filterwarnings("ignore:Adapter '.*invalid shape")  # peft about its own lora_bias


class Net(nn.Module):
    """Two layers of one kind and shape; the second adds to the first."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.first, self.second = layer.make(), layer.make()
        for p in self.parameters():
            p.data.add_(torch.randn_like(p) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + 0.5 * self.second(x)


class Pair(NamedTuple):
    theirs: Any
    ours: Tuner
    x: Tensor
    base: nn.Module


def veneer_config(row: Row) -> Any:
    entry = next(e for e in registry.METHODS.values() if e.config == row.config)
    made = __import__(f"veneer.{entry.module}", fromlist=[row.config])
    return getattr(made, row.config)(target_modules=["first", "second"], **row.kwargs)


def their_tensors(model: Any, adapter: str) -> dict[str, Tensor]:
    return peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def our_tensors(tuner: Tuner, adapter: str) -> dict[str, Tensor]:
    """Tensors of an adapter that go into a file, by the file's names."""
    return {
        f"base_model.model.{path}.{key}" if path else f"base_model.{key}": getattr(holder, leaf)
        for path, key, spec, holder, leaf in tuner.tensor_names(adapter)
        if spec.save
    }


def pair(name: str, layer_name: str, dtype: torch.dtype = torch.float32, adapters: int = 1) -> Pair:
    """The same base under peft and under veneer with the same random adapter tensors."""
    row, layer = ROWS[name], LAYERS[layer_name]
    torch.manual_seed(5)
    net = Net(layer).to(dtype).eval()
    names = ["one", "two"][:adapters]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = getattr(peft, row.config)(target_modules=["first", "second"], **row.kwargs)
        theirs = peft.get_peft_model(copy.deepcopy(net), cfg, adapter_name="one")
        ours = Tuner(copy.deepcopy(net), veneer_config(row), "one")
        for n in names[1:]:
            theirs.add_adapter(n, copy.deepcopy(cfg))
            ours.add_adapter(n, veneer_config(row))
    theirs.base_model.set_adapter(names)
    ours.set_adapter(names)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    for p in trained:
        p.data.add_(torch.randn_like(p) * 0.3)
    for n in names:
        mine, yours = our_tensors(ours, n), their_tensors(theirs, n)
        assert {k: tuple(t.shape) for k, t in mine.items()} == {k: tuple(t.shape) for k, t in yours.items()}
        for k, t in mine.items():
            t.data.copy_(yours[k])
    x = layer.input()
    return Pair(theirs.eval(), ours.eval(), x.to(dtype) if x.is_floating_point() else x, net)


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the larger tensor's size where that is above one."""
    return ((a.double() - b.double()).abs().max() / max(1.0, b.abs().max().item())).item()


def their_output(both: Pair, row: Row) -> Tensor:
    if not row.by_merging:
        return both.theirs(both.x)
    both.theirs.merge_adapter()
    out = both.theirs(both.x)
    both.theirs.unmerge_adapter()
    return out


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_same_output(name: str, layer: str) -> None:
    both = pair(name, layer)
    with torch.no_grad():
        want, got = their_output(both, ROWS[name]), both.ours(both.x)
        base = both.base(both.x)
    assert apart(got, want) < 1e-5
    assert apart(got, base) > 1e-2, "the adapter does nothing, so the comparison says nothing"


@pytest.mark.parametrize(("name", "layer"), TWO)
def test_two_adapters(name: str, layer: str) -> None:
    both = pair(name, layer, adapters=2)
    with torch.no_grad():
        want, got = both.theirs(both.x), both.ours(both.x)
        both.ours.set_adapter(["one"])
        alone = both.ours(both.x)
    assert apart(got, want) < 1e-5
    assert apart(got, alone) > 1e-3


@pytest.mark.parametrize(("name", "layer"), MERGEABLE)
def test_forward_is_merged(name: str, layer: str) -> None:
    both = pair(name, layer)
    with torch.no_grad():
        want = both.ours(both.x)
        both.ours.merge_adapter(safe_merge=True)
        merged = both.ours(both.x)
        both.ours.unmerge_adapter()
        both.ours.disable_adapter_layers()
        assert torch.equal(both.ours(both.x), both.base(both.x))
    assert apart(merged, want) < 1e-5
    bare = dict(both.base.named_parameters())
    for key, p in both.ours.model.named_parameters():
        if ".base_layer." in key:
            assert torch.equal(p, bare[key.replace(".base_layer", "")]), key


@pytest.mark.parametrize(("name", "layer"), SMOOTH)
def test_same_gradients(name: str, layer: str) -> None:
    both = pair(name, layer)
    grads = []
    for model in (both.theirs, both.ours):
        x = both.x.clone().requires_grad_(both.x.is_floating_point())
        out = model(x)
        torch.manual_seed(9)
        (out * torch.randn_like(out)).sum().backward()
        grads.append(x.grad)
    if both.x.is_floating_point():
        assert apart(grads[1], grads[0]) < 1e-5
    theirs = {n.replace(".one", ""): p.grad for n, p in both.theirs.named_parameters() if p.requires_grad}
    ours = {n.replace(".one", ""): p.grad for n, p in both.ours.named_parameters() if p.requires_grad}
    ours = {f"base_model.{n}": g for n, g in ours.items()}
    assert ours.keys() == theirs.keys()
    for key, grad in theirs.items():
        assert (grad is None) == (ours[key] is None), key
        if grad is not None:
            assert apart(ours[key], grad) < 2e-5, key


@pytest.mark.parametrize(("name", "layer"), HALF)
def test_half_precision(name: str, layer: str) -> None:
    both = pair(name, layer, torch.bfloat16)
    with torch.no_grad():
        want, got = their_output(both, ROWS[name]), both.ours(both.x)
    assert got.dtype == torch.bfloat16
    assert apart(got, want) < 4e-2
    ours = {f"base_model.{n}": p.dtype for n, p in both.ours.named_parameters() if p.requires_grad}
    assert ours == {n: p.dtype for n, p in both.theirs.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_same_residual_weight(init: str) -> None:
    """The base's new weight and what the adapter took out of it are those of peft."""
    row = Row("LoraConfig", {"r": 4, "lora_alpha": 6, "init_lora_weights": init}, "linear")
    torch.manual_seed(5)
    net, x = Net(LAYERS["linear"]), LAYERS["linear"].input()
    want = net(x)
    cfg = peft.LoraConfig(target_modules=["first", "second"], **row.kwargs)
    theirs = peft.get_peft_model(copy.deepcopy(net), cfg)
    ours = Tuner(copy.deepcopy(net), veneer_config(row))
    assert apart(ours(x), want) < 1e-5
    for n in ("first", "second"):
        yours = theirs.base_model.model.get_submodule(n).base_layer.weight
        mine = ours.model.get_submodule(n).base_layer.weight
        assert apart(mine, yours) < 1e-5
        assert apart(mine, net.get_submodule(n).weight) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
def test_vera_projections_bit_for_bit(dtype: torch.dtype, autocast: bool) -> None:
    """A file without projections means the ones that peft draws, rounded to the base's dtype."""
    row = ROWS["vera"]
    net = Net(LAYERS["linear"]).to(dtype)
    cfg = peft.VeraConfig(target_modules=["first", "second"], **row.kwargs)
    theirs = peft.get_peft_model(copy.deepcopy(net), cfg, autocast_adapter_dtype=autocast)
    ours = Tuner(net, veneer_config(row), autocast_adapter_dtype=autocast)
    for key in ("vera_A", "vera_B"):
        mine, yours = getattr(ours, key)["default"], getattr(theirs.base_model, key)["default"]
        assert torch.equal(mine.double(), yours.double())


@pytest.mark.parametrize("config", ["VeraConfig", "OFTConfig", "IA3Config", "LoHaConfig", "LNTuningConfig"])
def test_config_has_every_field_of_peft(config: str) -> None:
    """The same names and defaults, and nothing else in the file."""
    theirs = getattr(peft, config)()
    ours = veneer_config(Row(config, {}, ""))
    ours.target_modules = None
    want, got = theirs.to_dict(), ours.to_file_dict()
    assert got.keys() == want.keys()
    assert {k: v for k, v in got.items() if k not in ("peft_type", "peft_version")} == {
        k: v for k, v in want.items() if k not in ("peft_type", "peft_version")
    }
    assert got["peft_type"] == theirs.peft_type.value


@pytest.mark.parametrize(
    ("config", "kwargs"),
    [
        ("OFTConfig", {"r": 4, "oft_block_size": 4}),
        ("OFTConfig", {"r": 0, "oft_block_size": 0}),
        ("OFTConfig", {"layers_pattern": "layers"}),
        ("VeraConfig", {"layers_pattern": "layers"}),
        ("LoHaConfig", {"layers_pattern": "layers"}),
        ("IA3Config", {"feedforward_modules": ["third"]}),
    ],
)
def test_configs_that_both_refuse(config: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        getattr(peft, config)(target_modules=["first", "second"], **kwargs)
    with pytest.raises(ValueError):
        veneer_config(Row(config, kwargs, ""))


@pytest.mark.parametrize("key", [0, 7])
def test_vera_slices_of_one_projection(key: int) -> None:
    """Layers of different sizes read the first columns and rows of the same two matrices."""
    torch.manual_seed(5)
    net, x = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 10), nn.Linear(10, 7)).eval(), torch.randn(3, 8)
    kwargs: dict[str, Any] = {"r": 5, "projection_prng_key": key, "target_modules": ["0", "1", "2"]}
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.VeraConfig(**kwargs)).eval()
    cfg = veneer_config(Row("VeraConfig", {}, ""))
    ours = Tuner(copy.deepcopy(net), dataclasses.replace(cfg, **kwargs)).eval()
    yours = their_tensors(theirs, "default")
    for name, t in our_tensors(ours, "default").items():
        if "lambda" in name:
            yours[name].copy_(torch.randn_like(t))
            t.data.copy_(yours[name])
    with torch.no_grad():
        assert apart(ours(x), theirs(x)) < 1e-5
        assert apart(ours(x), net(x)) > 1e-1
