"""Whole models, both ways: what either package saves the other loads, to equal outputs; tensor names are equal."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from api_zoo import moved, tokens
from checkpoint_jobs import JOBS, Job
from safetensors.torch import load_file

import veneer


def output(model: Any) -> torch.Tensor:
    x = tokens()
    given = {"input_ids": x, "attention_mask": torch.ones_like(x)}
    if model.config.is_encoder_decoder:
        given["labels"] = x
    with torch.no_grad():
        out = model(**given)
    return next(out[k] for k in ("logits", "start_logits", "last_hidden_state") if k in out)


def make(package: Any, job: Job) -> Any:
    model = package.get_peft_model(job.base(), getattr(package, job.config)(**job.options))
    return moved(model, scale=0.1)


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize(("writer", "reader"), [(veneer, peft), (peft, veneer), (veneer, veneer)],
                         ids=["veneer to peft", "peft to veneer", "veneer to veneer"])  # fmt: skip
def test_files_go_both_ways(name: str, writer: Any, reader: Any, tmp_path: Path) -> None:
    job = JOBS[name]
    model = make(writer, job)
    y = output(model)
    model.save_pretrained(tmp_path)
    base = job.base()
    assert (output(base) - y[:, -output(base).shape[1] :]).abs().max() > 1e-4, "the adapter does nothing"
    with warnings.catch_warnings():
        if reader is veneer:
            warnings.simplefilter("error")
        loaded = reader.PeftModel.from_pretrained(base, tmp_path)
    assert type(loaded).__name__ == type(model).__name__
    torch.testing.assert_close(output(loaded), y, atol=1e-5, rtol=1e-5)


def written(package: Any, job: Job, folder: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(tensors' shapes and dtypes, config, number of trained values) of a file."""
    model = make(package, job)
    model.save_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config = json.loads((folder / "adapter_config.json").read_text())
    return {k: (tuple(t.shape), t.dtype) for k, t in tensors.items()}, config, trained


@pytest.mark.parametrize("name", JOBS)
def test_names_shapes_and_configs_are_equal(name: str, tmp_path: Path) -> None:
    job = JOBS[name]
    ours, our_config, our_count = written(veneer, job, tmp_path / "veneer")
    theirs, their_config, their_count = written(peft, job, tmp_path / "peft")
    assert ours == {k: t for k, t in theirs.items() if not beside_the_adapter(k)}
    assert our_count == their_count
    for key, value in our_config.items():
        other = their_config[key]
        if key == "target_modules" and value == "all-linear":
            assert isinstance(other, list)  # peft writes what the word meant for this base
            continue
        if key == "modules_to_save" and value is not None:
            assert {v for v in other if any(v in k for k in theirs)} == set(value)  # those that the base has, once
            continue
        if isinstance(value, list) and isinstance(other, list):
            value, other = sorted(value, key=repr), sorted(other, key=repr)
        assert value == other, key


def beside_the_adapter(key: str) -> bool:
    """What peft adds to the file though nothing trained it: an adapted embedding's own table, a bias twice."""
    return key.endswith((".base_layer.weight", ".modules_to_save.bias"))


@pytest.mark.parametrize(
    "name", ["defaults", "saved modules", "tokens", "bias all", "vera", "ia3", "ln tuning", "prefix tuning"]
)
def test_training_goes_on_from_a_file(name: str, tmp_path: Path) -> None:
    """Loaded with is_trainable, the same tensors train as before saving, and a step changes the output."""
    job = JOBS[name]
    model = make(veneer, job)
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(tmp_path)
    loaded = veneer.PeftModel.from_pretrained(job.base(), tmp_path, is_trainable=True)
    trained = {n: p for n, p in loaded.named_parameters() if p.requires_grad}
    assert trained.keys() == before
    y = output(loaded.eval())
    x = tokens()
    loaded.train()
    loaded(input_ids=x, attention_mask=torch.ones_like(x)).logits.square().mean().backward()
    assert all(p.grad is not None for p in trained.values())
    torch.optim.SGD(trained.values(), lr=0.5).step()
    assert not torch.equal(output(loaded.eval()), y)
