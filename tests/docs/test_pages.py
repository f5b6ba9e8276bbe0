"""The methods' pages: as the generator writes them, each example runs, and the commands show them."""

from __future__ import annotations

import re
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from veneer import registry
from veneer.cli.app import app
from veneer.docs.__main__ import documents, measurements, stale
from veneer.docs.facts import facts, needs_others
from veneer.docs.overview import human, overview
from veneer.docs.pages import described, filename, page

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "methods"


def test_pages_are_up_to_date() -> None:
    wrong = stale(PAGES, documents(measurements(ROOT / "benchmarks" / "methods.json")))
    assert not wrong, f"run `make docs`: {wrong}"


def test_a_changed_absent_or_left_over_page_is_stale(tmp_path: Path) -> None:
    texts = {"a.md": "one", "b.md": "two", "c.md": "three"}
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "b.md").write_text("edited")
    (tmp_path / "gone.md").write_text(page(facts("IA3")))
    (tmp_path / "by_hand.md").write_text("mine")
    assert stale(tmp_path, texts) == ["b.md", "c.md", "gone.md"]


@pytest.mark.parametrize("name", registry.METHODS)
def test_the_pages_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (PAGES / filename(name)).read_text(encoding="utf-8")
    (program,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    (tmp_path / "example.py").write_text(program, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        left = runpy.run_path("example.py")
    saved = sorted((tmp_path / "adapter").rglob("*.safetensors"))
    assert saved
    assert all(t.isfinite().all() for f in saved for t in load_file(f).values() if t.is_floating_point())
    if "merged" in left:
        assert type(left["merged"]).__name__ == "LlamaForCausalLM"
        assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("name", registry.METHODS)
def test_the_page_names_the_tensors_and_fields(name: str) -> None:
    text = (PAGES / filename(name)).read_text(encoding="utf-8")
    f = facts(name)
    assert f.title
    assert f.summary
    assert f.tensors or needs_others(f.method)
    assert all(f"| `{t.key}` |" in text for t in f.tensors)
    assert all(f"| `{field.name}` |" in text for field in f.fields)


def test_facts_are_what_the_method_does() -> None:
    lora, tokens, prompt = facts("LORA"), facts("TRAINABLE_TOKENS"), facts("PROMPT_TUNING")
    assert {"Linear", "Conv2d", "Embedding"} <= set(lora.layers) == set(lora.merges)
    assert "LayerNorm" not in lora.layers
    assert (lora.mixed, lora.several, prompt.mixed) == (True, True, False)
    assert "Conv2d" not in tokens.layers
    assert [(t.key, t.shape) for t in lora.tensors] == [
        ("layer.lora_A.weight", (8, 128)),
        ("layer.lora_B.weight", (64, 8)),
    ]
    assert not facts("POLY").merges


def test_field_descriptions_come_from_the_class() -> None:
    doc = 'About it.\n\nr: rank. alpha, beta: scales, as\nin "r: 3". mode: one of "a: b" or r.'
    intro, said = described(doc, ["r", "alpha", "beta", "mode", "none"])
    assert intro == "About it."
    assert said == {
        "r": "rank.",
        "alpha": 'scales, as in "r: 3".',
        "beta": "see alpha",
        "mode": 'one of "a: b" or r.',
    }


def measured() -> dict[str, Any]:
    row = {"trained": 1234, "file_bytes": 2048, "time_to_frozen": 1.257, "time_ratio": 0.5, "loss_difference": 2e-7,
           "peak_mb": {"veneer": 321.4}, "rounds": 5, "quantised": True, "commit": "abc1234"}  # fmt: skip
    shape = {"num_hidden_layers": 8, "hidden_size": 576}
    case = {"batch": 4, "seq": 64, "threads": 1, "steps": 1, "shape": shape}
    return {
        "case": case,
        "machine": {"device": "a CPU", "threads": 2, "torch": "2"},
        "methods": {"IA3": row},
    }


def test_the_overview_shows_what_was_measured() -> None:
    some = [facts("IA3"), facts("VERA")]
    text = overview(some, measured())
    assert "| [IA3](ia3.md) | a trained factor for each feature | 1,234 | 2.0 KB | 1.26 | 0.50 | 321 MB | yes |" in text
    assert "5 rounds in which both took turns. Both are ratios of the processor's time." in text
    assert "| yes | yes | yes |" in text
    assert "at commits abc1234" in text
    assert "2e-07" in text
    assert "1,234" not in overview(some, None)
    assert "step time" not in overview(some, None).partition("## Fields")[0].partition("## Table")[2]


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 B"), (1536, "1.5 KB"), (200 * 1024, "200 KB"), (3 << 30, "3.0 GB")]
)
def test_human_sizes(size: int, text: str) -> None:
    assert human(size) == text


def test_veneer_methods_lists_and_shows() -> None:
    listed = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0, listed.output
    assert all(name.lower() in listed.output for name in registry.METHODS)
    shown = CliRunner().invoke(app, ["methods", "vera"])
    assert shown.exit_code == 0
    assert page(facts("VERA")).partition("\n\n")[2].strip() == shown.output.strip()
    wrong = CliRunner().invoke(app, ["methods", "vara"])
    assert wrong.exit_code == 2
    assert "did you mean VERA?" in re.sub(r"[\s│]+", " ", wrong.output + getattr(wrong, "stderr", ""))
