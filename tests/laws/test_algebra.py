"""Identity at init, forward == merged, unmerge exact, disabled == base."""

from __future__ import annotations

import pytest
import torch
from law_cases import CASES, Case
from lawlib import base_state, build, data, distance, every_case, exempt, randomize, same

from veneer import registry

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@every_case()
def test_identity_at_init(case: Case) -> None:
    exempt(case, "identity at init")
    x = data(case)
    assert distance(build(case)(x), _original(case)(x)) < 1e-5


def _original(case: Case) -> torch.nn.Module:
    from lawlib import Net

    return Net(case.make_module).eval()


@every_case()
@pytest.mark.parametrize("adapters", [1, 2])
def test_forward_is_merged(case: Case, adapters: int) -> None:
    exempt(case, "forward == merged")
    if adapters > 1:
        exempt(case, "several active")
    x = data(case)
    t = randomize(build(case, adapters=adapters))
    t.set_adapter([f"a{i}" for i in range(adapters)])
    before = t(x)
    t.merge_adapter()
    assert distance(t(x), before) < 2e-5
    with t.disabled():
        off = t(x)
    assert distance(off, before) > 1e-3, "the adapters do nothing: this proves nothing"
    t.merge_adapter(["a0"])
    t.merge_adapter()  # one after the other is the same as all at once
    assert distance(t(x), before) < 2e-5
    assert distance(t.merge_and_unload()(x), before) < 2e-5


MIXES = sorted({c.site_name for c in CASES if c.kind != "module"})  # on a norm one method acts


@pytest.mark.parametrize("site_name", MIXES)
def test_forward_is_merged_with_mixed_methods(site_name: str) -> None:
    """Every ordered pair of methods on one layer; each pair is one model."""
    firsts = {c.method_name: c for c in CASES if c.site_name == site_name and not c.variant}
    pairs = [(a, b) for a in firsts.values() for b in firsts.values() if a.method_name != b.method_name]
    assert pairs
    from lawlib import config

    for a, b in pairs:
        if type(registry.method(a.method_name)).exclusive != type(registry.method(b.method_name)).exclusive:
            continue  # one changes the base that the other is made for; adding it is an error
        if any(k in getattr(type(registry.method(c.method_name)), "exempt", {}) for c in (a, b) for k in _WHY):
            continue
        x = data(a)
        t = build(a, mixes=True)
        t.add_adapter("b", config(b))
        randomize(t)
        t.set_adapter(["a0", "b"])
        before = t(x)
        t.merge_adapter()
        assert distance(t(x), before) < 5e-5, f"{a.id} then {b.id}"
        t.unmerge_adapter()
        assert torch.equal(t(x), before)


_WHY = ("forward == merged", "forward == merged with groups", "several active")


@every_case()
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unmerge_is_exact(case: Case, dtype: torch.dtype) -> None:
    exempt(case, "forward == merged")
    t = randomize(build(case, dtype, adapters=2))
    t.set_adapter("a0")
    before = base_state(t)
    t.merge_adapter()
    assert not same(base_state(t), before)
    t.set_adapter("a1")
    t.merge_adapter(["a1"])
    t.unmerge_adapter()
    assert same(base_state(t), before)


@every_case(lambda c: c.kind != "conv")
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_forward_is_merged_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    exempt(case, "forward == merged")
    x = data(case, dtype)
    t = randomize(build(case, dtype))
    before = t(x)
    assert before.dtype == dtype
    t.merge_adapter()
    assert distance(t(x).float(), before.float()) < (0.04 if dtype == torch.bfloat16 else 0.006)


@every_case()
def test_disabled_is_base(case: Case) -> None:
    x = data(case)
    t = randomize(build(case, adapters=2))
    t.set_adapter("a0")
    on = t(x)
    with t.disabled():
        off = t(x)
    assert not torch.equal(on, off)
    assert torch.equal(t(x), on)
    changes = registry.method(case.method_name).changes_base(config_of(t))
    if not changes:
        assert torch.equal(off, _original(case)(x))
    plain = t.unload()
    assert not any("lora" in n or "a0" in n for n, _ in plain.named_modules())
    assert torch.equal(plain(x), off)


def config_of(t: object) -> object:
    return t.peft_config["a0"]  # type: ignore[attr-defined]


@every_case()
def test_disabling_a_merged_model_restores_the_base(case: Case) -> None:
    exempt(case, "forward == merged")
    x = data(case)
    t = randomize(build(case))
    with t.disabled():
        off = t(x)
    t.merge_adapter()
    with t.disabled():
        assert torch.equal(t(x), off)
