"""Answers to many prompts: sorted by length, batched, padded (on the left for decoders), with a key/value cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from veneer.train.collate import pad_batch
from veneer.train.processes import merged, mine

__all__ = ["evaluating", "greedy", "translate"]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No gradients and no dropout inside; the model's mode is restored after."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    pad: int,
    stops: set[int],
    max_new_tokens: int,
    batch_size: int,
) -> list[list[int]]:
    """The most likely continuation of each prompt, up to its first stop token (left out) or the limit."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: list[list[int] | None] = [None] * len(prompts)
    with evaluating(model):
        for part in mine([order[first : first + batch_size] for first in range(0, len(order), batch_size)]):
            ids = pad_batch([prompts[index] for index in part], pad, side="left").to(device)
            mask = pad_batch([[1] * len(prompts[index]) for index in part], 0, side="left").to(device)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            for index, row in zip(part, out[:, ids.shape[1] :].tolist()):
                end = next((place for place, token in enumerate(row) if token in stops), len(row))
                answers[index] = row[:end]
    return merged(answers)


def translate(
    model: Any, sources: Sequence[Sequence[int]], pad: int, max_new_tokens: int, num_beams: int, batch_size: int
) -> list[list[int]]:
    """What an encoder-decoder writes for each source, by greedy or beam search, special tokens included."""
    config = copy.deepcopy(model.generation_config)  # the decoder's first token, and tokens a model forces
    config.update(max_new_tokens=max_new_tokens, max_length=None, num_beams=num_beams, do_sample=False)
    config.pad_token_id = pad
    device = next(model.parameters()).device
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    answers: list[list[int] | None] = [None] * len(sources)
    with evaluating(model):
        for part in mine([order[first : first + batch_size] for first in range(0, len(order), batch_size)]):
            ids = pad_batch([sources[index] for index in part], pad).to(device)
            mask = pad_batch([[1] * len(sources[index]) for index in part], 0).to(device)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            for index, row in zip(part, out.tolist(), strict=True):
                answers[index] = row
    return merged(answers)
