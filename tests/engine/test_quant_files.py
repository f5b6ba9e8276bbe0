"""Models whose files are quantised already, by the libraries that make and read them: GPTQ, AWQ, compressed-tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from quant_zoo import needs

import veneer
from veneer.errors import CannotMerge

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ROWS = [
    f"Order {i}: {i % 7} crates of apples and {i % 5} of pears, to Brno, by Monday the {i % 28}th." for i in range(64)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    from veneer.train.bases import load_tokenizer, resolve_base

    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("files") / "base"
    tokenizer = load_tokenizer(resolve_base("smollm2-135m-instruct"))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=4, max_position_embeddings=128, **sizes)
    LlamaForCausalLM(config).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture(scope="module", params=["gptq", "awq"])
def packed(request: pytest.FixtureRequest, base: Path) -> Path:
    """Quantised with sample rows, as users do it."""
    needs("gptqmodel")
    from gptqmodel import GPTQModel, QuantizeConfig

    way = {"quant_method": "awq", "format": "gemm"} if request.param == "awq" else {}
    model = GPTQModel.load(str(base), QuantizeConfig(bits=4, group_size=32, device="cpu", **way))
    model.quantize(ROWS, batch_size=8)
    model.save(str(base.with_name(request.param)))
    return base.with_name(request.param)


def load(folder: Path, **more: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)


def ids() -> torch.Tensor:
    return torch.randint(0, 999, (4, 12), generator=torch.Generator().manual_seed(2))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids()).logits


def trained(model: Any) -> list[float]:
    """The losses of ten steps."""
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    model.train()
    for _ in range(10):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_gptq_and_awq_train_and_load_in_peft(packed: Path, tmp_path: Path) -> None:
    model = veneer.get_peft_model(veneer.prepare_model_for_kbit_training(load(packed)), veneer.LoraConfig(**LORA))
    losses = trained(model)
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path)
    y = logits(model)
    for package in (veneer, peft):
        again = package.PeftModel.from_pretrained(load(packed), str(tmp_path))
        torch.testing.assert_close(logits(again), y, atol=2e-5, rtol=2e-5)
    with pytest.raises(CannotMerge, match=r"cannot be packed anew.*veneer merge --base ORIGINAL"):
        model.merge_and_unload()
    torch.testing.assert_close(logits(model), y)


@pytest.mark.slow
def test_reweighting_reads_what_the_kernel_multiplies_by(packed: Path) -> None:
    """DoRA, which peft refuses on these layers."""
    model = veneer.get_peft_model(load(packed), veneer.LoraConfig(**LORA, use_dora=True))
    site = model.base_model.model.model.layers[0].mlp.down_proj.site
    x = torch.randn(3, site.inp)
    torch.testing.assert_close(site.module(x), x @ site.weight().float().mT, atol=1e-4, rtol=1e-3)
    losses = trained(model)
    assert losses[-1] < losses[0] - 0.1


@pytest.fixture(scope="module", params=["W4A16", "FP8_DYNAMIC"])
def compressed(request: pytest.FixtureRequest, base: Path) -> Path:
    """Rounded to the nearest."""
    needs("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = preset_name_to_scheme(request.param, ["Linear"])
    scheme.format = "pack-quantized" if request.param == "W4A16" else "float-quantized"
    if scheme.weights.group_size:
        scheme.weights.group_size = 32
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status=QuantizationStatus.FROZEN,
        format=scheme.format,
    )  # fmt: skip
    model = load(base)
    apply_quantization_config(model, config)
    for layer in (m for m in model.modules() if hasattr(m, "weight_scale")):
        groups = layer.weight.data.unflatten(1, (-1, scheme.weights.group_size or layer.in_features))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
        layer.weight_scale.data = scale.view_as(layer.weight_scale).to(layer.weight_scale.dtype)
        if hasattr(layer, "weight_zero_point"):
            layer.weight_zero_point.data = zero.view_as(layer.weight_zero_point).to(layer.weight_zero_point.dtype)
    compressor, where = ModelCompressor(quantization_config=config), base.with_name(request.param)
    compressor.compress_model(model)
    model.save_pretrained(where)
    compressor.update_config(where)
    return where


@pytest.mark.slow
def test_compressed_tensors_dequantised(compressed: Path) -> None:
    from transformers import CompressedTensorsConfig

    with pytest.raises(ValueError, match=r"q_proj .*not decompressed.*CompressedTensorsConfig\(dequantize=True\)"):
        veneer.get_peft_model(load(compressed), veneer.LoraConfig(**LORA))
    settings = CompressedTensorsConfig(dequantize=True)
    model = veneer.get_peft_model(load(compressed, quantization_config=settings), veneer.LoraConfig(**LORA))
    losses = trained(model)
    assert losses[-1] < losses[0] - 0.1
    y = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), y, atol=1e-4, rtol=1e-4)
