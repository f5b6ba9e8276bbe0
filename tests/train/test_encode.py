"""Labels: what is learned, decoded, is exactly what the model should say."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_train import bos_tokenizer, bpe_tokenizer

from veneer.train.encode import (
    IGNORE,
    Encoded,
    Piece,
    chat_pieces,
    encode_marked,
    encode_pieces,
    has_markers,
    render,
)

TURNS = [
    {"role": "system", "content": "answer"},
    {"role": "user", "content": "colour one"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "colour two"},
    {"role": "assistant", "content": " blue\n\ngreen "},
]


def learned(tokenizer: Any, row: Encoded) -> list[str]:
    """Each run of labelled tokens, decoded with its special tokens; labels must equal their tokens."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row.input_ids, row.labels, strict=True):
        if label == IGNORE:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


def test_only_the_assistants_turns_and_their_ends(tokenizer: Any) -> None:
    row = encode_pieces(tokenizer, [chat_pieces(tokenizer, TURNS)], chat=True)[0]
    assert learned(tokenizer, row) == ["red<|im_end|>", " blue\n\ngreen <|im_end|>"]
    assert tokenizer.decode(row.input_ids) == render(tokenizer, TURNS)
    assert row.stops == {tokenizer.eos_token_id}


def test_prompt_is_what_generation_sees(tokenizer: Any) -> None:
    row = encode_pieces(tokenizer, [chat_pieces(tokenizer, TURNS)], chat=True)[0]
    asked = render(tokenizer, TURNS[:-1], prompt=True)
    assert row.input_ids[: row.prompt] == tokenizer(asked, add_special_tokens=False)["input_ids"]


def test_a_last_user_turn_is_not_learned(tokenizer: Any) -> None:
    turns = [*TURNS[:3], {"role": "user", "content": "three"}]
    row = encode_pieces(tokenizer, [chat_pieces(tokenizer, turns)], chat=True)[0]
    assert learned(tokenizer, row) == ["red<|im_end|>"]


def test_answer_that_would_merge_with_its_prompt(tokenizer: Any) -> None:
    """The whole text makes one token of `re` and `d`; the prompt must be tokenised as the model meets it."""
    row = encode_pieces(tokenizer, [[Piece("colour re", False), Piece("d green", True)]], chat=False)[0]
    whole = tokenizer("colour red green", add_special_tokens=False)["input_ids"]
    assert row.input_ids[:-1] != whole
    assert learned(tokenizer, row) == ["d green<|im_end|>"]
    assert row.input_ids[: row.prompt] == tokenizer("colour re", add_special_tokens=False)["input_ids"]


def test_template_that_rewrites_turns_is_refused() -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ' ' }}{{ (m['content'] if loop.last else 'x') + '\n' }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="does not keep turn 3"):
        chat_pieces(tokenizer, TURNS)


def test_template_that_raises_is_refused() -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        chat_pieces(tokenizer, TURNS)


def test_generation_markers() -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}"
        "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert has_markers(tokenizer)
    assert not has_markers(bpe_tokenizer())
    row = encode_marked(tokenizer, TURNS)
    assert learned(tokenizer, row) == ["red<|im_end|>", " blue\n\ngreen <|im_end|>"]
    assert row.stops == {tokenizer.eos_token_id}


def test_template_without_an_end_gets_one() -> None:
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\nassistant: ' }}{% endif %}"
    )
    row = encode_pieces(tokenizer, [chat_pieces(tokenizer, TURNS[1:3])], chat=True)[0]
    assert learned(tokenizer, row) == ["red<|im_end|>"]


@pytest.mark.parametrize("text", ["red green", "<|im_start|>red green"])
def test_one_bos_and_one_eos(text: str) -> None:
    tokenizer = bos_tokenizer()
    row = encode_pieces(tokenizer, [[Piece(text, True)]], chat=False)[0]
    assert tokenizer.decode(row.input_ids) == "<|im_start|>red green<|im_end|>"
    assert row.labels[0] == IGNORE
    assert row.labels[1:] == row.input_ids[1:]


def test_prompt_and_completion_with_a_bos() -> None:
    tokenizer = bos_tokenizer()
    row = encode_pieces(tokenizer, [[Piece("colour one ", False), Piece("red", True)]], chat=False)[0]
    assert tokenizer.decode(row.input_ids) == "<|im_start|>colour one red<|im_end|>"
    assert learned(tokenizer, row) == ["red<|im_end|>"]
    assert row.input_ids[: row.prompt] == tokenizer("colour one ")["input_ids"]


def test_eos_is_not_doubled(tokenizer: Any) -> None:
    row = encode_pieces(tokenizer, [[Piece("red<|im_end|>", True)]], chat=False)[0]
    assert tokenizer.decode(row.input_ids) == "red<|im_end|>"
