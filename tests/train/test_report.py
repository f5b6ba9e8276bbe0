"""The report, the model card and the numbers in them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from report_zoo import EVIL, Page, make_layers, make_result

from veneer.inspection import LayerDelta, delta_singular_values, effective_rank
from veneer.train.card import render_card, write_card
from veneer.train.charts import Series, line_chart, smooth, ticks
from veneer.train.report import (
    differences,
    format_metric,
    human_count,
    human_seconds,
    metric_rows,
    render_report,
    write_report,
)


@pytest.fixture
def page_text(tmp_path: Path) -> str:
    return render_report(make_result(tmp_path), make_layers())


def test_page_is_well_formed(page_text: str) -> None:
    page = Page(page_text)
    assert page.open == []
    assert page_text.count("<svg") == page_text.count("</svg>") >= 4
    for tag in ("h1", "table", "svg", "details"):
        assert tag in page.tags


def test_page_loads_nothing_from_outside(page_text: str) -> None:
    page = Page(page_text)
    loading = [item for item in page.attributes if item[1] in {"src", "href", "srcset", "data", "action"}]
    assert loading == []
    assert not {"link", "iframe", "img", "object", "base", "form"} & set(page.tags)
    assert "//" not in re.sub(r"/\*.*?\*/", "", page_text.replace(EVIL, ""), flags=re.S)
    assert "@import" not in page_text
    assert "url(" not in page_text
    policy = [value for tag, name, value in page.attributes if tag == "meta" and name == "content"]
    assert any(value.startswith("default-src 'none'") for value in policy)


def test_page_escapes_what_comes_from_data(page_text: str) -> None:
    assert EVIL not in page_text
    assert "<script>alert" not in page_text
    assert "<img" not in page_text
    shown = "".join(Page(page_text).text)
    assert shown.count(EVIL) >= 3  # the prompt, the settings, the machine
    assert Page(page_text).tags.count("script") == 1


def test_page_holds_the_numbers(page_text: str) -> None:
    shown = " ".join("".join(Page(page_text).text).split())
    for text in (
        "0.0 %",
        "90.0 %",
        "12.5 %",
        "97.5 %",
        "1 min 15 s",
        "460.8 k",
        "135.0 M",
        "0.34 %",
        "2,000",
    ):
        assert text in shown, text
    assert "All 6 layers" in shown
    assert "model.layers.2.mlp.up_proj" in shown
    marked = re.findall(r"<mark>(.*?)</mark>", page_text)
    assert "3" in marked  # the one wrong value of the tuned answer


def test_page_of_a_run_without_measurements(tmp_path: Path) -> None:
    bare = make_result(tmp_path, history=[], before={}, after={}, samples=[], train_seconds=0.0)
    page = Page(render_report(bare))
    assert page.open == []
    assert "svg" not in page.tags
    shown = "".join(page.text)
    assert "What the adapter changed" not in shown
    assert "Held-out examples" not in shown


def test_report_is_written_whole(tmp_path: Path) -> None:
    path = write_report(make_result(tmp_path), tmp_path / "deep" / "report.html", make_layers())
    assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]


def test_failed_report_leaves_no_file(tmp_path: Path) -> None:
    broken = make_result(tmp_path, samples=[None])
    with pytest.raises(AttributeError):
        write_report(broken, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_differences_keep_the_text_and_mark_what_is_new() -> None:
    parts = differences('{"a": 1, "b": 2}', '{"a": 1, "b": 3}')
    assert "".join(part.text for part in parts) == '{"a": 1, "b": 3}'
    assert [part.text for part in parts if part.changed] == ["3"]
    assert differences("same", "same")[0].changed is False
    assert differences("same", "") == []


def test_metric_rows_say_which_way_is_better() -> None:
    rows = {row.name: row for row in metric_rows({"f1": 0.2, "loss": 1.0, "n": 8}, {"f1": 0.5, "loss": 1.5, "n": 8})}
    assert set(rows) == {"f1", "loss"}
    assert (rows["f1"].before, rows["f1"].after, rows["f1"].change) == ("20.0 %", "50.0 %", "+30.0 points")
    assert rows["f1"].better is True
    assert rows["loss"].better is False
    assert rows["loss"].share is None
    same = metric_rows({"f1": 0.5}, {"f1": 0.5})[0]
    assert same.better is None


@pytest.mark.parametrize(
    ("value", "text"), [(9.04, "9.0 s"), (42.0, "42 s"), (75.4, "1 min 15 s"), (3725.0, "1 h 02 min")]
)
def test_human_seconds(value: float, text: str) -> None:
    assert human_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(12, "12"), (1804.4, "1,804"), (381_233, "381.2 k"), (134_515_008, "134.5 M"), (8e9, "8.0 G")],
)
def test_human_count(value: float, text: str) -> None:
    assert human_count(value) == text


def test_format_metric() -> None:
    assert format_metric("exact_match", 0.913) == "91.3 %"
    assert format_metric("eval_loss", 0.5) == "0.5"
    assert format_metric("n", 40) == "40"
    assert format_metric("bleu", 1.0000000000000002) == "100.0 %"  # as sums of logarithms end


def test_smoothing_follows_a_line_and_keeps_a_constant() -> None:
    assert smooth([3.0] * 9) == pytest.approx([3.0] * 9)
    line = [float(i) for i in range(101)]
    assert smooth(line)[50] == pytest.approx(50.0, abs=0.01)  # no lag in the middle
    assert smooth([]) == []


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    values = ticks(-3.2, 18.9)
    assert values == pytest.approx([0, 5, 10, 15])
    assert ticks(2.0, 2.0) == [2.0]


def test_chart_leaves_out_what_is_not_finite() -> None:
    chart = line_chart([Series("loss", "raw", [(1, 1.0), (2, math.nan), (3, 2.0)])], title="<b>")
    assert "nan" not in chart.lower()
    assert "<b>" not in chart
    assert not line_chart([Series("loss", "raw", [(1, math.inf)])], title="t")


def test_singular_values_and_norm_agree_with_the_dense_delta() -> None:
    torch.manual_seed(0)
    for out, r, inside in ((20, 4, 12), (3, 5, 7)):
        a, b = torch.randn(r, inside), torch.randn(out, r)
        dense = torch.linalg.svdvals(-0.5 * b.double() @ a.double())[: min(r, out, inside)]
        torch.testing.assert_close(delta_singular_values(a, b, -0.5), dense)


def test_effective_rank() -> None:
    assert effective_rank(torch.ones(5)) == pytest.approx(5.0)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(torch.zeros(3)) == 0.0
    assert 1.0 < effective_rank(torch.tensor([3.0, 1.0])) < 2.0


def test_layer_names_give_block_and_module() -> None:
    layer = make_layers()[2]
    assert (layer.block, layer.module) == (1, "self_attn.q_proj")
    assert layer.relative_norm == pytest.approx(layer.delta_norm / 10)
    plain = LayerDelta("classifier", (2, 4), 2, 1.0, 2.0, 1.0, (1.0,))
    assert (plain.block, plain.module) == (None, "classifier")


def test_card_header_and_table(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    text = write_card(make_result(tmp_path), tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    head, body = text.split("---\n")[1], text.split("---\n", 2)[2]
    assert yaml.safe_load(head) == {
        "base_model": "smollm2-135m-instruct",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["veneer", "peft", "lora"],
    }
    assert "| exact match | 0.0 % | 90.0 % |" in body
    assert "veneer chat ." in body
    assert str(tmp_path) not in body  # the folder travels
    assert "## Licence" not in body
    assert "<script>" not in body


def test_card_leaves_an_unknown_licence_to_the_user(tmp_path: Path) -> None:
    result = make_result(tmp_path)
    result.recipe.base.name = "owner/model"
    text = render_card(result)
    assert "license" not in yaml.safe_load(text.split("---\n")[1])
    assert "## Licence" in text
