"""combine, resize, convert, extract: every result against the sum of full deltas, and in peft."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from ship_zoo import probe, randomised
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from veneer import IA3Config, LoraConfig, OFTConfig, PeftModel, VeraConfig
from veneer.arithmetic import combine_adapters, convert_file, extract_lora, resize_adapter
from veneer.arithmetic.formats import export_style
from veneer.arithmetic.styles import STYLES, read_pairs, style_of
from veneer.cli.app import app
from veneer.errors import AdapterError

LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}


def weights(base: Path, folder: Path | None, loader: Any = PeftModel) -> dict[str, torch.Tensor]:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if folder is not None:
        model = loader.from_pretrained(model, str(folder)).merge_and_unload()
    return {k: t.double() for k, t in model.state_dict().items()}


def change(base: Path, folder: Path, loader: Any = PeftModel) -> dict[str, torch.Tensor]:
    before = weights(base, None)
    return {k: t - before[k] for k, t in weights(base, folder, loader).items()}


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 2e-6) -> None:
    assert a.keys() == b.keys()
    assert any(bool(t.any()) for t in a.values())
    for k in a:
        assert torch.allclose(a[k], b[k], atol=atol), k


# -- combine -------------------------------------------------------------------------------------------------------
def three(make_adapter: Any) -> list[Path]:
    """Other ranks, scalings, layers and kinds of layer."""
    return [
        make_adapter(LoraConfig(**LORA), name="a", seed=1),
        make_adapter(LoraConfig(**LORA, use_rslora=True, rank_pattern={"v_proj": 2}), name="b", seed=2),
        make_adapter(
            LoraConfig(**{**LORA, "target_modules": ["q_proj", "embed_tokens", "down_proj"], "r": 3}), name="c", seed=3
        ),
    ]


@pytest.mark.parametrize("how", ["cat", "svd"])
@pytest.mark.parametrize("loader", [PeftModel, peft.PeftModel])
def test_combine_is_the_weighted_sum(how: str, loader: Any, make_adapter: Any, llama: Path, tmp_path: Path) -> None:
    folders, numbers = three(make_adapter), [1.0, 0.5, -2.0]
    more = {"svd_rank": 11} if how == "svd" else {}  # the sum of the ranks: nothing is lost
    done = combine_adapters(folders, tmp_path / "sum", numbers, how, **more)
    assert done.worst < 1e-6
    parts = [change(llama, f) for f in folders]
    want = {k: sum(n * p[k] for n, p in zip(numbers, parts, strict=True)) for k in parts[0]}
    close(change(llama, tmp_path / "sum", loader), want)


def test_negation_takes_an_adapter_back(make_adapter: Any, llama: Path, tmp_path: Path) -> None:
    a = three(make_adapter)[0]
    combine_adapters([a], tmp_path / "minus", [-1.0])
    close({k: -t for k, t in change(llama, tmp_path / "minus").items()}, change(llama, a))


def test_combine_equals_the_model_in_memory(make_adapter: Any, llama: Path, tmp_path: Path) -> None:
    folders = [make_adapter(LoraConfig(**LORA), name=n, seed=i) for i, n in enumerate("ab")]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(folders[0]), "a")
    model.load_adapter(str(folders[1]), "b")
    for how in ("ties", "dare_ties", "magnitude_prune_svd"):
        torch.manual_seed(5)
        model.add_weighted_adapter(["a", "b"], [1.0, 0.7], how, how, density=0.6)
        combine_adapters(folders, tmp_path / how, [1.0, 0.7], how, density=0.6, seed=5)
        held = load_file(tmp_path / how / "adapter_model.safetensors")
        model.set_adapter(how)
        for name, layer in model.base_model.adapted_layers():
            view = layer.view(how)
            product = held[f"base_model.model.{name}.lora_B.weight"] @ held[f"base_model.model.{name}.lora_A.weight"]
            assert torch.allclose(product, view.lora_B @ view.lora_A, atol=1e-6), (how, name)


def test_the_result_keeps_the_choice_of_layers_and_whole_modules(
    make_adapter: Any, llama: Path, tmp_path: Path
) -> None:
    a = make_adapter(LoraConfig(**LORA, modules_to_save=["lm_head"]), name="a")
    b = make_adapter(LoraConfig(**LORA), name="b", seed=2)
    combine_adapters([a, b], tmp_path / "sum")
    settings = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert sorted(settings["target_modules"]) == ["q_proj", "v_proj"]
    assert settings["modules_to_save"] == ["lm_head"]
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (8, 8, str(llama))
    head = "lm_head.weight"
    assert torch.equal(weights(llama, tmp_path / "sum")[head], weights(llama, a)[head])
    c = make_adapter(LoraConfig(**LORA, modules_to_save=["lm_head"]), name="c", seed=3)
    with pytest.raises(AdapterError, match=r"lm_head.*trained whole by more than one"):
        combine_adapters([a, c], tmp_path / "no")
    assert not (tmp_path / "no").exists()


REFUSED = {
    "dora": (lambda: LoraConfig(**LORA, use_dora=True), "DoRA rescales.*veneer convert"),
    "vera": (lambda: VeraConfig(target_modules=["q_proj"], r=4), "vera is not plain LoRA.*veneer convert"),
    "bias": (lambda: LoraConfig(**LORA, bias="all"), "trained biases of the base"),
    "tokens": (lambda: LoraConfig(**LORA, trainable_token_indices=[1]), "trains token rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_combine_refuses_with_the_reason(name: str, make_adapter: Any, tmp_path: Path) -> None:
    make, why = REFUSED[name]
    with pytest.raises(AdapterError, match=why):
        combine_adapters([make_adapter(make())], tmp_path / "no")
    assert not list(tmp_path.glob("no*"))


def test_adapters_of_other_bases(make_adapter: Any, tmp_path: Path) -> None:
    a, b = (make_adapter(LoraConfig(**LORA), name=n) for n in "ab")
    path = b / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "other/name"}))
    with pytest.raises(AdapterError, match=r"other bases.*other/name.*--base"):
        combine_adapters([a, b], tmp_path / "no")
    combine_adapters([a, b], tmp_path / "yes", base="other/name")
    assert json.loads((tmp_path / "yes" / "adapter_config.json").read_text())["base_model_name_or_path"] == "other/name"


# -- resize --------------------------------------------------------------------------------------------------------
def test_resize_down_is_the_best_there_is(make_adapter: Any, llama: Path, tmp_path: Path) -> None:
    a = make_adapter(LoraConfig(**{**LORA, "r": 6}))
    done = resize_adapter(a, tmp_path / "small", rank=2)
    old, new = change(llama, a), change(llama, tmp_path / "small")
    for name, error in done.errors.items():
        D, E = old[f"{name}.weight"], new[f"{name}.weight"]
        S = torch.linalg.svdvals(D)
        assert error == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-3)
        assert float((D - E).norm() / D.norm()) == pytest.approx(error, rel=1e-3)
    assert set(done.ranks.values()) == {2}


def test_resize_up_is_exact_and_error_chooses_ranks(make_adapter: Any, llama: Path, tmp_path: Path) -> None:
    a = make_adapter(LoraConfig(**LORA))
    assert resize_adapter(a, tmp_path / "big", rank=9).worst < 1e-6
    close(change(llama, tmp_path / "big", peft.PeftModel), change(llama, a))
    done = resize_adapter(a, tmp_path / "fit", error=0.4)
    assert 0 < done.worst <= 0.4
    assert max(done.ranks.values()) < 4
    for name, r in done.ranks.items():
        S = torch.linalg.svdvals(change(llama, a)[f"{name}.weight"])
        assert r == 1 or float(S[r - 1 :].norm() / S.norm()) > 0.4
    with pytest.raises(AdapterError, match="one of the two"):
        resize_adapter(a, tmp_path / "no")


# -- convert -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["oft", "ia3", "dora"])
def test_any_method_becomes_lora(kind: str, make_adapter: Any, llama: Path, tmp_path: Path) -> None:
    made = {
        "oft": lambda: OFTConfig(target_modules=["q_proj"], r=0, oft_block_size=8, task_type="CAUSAL_LM"),
        "ia3": lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        "dora": lambda: LoraConfig(**LORA, use_dora=True),
    }
    a = make_adapter(made[kind]())
    exact = convert_file(a, tmp_path / "whole", rank=1.0)
    assert exact.worst < 1e-3  # type: ignore[union-attr]
    close(change(llama, tmp_path / "whole", peft.PeftModel), change(llama, a), atol=1e-4)
    near = convert_file(a, tmp_path / "near", rank=3)
    D, E = change(llama, a), change(llama, tmp_path / "near")
    for name, error in near.errors.items():  # type: ignore[union-attr]
        key = f"{name}.weight"
        assert float((D[key] - E[key]).norm() / D[key].norm()) == pytest.approx(error, abs=1e-3)


@pytest.mark.parametrize("style", [s for s in STYLES if s != "peft"])
def test_other_styles_and_back(style: str, make_adapter: Any, llama: Path, tmp_path: Path) -> None:
    a = make_adapter(LoraConfig(**LORA, rank_pattern={"layers.1.self_attn.v_proj": 2}))
    file = export_style(a, tmp_path / "out.safetensors", style)
    assert style_of(load_file(file)) == style
    prefix = "transformer" if style == "diffusers" else None
    convert_file(file, tmp_path / "back", base=str(llama), prefix=prefix, task_type="CAUSAL_LM")
    close(change(llama, tmp_path / "back", peft.PeftModel), change(llama, a))


def test_names_of_each_style(make_adapter: Any, tmp_path: Path) -> None:
    a = make_adapter(LoraConfig(**LORA))
    kohya = load_file(export_style(a, tmp_path / "k.safetensors", "kohya", "lora_te"))
    stem = "lora_te_model_layers_0_self_attn_q_proj"
    assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} <= set(kohya)
    assert float(kohya[f"{stem}.alpha"]) == 6.0
    held = torch.load(export_style(a, tmp_path / "l.pt", "loralib"), weights_only=True)
    path = "model.layers.0.self_attn.q_proj"
    source = load_file(a / "adapter_model.safetensors")
    assert torch.equal(held[f"{path}.lora_A"], source[f"base_model.model.{path}.lora_A.weight"])
    assert torch.allclose(held[f"{path}.lora_B"], source[f"base_model.model.{path}.lora_B.weight"] * 1.5)


def test_older_diffusers_keys(llama: Path, tmp_path: Path) -> None:
    A, B = torch.randn(2, 4), torch.randn(4, 2)
    old = {"unet.down.attn1.processor.to_q_lora.down.weight": A, "unet.down.attn1.processor.to_q_lora.up.weight": B,
           "unet.down.attn1.processor.to_out_lora.down.weight": A, "unet.down.attn1.processor.to_out_lora.up.weight": B,
           "unet.mid.proj.lora.down.weight": A, "unet.mid.proj.lora.up.weight": B}  # fmt: skip
    assert set(read_pairs(old)) == {"unet.down.attn1.to_q", "unet.down.attn1.to_out.0", "unet.mid.proj"}
    save_file({k: t.clone() for k, t in old.items()}, tmp_path / "old.safetensors")
    convert_file(tmp_path / "old.safetensors", tmp_path / "new", prefix="unet")
    assert "base_model.model.down.attn1.to_out.0.lora_A.weight" in load_file(
        tmp_path / "new" / "adapter_model.safetensors"
    )


BROKEN = {
    "half": ({"x.lora_A": torch.zeros(2, 3)}, "has factor A but not the other"),
    "ranks": ({"x.lora_A": torch.zeros(2, 3), "x.lora_B": torch.zeros(3, 4)}, "A has rank 2, B 4"),
    "none": ({"x.weight": torch.zeros(2)}, "not LoRA keys"),
    "tucker": ({"lora_unet_x.lora_mid.weight": torch.zeros(2)}, "Tucker"),
    "dora": ({"lora_unet_x.dora_scale": torch.zeros(2)}, "depends on the base's weights"),
    "more": ({"x.lora_A": torch.zeros(2, 3), "x.lora_B": torch.zeros(3, 2), "y": torch.zeros(1)}, "such as y"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_no_lora(name: str, tmp_path: Path) -> None:
    tensors, why = BROKEN[name]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=why):
        convert_file(tmp_path / "x.safetensors", tmp_path / "no")
    assert not list(tmp_path.glob("no*"))


def test_kohya_needs_names(make_adapter: Any, llama: Path, tmp_path: Path) -> None:
    file = export_style(make_adapter(LoraConfig(**LORA)), tmp_path / "k.safetensors", "kohya")
    with pytest.raises(AdapterError, match=r"underscores for dots.*--base"):
        convert_file(file, tmp_path / "no")
    tensors = {k.replace("q_proj", "nowhere"): t for k, t in load_file(file).items()}
    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(AdapterError, match="names no module of the base"):
        convert_file(tmp_path / "odd.safetensors", tmp_path / "no", base=str(llama))


# -- extract -------------------------------------------------------------------------------------------------------
def tuned_model(base: Path, names: tuple[str, ...]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.requires_grad_(False)
    for n, p in model.named_parameters():
        p.requires_grad_(n.endswith(names))
    return randomised(model, 4, 0.05)


def test_extract_at_full_rank_is_the_tuned_model(llama: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama)
    tuned = tuned_model(llama, ("q_proj.weight", "embed_tokens.weight", "input_layernorm.weight"))
    done = extract_lora(base, tuned, tmp_path / "x", rank=32, task_type="CAUSAL_LM")
    assert done.worst < 1e-6
    assert done.whole == [f"model.layers.{i}.input_layernorm" for i in range(2)]
    assert done.left == []
    for loader in (PeftModel, peft.PeftModel):
        again = loader.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(tmp_path / "x"))
        with torch.no_grad():
            gap = (again(probe()).logits - tuned(probe()).logits).abs().max()
        assert gap < 1e-4, loader


def test_extract_to_a_rank_reports_the_error(llama: Path, tmp_path: Path) -> None:
    base, tuned = AutoModelForCausalLM.from_pretrained(llama), tuned_model(llama, ("v_proj.weight", "norm.weight"))
    done = extract_lora(base, tuned, tmp_path / "x", rank=3, save_whole=False)
    assert "model.norm.weight" in done.left
    before, got = weights(llama, None), change(llama, tmp_path / "x")
    for name, error in done.errors.items():
        D = tuned.state_dict()[f"{name}.weight"].double() - before[f"{name}.weight"]
        assert float((D - got[f"{name}.weight"]).norm() / D.norm()) == pytest.approx(error, rel=1e-3)
    done = extract_lora(base, tuned, tmp_path / "y", error=0.25)
    assert 0.1 < done.worst <= 0.25


def test_extract_refuses(llama: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(AdapterError, match="equal"):
        extract_lora(base, base, tmp_path / "no", rank=2)
    wide = AutoModelForCausalLM.from_pretrained(llama)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wide.resize_token_embeddings(400)
    with pytest.raises(AdapterError, match=r"embed_tokens.*resize_token_embeddings"):
        extract_lora(base, wide, tmp_path / "no", rank=2)
    assert not list(tmp_path.glob("no*"))


def test_extract_biases(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    tuned = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    extract_lora(base, tuned, tmp_path / "x", rank=5)
    x = torch.randn(3, 6)
    again = PeftModel.from_pretrained(base, str(tmp_path / "x"))
    assert torch.allclose(again(x), tuned(x), atol=1e-5)


# -- the commands --------------------------------------------------------------------------------------------------
def test_commands(make_adapter: Any, llama: Path, tmp_path: Path) -> None:
    a, b = (make_adapter(LoraConfig(**LORA), name=n, seed=i) for i, n in enumerate("ab"))
    tuned = tmp_path / "tuned"
    tuned_model(llama, ("q_proj.weight",)).save_pretrained(tuned)
    shutil.copy(llama / "tokenizer.json", tuned)
    for words, says in (
        (["combine", a, b, "--weights", "1,-0.5", "--out", tmp_path / "1"], "equal to the weighted sum"),
        (["resize", a, "--rank", 2, "--out", tmp_path / "2"], "largest"),
        (["convert", a, "--to", "kohya", "--out", tmp_path / "3.safetensors"], "written to"),
        (["convert", a, "--rank", 3, "--out", tmp_path / "4"], "rank 3"),
        (["extract", llama, tuned, "--rank", 4, "--out", tmp_path / "5"], "error against the difference"),
    ):
        done = CliRunner().invoke(app, [str(w) for w in words])
        assert done.exit_code == 0, done.output
        assert says in done.output
    for words, says in (
        (["combine", a, b, "--weights", "1,x", "--out", tmp_path / "6"], "not a list of numbers"),
        (["combine", a, b, "--weights", "1", "--out", tmp_path / "6"], "2 adapters and 1 weights"),
        (["combine", a, b, "--type", "tiez", "--out", tmp_path / "6"], "did you mean 'ties'"),
        (["resize", a, "--rank", 2, "--out", tmp_path / "2"], "already exists"),
    ):
        done = CliRunner().invoke(app, [str(w) for w in words])
        assert done.exit_code == 2, done.output
        assert says in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "6").exists()
