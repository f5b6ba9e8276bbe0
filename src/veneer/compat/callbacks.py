"""Callbacks of transformers' Trainer under peft's names."""

from __future__ import annotations

from transformers import TrainerCallback


class AdamssAsaCallback(TrainerCallback):
    """Scripts hand it to a Trainer so that AdaMSS's allocation runs after each step of the optimizer. Here the
    allocation runs after each step of any optimizer that trains the adapter (veneer.schedule): there is nothing left
    to do, and the callback only takes its place in the list."""
