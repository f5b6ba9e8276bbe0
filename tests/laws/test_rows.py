"""A batch whose rows use different adapters equals each row computed alone."""

from __future__ import annotations

import pytest
import torch
from law_cases import Case
from lawlib import build, config, data, distance, every_case, exempt, randomize, rows

from veneer.context import BASE


def _alone(t: torch.nn.Module, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Each row by a call of its own."""
    out = []
    for i, name in enumerate(names):
        if name == BASE:
            with t.disabled():
                out.append(t(x[i : i + 1]))
        else:
            t.set_adapter(name)
            out.append(t(x[i : i + 1]))
    return torch.cat(out)


@every_case()
def test_mixed_batch_is_each_row_alone(case: Case) -> None:
    exempt(case, "mixed batch")
    t = randomize(build(case, adapters=3))
    for _, layer in t.adapted_layers():
        layer.set_scale("a1", 0.5)
    names = ["a2", BASE, "a0", "a0", "a1", BASE, "a2"]
    x = torch.cat([data(case)] * 3)[: len(names)]
    assert len(x) == len(names) or case.site_name == "Conv3d"
    names = names[: len(x)]
    expected = _alone(t, x, names)
    with rows(t, names):
        y = t(x)
    assert distance(y, expected) < 1e-5
    for part in (["a1"] * len(x), [BASE] * len(x)):
        expected = _alone(t, x, part)
        with rows(t, part):
            assert distance(t(x), expected) < 1e-5


@every_case(lambda c: "r" in c.cfg_kwargs and c.cfg_kwargs["r"] and not c.variant)
def test_mixed_batch_with_different_ranks(case: Case) -> None:
    exempt(case, "mixed batch")
    exempt(case, "different ranks")
    t = build(case)
    t.add_adapter("b", config(case, r=8))
    t.add_adapter("c", config(case, r=8, target_modules=["second"]))
    randomize(t)
    names = ["b", "a0", "c", BASE, "b"]
    x = torch.cat([data(case)] * 3)[:5]
    expected = _alone(t, x, names)
    with rows(t, names):
        assert distance(t(x), expected) < 1e-5


@every_case()
def test_mixed_batch_gradients(case: Case) -> None:
    """A mixed batch trains each row's own adapter as that row alone would."""
    exempt(case, "mixed batch")
    t = randomize(build(case, adapters=2))
    x = data(case)[:2]
    names = ["a1", "a0"]
    t.set_adapter(["a0", "a1"])
    with rows(t, names):
        t(x).square().sum().backward()
    mixed = {n: p.grad.clone() for n, p in t.named_parameters() if p.grad is not None}
    t.zero_grad()
    for i, name in enumerate(names):
        t.set_adapter(name)
        t(x[i : i + 1]).square().sum().backward()
    alone = {n: p.grad.clone() for n, p in t.named_parameters() if p.grad is not None}
    assert mixed.keys() == alone.keys()
    for n in alone:
        assert distance(mixed[n], alone[n]) < 1e-4, n


@every_case(lambda c: c.site_name in ("Linear", "Embedding") and not c.variant)
def test_wrong_number_of_names(case: Case) -> None:
    exempt(case, "mixed batch")
    t = build(case)
    with rows(t, ["a0"] * 7), pytest.raises(ValueError, match="one name a row"):
        t(data(case))


@every_case(lambda c: c.site_name == "Linear" and not c.variant)
def test_not_while_merged(case: Case) -> None:
    exempt(case, "forward == merged")
    t = build(case)
    t.merge_adapter()
    with rows(t, ["a0"] * 3), pytest.raises(ValueError, match="unmerge_adapter"):
        t(data(case))
