"""Writing a safetensors file one tensor at a time: eight bytes of header length, the header as JSON, the data.

The library's own writer wants every tensor of a file in memory at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["NAMES", "Plan", "is_complete", "size_of", "write_shard"]

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip

Plan = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def size_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    size = dtype.itemsize
    for n in shape:
        size *= n
    return size


def _header(plan: Plan) -> tuple[bytes, list[str]]:
    """The header and the order of the data: wide types first, so that every tensor is aligned."""
    order = sorted(plan, key=lambda k: (-plan[k][0].itemsize, k))
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for key in order:
        dtype, shape = plan[key]
        end = start + size_of(dtype, shape)
        fields[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), order


def write_shard(path: Path, plan: Plan, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file beside and rename it. tensors: every (key, value) of the plan, in any order, asked for one by
    one; each is written where it belongs and let go of.

    Raises ValueError where a tensor is not as planned, or one is missing; nothing is left then.
    """
    header, order = _header(plan)
    starts, start = {}, 8 + len(header)
    for key in order:
        starts[key] = start
        start += size_of(*plan[key])
    partial = path.with_name(path.name + ".writing")
    left = set(plan)
    try:
        with partial.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(start)
            for key, t in tensors:
                if (t.dtype, tuple(t.shape)) != plan[key]:
                    raise ValueError(f"{key}: planned {plan[key]}, got {t.dtype} {tuple(t.shape)}")
                stream.seek(starts[key])
                stream.write(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                left.discard(key)
            stream.flush()
            os.fsync(stream.fileno())
        if left:
            raise ValueError(f"{path}: {min(left)} was planned and not given")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_complete(path: Path, plan: Plan) -> bool:
    """Whether the file is there with exactly this header and size."""
    if not path.is_file():
        return False
    header, _ = _header(plan)
    size = 8 + len(header) + sum(size_of(*p) for p in plan.values())
    with path.open("rb") as stream:
        return path.stat().st_size == size and stream.read(8 + len(header))[8:] == header
