"""Compiled whole (`fullgraph=True`) every method gives eager's numbers; where its tensors lie in modules of their own,
the adapters that are switched between share one graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from law_cases import CASES, Case
from lawlib import build, data, distance, exempt, randomize
from torch._dynamo.utils import counters

import veneer
from veneer.tuner import Tuner

QUICK = {"LORA", "DORA", "IA3", "ADALORA"}
FIRST = {c.method_name: c for c in reversed(CASES) if not c.variant}


def first_cases() -> Any:
    """A case a method."""
    marked = [c if n in QUICK else pytest.param(c, marks=pytest.mark.slow) for n, c in FIRST.items()]
    return pytest.mark.parametrize("case", marked, ids=list(FIRST))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def by_name(t: Tuner) -> bool:
    """Whether a tensor of the adapters' is found by the adapter's name (`layer.ia3_l["a0"]`)."""
    return any(leaf == name for name in t.peft_config for *_, leaf in t.tensor_names(name))


def gradients(t: Tuner, y: torch.Tensor) -> list[torch.Tensor]:
    trained = [p for p in t.parameters() if p.requires_grad]
    found = torch.autograd.grad(y.square().sum(), trained, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def agree(t: Tuner, compiled: Any, x: torch.Tensor) -> None:
    torch.manual_seed(0)
    y = compiled(x)
    torch.manual_seed(0)
    expected = t(x)
    assert distance(y.detach(), expected.detach()) < 1e-5
    if t.training:
        pairs = zip(gradients(t, y), gradients(t, expected), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("training", [True, False])
@first_cases()
def test_compiled_whole(case: Case, training: bool) -> None:
    exempt(case, "compiled == eager")
    x, t = data(case), randomize(build(case, adapters=2))
    t.train(training)
    compiled = torch.compile(t, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(training):
        for name in ("a0", "a1", "a0"):
            t.set_adapter(name)
            agree(t, compiled, x)
    assert graphs() == 1 or (graphs() == 2 and (by_name(t) or t.peft_config["a0"].get("velora_config") is not None))


def lora(case_name: str = "LORA", adapters: int = 3) -> tuple[Tuner, Any, torch.Tensor]:
    case = FIRST[case_name]
    t = randomize(build(case, adapters=adapters))
    return t, torch.compile(t, fullgraph=True, backend="eager"), data(case)


def test_what_changes_an_adapter_reaches_compiled_code() -> None:
    """Scalings, modules put in the place of others, another adapter of the name, layers set apart, the base alone."""
    t, compiled, x = lora()
    t.train()
    agree(t, compiled, x)
    layer: Any = t.model.first
    layer.scaling["a0"] = 3.5
    agree(t, compiled, x)
    layer.scale_layer(0.5)
    agree(t, compiled, x)
    layer.lora_dropout["a0"] = torch.nn.Dropout(1.0)  # compiled code draws other masks: all or nothing is the same
    agree(t, compiled, x)
    layer.lora_dropout["a0"] = torch.nn.Identity()
    agree(t, compiled, x)
    layer.lora_A["a0"].weight = torch.nn.Parameter(torch.randn(4, x.shape[-1]))
    agree(t, compiled, x)
    layer.set_adapter("a2")
    agree(t, compiled, x)
    t.set_adapter("a1")
    agree(t, compiled, x)
    t.set_adapter(["a1", "a2"])
    agree(t, compiled, x)
    t.delete_adapter("a1")
    agree(t, compiled, x)
    with t.disabled():
        agree(t.eval(), compiled, x)
    t.merge_adapter()
    agree(t, compiled, x)
    t.unmerge_adapter()
    agree(t, compiled, x)


def test_compiled_in_another_precision() -> None:
    t, compiled, x = lora()
    agree(t.eval(), compiled, x)
    agree(t.to(torch.float64), compiled, x.double())


def test_functional_call_reaches_compiled_code() -> None:
    t, _, x = lora()
    others = {n: p.detach() * 2 for n, p in t.named_parameters()}
    f = torch.compile(lambda: torch.func.functional_call(t, others, x), fullgraph=True, backend="eager")
    assert distance(f().detach(), torch.func.functional_call(t, others, x).detach()) < 1e-5


class Heads(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).tanh())


def test_saved_modules_switch_with_their_adapters() -> None:
    torch.manual_seed(0)
    cfg = lambda: veneer.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"], init_lora_weights=False)
    t: Any = Tuner(Heads(), cfg(), "one")
    t.add_adapter("two", cfg())
    torch.nn.init.normal_(t.model.head.modules_to_save["two"].weight)
    compiled, x = torch.compile(t, fullgraph=True, backend="eager"), torch.randn(4, 6)
    for name in ("one", "two", "one"):
        t.set_adapter(name)
        agree(t.train(), compiled, x)
    assert graphs() == 1


@pytest.mark.slow
def test_a_compiled_step_is_the_eager_step() -> None:
    """A language model under inductor: losses of a few optimizer steps with switches between them, one graph."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))

    def losses(compiling: bool) -> list[float]:
        torch.manual_seed(0)
        cfg = lambda: veneer.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
        model: Any = veneer.get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)), cfg(), "one")
        model.add_adapter("two", cfg())
        call = torch.compile(model, fullgraph=True) if compiling else model
        optimizers = {}
        for name in ("one", "two"):
            model.set_adapter(name)
            optimizers[name] = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        out = []
        for name in ("one", "two", "two", "one"):
            model.set_adapter(name)
            loss = call(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            out.append(loss.item())
        return out

    eager = losses(False)
    assert losses(True) == pytest.approx(eager, rel=1e-4)
    assert eager[3] < eager[0]
    assert graphs() == 1
