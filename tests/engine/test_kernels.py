"""Every fast path equals its plain reference: values, gradients, gradients of gradients, and where it steps aside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import veneer
from veneer import fused as base
from veneer import kernels
from veneer.kernels import low_rank_linear, low_rank_reference, mask_like

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def draw(bias: bool, rate: float, dtype: torch.dtype = torch.float64) -> list[Any]:
    torch.manual_seed(0)
    x, W, A, B = (torch.randn(*s, dtype=dtype) for s in ((2, 3, 5), (4, 5), (2, 5), (4, 2)))
    b = torch.randn(4, dtype=dtype) if bias else None
    keep = mask_like(x, rate) if rate else None
    return [*(t.requires_grad_() for t in (x, W)), b.requires_grad_() if bias else None, A.requires_grad_(),
            B.requires_grad_(), 1.7, keep, rate]  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_low_rank_linear(bias: bool, rate: float) -> None:
    args = draw(bias, rate)
    wanted, got = low_rank_reference(*args), low_rank_linear(*args)
    torch.testing.assert_close(got, wanted)
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    g = torch.randn_like(wanted)
    for mine, theirs in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert gradcheck(lambda *_: low_rank_linear(*args), leaves)
    assert gradgradcheck(lambda *_: low_rank_linear(*args), leaves)


def test_a_frozen_base_gets_no_gradient_of_its_own() -> None:
    args = draw(True, 0.0)
    args[1].requires_grad_(False), args[2].requires_grad_(False)
    low_rank_linear(*args).sum().backward()
    assert args[1].grad is None
    assert args[2].grad is None
    assert args[3].grad is not None


def test_mask_has_the_rate_it_was_asked_for() -> None:
    torch.manual_seed(0)
    assert mask_like(torch.empty(400, 501), 0.05).float().mean().item() == pytest.approx(0.95, abs=0.002)
    assert mask_like(torch.empty(3, 5), 0.0).all()
    assert not mask_like(torch.empty(3, 5), 1.0).any()
    rare = 2.0**-18  # less than 16 bits can say
    assert sum(int((~mask_like(torch.empty(1 << 16), rare)).sum()) for _ in range(400)) == pytest.approx(100, abs=45)


def test_masks_are_the_generators_and_their_elements_apart() -> None:
    x = torch.empty(1 << 14)
    torch.manual_seed(3)
    first, second = mask_like(x, 0.5), mask_like(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(mask_like(x, 0.5), first)
    assert not torch.equal(first, second)
    for step in range(1, 9):  # four elements share a draw
        same = (first[:-step] == first[step:]).float().mean().item()
        assert same == pytest.approx(0.5, abs=0.03)


def adapted(bias: bool = True, **more: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5, bias=bias))
    model: Any = veneer.get_peft_model(
        net, veneer.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **more)
    )
    return model, model.base_model.model[0]


def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls of the fast path."""
    calls = [0]
    real = kernels._forward

    def counted(*args: Any) -> Any:
        calls[0] += 1
        return real(*args)

    monkeypatch.setattr(kernels, "_forward", counted)
    return calls


def test_it_is_the_path_that_a_plain_layer_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted()
    calls = count(monkeypatch)
    model(torch.randn(3, 6)).sum().backward()
    assert calls == [1]


def test_hooks_of_the_base_run_and_see_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer = adapted()
    x = torch.randn(3, 6)
    plain = model(x)
    calls, seen = count(monkeypatch), []
    layer.base_layer.register_forward_hook(lambda m, a, y: seen.append(y))
    torch.testing.assert_close(model(x), plain)
    assert calls == [0]
    torch.testing.assert_close(seen[0], layer.base_layer(x))


@pytest.mark.parametrize("how", ["func", "vmap", "forward mode", "autocast", "other forward", "two adapters"])
def test_it_steps_aside(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layer = adapted()
    x = torch.randn(3, 6)
    if how == "two adapters":
        model.add_adapter("b", veneer.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "b"])
    merged_weight, merged_bias = layer.effective()
    wanted = nn.functional.linear(x, merged_weight, merged_bias)
    calls = count(monkeypatch)
    if how == "func":
        got = torch.func.functional_call(model, {k: p.detach() for k, p in model.named_parameters()}, (x,))
        torch.func.grad(lambda v: model(v).sum())(x)
    elif how == "vmap":
        got = torch.vmap(model)(x)
    elif how == "forward mode":
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            got, tangent = torch.autograd.forward_ad.unpack_dual(model(dual))
        torch.testing.assert_close(tangent, nn.functional.linear(torch.ones_like(x), merged_weight))
    elif how == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            got = model(x)
        assert got.dtype == torch.bfloat16
        got = got.float()
    elif how == "other forward":
        layer.base_layer.forward = lambda v: nn.functional.linear(v, layer.base_layer.weight, layer.base_layer.bias)
        got = model(x)
    else:
        got = model(x)
    tolerance: dict[str, Any] = {"rtol": 0.05, "atol": 0.05} if how == "autocast" else {}
    torch.testing.assert_close(got, wanted, **tolerance)
    assert calls == [0]


def test_dropout_is_the_whole_change_on_average() -> None:
    model, _ = adapted(lora_dropout=0.5)
    x = torch.randn(1, 6).expand(20000, 6)
    torch.manual_seed(3)
    trained = model.train()(x).mean(0)
    torch.testing.assert_close(trained, model.eval()(x)[0], rtol=0.05, atol=0.05)


def test_compiled_equals_eager() -> None:
    model, _ = adapted()
    x = torch.randn(3, 6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


# -- the base's own work ---------------------------------------------------------------------------------


def test_rms_norm() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    w.requires_grad_()
    torch.testing.assert_close(base.rms_norm(x, w, 1e-6), nn.functional.rms_norm(x, (5,), w, 1e-6))
    assert gradcheck(lambda a, b: base.rms_norm(a, b, 1e-6), (x, w))
    assert gradgradcheck(lambda a, b: base.rms_norm(a, b, 1e-6), (x, w))


def test_rotary_and_gate_gradients() -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cos, sin = (torch.randn(3, 6, dtype=torch.float64) for _ in range(2))
    assert gradcheck(lambda a: base.rotary(a, cos, sin), (x,))
    assert gradgradcheck(lambda a: base.rotary(a, cos, sin), (x,))
    assert gradcheck(base.gated_silu, (x, y))
    assert gradgradcheck(base.gated_silu, (x, y))


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    if name == "gemma":
        return GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=4))
    kind, config = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}[name]
    return kind(config(**SIZES))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_gives_its_own_numbers(name: str, dtype: torch.dtype) -> None:
    plain: Any = tiny(name).to(dtype)
    for module in plain.modules():
        if "RMSNorm" in type(module).__name__:
            nn.init.normal_(module.weight)
    model: Any = copy.deepcopy(plain)
    ids = torch.randint(0, 61, (2, 7))
    found = base.base_kernels(model)
    assert found.functions
    norms = {"llama": 5, "qwen2": 5, "gemma": 0}[name]  # Gemma's norm adds one to its weight, its gate is a GELU
    gates = {"llama": 2, "qwen2": 2, "gemma": 0}[name]
    assert len(found.forwards) == norms + gates
    wanted = plain(ids, labels=ids)
    wanted.loss.backward()
    with found:
        got = model(ids, labels=ids)
        got.loss.backward()
    loose = dtype == torch.bfloat16
    close: dict[str, Any] = {"rtol": 5e-2, "atol": 5e-2} if loose else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(got.logits, wanted.logits, **close)
    for (key, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **close, msg=lambda m, key=key: f"{key}: {m}")
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert model.state_dict().keys() == plain.state_dict().keys()
