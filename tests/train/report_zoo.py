"""A made-up run with text that no page may take for its own, and a reader that checks a page's tags."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from veneer.inspection import LayerDelta, effective_rank
from veneer.train.recipe import Recipe
from veneer.train.result import RunResult, Sample

EVIL = '<script>alert("x")</script> & <img src=x onerror=y>'
VOID = {"meta", "wbr", "br", "img", "input", "hr", "link", "circle", "line", "path", "rect"}


class Page(HTMLParser):
    """Checks that tags nest, and keeps the attributes and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in {"script", "style"}:
            self.text.append(data)


def make_layers() -> list[LayerDelta]:
    generator = torch.Generator().manual_seed(0)
    layers = []
    for block in range(3):
        for name in ("self_attn.q_proj", "mlp.up_proj"):
            values = torch.rand(4, generator=generator, dtype=torch.float64).sort(descending=True).values
            layers.append(
                LayerDelta(
                    name=f"model.layers.{block}.{name}",
                    shape=(16, 32),
                    r=4,
                    delta_norm=float(values.norm()),
                    base_norm=10.0,
                    effective_rank=effective_rank(values),
                    singular_values=tuple(values.tolist()),
                )
            )
    return layers


def make_result(tmp_path: Path, **changes: Any) -> RunResult:
    recipe = Recipe.model_validate(
        {
            "task": "causal-lm",
            "base": "smollm2-135m-instruct",
            "data": EVIL,
            "adapter": {"method": "lora", "r": 4},
            "train": {"learning_rate": 1e-3},
            "out": str(tmp_path),
        }
    )
    history = [
        {
            "step": step,
            "loss": 2.0 / step,
            "learning_rate": 1e-3 * (1 - step / 21),
            "tokens_per_second": 1000.0 + step,
            "peak_memory_mb": 900.0,
        }
        for step in range(1, 21)
    ]
    values: dict[str, Any] = {
        "out": str(tmp_path),
        "task": "causal-lm",
        "recipe": recipe,
        "history": history,
        "before": {"exact_match": 0.0, "field_accuracy": 0.125, "loss": 2.5, "examples": 40},
        "after": {"exact_match": 0.9, "field_accuracy": 0.975, "loss": 0.2, "examples": 40},
        "samples": [
            Sample(EVIL, '{"item": "tea", "count": 2}', EVIL, '{"item": "tea", "count": 3}', False, False),
            Sample("two teas", '{"item": "tea"}', "no", '{"item": "tea"}', False, True),
        ],
        "train_seconds": 75.4,
        "train_tokens": 150_800,
        "trainable_params": 460_800,
        "total_params": 134_975_808,
        "adapter_dir": str(tmp_path / "adapter"),
        "merged_dir": None,
        "machine": {"cpu": "2 cores", "note": EVIL},
    }
    return RunResult(**{**values, **changes})
