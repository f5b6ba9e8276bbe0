"""Image classification with a vision transformer, its image processor and transformers' Trainer.

    python examples/vit.py [FOLDER]

Runs in seconds on a CPU: a small ViT with random weights, made on the spot, learns which way the stripes of an image
run. The adapter is left in FOLDER, if one is named. With a real model, `from_pretrained` stands for `make_base`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

from veneer import LoraConfig, PeftModel, get_peft_model

NAMES = ["across", "down", "slanted"]
SIZE = 32


def make_image(label: int, draw: np.random.Generator) -> Image.Image:
    """A striped image of 48 x 48 points, with noise."""
    across, down = np.mgrid[:48, :48]
    along = (across, down, across + down)[label] + draw.integers(12)
    grey = 128 + 90 * np.sign(np.sin(2 * np.pi * along / 12)) + draw.normal(0, 25, (48, 48))
    return Image.fromarray(np.repeat(grey.clip(0, 255)[..., None], 3, 2).astype(np.uint8))


class Striped(Dataset):
    """Images as the processor gives them, with their label."""

    def __init__(self, number: int, seed: int, processor: Any) -> None:
        draw = np.random.default_rng(seed)
        self.labels = [i % len(NAMES) for i in range(number)]
        images = [make_image(label, draw) for label in self.labels]
        self.pixels = processor(images, return_tensors="pt")["pixel_values"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


def make_base() -> ViTForImageClassification:
    set_seed(0)
    config = ViTConfig(
        image_size=SIZE, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, id2label=dict(enumerate(NAMES)), initializer_range=0.1,
    )  # fmt: skip
    return ViTForImageClassification(config)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(folder: str) -> None:
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    train, test = Striped(240, 1, processor), Striped(90, 2, processor)
    # the classifier is new: it is trained whole and saved with the adapter
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = get_peft_model(make_base(), config)
    model.print_trainable_parameters()
    args = TrainingArguments(
        output_dir=folder, num_train_epochs=5, per_device_train_batch_size=24, learning_rate=1e-2, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, label_names=["labels"],
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=train, compute_metrics=accuracy)
    before = trainer.predict(test).metrics["test_accuracy"]
    trainer.train()
    after = trainer.predict(test).metrics["test_accuracy"]
    print(f"accuracy: {before:.2f} before, {after:.2f} after")

    where = Path(folder) / "adapter"
    model.save_pretrained(where)
    processor.save_pretrained(where)
    again = PeftModel.from_pretrained(make_base(), where).eval()
    batch = ViTImageProcessor.from_pretrained(where)([make_image(1, np.random.default_rng(3))], return_tensors="pt")
    with torch.no_grad():
        logits, loaded = model.eval()(**batch).logits, again(**batch).logits
    print(f"one image: {NAMES[int(loaded.argmax())]}")
    print(f"loaded back: {'equal' if torch.equal(logits, loaded) else 'different'}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(temporary)
