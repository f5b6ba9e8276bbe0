"""What a first call under torch.inference_mode leaves behind (constants made once) serves training as well."""

from __future__ import annotations

import torch
from law_cases import Case
from lawlib import build, data, every_case, randomize, tensors


@every_case(lambda case: case.site_name in ("Linear", "Embedding"))
def test_training_goes_on_after_a_call_in_inference_mode(case: Case) -> None:
    t = randomize(build(case))
    x = data(case)
    with torch.inference_mode():
        first = t(x).clone()
    y = t(x)
    torch.testing.assert_close(y, first, atol=1e-5, rtol=1e-5)
    y.square().mean().backward()
    trained = [p for _, p in tensors(t, "a0") if p.requires_grad]
    assert trained
    assert any(p.grad is not None for p in trained)
