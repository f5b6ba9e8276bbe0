"""8-bit weights for exported graphs (onnxruntime's dynamic quantisation), and what they lose on sample text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import AdapterError
from .certificate import SAMPLES, Certificate, Outputs, certify
from .onnx_graph import Graph, session

__all__ = ["int8_path", "quantise"]


def int8_path(path: Path) -> Path:
    return path.with_name(path.stem + ".int8.onnx")


def quantise(
    graphs: Sequence[Graph], paths: Sequence[Path], model: Any, tokenizer: Any, samples: Sequence[str] = ()
) -> Certificate:
    """Write NAME.int8.onnx beside each graph; returns the difference of the last graph's first output to torch's.

    Weights are rounded to 8 bits per output channel, activations to 8 bits per call. samples: texts; without any, a
    few built in. Raises AdapterError without a tokenizer to read them.
    """
    if tokenizer is None:
        raise AdapterError("what int8 loses is measured on text, which needs the model's tokenizer")
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    for path in paths:
        ready = path.with_name(path.stem + ".ready.onnx")
        quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
        quantize_dynamic(str(ready), str(int8_path(path)), weight_type=QuantType.QInt8, per_channel=True)
        ready.unlink()
    texts = list(samples) or list(SAMPLES)
    full = _run(graphs, list(paths), tokenizer, texts, model)
    small = _run(graphs, [int8_path(p) for p in paths], tokenizer, texts, model)
    return certify(full, small, "int8")


def _run(graphs: Sequence[Graph], paths: list[Path], tokenizer: Any, texts: list[str], model: Any) -> Outputs:
    """The first output of the last graph over texts, one at a time, without padding."""
    running = [session(p) for p in paths]
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)["input_ids"]
        mask = torch.ones_like(ids)
        given: dict[str, Any] = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        if len(running) == 2:  # the text is read, and then written
            (hidden,) = running[0].run(["last_hidden_state"], given)
            given = {"input_ids": ids.numpy(), "encoder_attention_mask": mask.numpy(), "encoder_hidden_states": hidden}
        elif "position_ids" in graphs[0].inputs:
            given["position_ids"] = (mask.cumsum(1) - 1).numpy()
        for node in running[-1].get_inputs():
            if node.name.startswith("past_key_values."):
                given[node.name] = torch.zeros(1, node.shape[1], 0, node.shape[3]).numpy()
        known = {node.name for node in running[-1].get_inputs()}
        name = graphs[-1].outputs[0]
        (value,) = running[-1].run([name], {k: v for k, v in given.items() if k in known})
        found.append(torch.from_numpy(value).flatten(0, -2))
    return Outputs(torch.cat(found), graphs[-1].outputs[0] == "logits")
