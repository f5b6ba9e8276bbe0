"""One ONNX graph: written by torch.onnx (dynamo), and compared with torch in onnxruntime at sizes it never saw."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, MissingExtra

__all__ = ["TOLERANCE", "Graph", "compare_graph", "libraries", "session", "write_graph"]

TOLERANCE = 1e-4
"""Largest difference to torch that is accepted, over the largest output."""

Nested = Sequence[Any]


@dataclass(frozen=True)
class Graph:
    """module: takes the inputs by position (tensors, or lists of tensors), gives a tuple of tensors. inputs, outputs:
    names in that order, lists spread out. free: for each argument, which axes are free (a list: of each tensor in it).
    sample(size, seed): the arguments of one size; the first of sizes is traced, the others are checked.
    """

    file: str
    module: nn.Module
    inputs: Sequence[str]
    outputs: Sequence[str]
    free: Nested
    sample: Callable[[Any, int], tuple[Any, ...]]
    sizes: Sequence[Any]


def libraries() -> Any:
    """onnxruntime. Raises MissingExtra without the packages that an export needs."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtra("ONNX export needs onnx, onnxruntime, onnxscript: pip install 'veneer[onnx]'") from error
    return onnxruntime


def session(path: Path) -> Any:
    """The graph in onnxruntime, on the CPU."""
    return libraries().InferenceSession(str(path), providers=["CPUExecutionProvider"])


def flat(arguments: Nested) -> list[Any]:
    out: list[Any] = []
    for item in arguments:
        out += list(item) if isinstance(item, list | tuple) else [item]
    return out


@torch.no_grad()
def write_graph(graph: Graph, folder: Path) -> Path:
    """Trace the graph and save it. Raises AdapterError where torch.onnx cannot."""
    from torch.export import Dim
    from torch.onnx.errors import OnnxExporterError

    def axes(item: Any) -> Any:
        return [axes(one) for one in item] if isinstance(item, list) else dict.fromkeys(item, Dim.DYNAMIC)

    path = folder / graph.file
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                graph.module.eval(),
                graph.sample(graph.sizes[0], 0),
                dynamo=True,
                verbose=False,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_shapes=tuple(axes(item) for item in graph.free),
            )
    except OnnxExporterError as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise AdapterError(f"torch.onnx cannot export {graph.file} of this model: {first}") from error
    program.save(str(path))
    return path


@torch.no_grad()
def compare_graph(graph: Graph, path: Path) -> float:
    """The largest difference of any output between onnxruntime and torch. Raises AdapterError beyond TOLERANCE."""
    running, worst = session(path), 0.0
    known = {i.name for i in running.get_inputs()}  # an input that no output needs is left out of the graph
    for seed, size in enumerate(graph.sizes, 1):
        given = graph.sample(size, seed)
        want: tuple[Tensor, ...] = graph.module(*given)
        feed = {n: t.numpy() for n, t in zip(graph.inputs, flat(given), strict=True) if n in known}
        for name, got, right in zip(graph.outputs, running.run(list(graph.outputs), feed), want, strict=True):
            gap = float((torch.from_numpy(got) - right).abs().max())
            if not gap <= TOLERANCE * max(float(right.abs().max()), 1e-12):
                raise AdapterError(
                    f"{graph.file}: onnxruntime differs from torch by {gap:.3g} in {name} at {size}; nothing was "
                    "written"
                )
            worst = max(worst, gap)
    return worst
