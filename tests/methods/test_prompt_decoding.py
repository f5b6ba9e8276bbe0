"""Ways to generate beside plain ones: caches of a fixed size, going on from a cache, drafts. Each gives the tokens that
the plain search gives, which test_prompts.py holds against peft; peft itself fails or repeats positions here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from prompt_zoo import LM, METHODS, N, adapted, batch, cases, make, own

from veneer.errors import AdapterError

SIX = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
FIXED = {**SIX, "cache_implementation": "static"}


@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize(("method", "arch", "task"), cases(LM, ("prompt", "prefix")))
def test_a_cache_of_fixed_size_has_room(method: str, arch: str, task: str, pad: str | None) -> None:
    model, data = adapted(method, arch, task), batch(task, pad, labels=False)
    for search in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        want = model.generate(**data, **SIX, **search)
        assert model.generate(**data, **FIXED, **search).tolist() == want.tolist()
    assert "create_masks_for_generate" not in vars(model.base_model)


@pytest.mark.parametrize("form", ["positional", "inputs_embeds", "max_length", "chunks", "own cache"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_cache_of_fixed_size_for_any_form_of_call(method: str, form: str) -> None:
    model, data = adapted(method, "llama", "CAUSAL_LM"), batch("CAUSAL_LM", None, labels=False)
    want, ids = model.generate(**data, **SIX), data["input_ids"]
    if form == "positional":
        got = model.generate(ids, **FIXED)
    elif form == "inputs_embeds":
        got = model.generate(inputs_embeds=model.base_model.get_input_embeddings()(ids), **FIXED)
        want = want[:, 6:]
    elif form == "max_length":
        got = model.generate(**data, max_length=12, min_length=12, do_sample=False, cache_implementation="static")
    elif form == "chunks":
        got = model.generate(**data, **FIXED, prefill_chunk_size=2)
    else:
        mine = tf.StaticCache(config=model.base_model.config, max_cache_len=6 + 6 + N)
        got = model.generate(**data, **SIX, past_key_values=mine)
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "bloom"])
def test_generation_goes_on_from_its_cache(method: str, arch: str, pad: str | None) -> None:
    """A chat's next turn: what was said and the new words, with the cache that the first turn left."""
    model, data, tasks = adapted(method, arch, "CAUSAL_LM"), batch("CAUSAL_LM", pad, False), own(method, 2)
    first = model.generate(**data, **SIX, **tasks, return_dict_in_generate=True)
    said, cache = torch.cat([first.sequences, torch.tensor([[7, 8], [9, 10]])], 1), first.past_key_values
    assert cache.get_seq_length() == N + 6 + 6 - 1  # as long as it is, once generate is over
    mask = torch.cat([data["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1)
    want = model.generate(input_ids=said, attention_mask=mask, **SIX, **tasks)
    again = model.generate(input_ids=said, attention_mask=mask, past_key_values=cache, **SIX, **tasks)
    assert again.tolist() == want.tolist()
    assert cache.get_seq_length() == N + 14 + 6 - 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("draft", ["model", "lookup"])
def test_drafts_change_no_token(method: str, draft: str) -> None:
    model, tasks = adapted(method, "llama", "CAUSAL_LM"), own(method)
    ids = torch.tensor([[5, 9, 7, 5, 9, 7, 5, 9]])
    want = model.generate(ids, **{**SIX, "max_new_tokens": 12}, **tasks)
    drafter = make("llama", "CAUSAL_LM")
    used: list[int] = []
    drafter.register_forward_hook(lambda *_: used.append(1))
    by = {"assistant_model": drafter} if draft == "model" else {"prompt_lookup_num_tokens": 3}
    assert model.generate(ids, **{**SIX, "max_new_tokens": 12}, **tasks, **by).tolist() == want.tolist()
    assert bool(used) == (draft == "model")


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_window_narrower_than_the_input(method: str) -> None:
    """Sliding attention: the window leaves the prompt behind, in a cache as in one pass."""
    from prompt_zoo import IDS, config

    from veneer.model import get_peft_model

    torch.manual_seed(0)
    same = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    base = tf.MistralForCausalLM(tf.MistralConfig(sliding_window=6, intermediate_size=48, **same, **IDS))
    torch.manual_seed(3)
    model, data = get_peft_model(base, config(method, "CAUSAL_LM")).eval(), batch("CAUSAL_LM", None, False)
    want = model.generate(**data, **SIX, use_cache=False).tolist()
    assert model.generate(**data, **SIX).tolist() == want
    assert model.generate(**data, **FIXED).tolist() == want


def test_a_cache_without_a_place_for_a_prompt() -> None:
    model = adapted("prompt", "llama", "CAUSAL_LM")
    with pytest.raises(AdapterError, match='cache_implementation="quantized"'):
        model.generate(torch.tensor([[5, 6]]), **SIX, cache_implementation="quantized")


def test_an_error_inside_leaves_nothing_behind() -> None:
    model, data = adapted("prefix", "llama", "CAUSAL_LM"), batch("CAUSAL_LM", None, labels=False)
    cache = tf.DynamicCache()

    def stop(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> bool:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        model.generate(**data, **SIX, past_key_values=cache, stopping_criteria=[stop])
    assert cache.get_seq_length() == N + 6
    assert not any("get_seq_length" in vars(c) for c in (cache, *cache.layers))
    assert not model.base_model._forward_pre_hooks
    assert not model.base_model._forward_hooks
