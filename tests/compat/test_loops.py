"""Training loops as people write them for peft: data shuffled from the seed, AdamW and a schedule by hand, an
evaluation, the adapter saved from a full state dict, its config and then its weights loaded. The same loop runs on
both libraries and has the same losses, and the loaded adapter the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BloomConfig,
    BloomForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    get_linear_schedule_with_warmup,
)

import veneer

pytestmark = pytest.mark.slow

WORDS, ROWS, LENGTH, EPOCHS = 40, 24, 10, 3
BERT = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
PROMPT = {"num_virtual_tokens": 4}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("SEQ_CLS", "LoraConfig", {"r": 4}),
    ("SEQ_CLS", "IA3Config", {}),
    ("SEQ_CLS", "VeraConfig", {"r": 4}),
    ("SEQ_CLS", "PromptTuningConfig", PROMPT),
    ("SEQ_CLS", "PromptEncoderConfig", {**PROMPT, "encoder_hidden_size": 8}),
    ("SEQ_CLS", "PrefixTuningConfig", {**PROMPT, "encoder_hidden_size": 8, "prefix_projection": True}),
    ("TOKEN_CLS", "LoraConfig", {"r": 4, "bias": "all"}),
    ("SEQ_2_SEQ_LM", "LoraConfig", {"r": 4, "lora_alpha": 16}),
    ("SEQ_2_SEQ_LM", "IA3Config", {}),
    ("SEQ_2_SEQ_LM", "AdaLoraConfig", {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 9}),
    ("SEQ_2_SEQ_LM", "PrefixTuningConfig", PROMPT),
    ("CAUSAL_LM", "LoraConfig", {"r": 4}),
    ("CAUSAL_LM", "LNTuningConfig", {}),
    ("CAUSAL_LM", "PromptTuningConfig", PROMPT),
    ("CAUSAL_LM", "PrefixTuningConfig", PROMPT),
]


def base(task: str) -> Any:
    torch.manual_seed(0)
    if task == "SEQ_CLS":
        return BertForSequenceClassification(BertConfig(**BERT, num_labels=3))
    if task == "TOKEN_CLS":
        return BertForTokenClassification(BertConfig(**BERT, num_labels=5))
    if task == "SEQ_2_SEQ_LM":
        return T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0))
    config = BloomConfig(vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.0)
    return BloomForCausalLM(config)


def rows(task: str) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, WORDS, (ROWS, LENGTH), generator=g)
    labels = {
        "SEQ_CLS": torch.randint(3, (ROWS,), generator=g),
        "TOKEN_CLS": torch.randint(5, (ROWS, LENGTH), generator=g),
        "SEQ_2_SEQ_LM": torch.randint(3, WORDS, (ROWS, 4), generator=g),
        "CAUSAL_LM": ids,
    }[task]
    mask = torch.ones_like(ids[0])
    return [{"input_ids": i, "attention_mask": mask, "labels": y} for i, y in zip(ids, labels, strict=True)]


def loop(lib: Any, task: str, name: str, options: dict[str, Any], folder: Path) -> tuple[list[float], torch.Tensor]:
    """The losses of training, and the logits of the adapter loaded from its file."""
    data = rows(task)
    model = base(task)
    torch.manual_seed(3)
    model = lib.get_peft_model(model, getattr(lib, name)(task_type=task, **options))
    loader = DataLoader(data, shuffle=True, batch_size=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, EPOCHS * len(loader))
    losses, step = [], 0
    for _ in range(EPOCHS):
        model.train()
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            if name == "AdaLoraConfig":
                model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
    model.save_pretrained(folder, state_dict=model.state_dict())
    config = lib.PeftConfig.from_pretrained(folder)
    assert config.task_type == task
    loaded = lib.PeftModel.from_pretrained(base(task), folder).eval()
    with torch.no_grad():
        batch = next(iter(DataLoader(data, batch_size=ROWS)))
        answers = batch.pop("labels")  # peft's AdaLoRA takes no labels once loaded
        if task == "SEQ_2_SEQ_LM":
            batch["decoder_input_ids"] = answers
        return losses, loaded(**batch).logits


@pytest.mark.parametrize(
    ("task", "name", "options"), CASES, ids=[f"{t}-{n.removesuffix('Config')}" for t, n, _ in CASES]
)
def test_a_loop_has_pefts_losses(task: str, name: str, options: dict[str, Any], tmp_path: Path) -> None:
    ours, logits = loop(veneer, task, name, options, tmp_path / "ours")
    theirs, logits_of_theirs = loop(peft, task, name, options, tmp_path / "theirs")
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[0] != ours[-1]
    torch.testing.assert_close(logits, logits_of_theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_a_prompt_is_saved_from_the_given_state_dict(name: str, tmp_path: Path) -> None:
    """Trainers gather the encoder's tensors from their shards; the file has the prompt that these make."""
    model = veneer.get_peft_model(base("SEQ_CLS"), getattr(veneer, name)(task_type="SEQ_CLS", **PROMPT))
    given = {k: t.clone() for k, t in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.save_pretrained(tmp_path, state_dict=given)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(p.abs().sum() == 0 for p in model.parameters())
    model.load_state_dict(given)
    for key, value in veneer.get_peft_model_state_dict(model).items():
        torch.testing.assert_close(saved[key], value)
    assert saved["prompt_embeddings"].abs().sum() > 0
    del given["prompt_encoder.default.embedding.weight"]
    with pytest.raises(veneer.errors.AdapterError, match="state dict given to save has no"):
        model.save_pretrained(tmp_path, state_dict=given)
