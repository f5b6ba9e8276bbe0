"""Small quantised layers and models, one of each library that is installed."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

WIDTH, OUT = 64, 48


def _bnb4(layer: nn.Linear, kind: str, nested: bool) -> nn.Module:
    import bitsandbytes as bnb

    dtype = layer.weight.dtype
    new = bnb.nn.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, dtype, nested, kind, device="meta"
    )
    new.weight = bnb.nn.Params4bit(
        layer.weight.data, requires_grad=False, compress_statistics=nested, quant_type=kind, module=new
    ).to("cpu")
    new.bias = layer.bias
    return new


def _bnb8(layer: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    new = bnb.nn.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, device="meta"
    )
    new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False).to("cpu")
    new.bias = layer.bias
    return new


def _ao(layer: nn.Linear, kind: str) -> nn.Module:
    import torchao.quantization as q

    configs = {
        "int8": lambda: q.Int8WeightOnlyConfig(),
        "int4": lambda: q.IntxWeightOnlyConfig(torch.int4, q.PerGroup(8)),
        "int4-asymmetric": lambda: q.IntxWeightOnlyConfig(
            torch.int4, q.PerGroup(8), mapping_type=q.MappingType.ASYMMETRIC
        ),
        "float8": lambda: q.Float8WeightOnlyConfig(),
    }
    q.quantize_(layer, configs[kind]())
    return layer


def _hqq(layer: nn.Linear, bits: int) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    return HQQLinear(
        layer, BaseQuantizeConfig(nbits=bits, group_size=8), compute_dtype=layer.weight.dtype, device="cpu"
    )


def _quanto(layer: nn.Linear, kind: str) -> nn.Module:
    from optimum import quanto

    new = quanto.QLinear.from_module(layer, weights=getattr(quanto, f"q{kind}"))
    new.freeze()
    return new.requires_grad_(False)


def _gptq(layer: nn.Linear) -> nn.Module:
    """Codes by chance, 16 numbers around zero."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    new = TorchLinear(4, -1, True, False, layer.in_features, layer.out_features, layer.bias is not None)
    new.qweight.random_(-(2**31), 2**31)
    new.qzeros.fill_(0x77777777)
    new.scales = torch.full_like(new.scales, 0.02, dtype=layer.weight.dtype)
    new.g_idx.zero_()
    if layer.bias is not None:
        new.bias = layer.bias.detach().clone()
    new.post_init()
    return new


def _aqlm(layer: nn.Linear) -> nn.Module:
    """Codes and codebooks by chance: there is no quick way from a weight to them."""
    from aqlm import QuantizedLinear

    new = QuantizedLinear(
        layer.in_features, layer.out_features, 8, 1, 1, 16, layer.bias is not None, dtype=layer.weight.dtype
    )
    with torch.no_grad():
        new.codes.copy_(torch.randint(-(2**15), 2**15, new.codes.shape))
        new.codebooks.normal_(std=0.1)
        new.scales.fill_(1.0)
        if layer.bias is not None:
            new.bias.copy_(layer.bias)
    return new.requires_grad_(False)


#: name -> (library, how a plain layer becomes a quantised one, how large a part of a weight the rounding may be)
KINDS: dict[str, tuple[str, Callable[[nn.Linear], nn.Module], float]] = {
    "nf4": ("bitsandbytes", partial(_bnb4, kind="nf4", nested=False), 0.12),
    "nf4-double": ("bitsandbytes", partial(_bnb4, kind="nf4", nested=True), 0.12),
    "fp4": ("bitsandbytes", partial(_bnb4, kind="fp4", nested=False), 0.16),
    "int8": ("bitsandbytes", _bnb8, 0.01),
    "torchao-int8": ("torchao", partial(_ao, kind="int8"), 0.01),
    "torchao-int4": ("torchao", partial(_ao, kind="int4"), 0.1),
    "torchao-int4-asymmetric": ("torchao", partial(_ao, kind="int4-asymmetric"), 0.1),
    "torchao-float8": ("torchao", partial(_ao, kind="float8"), 0.04),
    "hqq4": ("hqq", partial(_hqq, bits=4), 0.1),
    "hqq8": ("hqq", partial(_hqq, bits=8), 0.01),
    "quanto-int8": ("optimum.quanto", partial(_quanto, kind="int8"), 0.01),
    "quanto-int4": ("optimum.quanto", partial(_quanto, kind="int4"), 0.1),
    "quanto-float8": ("optimum.quanto", partial(_quanto, kind="float8"), 0.04),
    "gptq": ("gptqmodel", _gptq, 0.0),
    "aqlm": ("aqlm", _aqlm, 0.0),
}
NO_MERGE = ("gptq", "aqlm")


def needs(library: str) -> None:
    parent = library.partition(".")[0]
    if importlib.util.find_spec(parent) is None or importlib.util.find_spec(library) is None:
        extra = {"gptqmodel": "gptqmodel", "compressed_tensors": "compressed-tensors"}
        pytest.skip(f"{library} is not installed: pip install {extra.get(library, 'veneer[quant]')}")


def make(kind: str, inp: int = WIDTH, out: int = OUT, dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    """A quantised linear layer."""
    library, quantise, _ = KINDS[kind]
    needs(library)
    layer = nn.Linear(inp, out, bias=bias, dtype=dtype).requires_grad_(False)
    return quantise(layer)


class Net(nn.Module):
    """Two quantised layers side by side, named as the laws' models name theirs."""

    def __init__(self, kind: str, inp: int = WIDTH, out: int = OUT, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second = (make(kind, inp, out, dtype) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + 0.5 * self.second(x)


def stored(layer: Any) -> dict[str, Tensor]:
    """Copies of everything that a quantised layer computes with, by name."""
    found: dict[str, Tensor] = {}
    weight = getattr(layer, "weight", None)
    if weight is not None and type(weight).__module__.startswith("torchao."):
        found |= {n: getattr(weight, n) for n in weight.tensor_data_names}
        if getattr(weight, "zero_point", None) is not None:
            found["zero_point"] = weight.zero_point
    elif type(layer).__name__ == "QLinear":
        names, _ = weight.__tensor_flatten__()
        found |= {n: getattr(getattr(weight, n), "_data", getattr(weight, n)) for n in names}
    elif type(layer).__name__ == "HQQLinear":
        found |= {"W_q": layer.W_q, **{k: v for k, v in layer.meta.items() if torch.is_tensor(v)}}
    elif type(layer).__name__ == "Linear4bit":
        state = weight.quant_state
        found |= {"codes": weight.data, "absmax": state.absmax, "code": state.code}
        if state.nested:
            found |= {"nested": state.state2.absmax, "offset": state.offset}
    else:
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        found |= {"codes": weight.data, "scales": scales}
    return {k: v.detach().clone() for k, v in found.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


#: name -> (library, quantization_config of transformers)
def model_config(kind: str) -> Any:
    import transformers

    if kind in ("nf4", "fp4"):
        needs("bitsandbytes")
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=kind == "nf4"
        )
    if kind == "int8":
        needs("bitsandbytes")
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if kind.startswith("quanto"):
        needs("optimum.quanto")
        return transformers.QuantoConfig(weights=kind.removeprefix("quanto-"))
    needs("torchao")
    import torchao.quantization as q

    ways = {
        "torchao-int8": lambda: q.Int8WeightOnlyConfig(),
        "torchao-int4": lambda: q.IntxWeightOnlyConfig(torch.int4, q.PerGroup(32)),
    }
    return transformers.TorchAoConfig(ways[kind]())


def load(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model, quantised while it loads (HQQ: after)."""
    from transformers import AutoModelForCausalLM

    if kind.startswith("hqq"):
        needs("hqq")
        from veneer.backends.loading import to_hqq

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        return to_hqq(model, bits=int(kind[3:]), group_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = model_config(kind)
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map="cpu")
