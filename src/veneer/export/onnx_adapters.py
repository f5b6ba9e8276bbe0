"""One ONNX graph for many adapters: each layer's A and B are inputs, so that an adapter is a file of tensors.

Inputs beside the model's own: "lora_A.<layer>" (r, in) and "lora_B.<layer>" (out, r), float32, for each layer that any
of the adapters changes; r is free, layer by layer. B holds the scaling. Zeros, or r = 0, give the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from .onnx import eager, new_folder
from .onnx_graph import Graph, compare_graph, libraries, write_graph
from .onnx_models import graphs_of

__all__ = ["FactorExport", "export_with_factors", "factors_of"]


@dataclass(frozen=True)
class FactorExport:
    """adapters: name -> its file of inputs. layers: those with inputs."""

    folder: Path
    layers: tuple[str, ...]
    adapters: dict[str, Path]
    largest_difference: float


def factors_of(adapter: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (A (r, in), B (out, r) with the scaling) of a plain LoRA on linear layers.

    Raises AdapterError for an adapter that is more than that: other methods, DoRA, whole modules, biases.
    """
    from .. import registry
    from ..layer_matrices import matrices
    from ..opened import open_adapter

    opened = open_adapter(adapter)
    config = opened.config
    odd = [
        word
        for word, found in {
            f"the method {registry.method_of(config).name.lower()}": registry.method_of(config).name != "LORA",
            "modules_to_save": getattr(config, "modules_to_save", None),
            "trainable_token_indices": getattr(config, "trainable_token_indices", None),
            "lora_bias": getattr(config, "lora_bias", False),
            f"bias={getattr(config, 'bias', 'none')}": getattr(config, "bias", "none") != "none",
        }.items()
        if found
    ]
    if odd:
        raise AdapterError(f"{adapter}: it is more than a product B A ({', '.join(odd)}); export it merged")
    out = {}
    for name, m in matrices(opened.model).items():
        if m.A is None or m.B is None or m.layer.site.kind != "linear":
            raise AdapterError(f"{adapter}: {name} is not a linear layer; export it merged")
        out[name] = m.A.detach().float(), (m.B.detach() * m.scaling).float()
    return out


class _Slot:
    """One layer's factors in a call; not a module, so that they are no part of the model."""

    A: Tensor
    B: Tensor


class _Linear(nn.Module):
    def __init__(self, base: nn.Linear, slot: _Slot):
        super().__init__()
        self.base, self.slot = base, slot

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.slot.A.T) @ self.slot.B.T


class _Reader(nn.Module):
    def __init__(self, inner: nn.Module, slots: Sequence[_Slot]):
        super().__init__()
        self.inner, self.slots = inner, slots

    def forward(self, input_ids: Tensor, attention_mask: Tensor, factors: list[Tensor]) -> tuple[Tensor, ...]:
        _fill(self.slots, factors)
        return self.inner(input_ids, attention_mask)


class _Writer(nn.Module):
    def __init__(self, inner: nn.Module, slots: Sequence[_Slot]):
        super().__init__()
        self.inner, self.slots = inner, slots

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor],
        factors: list[Tensor],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        _fill(self.slots, factors)
        return self.inner(input_ids, attention_mask, position_ids, past)


def _fill(slots: Sequence[_Slot], factors: Sequence[Tensor]) -> None:
    for slot, A, B in zip(slots, factors[::2], factors[1::2], strict=True):
        slot.A, slot.B = A, B


def export_with_factors(
    model: Any, adapters: Mapping[str, str], folder: str | Path, tokenizer: Any = None
) -> FactorExport:
    """Write `model.onnx` of the base with factors as inputs, and `adapters/NAME.safetensors` with each adapter's.

    model: the plain base, an encoder or a decoder. The graph is compared with torch at several ranks. Raises
    AdapterError as export_onnx does, and for adapters that are not plain LoRA on linear layers.
    """
    from safetensors.torch import save_file

    libraries()
    if getattr(model.config, "is_encoder_decoder", False):
        raise AdapterError(f"{type(model).__name__}: factors as inputs work for one graph; export it merged")
    found = {name: factors_of(source) for name, source in adapters.items()}
    layers = sorted({layer for held in found.values() for layer in held})
    model = model.float().cpu().eval()
    shapes = _shapes(model, layers)
    for name, held in found.items():
        for layer, (A, B) in held.items():
            if (B.shape[0], A.shape[1]) != shapes[layer]:
                raise AdapterError(f"{name}: {layer} is {B.shape[0]}x{A.shape[1]}, the base's is {shapes[layer]}")
    with new_folder(Path(folder)) as partial, eager(model):
        graph = _graph(model, layers, shapes)
        difference = compare_graph(graph, write_graph(graph, partial))
        model.config.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        (partial / "adapters").mkdir()
        for name, held in found.items():
            out: dict[str, Tensor] = {}
            for layer in layers:
                rows, columns = shapes[layer]
                A, B = held.get(layer, (torch.zeros(1, columns), torch.zeros(rows, 1)))
                out |= {f"lora_A.{layer}": A.contiguous(), f"lora_B.{layer}": B.contiguous()}
            save_file(out, str(partial / "adapters" / f"{name}.safetensors"))
    files = {name: Path(folder) / "adapters" / f"{name}.safetensors" for name in found}
    return FactorExport(Path(folder), tuple(layers), files, difference)


def _shapes(model: nn.Module, layers: Sequence[str]) -> dict[str, tuple[int, int]]:
    out: dict[str, tuple[int, int]] = {}
    for layer in layers:
        module = model.get_submodule(layer)
        if not isinstance(module, nn.Linear):
            raise AdapterError(f"{layer} is a {type(module).__name__}, not a linear layer; export it merged")
        out[layer] = module.out_features, module.in_features
    return out


def _graph(model: Any, layers: Sequence[str], shapes: Mapping[str, tuple[int, int]]) -> Graph:
    slots = [_Slot() for _ in layers]
    (plain,) = graphs_of(model)  # its shapes are read before the layers need factors
    for layer, slot in zip(layers, slots, strict=True):
        parent, _, leaf = layer.rpartition(".")
        base: Any = model.get_submodule(layer)
        setattr(model.get_submodule(parent), leaf, _Linear(base, slot))
    ranks = {tuple(size): rank for size, rank in zip(plain.sizes, (3, 1, 8, 2), strict=False)}

    def sample(size: Any, seed: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        factors = []
        for i, layer in enumerate(layers):
            rows, columns = shapes[layer]
            r = ranks[tuple(size)] + (i % 2)  # neighbours differ
            factors += [torch.randn(r, columns, generator=generator) / columns**0.5]
            factors += [torch.randn(rows, r, generator=generator) / r**0.5]
        return (*plain.sample(size, seed), factors)

    wrapper = _Writer if "position_ids" in plain.inputs else _Reader
    names = [f"{part}.{layer}" for layer in layers for part in ("lora_A", "lora_B")]
    return replace(
        plain, module=wrapper(plain.module, slots), inputs=[*plain.inputs, *names], sample=sample,
        free=(*plain.free, [(0,), (1,)] * len(layers)),
    )  # fmt: skip
