"""What has no merged weight says so, and leaves the base as it was."""

from __future__ import annotations

import pytest
import torch
from law_cases import CASES
from lawlib import base_state, build, data, randomize, same
from torch import nn

from veneer import CannotMerge
from veneer.methods.lora import LoraConfig
from veneer.site import spread
from veneer.tuner import Tuner

GROUPED = next(c for c in CASES if c.method_name == "LORA" and c.site_name == "Conv2d-groups")


def test_lora_on_a_grouped_convolution_does_not_merge() -> None:
    t = randomize(build(GROUPED))
    x = data(GROUPED)
    y, before = t(x), base_state(t)
    with pytest.raises(CannotMerge, match="4 groups"):
        t.merge_adapter()
    assert same(base_state(t), before)
    assert torch.equal(t(x), y)


def test_dora_on_a_grouped_convolution_is_that_of_the_one_without_groups() -> None:
    """Its V has no zeros between groups, so the same adapter on the ungrouped layer gives the same output."""
    grouped = nn.Conv2d(12, 8, 3, groups=4)
    whole = nn.Conv2d(12, 8, 3)
    with torch.no_grad():
        whole.weight.copy_(spread(grouped.weight, 4))
        whole.bias.copy_(grouped.bias)
    cfg = LoraConfig(target_modules=["0"], r=4, use_dora=True, init_lora_weights=False)
    one, other = (Tuner(nn.Sequential(m), cfg) for m in (grouped, whole))
    mine, theirs = (t.get_submodule("model.0").view("default") for t in (one, other))
    with torch.no_grad():
        mine.lora_magnitude_vector.mul_(torch.rand(8)[None, :, None, None] + 0.5)
        theirs.lora_A.copy_(mine.lora_A)
        theirs.lora_B.copy_(spread(mine.lora_B, 4))
        theirs.lora_magnitude_vector.copy_(mine.lora_magnitude_vector)
    x = torch.randn(2, 12, 5, 5)
    torch.testing.assert_close(one(x), other(x))
    with pytest.raises(CannotMerge, match="4 groups"):
        one.merge_adapter()


def test_nothing_is_merged_where_one_layer_refuses() -> None:
    """A model whose last layer cannot merge keeps its first one unmerged, too."""
    net = nn.Sequential(nn.Conv2d(12, 12, 1), nn.Conv2d(12, 8, 3, groups=4))
    t = Tuner(net, LoraConfig(target_modules=["0", "1"], r=4, init_lora_weights=False))
    before = {n: p.clone() for n, p in t.named_parameters()}
    with pytest.raises(CannotMerge):
        t.merge_adapter()
    assert same(dict(t.named_parameters()), before)
    assert not any(layer.merged_adapters for _, layer in t.adapted_layers())
