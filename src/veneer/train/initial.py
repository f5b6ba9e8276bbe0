"""Initial values that are drawn from the recipe's training rows: EVA, CorDA, LoRA-GA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

__all__ = ["BATCHES", "data_initial", "initialise", "prepare"]

BATCHES = 64  # of training rows, at most, that CorDA and LoRA-GA look at


def data_initial(config: Any) -> str | None:
    """The data-driven initial value that an adapter's config asks for."""
    name = str(getattr(config, "init_lora_weights", "")).lower()
    return name if name in ("eva", "corda", "lora_ga") else None


def _batches(rows: Any, collate: Callable[..., Any], args: Any, show: bool) -> Any:
    from veneer.inits.prepared import progress

    generator = torch.Generator().manual_seed(args.seed)
    loader = DataLoader(
        rows, args.per_device_train_batch_size, shuffle=True, collate_fn=collate, generator=generator
    )  # fmt: skip

    def some() -> Iterator[dict[str, torch.Tensor]]:
        for i, batch in enumerate(loader):
            if i == BATCHES:
                return
            yield {k: v.to(args.device) for k, v in batch.items()}

    return progress(list(some()), "Initial values", show)


@contextmanager
def _as_trained(model: Any, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def prepare(model: Any, config: Any, task: Any, rows: Any, collate: Callable[..., Any], args: Any, show: bool) -> None:
    """What must be known before the adapter is made: the inputs' covariances (CorDA), gradients (LoRA-GA)."""
    name = data_initial(config)
    if name == "corda":
        from veneer.inits.corda import preprocess_corda

        def run() -> None:
            for batch in _batches(rows, collate, args, show):
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

        with _as_trained(model, False):
            preprocess_corda(model, config, run_model=run, show_progress_bar=show)
    elif name == "lora_ga":
        from veneer.inits.lora_ga import preprocess_loraga

        def step() -> None:
            for batch in _batches(rows, collate, args, show):
                task.loss(model, batch, None).backward()

        with _as_trained(model, False):
            preprocess_loraga(model, config, step)


def initialise(model: Any, config: Any, rows: Any, collate: Callable[..., Any], args: Any, show: bool) -> None:
    """What is drawn once the adapter is there (EVA)."""
    if data_initial(config) == "eva":
        from veneer.inits.eva import initialize_lora_eva_weights

        def call(base: Any, batch: Any) -> Any:
            return base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

        batches = list(_batches(rows, collate, args, False))
        initialize_lora_eva_weights(model, batches, forward_fn=call, show_progress_bar=show)
