"""Layers that take no part in the loss are left out of the adapter, and said."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_train import recipe_for, write_jsonl
from torch import nn
from transformers import AutoModel, BertConfig, BertForSequenceClassification

from veneer.train import RecipeError, run
from veneer.train.idle import idle_layers
from veneer.train.outlook import outlook
from veneer.train.tasks import get_task

PAIRS = [{"anchor": "anna", "positive": "in paris"}, {"anchor": "bob", "positive": "in rome"}]
TRAIN = {"max_steps": 2, "use_cpu": True, "report_to": "none"}
recipe_of = partial(recipe_for, "embedding", train=TRAIN)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", PAIRS)


@pytest.mark.parametrize(
    "adapter",
    [
        {"r": 4, "target_modules": "all-linear"},
        {"r": 4, "target_modules": ["query", "dense"], "exclude_modules": ["key"]},
        {"r": 4, "target_modules": r".*dense", "exclude_modules": r".*attention\.output\.dense"},
        {"method": "vera", "r": 4, "target_modules": "all-linear"},
        {"method": "ia3", "target_modules": ["value", "dense"], "feedforward_modules": ["dense"]},
    ],
)
def test_a_pooler_that_nobody_reads_is_left_out(adapter: dict[str, Any], pairs: Path, bert: Path) -> None:
    recipe = recipe_of(pairs, bert, adapter=adapter)
    note = "Not adapted: pooler.dense; it takes no part in the loss."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an exclusion of the test's own that excludes nothing
        seen = outlook(recipe)
        result = run(recipe)
    assert note in seen.notes
    assert note in result.notes
    assert result.trainable_params == seen.matches.trained
    config = json.loads((Path(result.adapter_dir) / "adapter_config.json").read_text())
    if "exclude_modules" in config:
        assert "pooler" in str(config["exclude_modules"])
    else:  # peft's config of the method has no such field: the layers are named one by one
        assert not any("pooler" in name for name in config["target_modules"])
    for name, parameter in _trained(result.adapter_dir, bert).items():
        assert "pooler" not in name
        assert parameter.abs().sum() > 0 or "lora_B" in name or "lambda_b" in name, name


def _trained(folder: str, base: Path) -> dict[str, torch.Tensor]:
    from veneer import PeftModel

    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder, is_trainable=True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_nothing_else_to_adapt_is_an_error(pairs: Path, bert: Path) -> None:
    recipe = recipe_of(pairs, bert, adapter={"r": 4, "target_modules": ["pooler.dense"]})
    for act in (run, outlook):
        with pytest.raises(RecipeError, match=r"target_modules: pooler.dense takes no part in the loss of embedding"):
            act(recipe)


def test_what_is_read_stays() -> None:
    """A classifier reads its pooler; every layer of every task's own model gets a gradient."""
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    assert idle_layers(model, get_task("seq-cls"), layers) == []
    with torch.device("meta"):
        bare = BertForSequenceClassification(config)
    layers = {name: m for name, m in bare.named_modules() if isinstance(m, nn.Linear)}
    assert idle_layers(bare, get_task("seq-cls"), layers) == []
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class _Routed(nn.Module):
    """A tower that text does not reach, experts of which a token takes one, a norm whose output nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.config = BertConfig()
        self.embed = nn.Embedding(5, 4)
        self.tower = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))])
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.shadow, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        hidden = self.experts[0](self.embed(input_ids))
        self.shadow(hidden)
        from transformers.modeling_outputs import TokenClassifierOutput

        return TokenClassifierOutput(logits=self.head(hidden))


def test_experts_stay_and_towers_go() -> None:
    model = _Routed()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert idle_layers(model, get_task("token-cls"), layers) == ["tower.0.0", "tower.1.0", "shadow"]
