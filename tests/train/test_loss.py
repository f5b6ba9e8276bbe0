"""The labelled loss against the model's own, and what a step of it costs in logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from veneer.train.collate import Collator, pad_batch
from veneer.train.encode import IGNORE
from veneer.train.loss import labelled_loss, own_loss, takes_labelled_rows


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def gemma2() -> Any:
    """Its logits are soft-capped after the head."""
    config = Gemma2Config(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.5,
    )
    return Gemma2ForCausalLM(config)


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    rows = [{"input_ids": torch.randint(3, 60, (n,)).tolist()} for n in (5, 9, 12)]
    for row, prompt in zip(rows, (2, 5, 1), strict=True):
        ids = row["input_ids"]
        row["labels"] = [IGNORE] * prompt + ids[prompt:]
    rows[2]["labels"][4:6] = [IGNORE] * 2
    return Collator(0)(rows)


def wrap(model: Any, kind: str) -> Any:
    from veneer import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

    torch.manual_seed(2)
    if kind == "lora":
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    if kind == "prompt":
        return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    if kind == "prefix":
        return get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    return model


@pytest.mark.parametrize("kind", ["plain", "lora", "prompt", "prefix"])
@pytest.mark.parametrize("make", [gpt2, gemma2])
@pytest.mark.parametrize("items", [None, 31.0])
def test_equals_the_models_own_loss_and_gradients(make: Any, kind: str, items: float | None) -> None:
    torch.manual_seed(0)
    model = wrap(make().double().eval(), kind).double()
    assert takes_labelled_rows(model if kind == "plain" else model.get_base_model())
    count = None if items is None else torch.tensor(items, dtype=torch.float64)
    losses, gradients = [], []
    for loss in (labelled_loss(model, batch(), count), own_loss(model, batch(), count, shifted=True)):
        model.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-7)  # the loss itself is taken in fp32
    assert gradients[0]
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-7)


def test_logits_are_taken_at_labels_alone() -> None:
    model, seen = gpt2(), []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    rows = batch()
    labelled_loss(model, rows, None)
    assert seen == [(1, int((rows["labels"][:, 1:] != IGNORE).sum()), 60)]
    assert len(model.lm_head._forward_pre_hooks) == 0


def test_the_hook_goes_when_the_model_fails() -> None:
    model, rows = gpt2(), batch()
    rows["input_ids"][0, 0] = 1000
    with pytest.raises(IndexError):
        labelled_loss(model, rows, None)
    assert len(model.lm_head._forward_pre_hooks) == 0


def test_a_model_of_another_shape_falls_back() -> None:
    class Odd(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> Any:
            return type("Out", (), {"loss": torch.tensor(3.0)})()

    assert not takes_labelled_rows(Odd())
    rows = batch()
    labels = int((rows["labels"][:, 1:] != IGNORE).sum())
    assert labelled_loss(Odd(), rows, None) == 3.0
    assert labelled_loss(Odd(), rows, torch.tensor(2.0 * labels)) == 1.5


def test_accumulated_batches_equal_one_batch(llama: Path) -> None:
    model, rows = AutoModelForCausalLM.from_pretrained(llama), batch()
    items = (rows["labels"][:, 1:] != IGNORE).sum()
    whole = labelled_loss(model, rows, items)
    parts = [{key: value[i : i + 1] for key, value in rows.items()} for i in range(3)]
    torch.testing.assert_close(sum(labelled_loss(model, part, items) for part in parts), whole)


def test_padding() -> None:
    rows = [[1, 2, 3], [4]]
    assert pad_batch(rows, 9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad_batch(rows, 9, side="left").tolist() == [[1, 2, 3], [9, 9, 4]]
    assert pad_batch(rows, 9, multiple_of=4).shape == (2, 4)
    out = Collator(0, multiple_of=4)([{"input_ids": row, "labels": row} for row in rows])
    assert out["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert out["labels"].tolist() == [[1, 2, 3, IGNORE], [4, IGNORE, IGNORE, IGNORE]]
