"""Whether TensorRT's ONNX parser takes a graph: its operators, types and opset against the published list.

The list lies beside this file with its source and version; TensorRT itself is not asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import AdapterError, MissingExtra
from .serving_rules import Checked, Finding

__all__ = ["check_graphs", "operators"]

TYPES = {
    "FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "INT32": "INT32", "INT64": "INT64", "INT8": "INT8",
    "UINT8": "UINT8", "BOOL": "BOOL", "FLOAT8E4M3FN": "FP8", "INT4": "INT4", "DOUBLE": "FP32",
}  # fmt: skip
"""ONNX's names of types, and TensorRT's. Doubles are computed as float32."""


@dataclass(frozen=True)
class Operators:
    """types: operator -> the types of its first input that are taken. constant: operator -> the input that must be
    known when the engine is built. opsets: the first and the last."""

    version: str
    opsets: tuple[int, int]
    types: Mapping[str, frozenset[str]]
    constant: Mapping[str, int]


@cache
def operators() -> Operators:
    held = json.loads(Path(__file__).with_name("tensorrt_operators.json").read_text(encoding="utf-8"))
    types = {name: frozenset(words.split()) for name, words in held["operators"].items()}
    first, last = held["opsets"]
    return Operators(held["tensorrt"], (first, last), types, held["constant_input"])


def check_graphs(source: str) -> Checked:
    """The .onnx file, or all those in an exported folder, against the list. Raises AdapterError without any."""
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("reading a graph needs onnx: pip install 'veneer[onnx]'") from error

    path = Path(source)
    files = sorted(path.glob("*.onnx")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise AdapterError(f"{source}: no .onnx file here; write one with `veneer export ADAPTER --to onnx-lora`")
    models = {file.name: onnx.load(str(file), load_external_data=False) for file in files}
    findings = [
        Finding(f.level, f"{name}: {f.problem}", f.remedy) if len(models) > 1 else f
        for name, model in models.items()
        for f in _check(model)
    ]
    return Checked(findings, 0, f"trtexec --onnx={files[-1]}{_shapes(models[files[-1].name])}")


def _shapes(model: Any) -> str:
    """The options of trtexec that a graph with free axes needs, with the first such input as an example."""
    for i in model.graph.input:
        axes = [d.dim_param or str(d.dim_value) for d in i.type.tensor_type.shape.dim]
        if any(d.dim_param for d in i.type.tensor_type.shape.dim):
            smallest = "x".join(a if a.isdigit() else "1" for a in axes)
            return f" --minShapes={i.name}:{smallest},... --optShapes=... --maxShapes=..."
    return ""


def _check(model: Any) -> Iterator[Finding]:
    import onnx

    known = operators()
    functions = {(f.domain, f.name) for f in model.functions}
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not known.opsets[0] <= opset <= known.opsets[1]:
        yield Finding(
            "error",
            f"its opset is {opset}; TensorRT {known.version} reads {known.opsets[0]} to {known.opsets[1]}",
            f"onnx.version_converter.convert_version(model, {known.opsets[1]}), or a newer TensorRT",
        )
    typed = onnx.shape_inference.infer_shapes(model)
    bodies = [typed.graph, *model.functions]
    found: dict[tuple[str, str], list[str]] = {}
    for body in bodies:
        for problem, remedy, name in _of(body, {}, set(), functions, known):
            found.setdefault((problem, remedy), []).append(name)
    for (problem, remedy), names in sorted(found.items()):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield Finding("error", f"{problem} (node {names[0]}{more})", remedy)


def _of(
    body: Any, types: dict[str, str], constants: set[str], functions: set[tuple[str, str]], known: Operators
) -> Iterator[tuple[str, str, str]]:
    """(problem, remedy, node) of a graph or a function, and of the graphs in its nodes. types, constants: what the
    graphs around it know."""
    types, constants = {**types, **_types(body)}, constants | {t.name for t in getattr(body, "initializer", ())}
    for node in body.node:
        name = node.name or "".join(node.output[:1])
        if node.op_type == "Constant":
            constants.update(node.output)
        if node.domain not in ("", "ai.onnx"):
            if (node.domain, node.op_type) not in functions:
                problem = f"{node.domain}.{node.op_type} is no operator of ONNX itself"
                yield problem, "export without runtime-specific operators (no --int8)", name
        else:
            yield from ((*pair, name) for pair in _node(node, types, constants, known))
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
            for graph in inner:
                yield from _of(graph, types, constants, functions, known)


def _node(node: Any, types: Mapping[str, str], constants: set[str], known: Operators) -> Iterator[tuple[str, str]]:
    if node.op_type not in known.types:
        yield f"TensorRT {known.version} has no {node.op_type}", "write a plugin for it, or export another model"
        return
    first = next(iter([*node.input, *node.output]), "")
    kind = types.get(first)
    if kind is not None and known.types[node.op_type] and TYPES.get(kind, kind) not in known.types[node.op_type]:
        taken = ", ".join(sorted(known.types[node.op_type]))
        yield f"{node.op_type} of {kind}; TensorRT {known.version} takes {taken}", "cast around it"
    at = known.constant.get(node.op_type)
    if at is not None and len(node.input) > at and node.input[at] and node.input[at] not in constants:
        yield (
            f"input {at} of {node.op_type} is computed; TensorRT needs a constant",
            "fold constants (onnxsim, polygraphy)",
        )


def _types(body: Any) -> dict[str, str]:
    """Tensor -> its type's ONNX name, as far as known."""
    import onnx

    name = onnx.TensorProto.DataType.Name
    out = {t.name: name(t.data_type) for t in getattr(body, "initializer", ())}
    values: Iterable[Any] = [*getattr(body, "value_info", ()), *body.input, *body.output]
    return out | {v.name: name(v.type.tensor_type.elem_type) for v in values if not isinstance(v, str)}
