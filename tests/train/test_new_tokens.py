"""`tokens:` adds to the vocabulary: rows that start at the mean, train alone, travel alone and load by themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_train import bpe_tokenizer, chat, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import veneer
from veneer.export.merging import merge_to_folder
from veneer.train import Recipe, RecipeError, run
from veneer.train.use import load

NEW = ["<ACT>", "<STOP>"]
FEW: dict[str, Any] = {"max_steps": 3, "learning_rate": 0.05, "use_cpu": True, "logging_steps": 1}
QV: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module", params=["tied", "untied"])
def tight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose table holds the tokenizer's tokens and not one row more."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = bpe_tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=request.param == "tied", eos_token_id=2, bos_token_id=None,
        pad_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def actions(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "acts.jsonl", [chat("one", "<ACT>red<STOP>"), chat("two", "<ACT>blue<STOP>")] * 4)


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits


def test_rows_start_at_the_mean_and_travel_alone(
    causal: Callable[..., Recipe], tight: Path, actions: Path, tmp_path: Path
) -> None:
    data = {"train": str(actions)}
    still = run(causal(base=str(tight), data=data, adapter=QV, tokens=NEW, train={**FEW, "learning_rate": 0.0}))
    assert any("<ACT>" in note for note in still.notes)
    base = AutoModelForCausalLM.from_pretrained(tight)
    tables = {"embed_tokens": base.model.embed_tokens.weight, "lm_head": base.lm_head.weight}
    if base.config.tie_word_embeddings:
        del tables["lm_head"]
    held = {
        k: v for k, v in load_file(Path(still.adapter_dir) / "adapter_model.safetensors").items() if "lora" not in k
    }
    assert len(held) == len(tables)
    for name, table in tables.items():
        (rows,) = [value for key, value in held.items() if name in key]
        torch.testing.assert_close(rows, table.mean(0).expand(2, -1))
    tuned = run(causal(base=str(tight), data=data, adapter=QV, tokens=NEW, train=FEW, out=str(tmp_path / "tuned")))
    after = load_file(Path(tuned.adapter_dir) / "adapter_model.safetensors")
    for key, value in held.items():
        assert (after[key] - value).abs().max() > 1e-3
    trained = tuned.trainable_params - sum(v.numel() for k, v in after.items() if "lora" in k)
    assert trained == sum(2 * table.shape[1] for table in tables.values())


def test_it_loads_back_by_itself_everywhere(
    causal: Callable[..., Recipe], tight: Path, actions: Path, tmp_path: Path
) -> None:
    made = run(causal(base=str(tight), data={"train": str(actions)}, adapter=QV, tokens=NEW, train=FEW, merge=True))
    adapter = made.adapter_dir
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer("one<ACT>red<STOP>")["input_ids"]
    assert [tokenizer.decode([i]) for i in ids if i >= len(bpe_tokenizer())] == NEW
    expected = logits(AutoModelForCausalLM.from_pretrained(str(made.merged_dir)), ids)
    assert expected.shape[-1] == len(tokenizer)
    loaded = load(adapter)
    assert loaded.tokenizer.convert_tokens_to_ids("<ACT>") == len(bpe_tokenizer())
    merge_to_folder(adapter, tmp_path / "merged")
    oracle = AutoModelForCausalLM.from_pretrained(tight)
    oracle.resize_token_embeddings(len(tokenizer))
    models = {
        "load": loaded.model,
        "PeftModel": veneer.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tight), adapter),
        "AutoPeftModel": veneer.AutoPeftModelForCausalLM.from_pretrained(adapter),
        "veneer merge": AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        "peft": peft.PeftModel.from_pretrained(oracle, adapter),
    }
    for name, model in models.items():
        torch.testing.assert_close(
            logits(model, ids), expected, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_table_with_spare_rows_keeps_its_size(causal: Callable[..., Recipe], llama: Path, actions: Path) -> None:
    adapter = {"method": "trainable_tokens"}
    made = run(causal(data={"train": str(actions)}, adapter=adapter, tokens=NEW, train=FEW))
    held = load_file(Path(made.adapter_dir) / "adapter_model.safetensors")
    assert {tuple(value.shape) for value in held.values()} == {(2, 32)}
    assert load(made.adapter_dir).model.get_base_model().get_input_embeddings().weight.shape[0] == 400


def test_answers_hold_new_tokens(causal: Callable[..., Recipe], actions: Path) -> None:
    """They are learned, generated and shown."""
    train = {"learning_rate": 0.05, "num_train_epochs": 40, "use_cpu": True}
    adapter = {"r": 8, "target_modules": "all-linear"}
    data = {"train": str(actions), "test": str(actions)}
    made = run(causal(data=data, adapter=adapter, tokens=NEW, train=train, eval__limit=2))
    assert [sample.tuned for sample in made.samples] == ["<ACT>red<STOP>", "<ACT>blue<STOP>"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"tokens": ["<A>", "<A>"]}, "named twice"),
        ({"tokens": [" "]}, "empty"),
        ({"tokens": ["<A>"], "adapter": {"method": "vera"}}, "vera cannot train the rows"),
        ({"tokens": "<A>"}, "expected a list"),
    ],
)
def test_tokens_that_cannot_be(causal: Callable[..., Recipe], flags: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        causal(**flags)


def test_a_token_that_is_there_already(causal: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"'<\|im_end\|>' is token 2 already"):
        run(causal(tokens=["<|im_end|>"], adapter=QV))
