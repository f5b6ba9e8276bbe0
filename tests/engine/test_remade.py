"""What backward makes again instead of keeping: equal to keeping it, gradients of gradients too, and less kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer import fused, remade
from veneer.kernels import low_rank_linear

Kept = list[tuple[int, ...]]


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def block(x: Tensor, w: Tensor, gate: tuple[Tensor, ...], up: tuple[Tensor, ...], down: tuple[Tensor, ...]) -> Tensor:
    """A decoder's feed-forward part with LoRA on each layer."""
    adapted = lambda x, W, A, B: low_rank_linear(x, W, None, A, B, 1.5, None, 0.0)
    normed = fused.rms_norm(x, w, 1e-6)
    return adapted(fused.gated_silu(adapted(normed, *gate), adapted(normed, *up)), *down)


def tensors() -> list[Tensor]:
    into, out = [(4, 3), (1, 3), (4, 1)], [(3, 4), (1, 4), (3, 1)]
    return drawn((1, 2, 3), (3,), *into, *into, *out)


def run(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
    return block(x, w, rest[:3], rest[3:6], rest[6:])


@pytest.fixture
def keeps(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Turns the seam off: the plain reference, in which autograd keeps what it is given."""

    def off() -> None:
        for module in (fused, veneer.kernels):
            monkeypatch.setattr(module, "keep_sources", lambda y, *_: y)

    return off


def kept(y: Tensor) -> Kept:
    """The shapes of the storages that the graph behind y keeps."""
    seen, todo, storages = set(), [y.grad_fn], {}
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for saved in getattr(node, "_raw_saved_tensors", ()):
            data = saved.data
            if isinstance(data, Tensor):
                storages[data.untyped_storage()._cdata] = tuple(data.shape)
        todo += [parent for parent, _ in node.next_functions]
    return sorted(storages.values())


def test_gradients_are_those_of_keeping(keeps: Any) -> None:
    given = tensors()
    y = run(*given)
    g = torch.randn_like(y)
    made = torch.autograd.grad(y, given, g)
    keeps()
    for mine, theirs in zip(made, torch.autograd.grad(run(*given), given, g), strict=True):
        assert torch.equal(mine, theirs)


def test_gradcheck() -> None:
    given = tensors()
    assert gradcheck(run, given)
    assert gradgradcheck(run, given)


def test_a_second_backward_and_a_part_of_one() -> None:
    given = tensors()
    y = run(*given)
    g = torch.randn_like(y)
    whole = torch.autograd.grad(y, given, g, retain_graph=True)
    part = torch.autograd.grad(y, given[3], g, retain_graph=True)[0]  # gate's A alone: up never asks
    again = torch.autograd.grad(y, given, g)
    assert torch.equal(part, whole[3])
    assert all(map(torch.equal, whole, again))


def llama(again: bool = False, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    config = veneer.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **more)
    model: Any = veneer.get_peft_model(base, config)
    fused.base_kernels(model, mlp_checkpointing=again).on()
    return model


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("again", [False, True])
def test_a_model_learns_the_same_and_keeps_less(rate: float, again: bool, keeps: Any) -> None:
    model = llama(again, lora_dropout=rate).train()
    ids = torch.randint(0, 61, (2, 7))

    def step() -> tuple[dict[str, Tensor], Kept]:
        torch.manual_seed(1)
        model.zero_grad(set_to_none=True)
        loss = model(ids, labels=ids).loss
        held = kept(loss)
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, held

    (mine, less), _ = step(), keeps()
    theirs, more = step()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    wide = (2, 7, 40)
    assert more.count(wide) - less.count(wide) == (6 if again else 2)  # an activation a layer; gate and up
    hidden = (2, 7, 16)
    norms = 3  # two a layer; the first's input has no gradient and is kept by nobody else
    assert more.count(hidden) - less.count(hidden) == norms


def test_other_hooks_act_alone() -> None:
    model = llama().train()
    ids = torch.randint(0, 61, (1, 5))
    model(ids, labels=ids).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    packed = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(ids, labels=ids).loss.backward()
    assert torch.Size((1, 5, 40)) in packed
    assert all(torch.equal(p.grad, wanted[name]) for name, p in model.named_parameters() if p.grad is not None)


def test_checkpointing_gives_the_same() -> None:
    given = tensors()
    y = run(*given)
    wanted = torch.autograd.grad(y.sum(), given)
    got = torch.autograd.grad(checkpoint(run, *given, use_reentrant=False).sum(), given)
    assert all(map(torch.equal, got, wanted))


def test_a_changed_source_is_an_error_and_a_changed_output_is_kept() -> None:
    given = tensors()
    x = given[0] * 1
    y = run(x, *given[1:])
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match=r"\(1, 2, 3\).*modified in place"):
        y.sum().backward()
    normed = fused.rms_norm(given[0], given[1], 1e-6)
    assert remade.remade_of(normed) is not None
    normed.add_(1)  # as a hook that adds noise may
    assert remade.remade_of(normed) is None


def test_nothing_is_marked_without_a_graph() -> None:
    x, w = drawn((2, 4), (4,))
    with torch.no_grad():
        assert remade.remade_of(fused.rms_norm(x, w, 1e-6)) is None
    before = len(remade._MADE)
    y = fused.rms_norm(x, w, 1e-6)
    assert len(remade._MADE) == before + 1
    del y
    assert len(remade._MADE) == before
