"""One request as the engine sees it: prompt tokens, how to sample, and the text as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Event", "Job", "sample"]


@dataclass(frozen=True)
class Event:
    """text: what is new. reason: "stop", "length" or "cancelled" at the end, "error" with the error's text."""

    text: str
    reason: str | None = None


@dataclass
class Job:
    """adapter: its name, or None for the base. emit: called from the engine's thread for each event."""

    prompt: list[int]
    adapter: str | None
    emit: Callable[[Event], None]
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    stop: Sequence[str] = ()
    seed: int | None = None
    tokens: list[int] = field(default_factory=list)
    cancelled: bool = False
    sent: int = 0
    generator: torch.Generator | None = None

    def take(self, token: int, tokenizer: Any, ends: set[int]) -> bool:
        """Note one generated token, emit the text that is certain; True where the job is done."""
        if self.cancelled:
            self.emit(Event("", "cancelled"))
            return True
        ended = token in ends
        if not ended:
            self.tokens.append(token)
        text = tokenizer.decode(self.tokens, skip_special_tokens=True)
        cut = min((at for s in self.stop if (at := text.find(s)) >= 0), default=None)
        full = len(self.tokens) >= self.max_tokens
        if cut is not None or ended or full:
            self._send(text if cut is None else text[:cut], "length" if full and not ended and cut is None else "stop")
            return True
        self._send(text[: self._certain(text)], None)
        return False

    def _certain(self, text: str) -> int:
        """How much of the text no later token can change: no half character, no beginning of a stop text."""
        end = len(text.rstrip("�"))
        for s in self.stop:
            for n in range(min(len(s) - 1, end), 0, -1):
                if text[:end].endswith(s[:n]):
                    end -= n
                    break
        return end

    def _send(self, text: str, reason: str | None) -> None:
        new = text[self.sent :]
        self.sent = max(self.sent, len(text))
        if new or reason is not None:
            self.emit(Event(new, reason))


def sample(logits: Tensor, job: Job) -> int:
    """The next token from one row's logits (vocabulary,), by the job's own settings and generator."""
    if job.temperature <= 0:
        return int(logits.argmax())
    if job.generator is None:
        job.generator = torch.Generator()
        job.generator.manual_seed(job.seed) if job.seed is not None else job.generator.seed()
    p = (logits.float().cpu() / job.temperature).softmax(-1)
    if job.top_p < 1:
        ordered, index = p.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= job.top_p] = 0  # the first that reaches the mass stays
        p = torch.zeros_like(p).scatter(0, index, ordered)
    return int(torch.multinomial(p, 1, generator=job.generator))
