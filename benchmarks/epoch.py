"""One epoch of `veneer train` on real rows of many lengths, against a plain script: peft, Trainer, a padding collator.

    VENEER_BENCH_DATA=/folder/with/wnut17/and/gsm8k python benchmarks/run.py epoch-ner epoch-gsm8k

The folder holds wnut17/{train,test}.conll and gsm8k/{train,test}.jsonl as their authors publish them. Both train on the
same tokens, with the same adapter, rows a batch, learning rate and schedule; the epoch alone is timed, and the number
that must agree is the mean loss of held-out labels after it (orders and dropout differ, so within a tenth). "int8" is
veneer with `base.matmul: int8`.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from common import Case, Lap, device

DATA = "VENEER_BENCH_DATA"
ADAPTER = {"method": "lora", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
TARGETS = {
    "ner": ["query", "key", "value", "dense"],
    "gsm8k": "all-linear",
}  # peft takes a head for one of "all-linear"
RECIPES: dict[str, dict[str, Any]] = {
    "ner": {
        "task": "token-cls", "base": "minilm-l6",
        "data": {"train": "wnut17/train.conll", "test": "wnut17/test.conll", "max_length": 128},
    },
    "gsm8k": {
        "task": "causal-lm", "base": "smollm2-135m-instruct",
        "data": {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl", "prompt": "question", "completion": "answer",
                 "max_length": 384},
    },
}  # fmt: skip


def folder() -> Path:
    """Where the rows are. Raises SystemExit with what to do where they are not."""
    given = os.environ.get(DATA)
    if given is None or not Path(given).is_dir():
        raise SystemExit(f"set {DATA} to a folder with wnut17/ and gsm8k/ (now {given!r}); see benchmarks/epoch.py")
    return Path(given)


def recipe_of(who: str, o: dict[str, Any]) -> Any:
    from veneer.train import load_recipe

    chosen, where = dict(RECIPES[o["data"]]), folder()
    if who == "int8":
        chosen["base"] = {"name": chosen["base"], "matmul": "int8"}
    data = {k: str(where / v) if k in ("train", "test") else v for k, v in chosen["data"].items()}
    train = {
        "num_train_epochs": 1, "per_device_train_batch_size": o["batch"], "learning_rate": o["lr"],
        "use_cpu": device() == "cpu", "save_strategy": "no", "logging_strategy": "no",
    }  # fmt: skip
    adapter = ADAPTER | {"target_modules": TARGETS[o["data"]]}
    out = str(Path(tempfile.mkdtemp()) / "run")
    return load_recipe(None, **{**chosen, "data": data, "adapter": adapter, "train": train, "out": out})


def build(who: str, o: dict[str, Any]) -> Lap:
    """Laps of an epoch each; the warm-up lap sees a few rows."""
    import transformers

    from veneer.train.bases import load_base, safe_pad
    from veneer.train.prepare import model_options, prepare

    transformers.logging.set_verbosity_error()
    recipe = recipe_of(who, o)
    parts = prepare(recipe, Path(recipe.out) / "checkpoints")
    plan = parts.plan
    train, held_out = plan.train.select(range(o["rows"])), plan.test.select(range(o["held_out"]))
    state: dict[str, Any] = {}

    def ready() -> Any:
        transformers.set_seed(recipe.seed)
        plan.train = train if state else train.select(range(min(2 * o["batch"], len(train))))
        model, tokenizer = load_base(parts.ref, recipe.task, **model_options(plan))
        safe_pad(tokenizer, set(plan.stop_ids))
        model.config.pad_token_id = tokenizer.pad_token_id
        return (plain if who == "peft" else ours)(recipe, parts, model, tokenizer)

    def run(trainer: Any) -> None:
        state["trainer"] = trainer
        trainer.epoch()

    return Lap(run, ready, after=lambda: loss_of(state["trainer"], held_out, o["batch"]))


def ours(recipe: Any, parts: Any, model: Any, tokenizer: Any) -> Any:
    """What `veneer train` does between its two measurements."""
    from veneer.train.faster import faster_base
    from veneer.train.loop import _adapt, _trainer

    model, collate = _adapt(recipe, parts, model, tokenizer, None)
    trainer: Any = _trainer(recipe, parts, model, tokenizer, collate, ())

    def epoch() -> None:
        with faster_base(recipe, parts, trainer, lambda text: None):
            trainer.train()

    trainer.epoch = epoch
    return trainer


def plain(recipe: Any, parts: Any, model: Any, tokenizer: Any) -> Any:
    """What a tutorial has."""
    import peft
    from transformers import DataCollatorForTokenClassification, Trainer, TrainingArguments

    chosen = recipe.adapter.options
    tokens = recipe.task == "token-cls"
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="TOKEN_CLS" if tokens else "CAUSAL_LM", **chosen))
    names = ("num_train_epochs", "per_device_train_batch_size", "learning_rate", "lr_scheduler_type", "warmup_steps")
    same = {name: getattr(parts.args, name) for name in names}
    args = TrainingArguments(
        output_dir=recipe.out, save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
        use_cpu=device() == "cpu", seed=recipe.seed, dataloader_pin_memory=False, **same,
    )  # fmt: skip
    rows = parts.plan.train.map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
    rows = rows.select_columns(["input_ids", "attention_mask", "labels"])
    collate = DataCollatorForTokenClassification(tokenizer)  # pads input_ids, attention_mask and labels
    trainer: Any = Trainer(model, args, collate, rows)
    trainer.epoch = trainer.train
    return trainer


def loss_of(trainer: Any, rows: Any, size: int) -> float:
    """The mean loss of the labels of rows that were not trained on."""
    import torch
    import torch.nn.functional as F

    model, total, count = trainer.model.eval(), 0.0, 0
    shift = int("CAUSAL" in str(model.active_peft_config.task_type))
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row["input_ids"]], device=model.device)
            labels = torch.tensor(row["labels"][shift:], device=model.device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            logits = logits[: len(labels)].float()
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
    return total / count


def case(about: str, **options: Any) -> Case:
    return Case(
        about=about,
        build=build,
        contestants=("peft", "veneer", "int8"),
        targets={("veneer", "peft"): 0.5, ("int8", "peft"): 0.5},
        agree=("peft", "veneer", "int8"),
        tolerance=0.1,
        options=options,
        rounds=2,
        # as veneer.train.allocator sets it before torch is imported
        env={who: {"THP_MEM_ALLOC_ENABLE": "1"} for who in ("veneer", "int8")},
        needs=lambda: None if Path(os.environ.get(DATA, "-")).is_dir() else f"{DATA} is not set to a folder",
    )


CASES = {
    "epoch-ner": case("an epoch, WNUT-17, MiniLM", data="ner", rows=768, held_out=64, batch=16, lr=1e-3),
    "epoch-gsm8k": case("an epoch, GSM8K, SmolLM2-135M", data="gsm8k", rows=64, held_out=16, batch=8, lr=5e-4),
}
