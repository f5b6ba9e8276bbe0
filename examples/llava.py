"""Questions about images with a Llava-like model, its processor and transformers' Trainer.

    python examples/llava.py [FOLDER]

Runs in seconds on a CPU: a small Llava with random weights, made on the spot, learns to say the colour of a square and
where it lies. The adapter, on the language model's layers and the projector between image and text, is left in FOLDER,
if one is named. With a real model, `from_pretrained` takes the place of `make_base` and `make_processor`.
"""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from veneer import LoraConfig, PeftModel, get_peft_model

COLOURS, PLACES = ["red", "green", "blue"], ["left", "right"]
WORDS = ["<pad>", "</s>", "<unk>", "<image>", "which", "colour", "and", "where", "?", *COLOURS, *PLACES]
SIZE, PATCH = 16, 8
PROMPT = "<image> which colour and where ?"

Row = tuple[Image.Image, str]


def make_rows(number: int, seed: int) -> list[Row]:
    """(image, answer) pairs: a square in one half of an image."""
    draw, rows = random.Random(seed), []
    for colour, place in itertools.islice(itertools.cycle(itertools.product(COLOURS, PLACES)), number):
        image = Image.new("RGB", (40, 40), tuple(draw.randint(0, 60) for _ in range(3)))
        x, y = draw.randint(0, 5) + 20 * PLACES.index(place), draw.randint(0, 25)
        ImageDraw.Draw(image).rectangle((x, y, x + 14, y + 14), fill=colour)
        rows.append((image, f"{colour} {place}"))
    return rows


def make_processor() -> LlavaProcessor:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def make_base() -> LlavaForConditionalGeneration:
    set_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE,
        patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=WORDS.index("<image>"))
    return LlavaForConditionalGeneration(config)


class Collate:
    """Image, question and answer as the processor writes them; only the answer and its end are learned."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self.processor = processor

    def __call__(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        images, texts = [image for image, _ in rows], [f"{PROMPT} {answer} </s>" for _, answer in rows]
        batch = self.processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].clone()
        question = self.processor(images=images[0], text=PROMPT, return_tensors="pt")["input_ids"].shape[1]
        labels[:, :question] = -100
        labels[labels == self.processor.tokenizer.pad_token_id] = -100
        return {**batch, "labels": labels}


@torch.no_grad()
def answers(model: Any, processor: LlavaProcessor, rows: list[Row]) -> list[str]:
    batch = processor(images=[image for image, _ in rows], text=[PROMPT] * len(rows), return_tensors="pt")
    out = model.eval().generate(**batch, max_new_tokens=3, do_sample=False)
    return processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def right(model: Any, processor: LlavaProcessor, rows: list[Row]) -> float:
    given = answers(model, processor, rows)
    return sum(text.strip() == answer for text, (_, answer) in zip(given, rows, strict=True)) / len(rows)


def main(folder: str) -> None:
    processor, train, test = make_processor(), make_rows(240, 1), make_rows(60, 2)
    # the language model's layers and the projector, not the tower that reads the image
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)|.*multi_modal_projector\.linear_\d"
    model = get_peft_model(make_base(), LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=targets))
    model.print_trainable_parameters()
    before = right(model, processor, test)
    args = TrainingArguments(
        output_dir=folder, num_train_epochs=10, per_device_train_batch_size=24, learning_rate=1e-2, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    Trainer(model, args, data_collator=Collate(processor), train_dataset=train).train()
    print(f"exact match: {before:.2f} before, {right(model, processor, test):.2f} after")

    where = Path(folder) / "adapter"
    model.save_pretrained(where)
    processor.save_pretrained(where)
    again, reader = PeftModel.from_pretrained(make_base(), where).eval(), LlavaProcessor.from_pretrained(where)
    batch = Collate(reader)(test[:4])
    with torch.no_grad():
        logits, loaded = model(**batch).logits, again(**batch).logits
    print(f"one image: {answers(again, reader, test[:1])[0]} (is {test[0][1]})")
    print(f"loaded back: {'equal' if torch.equal(logits, loaded) else 'different'}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(temporary)
