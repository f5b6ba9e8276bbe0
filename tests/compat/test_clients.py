"""Other libraries, as they are, with veneer under the name `peft`: each script in clients/ runs in its own process.

A library that is not installed is skipped, with the line that installs it beside the torch that is there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CLIENTS = Path(__file__).parent / "clients"
pytestmark = pytest.mark.slow


def run(script: str, *arguments: str, needs: str, install: str, processes: int = 1) -> None:
    if find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed: pip install --no-deps {install}")
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(many if processes > 1 else []), "-m", "veneer.compat", script, *arguments]
    paths = [p for p in sys.path if p]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, cwd=CLIENTS, env=env, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_transformers_adapter_methods_trainer_and_pipeline() -> None:
    run("with_transformers.py", needs="transformers", install="transformers")


@pytest.mark.parametrize("trainer", ["sft", "dpo", "reward"])
def test_trl(trainer: str) -> None:
    run("with_trl.py", trainer, needs="trl", install="trl==1.16.0")


def test_sentence_transformers() -> None:
    run("with_sentence_transformers.py", needs="sentence_transformers", install="sentence-transformers==6.2.0")


def test_diffusers() -> None:
    run("with_diffusers.py", needs="diffusers", install="diffusers==0.42.1")


def test_accelerate_in_two_processes() -> None:
    run("with_accelerate.py", needs="accelerate", install="accelerate", processes=2)


def test_loralib_checkpoints() -> None:
    run("with_loralib.py", needs="loralib", install="loralib==0.1.2")
