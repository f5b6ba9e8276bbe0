"""diffusers' LoRA loading, switching, fusing and hot-swapping on a tiny random pipeline, under the name peft."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

assert "veneer" in peft.__file__, peft.__file__
TARGETS = ["to_q", "to_v"]


def tokenizer(folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefgh", *(f"{c}</w>" for c in "abcdefgh")]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


def pipeline(folder: Path) -> Any:
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=2,
        down_block_types=down, up_block_types=up, cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=[4, 8], in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=18,
            max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    parts = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    made = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer(folder), unet=unet, scheduler=DDIMScheduler(), **parts
    )
    made.set_progress_bar_config(disable=True)
    return made


def image(pipe: Any) -> torch.Tensor:
    seed = torch.Generator().manual_seed(0)
    out = pipe("a b c", generator=seed, num_inference_steps=2, output_type="np", height=16, width=16)
    return torch.from_numpy(out.images)


def lora_file(folder: Path, name: str, r: int, seed: int) -> str:
    """A LoRA for the UNet and the text encoder, as diffusers' training scripts save it."""
    pipe = pipeline(folder / "tokens")
    torch.manual_seed(seed)
    config = {"r": r, "lora_alpha": r, "init_lora_weights": False}
    pipe.unet.add_adapter(peft.LoraConfig(target_modules=TARGETS, **config))
    pipe.text_encoder.add_adapter(peft.LoraConfig(target_modules=["q_proj", "v_proj"], **config))
    for model in (pipe.unet, pipe.text_encoder):
        for key, p in model.named_parameters():
            if "lora_B" in key:
                p.data.normal_(std=0.5)
    where = folder / name
    StableDiffusionPipeline.save_lora_weights(
        str(where),
        unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(pipe.text_encoder),
    )
    return str(where)


def loading(folder: Path, one: str, two: str) -> None:
    pipe = pipeline(folder / "tokens")
    base = image(pipe)
    pipe.load_lora_weights(one, adapter_name="one")
    pipe.load_lora_weights(two, adapter_name="two")
    pipe.set_adapters("one")
    first = image(pipe)
    pipe.set_adapters("two")
    second = image(pipe)
    assert not torch.allclose(first, base)
    assert not torch.allclose(second, base)
    assert not torch.allclose(first, second)
    pipe.set_adapters(["one", "two"], adapter_weights=[0.5, 0.5])
    assert sorted(pipe.get_active_adapters()) == ["one", "two"]
    both = image(pipe)
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)
    pipe.disable_lora()
    torch.testing.assert_close(image(pipe), base)
    pipe.enable_lora()
    torch.testing.assert_close(image(pipe), both)
    pipe.delete_adapters("two")
    pipe.set_adapters("one")
    torch.testing.assert_close(image(pipe), first)
    pipe.unload_lora_weights()
    torch.testing.assert_close(image(pipe), base)


def fusing(folder: Path, one: str) -> None:
    pipe = pipeline(folder / "tokens")
    base = image(pipe)
    pipe.load_lora_weights(one, adapter_name="one")
    apart = image(pipe)
    pipe.fuse_lora()
    torch.testing.assert_close(image(pipe), apart, rtol=1e-3, atol=1e-4)
    pipe.unfuse_lora()
    torch.testing.assert_close(image(pipe), apart)
    pipe.fuse_lora(lora_scale=0.0)
    torch.testing.assert_close(image(pipe), base, rtol=1e-3, atol=1e-4)


def hotswapping(folder: Path, one: str, two: str) -> None:
    """hotswap=True puts the second file's tensors into the first's place. diffusers swaps no text encoder, so the
    UNet's LoRA alone is loaded."""
    pipe, other = pipeline(folder / "tokens"), pipeline(folder / "tokens")
    other.unet.load_lora_adapter(unet_part(other, two), prefix="unet")
    pipe.unet.load_lora_adapter(unet_part(pipe, one), prefix="unet", adapter_name="first")
    held = next(m for m in pipe.unet.modules() if hasattr(m, "lora_A"))
    before = held.lora_A["first"].weight
    pipe.unet.load_lora_adapter(unet_part(pipe, two), prefix="unet", adapter_name="first", hotswap=True)
    assert held.lora_A["first"].weight is before  # the same storage, so compiled code goes on
    torch.testing.assert_close(image(pipe), image(other))


def unet_part(pipe: Any, folder: str) -> dict[str, torch.Tensor]:
    state, _ = pipe.lora_state_dict(folder)
    return {k: v for k, v in state.items() if k.startswith("unet.")}


with tempfile.TemporaryDirectory() as name:
    where = Path(name)
    one_file, two_file = lora_file(where, "one", 2, 1), lora_file(where, "two", 2, 2)
    loading(where, one_file, two_file)
    fusing(where, one_file)
    hotswapping(where, one_file, two_file)
