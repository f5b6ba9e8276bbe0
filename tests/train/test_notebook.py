"""What a notebook's cell shows of a recipe and of a run's result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import yaml
from report_zoo import make_result

from veneer.train import Recipe


def test_a_result_is_a_few_lines_and_tables(tmp_path: Path) -> None:
    result = make_result(tmp_path)
    text = repr(result)
    assert len(text.splitlines()) < 12
    assert result.adapter_dir in text
    html = result._repr_html_()
    assert html.count("<table>") == 2
    assert all(word in html for word in ("expected", "change", result.out))
    sample = replace(result.samples[0], prompt="<b>&", tuned="x" * 5000)
    result.samples[0] = sample
    html = result._repr_html_()
    assert "&lt;b&gt;&amp;" in html
    assert "x" * 400 not in html
    result.samples, result.before, result.after = [], {}, {}
    assert "<table>" not in result._repr_html_()


def test_a_recipe_is_its_yaml(causal: Callable[..., Recipe]) -> None:
    recipe = causal()
    html = recipe._repr_html_()
    assert yaml.safe_load(html.removeprefix("<pre>").removesuffix("</pre>"))["task"] == "causal-lm"
