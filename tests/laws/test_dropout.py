"""Dropout acts in training, on the adapter's path alone."""

from __future__ import annotations

import torch
from law_cases import Case
from lawlib import build, data, distance, every_case, exempt, randomize

from veneer import registry


def dropout_of(case: Case) -> str | None:
    return registry.method(case.method_name).dropout


@every_case(lambda c: dropout_of(c) is not None and c.kind != "embedding" and not c.variant)
def test_dropout(case: Case) -> None:
    x = data(case)
    name = dropout_of(case)
    assert name is not None
    t, plain = randomize(build(case, **{name: 0.5})), randomize(build(case))
    y = plain(x)
    assert torch.equal(t(x), y), "dropout acted outside training"
    t.train()
    torch.manual_seed(0)
    outputs = torch.stack([t(x) for _ in range(3)])
    assert not torch.equal(outputs[0], outputs[1])
    with t.disabled():
        off = t(x)
    with plain.disabled():
        assert torch.equal(off, plain(x)), "dropout reached the base's input"
    many = torch.stack([t(x) for _ in range(400)]).mean(0)
    assert distance(many - off, y - off) < 0.35, "dropout is not unbiased"


@every_case(lambda c: dropout_of(c) is not None and c.kind != "embedding" and not c.variant)
def test_merging_in_training_mode_takes_the_whole_change(case: Case) -> None:
    name = dropout_of(case)
    assert name is not None
    exempt(case, "forward == merged")
    x = data(case)
    t = randomize(build(case, **{name: 0.5}))
    y = t(x)
    t.train()
    t.merge_adapter()
    assert distance(t(x), y) < 2e-5
