"""Quantised layers under every method: the laws, over the registry and over the libraries."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from law_cases import CASES, Case
from lawlib import config, randomize, rows
from quant_zoo import KINDS, NO_MERGE, Net, needs, same, stored

from veneer import AdapterError, CannotMerge, PeftWarning, registry
from veneer.tuner import Tuner

METHODS = [c for c in CASES if c.site_name == "Linear" and not c.variant]
VARIANTS = [c for c in CASES if c.site_name == "Linear" and c.variant]
EVERY_KIND = ("LORA", "DORA", "LOHA", "OFT")

# Why a method does not run on a quantised layer, as its own error says.
REFUSED = {
    "pissa": "quantised",
    "pissa-fast": "quantised",
    "olora": "quantised",
    "KASA": "quantised",
}


def build(kind: str, case: Case, adapters: int = 1) -> Tuner:
    torch.manual_seed(1)
    net = Net(kind, 24, 16).eval()
    t = Tuner(net, config(case), "a0")
    for i in range(1, adapters):
        t.add_adapter(f"a{i}", config(case))
    return t.eval()


def data() -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randn(3, 5, 24)


def merge(t: Tuner, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        t.merge_adapter(**options)


def pairs() -> Any:
    """Every method on a 4-bit layer, one method of each kind on every library's; the rest in the slow run."""
    fast = [("nf4", c) for c in METHODS]
    fast += [(k, c) for c in METHODS if c.method_name in EVERY_KIND for k in KINDS if k != "nf4"]
    slow = [(k, c) for c in METHODS for k in ("int8", "hqq4", "torchao-int8") if (k, c) not in fast]
    slow += [("nf4", c) for c in VARIANTS]
    marked = [*fast, *(pytest.param(k, c, marks=pytest.mark.slow) for k, c in slow)]
    return pytest.mark.parametrize(("kind", "case"), marked, ids=[f"{k}-{c.id}" for k, c in [*fast, *slow]])


@pairs()
def test_a_method_runs_on_a_quantised_layer_or_refuses(kind: str, case: Case) -> None:
    needs(KINDS[kind][0])
    x, plain = data(), Net(kind, 24, 16).eval()
    y = plain(x)
    reason = REFUSED.get(case.variant, REFUSED.get(case.method_name))
    if reason is not None:
        with pytest.raises((AdapterError, ValueError), match=reason):
            build(kind, case)
        return
    method = registry.method(case.method_name)
    t = build(kind, case)
    if "identity at init" not in method.exempt:
        torch.testing.assert_close(t(x), y, atol=2e-5, rtol=2e-5)
    with t.disabled():
        torch.testing.assert_close(t(x), y)
    randomize(t)
    seen = x.clone().requires_grad_()
    out = t(seen)
    assert not torch.allclose(out, y, atol=1e-4)
    t.require_grad("a0", True)
    t(seen).square().sum().backward()
    trained = [p for p in t.parameters() if p.requires_grad]
    assert trained
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert seen.grad is not None
    assert seen.grad.isfinite().all()
    if not method.mergeable:
        return
    if kind in NO_MERGE:
        with pytest.raises(CannotMerge, match="cannot be packed anew"):
            merge(t)
        torch.testing.assert_close(t(x), out)
        return
    before = {n: stored(getattr(plain, n)) for n in ("first", "second")}
    merge(t)
    errors = t.merge_errors()
    assert sorted(errors) == ["first", "second"]
    bound = KINDS[kind][2]
    assert all(e.weight < bound for e in errors.values()), errors
    with torch.no_grad():
        merged = t(x)
    assert (merged - out).norm() < 2 * bound * out.norm()
    t.unmerge_adapter()
    torch.testing.assert_close(t(x), out)
    assert t.merge_errors() == {}
    for n in before:
        assert same(stored(t.model.get_submodule(n).base_layer), before[n])


MIXED = [c for c in METHODS if c.method_name not in REFUSED]


@pytest.mark.parametrize("case", MIXED, ids=[c.id for c in MIXED])
def test_rows_of_a_mixed_batch_are_as_alone(case: Case) -> None:
    needs("bitsandbytes")
    t = randomize(build("nf4", case, adapters=2))
    x = data()
    names = ["a1", "__base__", "a0"]
    with rows(t, names):
        got = t(x)
    for i, name in enumerate(names):
        if name == "__base__":
            with t.disabled():
                alone = t(x[i : i + 1])
        else:
            t.set_adapter(name)
            alone = t(x[i : i + 1])
        torch.testing.assert_close(got[i : i + 1], alone, atol=2e-4, rtol=2e-4)
