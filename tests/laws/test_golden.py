"""Random recipes are part of the file format: the same seed gives the same bits, today and in files of years ago."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn

from veneer.methods.vera import VeraConfig
from veneer.tuner import Tuner

# (projection_prng_key, r) -> what the projections of layers (24 -> 16) and (10 -> 30) begin with, and their SHA-256
GOLDEN: dict[tuple[int, int], tuple[list[float], list[float], str]] = {
    (0, 4): ([-0.00374341, 0.2682218, -0.41152257], [0.61153352, 0.25634077, -0.95540392], "ee66b0a40fad4e48"),
    (3, 16): ([-0.49573648, -0.39443064, -0.21415752], [-0.17658657, -0.40520373, 0.25017646], "4871e7e8157901fa"),
}


def projections(key: int, r: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(key + 1)  # the global random state must not matter
    torch.rand(key % 7)
    net = nn.ModuleDict({"a": nn.Linear(24, 16), "b": nn.Linear(10, 30)}).to(dtype)
    t = Tuner(net, VeraConfig(r=r, projection_prng_key=key, target_modules=["a", "b"]), "x")
    return t.vera_A["x"], t.vera_B["x"]


@pytest.mark.parametrize(("key", "r"), GOLDEN)
def test_vera_projections(key: int, r: int) -> None:
    A, B = projections(key, r)
    first_A, first_B, digest = GOLDEN[key, r]
    assert A.shape == (r, 24)
    assert B.shape == (30, r)
    assert A[0, :3].tolist() == pytest.approx(first_A, abs=1e-7)
    assert B[0, :3].tolist() == pytest.approx(first_B, abs=1e-7)
    assert hashlib.sha256(A.numpy().tobytes() + B.numpy().tobytes()).hexdigest()[:16] == digest


def test_vera_projections_do_not_touch_the_global_random_state() -> None:
    net = nn.ModuleDict({"a": nn.Linear(24, 16)})
    torch.manual_seed(3)
    Tuner(net, VeraConfig(r=4, target_modules=["a"]), "x")
    state = torch.get_rng_state()
    torch.manual_seed(3)
    torch.randn(4)  # the layer's own vector of r numbers, and nothing else
    assert torch.equal(torch.get_rng_state(), state)
