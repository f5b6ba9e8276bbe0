"""One graph serves several adapters, whose A and B are its inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from veneer import IA3Config, LoraConfig, PeftModel
from veneer.cli.app import app
from veneer.errors import AdapterError
from veneer.export.onnx_adapters import factors_of
from veneer.export.tensorrt import check_graphs


@pytest.mark.slow
def test_two_adapters_of_different_ranks_and_layers(llama: Path, make_adapter: Any, tmp_path: Path) -> None:
    folders = {
        "red": make_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=32), "red", 1),
        "green": make_adapter(LoraConfig(target_modules=["v_proj", "up_proj"], r=2, use_rslora=True), "green", 2),
    }
    words = ["export", folders["red"], "--to", "onnx-lora", "--with", f"green={folders['green']}"]
    done = CliRunner().invoke(app, [*map(str, words), "--out", str(tmp_path / "x")])
    assert done.exit_code == 0, done.output
    assert check_graphs(str(tmp_path / "x")).findings == []  # TensorRT has all its operators
    session = onnxruntime.InferenceSession(str(tmp_path / "x" / "model.onnx"))
    nodes = {n.name: n for n in session.get_inputs()}
    assert sum(n.startswith("lora_A.") for n in nodes) == 6  # three modules in two layers
    ids = torch.randint(3, 200, (2, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    plain = {
        "input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": (mask.cumsum(1) - 1).numpy(),
        **{n: torch.zeros(2, k.shape[1], 0, k.shape[3]).numpy() for n, k in nodes.items() if n.startswith("past")},
    }  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(llama).eval()
    zeros = load_file(tmp_path / "x" / "adapters" / "red.safetensors")
    cases: list[tuple[Any, Any]] = [(base, {k: v * 0 for k, v in zeros.items()})]
    for name, folder in folders.items():
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(folder)).eval()
        cases.append((adapted, load_file(tmp_path / "x" / "adapters" / f"{name}.safetensors")))
    seen = []
    for model, factors in cases:
        (got,) = session.run(["logits"], plain | factors)
        with torch.no_grad():
            want = model(ids).logits
        assert torch.allclose(torch.from_numpy(got), want, atol=1e-4 * float(want.abs().max()))
        seen.append(want)
    assert float((seen[0] - seen[1]).abs().max()) > 0.1
    assert float((seen[1] - seen[2]).abs().max()) > 0.1


def test_factors_hold_the_scaling(make_adapter: Any) -> None:
    folder = make_adapter(LoraConfig(target_modules=["q_proj"], r=4, lora_alpha=32))
    (A, B), *_ = factors_of(str(folder)).values()
    from veneer import state

    tensors = state.read(str(folder))[0]
    own = {k.rsplit("lora_", 1)[1]: t for k, t in tensors.items() if "layers.0." in k}
    assert torch.equal(A, own["A.weight"])
    assert torch.allclose(B, 8 * own["B.weight"])


def test_what_is_more_than_a_product_is_refused(make_adapter: Any) -> None:
    more: list[Any] = [
        LoraConfig(target_modules=["q_proj"], use_dora=True),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    ]
    for i, (config, word) in enumerate(
        zip(more, ("the method dora", "modules_to_save", "the method ia3"), strict=True)
    ):
        with pytest.raises(AdapterError, match=rf"more than a product B A \({word}\)"):
            factors_of(str(make_adapter(config, f"a{i}")))
    with pytest.raises(AdapterError, match="not a linear layer"):
        factors_of(str(make_adapter(LoraConfig(target_modules=["embed_tokens"]), "e")))
