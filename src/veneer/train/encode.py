"""Text and conversations to token ids and labels, with a label on every token that is to be learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "IGNORE",
    "Encoded",
    "Piece",
    "chat_pieces",
    "encode_marked",
    "encode_pieces",
    "framing",
    "has_markers",
    "render",
]

IGNORE = -100


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's text, and whether the model learns to write it."""

    text: str
    trained: bool


@dataclass
class Encoded:
    """One row: its token ids and as many labels, IGNORE where nothing is learned.

    ``prompt`` counts the tokens before the last answer; ``stops`` holds the special tokens that end answers.
    """

    input_ids: list[int]
    labels: list[int]
    prompt: int = 0
    stops: set[int] = field(default_factory=set)


def render(tokenizer: Any, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
    """A conversation in the model's own chat template; with ``prompt`` it ends where an answer begins.

    Raises:
        ValueError: the template refuses the conversation.
    """
    import jinja2

    clean = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(clean, tokenize=False, add_generation_prompt=prompt))
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error


def chat_pieces(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[Piece]:
    """A conversation cut into what is given and what the assistant writes.

    Each assistant turn is what the template adds between "a prompt for turn i" and "turns up to i"; both must
    be beginnings of the whole conversation.

    Raises:
        ValueError: the template rewrites earlier turns, so that its answers cannot be found.
    """
    whole = render(tokenizer, messages)
    pieces: list[Piece] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = render(tokenizer, messages[:index], prompt=True)
        end = render(tokenizer, messages[: index + 1])
        if not (whole.startswith(end) and end.startswith(start) and len(start) >= done):
            raise ValueError(
                f"the chat template does not keep turn {index + 1} as it is written: the text up to that "
                "turn is not a beginning of the whole conversation, so its answer cannot be told apart"
            )
        pieces += [Piece(whole[done : len(start)], False), Piece(whole[len(start) : len(end)], True)]
        done = len(end)
    return [*pieces, Piece(whole[done:], False)] if done < len(whole) else pieces


def has_markers(tokenizer: Any) -> bool:
    """Whether the chat template itself marks the assistant's turns (`{% generation %}`)."""
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any("generation %}" in text or "generation -%}" in text for text in texts)


def encode_marked(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> Encoded:
    """A conversation whose template marks the assistant's turns; the token that ends a turn is learned."""
    clean = [{key: value for key, value in message.items() if value is not None} for message in messages]
    out = tokenizer.apply_chat_template(clean, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = list(out["input_ids"]), list(out["assistant_masks"])
    special = set(tokenizer.all_special_ids)
    for index in range(1, len(ids)):
        if mask[index - 1] and not mask[index] and ids[index] in special and ids[index - 1] not in special:
            mask[index] = 1
    stops: set[int] = set()
    for start, end in _runs([bool(flag) for flag in mask]):
        closed = _close(tokenizer, ids, start, end, special)
        mask[closed:end] = [0] * (end - closed)
        stops |= {ids[closed - 1]} & special
    labels = [token if flag else IGNORE for token, flag in zip(ids, mask)]
    runs = _runs([label != IGNORE for label in labels])
    return _finish(tokenizer, Encoded(ids, labels, runs[-1][0] if runs else len(ids), stops), special)


def encode_pieces(tokenizer: Any, rows: Sequence[Sequence[Piece]], chat: bool) -> list[Encoded]:
    """Rows of pieces to ids and labels, tokenised as one text wherever that agrees with the prompt alone.

    A prompt must give the same tokens in training as it gives alone when the model is asked; where the whole
    text would merge the end of a prompt with the start of an answer, the two are tokenised apart. ``chat``
    says that the template has already written every special token; other rows get the tokenizer's own BOS.
    """
    texts: list[str] = []
    for pieces in rows:
        joined = [piece.text for piece in pieces]
        texts += ["".join(joined[: count + 1]) for count in range(len(joined))]
    ids = iter(_tokenise(tokenizer, texts))
    bos = [] if chat else framing(tokenizer)[0]
    special = set(tokenizer.all_special_ids)
    return [_assemble(tokenizer, pieces, [next(ids) for _ in pieces], bos, special, chat=chat) for pieces in rows]


def _tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def framing(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before a text and after it."""
    ids, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    if not plain or plain[0] not in ids:
        return [], []
    start = ids.index(plain[0])
    return ids[:start], ids[start + len(plain) :]


def _assemble(
    tokenizer: Any,
    pieces: Sequence[Piece],
    prefixes: list[list[int]],
    bos: list[int],
    special: set[int],
    chat: bool,
) -> Encoded:
    whole = prefixes[-1]
    if all(whole[: len(ids)] == ids for ids in prefixes[:-1]):
        ids, ends = list(whole), [len(ids) for ids in prefixes]
    else:
        ids, ends = [], []
        for part in _tokenise(tokenizer, [piece.text for piece in pieces]):
            ids += part
            ends.append(len(ids))
    if ids[: len(bos)] != bos:  # a text may already spell its BOS out
        ids, ends = bos + ids, [end + len(bos) for end in ends]
    labels, prompt, stops = [IGNORE] * len(ids), len(ids), set()
    for number, piece in enumerate(pieces):
        if piece.trained:
            start, end = (ends[number - 1] if number else 0), ends[number]
            end = _close(tokenizer, ids, start, end, special) if chat else end
            labels[start:end], prompt = ids[start:end], start
            stops |= {ids[end - 1]} & special if chat and end else set()
    return _finish(tokenizer, Encoded(ids, labels, prompt, stops), special)


def _finish(tokenizer: Any, row: Encoded, special: set[int]) -> Encoded:
    """An answer that runs to the end of its row learns to stop; the first token is never predicted."""
    if row.labels and row.labels[-1] != IGNORE and row.input_ids[-1] not in special:
        if tokenizer.eos_token_id is not None:
            row.input_ids.append(tokenizer.eos_token_id)
            row.labels.append(tokenizer.eos_token_id)
    if row.labels:
        row.labels[0] = IGNORE
    return row


def _close(tokenizer: Any, ids: list[int], start: int, end: int, special: set[int]) -> int:
    """Where an answer stops: after its last special token, if only white space follows it."""
    last = next((index for index in range(end - 1, start - 1, -1) if ids[index] in special), None)
    if last is None or tokenizer.decode(ids[last + 1 : end]).strip():
        return end
    return last + 1


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    runs, start = [], None
    for index, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = index
        elif not flag and start is not None:
            runs.append((start, index))
            start = None
    return runs
