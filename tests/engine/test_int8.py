"""int8 products of frozen layers: how near they are to the floats, where they act, and where they step aside."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer import int8
from veneer.int8 import Inputs, Int8Weight, int8_base, quantise_rows


def off_by(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def llama() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    base = LlamaForCausalLM(config)
    model = veneer.get_peft_model(base, veneer.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    ids = torch.randint(0, 97, (3, 11))
    return model.train(), {"input_ids": ids, "labels": ids}


def step(model: Any, batch: dict[str, Tensor]) -> tuple[float, list[Tensor]]:
    """The loss and the adapters' gradients."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_rows_come_back_to_half_a_step() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 40) * torch.tensor([[1e-3], [1.0], [50.0], [0.0], [2.0]])
    q, scale = quantise_rows(x)
    assert q.dtype == torch.int8
    assert ((q * scale - x).abs() <= scale * 0.5001).all()
    assert not q[3].any()


def test_both_products_are_near_and_outliers_move_to_the_weight() -> None:
    torch.manual_seed(0)
    x, W, g = torch.randn(2, 30, 64), torch.randn(48, 64), torch.randn(60, 48)
    x[..., 7] *= 80  # one channel that would take the others' bits
    highest = x.reshape(-1, 64).abs().amax(0)
    found = {}
    for name, c in {"smooth": (highest / W.abs().amax(0)).sqrt(), "plain": torch.ones(64)}.items():
        weight = Int8Weight(W, Inputs(c))
        y = torch.empty(60, 48)
        weight.product(x, y)
        rest = x.clone()
        rest[..., 7] = 0
        lost = y - (x @ W.mT).view(60, 48)
        found[name] = float(lost.norm() / (rest @ W.mT).norm())
        assert off_by(weight.input_gradient(g), g @ W) < (0.02 if name == "plain" else 0.1)
    assert found["smooth"] < found["plain"] / 2
    assert found["smooth"] < 0.1


def test_rows_are_quantised_once_for_layers_that_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = llama()
    with int8_base(model, [lambda: model(**batch)]) as found:
        assert len(found.weights) == len(found.errors) == 14
        calls = [0]
        real = int8.quantise_rows

        def counted(x: Tensor) -> Any:
            calls[0] += 1
            return real(x)

        monkeypatch.setattr(int8, "quantise_rows", counted)
        model(**batch)
        assert calls[0] == 2 * 4  # a layer of the model: q k v, o, gate up, down
        x = torch.randn(3, 8)
        inputs = Inputs(torch.ones(8))
        first = inputs.rows(x)
        assert inputs.rows(x) is first
        x.mul_(2)
        assert inputs.rows(x) is not first


def test_a_step_is_near_the_float_one_and_eval_is_the_float_one() -> None:
    model, batch = llama()
    loss, wanted = step(model, batch)
    scores = model.eval()(**batch).logits
    model.train()
    found = int8_base(model, [lambda: model(**batch)])
    assert model.training
    assert step(model, batch)[0] == loss  # made, not yet on
    with found:
        near, got = step(model, batch)
        assert near != loss
        assert near == pytest.approx(loss, rel=0.02)
        assert all(off_by(a, b) < 0.15 for a, b in zip(got, wanted, strict=True))
        assert torch.equal(model.eval()(**batch).logits, scores)
        model.train()
    again, same = step(model, batch)
    assert again == loss
    assert all(map(torch.equal, same, wanted))


def test_a_layer_that_is_far_off_keeps_its_floats() -> None:
    model, batch = llama()
    loss, _ = step(model, batch)
    with int8_base(model, [lambda: model(**batch)], tolerance=1e-6) as found:
        assert not found.weights
        assert max(found.errors.values()) < 0.05
        assert min(found.errors.values()) > 1e-4
        assert step(model, batch)[0] == loss


def test_a_weight_that_has_changed_is_read_anew() -> None:
    model, batch = llama()
    layer: Any = model.base_model.model.model.layers[0].mlp.up_proj
    with int8_base(model, [lambda: model(**batch)]):
        assert int8.int8_weight(layer.base_layer) is not None
        with torch.no_grad():
            layer.base_layer.weight.mul_(2)
        assert int8.int8_weight(layer.base_layer) is None


def test_a_bias_is_added_and_other_dtypes_are_left_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 24), nn.Linear(24, 40))
    model: Any = veneer.get_peft_model(net, veneer.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    x = torch.randn(50, 32)
    model.train()
    wanted = model(x)
    with int8_base(model, [lambda: model(x)]):
        assert 0 < off_by(model(x), wanted) < 0.03
    assert not int8_base(model.double(), [lambda: model(x.double())]).weights


@pytest.mark.parametrize(("seconds", "faster"), [(0.0, True), (0.05, False)])
def test_whether_int8_is_faster_is_measured(monkeypatch: pytest.MonkeyPatch, seconds: float, faster: bool) -> None:
    def product(a: Tensor, b: Tensor) -> Tensor:
        time.sleep(seconds)
        return a

    monkeypatch.setattr(torch, "_int_mm", product)
    assert int8.int8_is_faster() is faster
