"""Every method on two processes: alike on each (DDP), and with all tensors in parts (FSDP's fully_shard); and inside
FSDP's older wrapper, which shows a layer views of one flat parameter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sharded_job
import torch
import torch.distributed as dist
from law_cases import CASES
from lawlib import build, data, randomize
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import veneer
from veneer import registry
from veneer.files import read_tensors

#: methods whose forward takes more than ids and labels, or other adapters
OWN_INPUTS = {"MULTITASK_PROMPT_TUNING", "XLORA"}
#: its router takes the mean over the tokens of a call, and each process has its own
BY_BATCH = {"LILY"}
#: what does not run, and the word of the error that says why
REFUSED = {
    "ddp": {"SHADOW": "find_unused_parameters"},
    "fsdp": {
        "ADALORA": "ADALORA does not train under fully_shard",
        "SHADOW": "SHADOW does not train under fully_shard",
        "LILY": "is shared with a parameter already managed by another FSDP group",  # one factor in many blocks
        **dict.fromkeys(("FROD", "OSF", "PSOFT"), "load the adapter before fully_shard"),  # they train and save
    },
}
METHODS = [name for name in registry.types() if name not in OWN_INPUTS]


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def found(request: Any, tmp_path_factory: Any) -> tuple[str, Path, dict[str, Any]]:
    """(way, folder, {method: losses or error}) of one pair of processes."""
    folder = tmp_path_factory.mktemp(request.param)
    source = str(Path(veneer.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", sharded_job.__file__, request.param, str(folder), *METHODS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, folder, json.loads((folder / "found.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_as_one_and_write_one_adapter(method: str, found: tuple[str, Path, dict[str, Any]]) -> None:
    way, folder, results = found
    result = results[method]
    if method in REFUSED[way]:
        assert isinstance(result, str), f"{method} works with {way}: take it off the list"
        assert REFUSED[way][method] in result
        return
    assert isinstance(result, list), result
    alone = sharded_job.adapted(method)
    losses = sharded_job.train(alone, sharded_job.rows())
    assert result == pytest.approx(losses, rel=1e-3 if method in BY_BATCH else 1e-5)
    tensors = read_tensors(folder / method / "adapter_model.safetensors")
    wanted = veneer.get_peft_model_state_dict(alone)
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in wanted.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> Any:
    """A group of this process alone."""
    meet = tmp_path_factory.mktemp("group") / "meet"
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2)
        nn.init.normal_(self.mha.in_proj_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mha(x, x, x)[0]  # type: ignore[no-any-return]


@torch.no_grad()
def test_weights_stand_in_for_views_of_a_flat_parameter(alone: None) -> None:
    torch.manual_seed(0)
    cfg = veneer.LoraConfig(target_modules=["mha"], r=2, init_lora_weights=False)
    model, x = veneer.get_peft_model(Attention(), cfg).eval(), torch.randn(5, 3, 8)
    with model.disable_adapter():
        base = model(x)
    expected = model(x)
    assert not torch.allclose(expected, base, atol=1e-3)
    torch.testing.assert_close(wrapped(model)(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=[c.id for c in CASES])
@torch.no_grad()
def test_flat_parameters(case: Any, alone: None) -> None:
    tuner, x = randomize(build(case)).eval(), data(case)
    expected = tuner(x)
    torch.testing.assert_close(wrapped(tuner)(x), expected)
