"""The rules of other servers, each with an adapter that breaks it, and the copy that mends what can be mended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ship_zoo import probe
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from veneer import IA3Config, LoraConfig, PeftModel, PromptTuningConfig
from veneer.cli.app import app
from veneer.errors import AdapterError
from veneer.export.serving_rules import check_adapter, plain_copy

PLAIN: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "r": 8, "task_type": "CAUSAL_LM"}


def test_a_plain_lora_is_fine(make_adapter: Any) -> None:
    folder = make_adapter(LoraConfig(**PLAIN), "mine")
    for server in ("vllm", "sglang"):
        found = check_adapter(str(folder), server)
        assert found.good
        assert found.findings == []
        assert f"mine={folder}" in found.flags
    done = CliRunner().invoke(app, ["check", str(folder), "--for", "vllm"])
    assert done.exit_code == 0, done.output
    assert "--max-lora-rank 8 " in done.output


def test_the_rank_to_start_vllm_with(make_adapter: Any) -> None:
    for rank, limit in ((9, 16), (17, 32), (24, 32)):
        found = check_adapter(str(make_adapter(LoraConfig(**{**PLAIN, "r": rank}), f"r{rank}")), "vllm")
        assert found.good
        assert f"--max-lora-rank {limit} " in found.flags
        assert [f.level for f in found.findings] == ["note"] * (rank > 16)


def test_a_rank_above_the_largest(make_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from veneer.export import serving_rules

    monkeypatch.setattr(serving_rules, "RANKS", (1, 4))
    found = check_adapter(str(make_adapter(LoraConfig(**PLAIN))), "vllm")
    assert not found.good
    assert "rank 8 is above vLLM's largest, 4" in found.findings[0].problem
    assert "veneer resize" in found.findings[0].remedy


@pytest.mark.parametrize(
    ("config", "says", "remedy"),
    [
        (LoraConfig(**PLAIN, use_dora=True), "the method is dora", "veneer convert"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "the method is ia3", "veneer convert"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "is not LoRA", "serve it with veneer"),
        (LoraConfig(**PLAIN, modules_to_save=["lm_head"]), "modules_to_save is not supported: lm_head", "merge"),
        (LoraConfig(**PLAIN, bias="lora_only"), "trained biases", "merge"),
        (LoraConfig(**PLAIN, lora_bias=True), "trained biases", "merge"),
        (LoraConfig(**PLAIN, trainable_token_indices=[5, 6]), "trained tokens", "merge"),
        (LoraConfig(**{**PLAIN, "target_modules": ["embed_tokens", "q_proj"]}), "an embedding is adapted", "merge"),
    ],
    ids=["dora", "ia3", "prompt", "whole", "bias", "lora-bias", "tokens", "embedding"],
)
def test_what_neither_server_takes(config: Any, says: str, remedy: str, make_adapter: Any) -> None:
    folder = make_adapter(config)
    for server in ("vllm", "sglang"):
        found = check_adapter(str(folder), server)
        assert not found.good
        broken = [f for f in found.findings if f.level != "note"]
        assert len(broken) == 1, broken
        assert says in broken[0].problem
        assert remedy in broken[0].remedy
    assert CliRunner().invoke(app, ["check", str(folder)]).exit_code == 1


def test_a_changed_vocabulary(make_adapter: Any, llama: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_adapter(LoraConfig(**PLAIN))
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.model.embed_tokens.weight": torch.zeros(303, 32)}, path)
    found = check_adapter(str(folder), "vllm")
    assert ["an embedding of 303 rows" in f.problem for f in found.findings] == [True]


def test_layers_that_sglang_does_not_know(make_adapter: Any) -> None:
    folder = make_adapter(LoraConfig(**PLAIN))
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({k.replace("q_proj", "router"): t for k, t in load_file(path).items()}, path)
    assert "does not adapt: router" in check_adapter(str(folder), "sglang").findings[0].problem
    assert check_adapter(str(folder), "vllm").good


@pytest.mark.parametrize(
    ("more", "server"),
    [
        ({"rank_pattern": {"v_proj": 3}}, "vllm"),
        ({"alpha_pattern": {"v_proj": 3}}, "vllm"),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 2}}, "sglang"),
        ({"use_rslora": True}, "sglang"),
    ],
    ids=["ranks", "alphas", "both", "rslora"],
)
def test_scalings_that_are_not_read_are_mended(more: dict[str, Any], server: str, llama: Path, make_adapter: Any,
                                               tmp_path: Path) -> None:  # fmt: skip
    """The copy has one rank and a scaling of 1, and answers as the adapter does."""
    folder = make_adapter(LoraConfig(**PLAIN, **more))
    found = check_adapter(str(folder), server)
    assert [f.level for f in found.findings if f.plain] == ["wrong"] * len(found.findings)
    done = CliRunner().invoke(app, ["check", str(folder), "--for", server, "--fix", str(tmp_path / "plain")])
    assert done.exit_code == 0, done.output
    both = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(f)).eval()
        for f in (folder, tmp_path / "plain")
    ]
    assert both[1].peft_config["default"].r == both[1].peft_config["default"].lora_alpha
    with torch.no_grad():
        first, second = (m(probe()).logits for m in both)
    assert torch.allclose(first, second, atol=1e-4)


def test_errors(make_adapter: Any, tmp_path: Path) -> None:
    folder = make_adapter(LoraConfig(**PLAIN, use_dora=True))
    with pytest.raises(AdapterError, match="not one of vllm, sglang"):
        check_adapter(str(folder), "tgi")
    with pytest.raises(AdapterError, match="more than a product"):
        plain_copy(str(folder), tmp_path / "p")
    assert not (tmp_path / "p").exists()
