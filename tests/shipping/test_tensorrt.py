"""ONNX graphs against TensorRT's published operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from veneer.cli.app import app
from veneer.errors import AdapterError
from veneer.export.tensorrt import check_graphs, operators


def graph(path: Path, nodes: list[Any], kind: int = TensorProto.FLOAT, opset: int = 20, **more: Any) -> Path:
    """x -> nodes -> y, and inputs by name."""
    inputs = [helper.make_tensor_value_info("x", kind, ["n", 4])]
    inputs += [helper.make_tensor_value_info(n, t, [1]) for n, t in more.items()]
    made = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", kind, None)])
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(made, opset_imports=opsets), str(path))
    return path


def problems(path: Path) -> list[str]:
    return [f.problem for f in check_graphs(str(path)).findings]


def test_the_list() -> None:
    known = operators()
    assert known.version == "10.0"
    assert len(known.types) > 140
    assert {"MatMul", "Softmax", "GatherND"} <= known.types.keys()
    assert not {"MatMulInteger", "DynamicQuantizeLinear", "Unique"} & known.types.keys()
    assert known.constant["Slice"] == 3


def test_what_it_takes(tmp_path: Path) -> None:
    path = graph(tmp_path / "a.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    found = check_graphs(str(path))
    assert found.good
    assert found.flags == f"trtexec --onnx={path} --minShapes=x:1x4,... --optShapes=... --maxShapes=..."


def test_what_it_does_not_take(tmp_path: Path) -> None:
    make = helper.make_node
    path = tmp_path / "g.onnx"
    assert problems(graph(path, [make("Det", ["x"], ["y"], name="d")])) == ["TensorRT 10.0 has no Det (node d)"]
    twice = [make("Det", ["x"], ["h"], name="a"), make("Det", ["h"], ["y"], name="b")]
    assert problems(graph(path, twice)) == ["TensorRT 10.0 has no Det (node a and 1 more)"]
    foreign = [make("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft")]
    assert problems(graph(path, foreign)) == ["com.microsoft.FusedMatMul is no operator of ONNX itself (node y)"]
    (wrong,) = problems(graph(path, [make("Relu", ["x"], ["y"])], TensorProto.INT8))
    assert wrong.startswith("Relu of INT8; TensorRT 10.0 takes BF16, FP16, FP32")
    (late,) = problems(graph(path, [make("Relu", ["x"], ["y"])], opset=22))
    assert late == "its opset is 22; TensorRT 10.0 reads 9 to 20"


def test_axes_must_be_constants(tmp_path: Path) -> None:
    node = helper.make_node("Unsqueeze", ["x", "axes"], ["y"], name="u")
    path = graph(tmp_path / "g.onnx", [node], axes=TensorProto.INT64)
    assert problems(path) == ["input 1 of Unsqueeze is computed; TensorRT needs a constant (node u)"]
    axes = helper.make_node("Constant", [], ["axes"], value=helper.make_tensor("", TensorProto.INT64, [1], [0]))
    assert problems(graph(path, [axes, node])) == []


def test_graphs_in_nodes_are_read(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("h", TensorProto.FLOAT, None)
    inner = [helper.make_graph([helper.make_node(op, ["x"], ["h"])], op, [], [value]) for op in ("Relu", "Det")]
    node = helper.make_node("If", ["c"], ["y"], then_branch=inner[0], else_branch=inner[1])
    assert problems(graph(tmp_path / "g.onnx", [node], c=TensorProto.BOOL)) == ["TensorRT 10.0 has no Det (node h)"]


def test_the_command(tmp_path: Path) -> None:
    graph(tmp_path / "a.onnx", [helper.make_node("Relu", ["x"], ["y"])])
    run = lambda *more: CliRunner().invoke(app, ["check", str(tmp_path), "--for", "tensorrt", *more])
    done = run()
    assert done.exit_code == 0, done.output
    assert "TensorRT has every operator of it" in done.output
    graph(tmp_path / "b.onnx", [helper.make_node("Det", ["x"], ["y"])])
    done = run()
    assert done.exit_code == 1
    assert "b.onnx: TensorRT 10.0 has no Det" in done.output
    assert run("--fix", str(tmp_path / "c")).exit_code == 2
    with pytest.raises(AdapterError, match=r"no \.onnx file here"):
        check_graphs(str(tmp_path / "none"))
