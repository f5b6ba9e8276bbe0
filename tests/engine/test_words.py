"""Layers in words: each word against its meaning, the algebra, stacks on real architectures, the errors."""

from __future__ import annotations

import math

import pytest
from target_zoo import build
from torch import nn

from veneer.words import Stack, find_stacks, place_of, select_layers

LENGTHS = [1, 2, 3, 5, 6, 12, 25]


def picks(words: str | int | list[str], n: int) -> list[int]:
    return sorted(i for _, i in select_layers([Stack("layers", n, None)], words))


@pytest.mark.parametrize("n", LENGTHS)
def test_words_mean_what_they_say(n: int) -> None:
    layers = list(range(n))
    assert picks("even", n) == layers[::2]
    for k in range(1, n + 1):
        assert picks(f"every:{k}", n) == layers[::k]
        assert picks(f"first:{k}", n) == layers[:k]
        assert picks(f"last:{k}", n) == layers[-k:]
        middle = picks(f"middle:{k}", n)
        assert len(middle) == k
        assert middle == list(range(middle[0], middle[0] + k))
        assert 0 <= (n - 1 - middle[-1]) - middle[0] <= 1  # centred, the odd one out at the end
    for start in layers:
        assert picks(f"every:2+{start}", n) == layers[start::2]
        assert picks(start, n) == picks(str(start), n) == [start]
        for stop in layers[start:]:
            assert picks(f"{start}-{stop}", n) == layers[start : stop + 1]
    for p in (1, 10, 25, 33, 50, 75, 100):
        k = min(n, max(1, math.floor(n * p / 100 + 0.5)))
        assert picks(f"first:{p}%", n) == picks(f"first:{k}", n)
        assert picks(f"last:{p}%", n) == picks(f"last:{k}", n)
        assert picks(f"middle:{p}%", n) == picks(f"middle:{k}", n)
    if n > 1:
        assert picks("odd", n) == layers[1::2]


WORDS = ["even", "odd", "first:2", "last:3", "every:3+1", "2-4", "5", "middle:50%"]


@pytest.mark.parametrize("a", WORDS)
@pytest.mark.parametrize("b", WORDS)
def test_algebra(a: str, b: str) -> None:
    n = 7
    layers, left, right = set(range(n)), set(picks(a, n)), set(picks(b, n))

    def check(words: str | list[str], expected: set[int]) -> None:
        if expected:
            assert set(picks(words, n)) == expected
        else:
            with pytest.raises(ValueError, match="picks no layer"):
                picks(words, n)

    check(f"{a},{b}", left | right)
    check([a, b], left | right)
    check(f" {a} & {b} ", left & right)
    check(f"{a}&!{b}", left - right)
    check(f"!{a}&!{b}", layers - (left | right))
    check(f"!!{a}", left)
    check(f"{a}&{b},0", (left & right) | {0})  # & binds tighter


def test_stacks_count_apart() -> None:
    stacks = find_stacks(build("bart"))
    enc, dec = "model.encoder.layers", "model.decoder.layers"
    assert stacks == [Stack(enc, 3, "encoder"), Stack(dec, 2, "decoder")]
    assert select_layers(stacks, "last:1") == {(enc, 2), (dec, 1)}
    assert select_layers(stacks, "encoder&last:2") == {(enc, 1), (enc, 2)}
    assert select_layers(stacks, "decoder,encoder&0") == {(enc, 0), (dec, 0), (dec, 1)}
    assert select_layers(stacks, "!encoder") == {(dec, 0), (dec, 1)}
    assert select_layers(stacks, "2") == {(enc, 2)}  # the decoder has none
    assert select_layers(stacks, "first:50%") == {(enc, 0), (enc, 1), (dec, 0)}


@pytest.mark.parametrize(
    ("arch", "path", "side"),
    [
        ("llama", "model.layers", "decoder"),
        ("gpt2", "transformer.h", None),
        ("bert", "bert.encoder.layer", "encoder"),
        ("opt", "model.decoder.layers", "decoder"),
        ("vit", "vit.layers", None),
        ("mixtral", "model.layers", "decoder"),
        ("mpt", "transformer.blocks", None),
    ],
)
def test_one_stack(arch: str, path: str, side: str | None) -> None:
    assert find_stacks(build(arch)) == [Stack(path, 3, side)]


def test_lists_inside_a_block_belong_to_it() -> None:
    stacks = find_stacks(build("t5"))
    assert [(s.path, s.side) for s in stacks] == [("encoder.block", "encoder"), ("decoder.block", "decoder")]
    assert place_of("encoder.block.2.layer.1.DenseReluDense.wi", stacks) == ("encoder.block", 2)
    assert place_of("lm_head", stacks) is None
    assert place_of("encoder.final_layer_norm", stacks) is None


def test_stacks_of_other_shapes() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    root = nn.Module()
    root.anything = nn.ModuleList(block() for _ in range(4))
    root.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert find_stacks(root) == [Stack("anything", 4, None)]
    assert find_stacks(nn.Sequential(block(), block())) == [Stack("", 2, None)]
    assert place_of("1.0", [Stack("", 2, None)]) == ("", 1)
    plain = nn.Module()
    plain.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert find_stacks(plain) == [Stack("layers", 3, None)]
    assert find_stacks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lats:4", r"'lats:4' is not a word I know. Did you mean 'last:4'\?.*every:N"),
        ("evn", r"Did you mean 'even'"),
        ("", r"'' is not a word"),
        ("first:4,", r"'' is not a word"),
        ("-1", r"'-1' is not a word"),
        ("every:0", "at least 1"),
        ("first:0", "asks for 0"),
        ("last:120%", "asks for 120%"),
        ("5-2", "backwards; write 2-5"),
        ("first:9", r"'first:9' needs 9 layers, but the model has layers \(layers 0-5\)"),
        ("6", r"needs 7 layers"),
        ("4-8", r"needs 9 layers"),
        ("every:2+6", r"needs 7 layers"),
        ("encoder", r"'encoder' picks nothing; the model has layers"),
        ("first:2&last:2", "picks no layer of layers"),
    ],
)
def test_errors(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        picks(words, 6)


def test_model_without_layers() -> None:
    with pytest.raises(ValueError, match=r"no nn.ModuleList of blocks"):
        select_layers([], "even")
