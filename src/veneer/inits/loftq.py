"""LoftQ: the base's weight as quantisation will leave it, and the factors that make up for the loss. Li et al. 2023,
arXiv:2310.08659, section 3.

    repeat loftq_iter times:   Q = quantised(W - s B A),   B A = best of rank r to (W - Q) / s;   W_base = Q

The base stays in its own dtype and holds Q's values, so that quantising it later, blockwise in the same way, loses
nothing more. s B A makes up for the loss whatever alpha is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..view import View
from . import matrix
from .prepared import tuner_in

# Dettmers et al. 2023, arXiv:2305.14314, appendix E
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)  # fmt: skip
BLOCK = 64


def quantised(W: Tensor, bits: int) -> Tensor:
    """W's values after quantisation and back, float32, in W's shape: NF4 in blocks of 64 (row by row, the last one
    shorter), or int8 with one scale a row."""
    if bits == 8:
        half = W.half().float()  # int8 kernels read float16
        largest = half.abs().amax(1, keepdim=True)
        codes = torch.where(largest > 0, half * (127 / largest), 0.0).round()
        return codes * largest * (1 / 127)
    levels = torch.tensor(NF4, device=W.device)
    flat = W.flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    largest = padded.abs().amax(1, keepdim=True)
    unit = torch.where(largest > 0, padded / largest, 0.0)
    nearest = levels[torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)]
    return (nearest * largest).flatten()[: len(flat)].reshape(W.shape)


def split(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A (r, columns) and B (rows, r), of equal length, whose product is the best of rank r to W."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def fill(A: Tensor, B: Tensor, weight: Callable[[], Tensor], p: View, cfg: Any) -> Tensor:
    W = weight()
    bits, turns = cfg.loftq_config.get("loftq_bits", 4), cfg.loftq_config.get("loftq_iter", 1)
    M = matrix(W, p)
    rest = M
    for _ in range(turns):
        # blocks run along the weight as it is stored, which Conv1D transposes
        Q = p.site.to_canonical(quantised(p.site.from_canonical(rest.reshape(W.shape)).flatten(1), bits))
        Q = Q.reshape(M.shape)
        new_A, new_B = split((M - Q) / p.scaling, cfg.r)
        rest = M - p.scaling * new_B @ new_A
    A.copy_(new_A.reshape(A.shape))
    B.copy_(new_B.reshape(B.shape))
    return Q.reshape(W.shape).to(W.dtype)


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Give the adapter of a model whose base is already quantised the factors that make up for the loss, one layer
    after the other, from the original weights on disk.

    model_path: a safetensors file or a folder of them; by default the folder that the base came from. callback(model,
    layer name) is called after each layer; where it returns False, that layer gets its factors back.

    Raises ValueError where there are no such weights or none of them is of an adapted layer.
    """
    tuner = tuner_in(peft_model)
    if tuner is None or adapter_name not in tuner.peft_config:
        raise AdapterError(f"no adapter {adapter_name!r} on this {type(peft_model).__name__}")
    originals = _Originals(model_path or _folder_of(tuner.model))
    done = 0
    for name, layer in tuner.adapted_layers():
        if adapter_name not in layer.entries or layer.site.kind != "linear":
            continue
        stored = originals.weight(name)
        if stored is None:
            continue
        view = layer.view(adapter_name)
        W = layer.site.to_canonical(stored).to(device=layer.site.device, dtype=torch.float32)
        Q = layer.site.weight().float()
        if W.shape != Q.shape:
            raise AdapterError(f"{name}: the original weight is {tuple(W.shape)}, the layer's {tuple(Q.shape)}")
        before = view.lora_A.clone(), view.lora_B.clone()
        A, B = split((W - Q) / layer.scaling[adapter_name], view.cfg.r)
        view.fill("lora_A", A)
        view.fill("lora_B", B)
        done += 1
        if callback is not None and not callback(peft_model, name):
            view.fill("lora_A", before[0])
            view.fill("lora_B", before[1])
    if not done:
        raise AdapterError(f"{originals.path}: none of its weights belongs to a layer of adapter {adapter_name!r}")


class _Originals:
    """Weights by layer name from one safetensors file or a folder of shards, read one at a time."""

    def __init__(self, path: str):
        self.path = path
        names = [path] if os.path.isfile(path) else []
        if os.path.isdir(path):
            names = sorted(os.path.join(path, f) for f in os.listdir(path) if f.endswith(".safetensors"))
        if not names:
            raise AdapterError(f"{path}: no safetensors file there; give model_path, the folder of the original model")
        self.where = {key: file for file in names for key in _keys(file)}

    def weight(self, layer: str) -> Tensor | None:
        """The weight under the layer's name, or under the end of it: files may leave out the model's own prefix."""
        parts = layer.split(".")
        for i in range(len(parts)):
            key = ".".join([*parts[i:], "weight"])
            if key in self.where:
                return self._read(key)
        return None

    def _read(self, key: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.where[key], framework="pt") as f:
            return f.get_tensor(key)


def _keys(file: str) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as f:
            return list(f.keys())
    except SafetensorError as e:
        raise AdapterError(f"{file}: not a complete safetensors file ({e}); download or save it again") from e


def _folder_of(model: nn.Module) -> str:
    config: Any = getattr(model, "config", None)
    path = getattr(config, "_name_or_path", "") or ""
    if not os.path.isdir(path):
        raise AdapterError(
            f"the base came from {path or 'nowhere that it knows'!r}, which is no folder here; give model_path, a "
            "folder with the original weights as safetensors"
        )
    return path
