"""The graphs of a model: an encoder's one; a decoder's one with its key/value cache; an encoder and a decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from .onnx_graph import Graph

__all__ = ["graphs_of"]


def graphs_of(model: Any) -> list[Graph]:
    """What a merged transformers model is exported as. Raises AdapterError for a kind that has no form here."""
    if getattr(model.config, "is_encoder_decoder", False):
        return _seq2seq(model)
    if getattr(model, "can_generate", lambda: False)():
        return [_decoder(model)]
    return [_encoder(model)]


def tokens(vocabulary: int, rows: int, length: int, seed: int, before: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids (rows, length), and a mask (rows, before + length) that pads the first row's beginning where there is
    more than one row."""
    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(rows, before + length, dtype=torch.long)
    if rows > 1:
        mask[0, : (before + length) // 2] = 0
    return ids, mask


# -- encoders -------------------------------------------------------------------------------------------------------
class _Encoder(nn.Module):
    def __init__(self, model: Any, output: str):
        super().__init__()
        self.model, self.output = model, output

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return (self.model(input_ids=input_ids, attention_mask=attention_mask)[self.output],)


@torch.no_grad()
def _encoder(model: Any) -> Graph:
    size = model.config.vocab_size

    def sample(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
        ids, mask = tokens(size, *shape, seed)
        return ids, mask.flip(1)  # encoders pad on the right

    ids, mask = sample((2, 8), 0)
    found = model(input_ids=ids, attention_mask=mask)
    output = "logits" if found.get("logits") is not None else "last_hidden_state"
    names = ("input_ids", "attention_mask")
    return Graph("model.onnx", _Encoder(model, output), names, (output,), ((0, 1), (0, 1)), sample,
                 ((2, 8), (1, 3), (3, 16), (2, 7)))  # fmt: skip


# -- decoders -------------------------------------------------------------------------------------------------------
class _Decoder(nn.Module):
    """past: keys and values of each layer in turn, (rows, heads, tokens before, head size)."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=cache_of(past), use_cache=True,
        )  # fmt: skip
        return (out.logits, *spread(out.past_key_values))


def cache_of(past: list[Tensor]) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for i, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
        cache.update(keys, values, i)
    return cache


def spread(cache: Any) -> list[Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


def names_of(kind: str, layers: int) -> list[str]:
    """As optimum names them: past_key_values.0.key ..."""
    return [f"{kind}.{i}.{part}" for i in range(layers) for part in ("key", "value")]


@torch.no_grad()
def _cache_shapes(model: Any, **inputs: Any) -> list[tuple[int, int]]:
    """(heads, head size) of each tensor of the cache, as the model makes it. Raises AdapterError for other caches."""
    cache = model(**inputs, use_cache=True).past_key_values
    cache = getattr(cache, "self_attention_cache", cache)
    plain = all(type(layer).__name__ == "DynamicLayer" for layer in getattr(cache, "layers", [None]))
    if not plain:
        raise AdapterError(f"{type(model).__name__} keeps more than keys and values ({type(cache).__name__})")
    return [(t.shape[1], t.shape[3]) for t in spread(cache)]


def _past(shapes: list[tuple[int, int]], rows: int, before: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, before, size, generator=generator) for heads, size in shapes]


def _decoder(model: Any) -> Graph:
    size = model.config.vocab_size
    shapes = _cache_shapes(model, input_ids=tokens(size, 1, 2, 0)[0])
    layers = len(shapes) // 2

    def sample(at: tuple[int, int, int], seed: int) -> tuple[Any, ...]:
        rows, length, before = at
        ids, mask = tokens(size, rows, length, seed, before)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
        return ids, mask, positions, _past(shapes, rows, before, seed)

    return Graph(
        "model.onnx", _Decoder(model),
        ["input_ids", "attention_mask", "position_ids", *names_of("past_key_values", layers)],
        ["logits", *names_of("present", layers)],
        ((0, 1), (0, 1), (0, 1), [(0, 2)] * len(shapes)), sample,
        ((2, 3, 5), (1, 7, 0), (2, 4, 0), (3, 1, 9)),  # rows, tokens, tokens before; none before: a prompt
    )  # fmt: skip


# -- encoder and decoder --------------------------------------------------------------------------------------------
class _Source(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return (self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state,)


class _Target(nn.Module):
    """The decoder; keys and values over the source are worked out in each call, those over the target are cached."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, encoder_attention_mask: Tensor, encoder_hidden_states: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=EncoderDecoderCache(cache_of(past), DynamicCache()),
            use_cache=True,
        )
        return (out.logits, *spread(out.past_key_values.self_attention_cache))


def _seq2seq(model: Any) -> list[Graph]:
    size, width = model.config.vocab_size, model.config.hidden_size
    first = tokens(size, 1, 2, 0)[0]
    shapes = _cache_shapes(model, input_ids=first, decoder_input_ids=first)
    layers = len(shapes) // 2

    def source(shape: tuple[int, int], seed: int) -> tuple[Any, ...]:
        ids, mask = tokens(size, *shape, seed)
        return ids, mask.flip(1)

    def target(at: tuple[int, int, int, int], seed: int) -> tuple[Any, ...]:
        rows, length, before, source_length = at
        ids, _ = tokens(size, rows, length, seed)
        _, mask = tokens(size, rows, source_length, seed)
        hidden = torch.randn(rows, source_length, width, generator=torch.Generator().manual_seed(seed))
        return ids, mask.flip(1), hidden, _past(shapes, rows, before, seed)

    encoder = Graph(
        "encoder_model.onnx", _Source(model), ("input_ids", "attention_mask"), ("last_hidden_state",),
        ((0, 1), (0, 1)), source, ((2, 8), (1, 3), (3, 16)),
    )  # fmt: skip
    decoder = Graph(
        "decoder_model.onnx", _Target(model),
        ["input_ids", "encoder_attention_mask", "encoder_hidden_states", *names_of("past_key_values", layers)],
        ["logits", *names_of("present", layers)],
        ((0, 1), (0, 1), (0, 1), [(0, 2)] * len(shapes)), target,
        ((2, 3, 5, 7), (1, 1, 0, 4), (2, 6, 0, 9), (3, 1, 6, 8)),  # rows, tokens, tokens before, source tokens
    )  # fmt: skip
    return [encoder, decoder]
