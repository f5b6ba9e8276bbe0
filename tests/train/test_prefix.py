"""Batches laid out as one row with a shared beginning: the same loss and gradients, less work, or left as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from veneer import LoraConfig, PromptTuningConfig, get_peft_model
from veneer.train import Recipe, prefix, run
from veneer.train.collate import Collator
from veneer.train.encode import IGNORE
from veneer.train.loss import labelled_loss
from veneer.train.prefix import join_batch, shared_prefix

WIDE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
}
READS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**WIDE, num_key_value_heads=2)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**WIDE, num_key_value_heads=2)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**WIDE, num_key_value_heads=2, sliding_window=64)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**WIDE, num_key_value_heads=2, head_dim=8, sliding_window=64)
    ),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**WIDE)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**WIDE)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=97,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    ),
}
LEAVES = {
    "eager": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**WIDE, attn_implementation="eager")),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)),
    "short window": lambda: tf.MistralForCausalLM(tf.MistralConfig(**WIDE, num_key_value_heads=2, sliding_window=8)),
    "router loss": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(
            **WIDE, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True
        )
    ),
}


def rows(number: int = 4, start: int = 6) -> list[dict[str, list[int]]]:
    """Rows of several lengths that begin alike, learn their second half and have a token after it."""
    drawn = torch.Generator().manual_seed(number)
    found = []
    for row in range(number):
        own = torch.randint(20, 90, (5 + 3 * row,), generator=drawn).tolist()
        answer = torch.randint(20, 90, (4 + row,), generator=drawn).tolist()
        ids = [*range(1, 1 + start), *own, *answer, 7]
        found.append({"input_ids": ids, "labels": [IGNORE] * (start + len(own)) + answer + [IGNORE]})
    return found


def batch_of(number: int = 4, start: int = 6) -> dict[str, torch.Tensor]:
    return Collator(0)(rows(number, start))


def longest(batch: dict[str, torch.Tensor]) -> int:
    return batch["input_ids"].shape[1]


def adapted(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(make(), config)


@pytest.mark.parametrize("name", READS)
def test_loss_and_gradients_are_those_of_the_padded_batch(name: str) -> None:
    model, batch = adapted(READS[name]), batch_of()
    model.eval()
    grads = []
    with shared_prefix(model, batch, longest(batch)) as form:
        assert form is not None
        joined = form(batch)
        assert joined["input_ids"].shape == (1, 6 + sum(len(row["input_ids"]) - 6 - 2 for row in rows()) + 1)
        for given in (batch, joined):
            model.zero_grad()
            loss = labelled_loss(model, given, torch.tensor(7.0))
            loss.backward()
            grads.append((float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5)
    assert len(grads[0][1]) == len(grads[1][1]) > 0
    for a, b in zip(grads[0][1], grads[1][1], strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * max(float(a.abs().max()), 1e-3)


@pytest.mark.parametrize("name", LEAVES)
def test_a_model_that_would_read_rows_otherwise_keeps_its_batches(name: str) -> None:
    batch = batch_of()
    model = adapted(LEAVES[name])
    before = model.config._attn_implementation
    with shared_prefix(model, batch, longest(batch)) as form:
        assert form is None
    assert model.config._attn_implementation == before


def test_virtual_tokens_keep_their_batches() -> None:
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with shared_prefix(get_peft_model(READS["llama"](), config), batch_of(), 40) as form:
        assert form is None


def test_an_adapter_that_looks_at_rows_is_found_out_though_it_starts_as_nothing() -> None:
    """The layer below adds a trained share (zero at first) of the row's mean, which one row of all would change."""

    class Mean(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.share = inner, torch.nn.Parameter(torch.zeros(32))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.inner(hidden + self.share * hidden.mean(1, keepdim=True))

    model = READS["llama"]()
    model.requires_grad_(False)
    with shared_prefix(model, batch_of(), 40) as form:
        assert form is join_batch
    model.model.layers[0].mlp = Mean(model.model.layers[0].mlp)
    with shared_prefix(model, batch_of(), 40) as form:
        assert form is None
    assert not model.model.layers[0].mlp.share.any()  # put back


def test_the_shared_part_ends_before_any_prediction() -> None:
    def of(ids: list[list[int]], labels: list[list[int]]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(2, 4), "labels": torch.tensor(labels)}

    ids = [[1, 2, 3, 4], [1, 2, 3, 5]]
    joined = join_batch(of(ids, [[IGNORE, IGNORE, 3, 4], [IGNORE, IGNORE, IGNORE, 5]]))
    assert joined["input_ids"].tolist() == [[1, 2, 3, 2, 3, 5]]
    assert joined["position_ids"].tolist() == [[0, 1, 2, 1, 2, 3]]
    assert joined["labels"].tolist() == [[IGNORE, IGNORE, 3, 4, IGNORE, 5]]
    whole = join_batch(of(ids, ids))
    assert whole["input_ids"].tolist() == [[1, 2, 3, 1, 2, 3, 5]]
    assert whole["labels"].tolist() == [[IGNORE, 2, 3, 4, 2, 3, 5]]
    unlearned = of(ids, [[IGNORE] * 4, [IGNORE, 2, 3, 5]])
    assert join_batch(unlearned) is unlearned
    odd = batch_of() | {"token_type_ids": batch_of()["labels"]}
    assert join_batch(odd) is odd


def test_checkpointed_activations_are_computed_again_from_the_same_rows() -> None:
    model, batch = adapted(READS["llama"]), batch_of()
    model.train()
    grads = []
    with shared_prefix(model, batch, longest(batch)) as form:
        assert form is not None
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            labelled_loss(model, form(batch), torch.tensor(7.0)).backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_run_learns_the_same_from_either(
    causal: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    real = prefix._lay_out

    def lay_out(*args: Any) -> Any:
        batch = real(*args)
        seen.add(len(batch["input_ids"]))
        return batch

    monkeypatch.setattr(prefix, "_lay_out", lay_out)
    shared = run(causal(train__num_train_epochs=2, out=str(tmp_path / "shared")))
    assert seen == {1}
    seen.clear()
    padded = run(causal(train__num_train_epochs=2, out=str(tmp_path / "padded"), options={"share_prefix": False}))
    assert not seen
    assert len(shared.history) == len(padded.history) > 1
    for a, b in zip(shared.history, padded.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert shared.train_tokens == padded.train_tokens
