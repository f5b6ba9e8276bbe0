"""What has no merged weight says so, and leaves the base as it was."""

from __future__ import annotations

import pytest
import torch
from law_cases import CASES
from lawlib import base_state, build, config, data, randomize, same

from veneer import CannotMerge

GROUPED = next(c for c in CASES if c.method_name == "LORA" and c.site_name == "Conv2d-groups")


def test_lora_on_a_grouped_convolution_does_not_merge() -> None:
    t = randomize(build(GROUPED))
    x = data(GROUPED)
    y, before = t(x), base_state(t)
    with pytest.raises(CannotMerge, match="4 groups"):
        t.merge_adapter()
    assert same(base_state(t), before)
    assert torch.equal(t(x), y)


def test_dora_on_a_grouped_convolution_is_refused() -> None:
    t = build(GROUPED)
    with pytest.raises(ValueError, match="use_dora=True on first"):
        t.add_adapter("b", config(GROUPED, use_dora=True))
    assert list(t.peft_config) == ["a0"]


def test_nothing_is_merged_where_one_layer_refuses() -> None:
    """A model whose last layer cannot merge keeps its first one unmerged, too."""
    from torch import nn

    from veneer.methods.lora import LoraConfig
    from veneer.tuner import Tuner

    net = nn.Sequential(nn.Conv2d(12, 12, 1), nn.Conv2d(12, 8, 3, groups=4))
    t = Tuner(net, LoraConfig(target_modules=["0", "1"], r=4, init_lora_weights=False))
    before = {n: p.clone() for n, p in t.named_parameters()}
    with pytest.raises(CannotMerge):
        t.merge_adapter()
    assert same(dict(t.named_parameters()), before)
    assert not any(layer.merged_adapters for _, layer in t.adapted_layers())
