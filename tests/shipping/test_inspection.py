"""inspect and diff: numbers against full SVDs of the merged weight, pages, tables, exported matrices."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from veneer import LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, VeraConfig
from veneer.cli.app import app
from veneer.errors import AdapterError
from veneer.export.matrices import export_matrices, matrix_tensors
from veneer.inspection import compare_adapters, inspect_adapter, inspect_tensors, to_frame
from veneer.inspection.frames import write_frame
from veneer.inspection.grid import grid_of
from veneer.opened import open_adapter
from veneer.train.errors import BaseModelError

LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
METHODS = {
    "lora": lambda: LoraConfig(**LORA),
    "rslora": lambda: LoraConfig(**LORA, use_rslora=True, rank_pattern={"v_proj": 2}),
    "dora": lambda: LoraConfig(**LORA, use_dora=True),
    "vera": lambda: VeraConfig(target_modules=["q_proj", "o_proj"], r=5, task_type="CAUSAL_LM"),
    "loha": lambda: LoHaConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM"),
}


def full_deltas(base: Path, folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> (W, W' - W), from the merged model alone."""
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    after = model.merge_and_unload().state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    return {k.removesuffix(".weight"): (before[k].double(), (after[k] - before[k]).double()) for k in changed}


@pytest.mark.parametrize("name", METHODS)
def test_numbers_are_those_of_the_merged_weight(name: str, make_adapter: Any, llama: Path) -> None:
    folder = make_adapter(METHODS[name]())
    layers = inspect_adapter(open_adapter(str(folder)).model)
    deltas = full_deltas(llama, folder)
    assert {x.name for x in layers} == set(deltas)
    for x in layers:
        W, D = deltas[x.name]
        S = torch.linalg.svdvals(D)
        assert x.delta_norm == pytest.approx(float(D.norm()), rel=1e-4)
        assert x.relative_norm == pytest.approx(float(D.norm() / W.norm()), rel=1e-4)
        k = x.rank_for(0.3)
        assert x.error_at(k) <= 0.3
        assert float(S[k:].norm() / S.norm()) == pytest.approx(x.error_at(k), abs=1e-4)
        assert k == 0 or float(S[k - 1 :].norm() / S.norm()) > 0.3 - 1e-4
        assert not x.learned_nothing


def test_without_the_base_lora_is_read_from_its_file(make_adapter: Any, llama: Path) -> None:
    config = LoraConfig(
        target_modules=["q_proj", "embed_tokens"], r=4, use_rslora=True, rank_pattern={"layers.1.self_attn.q_proj": 2},
        task_type="CAUSAL_LM",
    )  # fmt: skip
    folder = make_adapter(config)
    known = inspect_adapter(open_adapter(str(folder)).model)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"base_model_name_or_path": str(llama.parent / "gone")}))
    opened = open_adapter(str(folder))
    assert not opened.has_base
    assert "gone" in opened.note
    alone = inspect_adapter(opened.model)
    assert [x.name for x in alone] == [x.name for x in known]
    for x, y in zip(alone, known, strict=True):
        assert x.singular_values == pytest.approx(y.singular_values)
        assert (x.shape, x.r, x.a_norm, x.b_norm) == (y.shape, y.r, y.a_norm, y.b_norm)
        assert math.isnan(x.relative_norm)
    with pytest.raises(BaseModelError):
        open_adapter(str(folder), base=str(llama.parent / "gone"))


def test_other_methods_ask_for_the_base(make_adapter: Any, llama: Path) -> None:
    folder = make_adapter(METHODS["vera"]())
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace(str(llama), str(llama) + "-gone"))
    with pytest.raises(AdapterError, match=r"vera adapter can only be read on its base.*--base"):
        open_adapter(str(folder))


def test_layers_that_learned_nothing(make_adapter: Any) -> None:
    folder = make_adapter(METHODS["lora"]())
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    dead = next(k for k in tensors if "lora_B" in k and ".1." in k and "v_proj" in k)
    save_file({k: torch.zeros_like(t) if k == dead else t for k, t in tensors.items()}, path)
    layers = inspect_adapter(open_adapter(str(folder)).model)
    idle = [x.name for x in layers if x.learned_nothing]
    assert idle == ["model.layers.1.self_attn.v_proj"]
    assert next(x for x in layers if x.name in idle).rank_for(0.1) == 0
    done = CliRunner().invoke(app, ["inspect", str(folder)])
    assert done.exit_code == 0, done.output
    assert "1 layers learned nothing" in done.output
    assert [t.name for t in inspect_tensors(load_file(path)) if t.zero] == [dead]


class Page(HTMLParser):
    """Counts elements and notes what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loads += [str(v) for k, v in attrs if k in ("src", "href") and v]


def read_page(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    return text, page


def test_inspect_writes_page_table_and_matrices(make_adapter: Any, tmp_path: Path) -> None:
    folder = make_adapter(METHODS["rslora"]())
    words = ["--html", tmp_path / "a.html", "--table", tmp_path / "a.csv", "--export", tmp_path / "a.npz"]
    done = CliRunner().invoke(app, ["inspect", str(folder), *map(str, words)])
    assert done.exit_code == 0, done.output
    assert "self_attn.v_proj" in done.output
    text, page = read_page(tmp_path / "a.html")
    assert page.loads == []
    assert page.counts["svg"] >= 2 + 4  # two charts, a spark line a layer
    assert text.count('class="heat') == 5
    assert re.search(r'id="idle-count">0<', text)
    table = pd.read_csv(tmp_path / "a.csv")
    layers = inspect_adapter(open_adapter(str(folder)).model)
    assert table["relative_norm"].tolist() == pytest.approx([x.relative_norm for x in layers])
    with np.load(tmp_path / "a.npz") as held:
        name = layers[0].name
        product = held[f"{name}.B"] @ held[f"{name}.A"] * held[f"{name}.scaling"]
        assert np.allclose(product, held[f"{name}.delta"], atol=1e-6)
        assert np.linalg.norm(held[f"{name}.delta"]) == pytest.approx(layers[0].delta_norm, rel=1e-5)


def test_markup_in_names_stays_text(make_adapter: Any, tmp_path: Path) -> None:
    folder = make_adapter(METHODS["lora"](), name="<script>alert(1)<script>")
    done = CliRunner().invoke(app, ["inspect", str(folder), "--html", str(tmp_path / "a.html")])
    assert done.exit_code == 0, done.output
    assert "<script>alert" not in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_a_prompt_method_is_shown_by_its_tensors(make_adapter: Any, tmp_path: Path) -> None:
    folder = make_adapter(PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    done = CliRunner().invoke(app, ["inspect", str(folder), "--html", str(tmp_path / "a.html")])
    assert done.exit_code == 0, done.output
    assert "prompt_embeddings" in done.output
    assert "3 × 32" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_matrices_as_safetensors_of_a_method_without_factors(make_adapter: Any, llama: Path, tmp_path: Path) -> None:
    folder = make_adapter(METHODS["loha"]())
    model = open_adapter(str(folder)).model
    held = load_file(export_matrices(model, tmp_path / "m.safetensors"))
    deltas = full_deltas(llama, folder)
    assert set(held) == {f"{name}.delta" for name in deltas}
    for name, (_, D) in deltas.items():
        assert torch.allclose(held[f"{name}.delta"].double(), D, atol=1e-6)
    assert matrix_tensors(model, parts=["A"]) == {}
    with pytest.raises(AdapterError, match=r"\.npz or \.safetensors"):
        export_matrices(model, tmp_path / "m.txt")
    with pytest.raises(AdapterError, match="unknown part 'C'"):
        matrix_tensors(model, parts=["C"])


def test_tables_of_any_rows(make_adapter: Any, tmp_path: Path) -> None:
    layers = inspect_adapter(open_adapter(str(make_adapter(METHODS["lora"]()))).model)
    frame = to_frame(layers)
    assert frame["module"].tolist() == [x.module for x in layers]
    assert json.loads(write_frame(layers, tmp_path / "t.json").read_text())[0]["name"] == layers[0].name
    with pytest.raises(AdapterError, match=r"\.csv"):
        write_frame(layers, tmp_path / "t.xlsx")


def test_figures(make_adapter: Any, tmp_path: Path) -> None:
    from veneer.inspection.figures import heat_map, spectra

    layers = inspect_adapter(open_adapter(str(make_adapter(METHODS["lora"]()))).model)
    figure = heat_map(layers)
    grid = grid_of(layers, "relative_norm")
    shown = figure.axes[0].images[0].get_array()
    assert grid is not None
    assert shown.shape == (2, 2)
    assert float(shown[0, 1]) == pytest.approx(grid.cells[1][0].value)  # type: ignore[union-attr]
    spectra(layers).savefig(tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 1000
    with pytest.raises(AdapterError, match="no heat map"):
        heat_map([x for x in layers if x.block is None])


# -- diff ----------------------------------------------------------------------------------------------------------
def dense(D: torch.Tensor, E: torch.Tensor) -> tuple[float, float]:
    """Cosine and output overlap by full SVDs."""
    U1, S1, _ = torch.linalg.svd(D)
    U2, S2, _ = torch.linalg.svd(E)
    k1, k2 = int((S1 / S1[0] > 1e-5).sum()), int((S2 / S2[0] > 1e-5).sum())
    overlap = float((U1[:, :k1].mT @ U2[:, :k2]).square().sum()) / min(k1, k2)
    return float((D * E).sum() / D.norm() / E.norm()), overlap


@pytest.mark.parametrize("names", [("lora", "rslora"), ("lora", "dora"), ("loha", "lora")])
def test_diff_equals_the_dense_computation(names: tuple[str, str], make_adapter: Any, llama: Path) -> None:
    a, b = (make_adapter(METHODS[n](), name=f"{i}", seed=i) for i, n in enumerate(names))
    found = compare_adapters(open_adapter(str(a)).model, open_adapter(str(b)).model)
    D, E = full_deltas(llama, a), full_deltas(llama, b)
    assert [d.name for d in found.layers] == [n for n in (x.name for x in found.layers) if n in D]
    assert len(found.layers) == 4
    for d in found.layers:
        cosine, overlap = dense(D[d.name][1], E[d.name][1])
        assert d.cosine == pytest.approx(cosine, abs=1e-4)
        if "dora" not in names:  # a full-rank change: the float32 merge blurs where its spectrum ends
            assert d.overlap_out == pytest.approx(overlap, abs=1e-3)
        gap = float((D[d.name][1] - E[d.name][1]).norm() / max(D[d.name][1].norm(), E[d.name][1].norm()))
        assert d.distance == pytest.approx(gap, abs=1e-4)


def test_an_adapter_equals_itself_and_opposes_its_negation(make_adapter: Any) -> None:
    folder = make_adapter(METHODS["lora"]())
    same = compare_adapters(open_adapter(str(folder)).model, open_adapter(str(folder)).model)
    assert same.cosine == pytest.approx(1.0)
    assert all(d.overlap_in == pytest.approx(1.0) and d.distance < 1e-6 for d in same.layers)
    path = folder / "adapter_model.safetensors"
    other = folder.with_name("negated")
    other.mkdir()
    (other / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    save_file({k: -t if "lora_B" in k else t for k, t in load_file(path).items()}, other / path.name)
    against = compare_adapters(open_adapter(str(folder)).model, open_adapter(str(other)).model)
    assert against.cosine == pytest.approx(-1.0)


def test_diff_command(make_adapter: Any, tmp_path: Path) -> None:
    a = make_adapter(METHODS["lora"](), name="a")
    b = make_adapter(LoraConfig(**{**LORA, "target_modules": ["q_proj", "o_proj"]}), name="b", seed=2)
    words = ["diff", a, b, "--html", tmp_path / "d.html", "--table", tmp_path / "d.csv"]
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.output
    assert "2 layers only in the first" in done.output
    text, page = read_page(tmp_path / "d.html")
    assert page.loads == []
    assert "Only in b: lora" in text
    assert len(pd.read_csv(tmp_path / "d.csv")) == 2
    c = make_adapter(LoraConfig(**{**LORA, "target_modules": ["up_proj"]}), name="c")
    done = CliRunner().invoke(app, ["diff", str(a), str(c)])
    assert done.exit_code == 2
    assert "no layer in common" in done.output
