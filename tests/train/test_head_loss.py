"""The chunked cross entropy equals the plain one, and is used only where a model's logits are its head's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import veneer
from veneer.train import head_loss
from veneer.train.head_loss import chunked_cross_entropy, cross_entropy_reference, rows_at_once
from veneer.train.loss import labelled_loss, own_loss

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradient(chunk: int, bias: bool) -> None:
    torch.manual_seed(0)
    h = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    W, b = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, dtype=torch.float64) if bias else None
    targets = torch.randint(0, 11, (7,))
    assert gradcheck(lambda v: chunked_cross_entropy(v, W, b, targets, chunk), (h,))
    assert gradgradcheck(lambda v: chunked_cross_entropy(v, W, b, targets, chunk), (h,))
    mine = chunked_cross_entropy(h, W, b, targets, chunk)
    theirs = torch.nn.functional.cross_entropy(h @ W.T + (0 if b is None else b), targets, reduction="sum")
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(cross_entropy_reference(h, W, b, targets).double(), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
def test_autocast_is_that_of_a_linear_layer(hidden: torch.dtype) -> None:
    torch.manual_seed(0)
    h, W, targets = torch.randn(20, 16, dtype=hidden), torch.randn(40, 16), torch.randint(0, 40, (20,))
    mine, theirs = h.clone().requires_grad_(), h.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = chunked_cross_entropy(mine, W, None, targets), cross_entropy_reference(theirs, W, None, targets)
        torch.testing.assert_close(found, wanted)
        found.backward()
        wanted.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=2e-2, atol=2e-2)


def test_chunks_are_of_a_size_and_of_bounded_logits() -> None:
    for rows in (0, 1, 15, 341, 342, 1024, 5000):
        chunk = rows_at_once(rows, 49152, "cpu")
        assert 1 <= chunk <= 341
        assert rows % chunk == 0 or chunk - rows % chunk <= -(-rows // chunk)
    assert rows_at_once(100, 10**9, "cpu") == 15  # ceil(100 / 7): at most 16 however large the vocabulary


def model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "gemma2":
        base: Any = Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=4))
    else:
        base = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=kind == "tied"))
    targets = ["q_proj", "lm_head"] if kind == "adapted head" else ["q_proj"]
    cfg = veneer.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, init_lora_weights=False)
    return veneer.get_peft_model(base, cfg)


@pytest.mark.parametrize("kind", ["tied", "untied", "adapted head", "gemma2"])
@pytest.mark.parametrize("items", [None, 5.0])
def test_the_models_own_loss(kind: str, items: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    m = model(kind)
    calls = []
    real = head_loss.chunked_cross_entropy
    monkeypatch.setattr(head_loss, "chunked_cross_entropy", lambda *a: calls.append(1) or real(*a))  # type: ignore[func-returns-value]
    ids = torch.randint(0, 61, (3, 6))
    labels = ids.masked_fill(torch.rand(3, 6) < 0.6, -100)
    labels[:, 1] = ids[:, 1]
    batch = {"input_ids": ids, "labels": labels}
    wanted = own_loss(m, batch, items, shifted=True)
    wanted.backward()
    gradients = {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}
    m.zero_grad()
    for _ in range(2):  # the second call of a model that changes its logits knows so
        got = labelled_loss(m, batch, items)
    got.backward()
    torch.testing.assert_close(got, wanted)
    assert gradients
    for name, p in m.named_parameters():
        if name in gradients:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)
    assert len(calls) == {"tied": 2, "untied": 2, "adapted head": 0, "gemma2": 0}[kind]
    assert "forward" not in m.get_base_model().get_output_embeddings().__dict__
    assert "_loss_function" not in m.get_base_model().__dict__
