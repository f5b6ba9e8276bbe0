"""`veneer train` runs a method's schedule without being told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.train import Recipe, run


def test_adalora_settles_its_ranks(causal: Callable[..., Recipe]) -> None:
    """A recipe with AdaLoRA ends with the ranks that it asks for, and no state of the schedule beyond its folder."""
    adapter: dict[str, Any] = {
        "method": "adalora", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 8,
        "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    train = {"max_steps": 8, "use_cpu": True, "learning_rate": 0.05, "gradient_accumulation_steps": 2}
    out = run(causal(adapter=adapter, train=train, data__test=None)).out
    pattern = json.loads((Path(out) / "adapter" / "adapter_config.json").read_text())["rank_pattern"]
    assert pattern
    assert sum(sum(mask) for mask in pattern.values()) == 2 * len(pattern)
