"""Speech to text with a Whisper, its processor and transformers' Trainer.

    python examples/whisper.py [FOLDER]

Runs in seconds on a CPU: a small Whisper, made on the spot, first learns (all of it) to write down the notes of a tune
played in one key; then an adapter has it follow the same tunes three semitones higher. The adapter is left in FOLDER,
if one is named. With a real model, `from_pretrained` takes the place of `make_base` and `make_processor`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import (
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    set_seed,
)

from veneer import LoraConfig, PeftModel, get_peft_model

RATE, NOTE = 16_000, 0.16  # samples and seconds
NAMES = {"do": 0, "re": 2, "mi": 4, "sol": 7, "la": 9}  # semitones
WORDS = ["<pad>", "<start>", "<end>", *NAMES]
TUNE = 3


def play(notes: list[str], shift: int, draw: np.random.Generator) -> np.ndarray:
    """The sound of a tune: sine waves with an overtone and noise."""
    time = np.arange(int(RATE * NOTE)) / RATE
    parts = []
    for note in notes:
        pitch = 440 * 2 ** ((NAMES[note] + shift) / 12)
        wave = np.sin(2 * np.pi * pitch * time) + 0.3 * np.sin(4 * np.pi * pitch * time)
        parts.append(0.3 * wave * np.hanning(len(time)) ** 0.5)
    return np.concatenate(parts) + draw.normal(0, 0.01, len(time) * len(notes))


def make_processor() -> tuple[WhisperFeatureExtractor, PreTrainedTokenizerFast]:
    """What reads sound and what writes text; of a real model, the two halves of WhisperProcessor."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<start>", eos_token="<end>"
    )
    return WhisperFeatureExtractor(feature_size=40, sampling_rate=RATE, chunk_length=1), tokenizer


class Tunes(Dataset):
    """Log-mel features of tunes, and the tokens of their notes."""

    def __init__(self, number: int, seed: int, shift: int, features: Any, tokenizer: Any) -> None:
        draw = np.random.default_rng(seed)
        self.tunes = [[str(note) for note in draw.choice(list(NAMES), TUNE)] for _ in range(number)]
        sounds = [play(tune, shift, draw) for tune in self.tunes]
        self.features = features(sounds, sampling_rate=RATE, return_tensors="pt")["input_features"]
        self.labels = tokenizer([" ".join([*tune, "<end>"]) for tune in self.tunes])["input_ids"]

    def __len__(self) -> int:
        return len(self.tunes)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_features": self.features[i], "labels": self.labels[i]}


def new_model() -> WhisperForConditionalGeneration:
    set_seed(0)
    config = WhisperConfig(
        vocab_size=len(WORDS), num_mel_bins=40, d_model=64, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
        max_source_positions=50, max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.update(
        max_length=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1
    )
    return model


def train(model: Any, tunes: Tunes, folder: str, epochs: int, rate: float) -> None:
    args = Seq2SeqTrainingArguments(
        output_dir=folder, num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=rate, warmup_steps=10,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        label_names=["labels"],
    )  # fmt: skip
    Seq2SeqTrainer(model, args, train_dataset=tunes).train()


@torch.no_grad()
def errors(model: Any, tunes: Tunes, tokenizer: Any) -> float:
    """The share of notes that are not written where they were played."""
    written = model.eval().generate(input_features=tunes.features, do_sample=False)
    texts = [text.split() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
    wrong = sum(text[i : i + 1] != [note] for text, tune in zip(texts, tunes.tunes) for i, note in enumerate(tune))
    return wrong / (TUNE * len(tunes))


def main(folder: str) -> None:
    features, tokenizer = make_processor()
    base = new_model()
    train(base, Tunes(480, 1, 0, features, tokenizer), folder, epochs=8, rate=3e-3)
    base.save_pretrained(Path(folder) / "base")
    higher, test = (Tunes(number, seed, 3, features, tokenizer) for number, seed in ((240, 2), (60, 3)))
    print(f"note errors in the first key: {errors(base, Tunes(60, 4, 0, features, tokenizer), tokenizer):.2f}")

    targets = r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    model.print_trainable_parameters()
    before = errors(model, test, tokenizer)
    train(model, higher, folder, epochs=8, rate=5e-3)
    print(f"note errors three semitones higher: {before:.2f} before, {errors(model, test, tokenizer):.2f} after")

    where = Path(folder) / "adapter"
    model.save_pretrained(where)
    fresh = WhisperForConditionalGeneration.from_pretrained(Path(folder) / "base")
    again = PeftModel.from_pretrained(fresh, where).eval()
    batch = {"input_features": test.features[:4], "labels": torch.tensor(test.labels[:4])}
    with torch.no_grad():
        logits, loaded = model(**batch).logits, again(**batch).logits
    print(f"loaded back: {'equal' if torch.equal(logits, loaded) else 'different'}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(temporary)
