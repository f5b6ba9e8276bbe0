"""A, B and delta of every layer as one file: .npz for NumPy and MATLAB, .safetensors for everything else.

Keys: "<layer>.A" (r, in), "<layer>.B" (out, r), "<layer>.delta" (out, in); delta = scaling * B @ A, and the
scaling is "<layer>.scaling" (one number). Methods without factors have the delta alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import AdapterError
from ..layer_matrices import matrices

if TYPE_CHECKING:
    from torch import nn

__all__ = ["PARTS", "export_matrices", "matrix_tensors"]

PARTS = ("A", "B", "delta", "scaling")


@torch.no_grad()
def matrix_tensors(model: nn.Module, adapter: str | None = None, parts: Iterable[str] = PARTS) -> dict[str, Tensor]:
    """Key -> tensor in float32 (float64 stays), as the module says. parts: which of A, B, delta, scaling.

    Raises AdapterError for an unknown part, and CannotMerge where delta is asked for and depends on the input.
    """
    wanted = list(parts)
    odd = [p for p in wanted if p not in PARTS]
    if odd:
        raise AdapterError(f"unknown part {odd[0]!r}; one of {', '.join(PARTS)}")
    out: dict[str, Tensor] = {}
    for name, m in matrices(model, adapter).items():
        found = {"A": m.A, "B": m.B, "scaling": torch.tensor(m.scaling)}
        if m.A is None:
            found["scaling"] = None
        for part in wanted:
            value = m.delta() if part == "delta" else found[part]
            if value is not None:
                work = torch.promote_types(value.dtype, torch.float32)
                out[f"{name}.{part}"] = value.detach().to("cpu", work).contiguous()
    return out


def export_matrices(
    model: nn.Module, path: str | Path, adapter: str | None = None, parts: Iterable[str] = PARTS
) -> Path:
    """Write the matrices of an adapter to a .npz or .safetensors file, beside and renamed.

    Raises AdapterError for another ending, and as matrix_tensors does.
    """
    from ..files import write_atomic, write_tensors

    path = Path(path)
    if path.suffix not in (".npz", ".safetensors"):
        raise AdapterError(f"{path}: matrices are written as .npz or .safetensors; name the file so")
    tensors = matrix_tensors(model, adapter, parts)
    if path.suffix == ".safetensors":
        write_tensors(os.fspath(path), tensors)
        return path
    import numpy as np

    def write(temporary: str) -> None:
        with open(temporary, "wb") as stream:
            np.savez(stream, **{k: t.numpy() for k, t in tensors.items()})  # type: ignore[arg-type]

    write_atomic(os.fspath(path), write)
    return path
