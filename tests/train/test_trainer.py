"""What the Trainer does with a task: accumulation, smoothing, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from veneer.train import Recipe, run

Flags = dict[str, Any]


def test_gradient_accumulation_changes_nothing(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    """Two micro-batches of four rows and one batch of eight average over the same labels."""
    losses = []
    for name, size, steps in (("a", 8, 1), ("b", 4, 2)):
        train = {
            "max_steps": 3,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "learning_rate": 0.01,
            "use_cpu": True,
        }
        result = run(causal(out=str(tmp_path / name), train=train, data__test=None))
        losses.append([row["loss"] for row in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_evaluation_and_checkpoints_during_training(causal: Callable[..., Recipe]) -> None:
    seen: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **more: Any) -> None:
            seen.append(metrics)

    train = {
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    result = run(causal(train={**train, "use_cpu": True}), callbacks=[Watch()])
    assert len(seen) == 2
    assert all(item["eval_loss"] > 0 for item in seen)
    assert {path.name for path in (Path(result.out) / "checkpoints").iterdir()} == {
        "checkpoint-2",
        "checkpoint-4",
    }


@pytest.mark.parametrize("virtual", [0, 3])
def test_label_smoothing(llama: Path, tmp_path: Path, virtual: int) -> None:
    from veneer import LoraConfig, PromptTuningConfig, get_peft_model
    from veneer.train.collate import Collator
    from veneer.train.tasks import get_task
    from veneer.train.trainer import TaskTrainer

    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    if virtual:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).eval()
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.2, use_cpu=True, report_to="none")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    trainer = TaskTrainer(task=get_task("causal-lm"), model=model, args=args, processing_class=tokenizer)
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"input_ids": [9, 10], "labels": [-100, 10]},
    ]
    batch = Collator(0)(rows)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs).logits[:, virtual:-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.2, reduction="sum"
    )
    loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(6))
    torch.testing.assert_close(loss, expected / 6)


def test_the_best_checkpoint_comes_back(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    """What is measured and saved after training is the best checkpoint, not the last."""
    from safetensors.torch import load_file

    train = {
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # upside down, so that the best is not the last
        "use_cpu": True,
    }
    result = run(causal(train=train))
    out = Path(result.out)
    state = json.loads((out / "checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())
    scores = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    best = max(scores, key=lambda step: scores[step])
    assert best == 2
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    kept = load_file(out / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert saved.keys() == kept.keys()
    assert all(torch.equal(saved[name], kept[name]) for name in saved)
