"""Prompts to token ids to text: the chat template, batches, streaming, sampling options."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

__all__ = ["Sampling", "complete", "prompt_text", "stream"]

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0. ``seed`` makes sampled answers repeatable."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``model.generate``."""
        if self.temperature <= 0:
            # None, not absent: a model's own sampling defaults would draw a warning beside do_sample=False
            greedy = dict.fromkeys(("temperature", "top_p", "top_k"))
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False, **greedy}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


def prompt_text(tokenizer: Any, messages: Messages, chat: bool = True) -> str:
    """The conversation in the model's chat template; plainly, turn after turn, without one or ``chat``."""
    if tokenizer.chat_template and chat:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return "\n".join(message["content"] for message in messages)


def _encode(model: Any, tokenizer: Any, prompts: Sequence[Messages], chat: bool) -> Any:
    from veneer.train.bases import safe_pad

    safe_pad(tokenizer, stop_ids(model, tokenizer))
    texts = [prompt_text(tokenizer, messages, chat) for messages in prompts]
    plain = not (tokenizer.chat_template and chat)  # a template writes the special tokens itself
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=plain)
    batch.pop("token_type_ids", None)
    return batch.to(model.device)


def stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: the model's, the tokenizer's, and what its chat template writes."""
    from veneer.train.encode import chat_pieces, encode_pieces

    own = model.generation_config.eos_token_id
    stops = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        # a template that rewrites its turns is a ValueError: the model's own end token has to do
        with contextlib.suppress(ValueError):
            stops |= encode_pieces(tokenizer, [chat_pieces(tokenizer, turns)], chat=True)[0].stops
    return {stop for stop in stops if stop is not None}


def _generate(model: Any, tokenizer: Any, batch: Any, sampling: Sampling, **more: Any) -> torch.Tensor:
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": sorted(stop_ids(model, tokenizer))}
    with torch.inference_mode():
        ids: torch.Tensor = model.generate(**batch, **ends, **sampling.arguments(), **more)
    return ids[:, batch["input_ids"].shape[1] :]


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Messages],
    sampling: Sampling,
    batch_size: int = 8,
    chat: bool = True,
) -> Iterator[str]:
    """The answer to each prompt, in order, ``batch_size`` prompts at a time (padded on the left)."""
    for start in range(0, len(prompts), batch_size):
        batch = _encode(model, tokenizer, prompts[start : start + batch_size], chat)
        ids = _generate(model, tokenizer, batch, sampling)
        yield from (text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True))


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.write(text)


def stream(
    model: Any,
    tokenizer: Any,
    messages: Messages,
    sampling: Sampling,
    write: Callable[[str], None],
    chat: bool = True,
) -> str:
    """Answer one conversation, calling ``write`` with each piece as it comes; return the whole answer."""
    batch = _encode(model, tokenizer, [messages], chat)
    ids = _generate(model, tokenizer, batch, sampling, streamer=_Streamer(tokenizer, write))
    return str(tokenizer.decode(ids[0], skip_special_tokens=True)).strip()
