"""Copies, pickles, casts, state dicts and models on the meta device."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from law_cases import Case
from lawlib import build, config, data, distance, every_case, exempt, randomize, tensors

from veneer import registry
from veneer.state import collect, put
from veneer.tuner import Tuner


@every_case()
def test_deepcopy(case: Case) -> None:
    """A copy computes the same, and what happens to one does not reach the other."""
    x = data(case)
    t = randomize(build(case, adapters=2))
    y = t(x)
    u = copy.deepcopy(t)
    assert torch.equal(u(x), y)
    randomize(u, seed=8)
    u.set_adapter("a1")
    u.host.enable(False)
    assert torch.equal(t(x), y)
    assert t.active_adapters == ["a0"]


@every_case()
def test_pickle(case: Case) -> None:
    x = data(case)
    t = randomize(build(case))
    file = io.BytesIO()
    torch.save(t.state_dict(), file)
    whole = io.BytesIO()
    t.model.make = None
    for p in t.parameters():
        p.grad = None
    torch.save(t, whole)
    whole.seek(0)
    u = torch.load(whole, weights_only=False)
    assert torch.equal(u(x), t(x))
    assert u.peft_config.keys() == t.peft_config.keys()


@every_case()
def test_casts(case: Case) -> None:
    t = randomize(build(case))
    expected = t(data(case))
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.04), (torch.float16, 0.006)):
        u = copy.deepcopy(t).to(dtype)
        assert {p.dtype for p in u.parameters()} == {dtype}
        y = u(data(case, dtype))
        assert y.dtype == dtype
        assert distance(y.float(), expected) < tolerance
    assert copy.deepcopy(t).half()(data(case, torch.float16)).dtype == torch.float16


@every_case()
def test_state_dict_round_trip(case: Case) -> None:
    x = data(case)
    t, u = randomize(build(case, adapters=2)), randomize(build(case, adapters=2), seed=8)
    assert not torch.equal(t(x), u(x))
    result = u.load_state_dict(t.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(u(x), t(x))


@every_case(lambda c: not registry.method(c.method_name).changes_base(config(c)))
def test_from_meta(case: Case) -> None:
    """Tensors made without memory and then loaded give the same model; none is left without memory."""
    x = data(case)
    t = randomize(build(case))
    saved = {k: v.clone() for k, v in collect(t, "a0").items()}
    from lawlib import Net

    u = Tuner(Net(case.make_module).eval(), config(case), "a0", low_cpu_mem_usage=True, fill=False).eval()
    assert all(v.is_meta for _, v in tensors(u, "a0"))
    report = put(u, "a0", saved)
    assert report.ok, report.text()
    assert not any(p.is_meta for p in u.parameters())
    assert torch.equal(u(x), t(x))


@every_case()
def test_loaded_before_the_base(case: Case) -> None:
    """An adapter loaded onto a base on the meta device acts once the base's weights have come."""
    from lawlib import Net

    x = data(case)
    t = randomize(build(case))
    saved = {k: v.clone() for k, v in collect(t, "a0").items()}
    base = Net(case.make_module).eval()
    with torch.device("meta"):
        empty = Net(case.make_module).eval()
    exempt(case, "loaded before the base")
    u = Tuner(empty, config(case), "a0", low_cpu_mem_usage=True, fill=False).eval()
    report = put(u, "a0", saved)
    assert report.ok, report.text()
    arrive(u.model, base)
    assert distance(u(x), t(x)) < 1e-6


def arrive(model: Any, weights: Any) -> None:
    """Give every module of a base, adapted or not, its weights."""
    for path, module in weights.named_modules():
        own = model.get_submodule(path)
        own = getattr(own, "base_layer", own)
        for name, p in module.named_parameters(recurse=False):
            setattr(own, name, torch.nn.Parameter(p.detach().clone(), requires_grad=False))


@every_case()
def test_delete_leaves_the_rest(case: Case) -> None:
    x = data(case)
    t = randomize(build(case, adapters=3))
    t.set_adapter("a1")
    y = t(x)
    t.delete_adapter("a0")
    t.delete_adapter("a2")
    assert torch.equal(t(x), y)
    assert not [n for n in t.state_dict() if ".a0" in n or ".a2" in n]
    assert list(t.peft_config) == ["a1"]
