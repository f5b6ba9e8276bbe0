"""Hot swap: another adapter's tensors in the place of a loaded one's, for every method."""

from __future__ import annotations

import torch
from law_cases import CASES, Case
from lawlib import build, config, data, distance, every_case, randomize

from veneer import registry
from veneer.hotswap import hotswap_adapter_from_state_dict
from veneer.state import collect

SWAPPED = [
    c for c in CASES if c.site_name == "Linear" or (c.site_name, c.variant) in (("Conv2d", ""), ("Embedding", ""))
]


@every_case(lambda c: c in SWAPPED and not registry.method(c.method_name).changes_base(config(c)))
def test_hot_swap_of_every_method(case: Case) -> None:
    """The model computes what a model with the new adapter does; tensors stay the same objects."""
    x = data(case)
    old, new = randomize(build(case)), randomize(build(case), seed=11)
    expected = new(x)
    assert distance(old(x), expected) > 1e-4
    held = {n: (p, p.data_ptr()) for n, p in old.named_parameters()}
    old.model.__dict__["_veneer_tuner"] = (old,)
    tensors = {k: v.clone() for k, v in collect(new, "a0", "").items()}
    hotswap_adapter_from_state_dict(old, tensors, "a0", config(case))
    assert torch.equal(old(x), expected)
    assert {n: (p, p.data_ptr()) for n, p in old.named_parameters()} == held
