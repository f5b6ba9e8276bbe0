"""The certificate of equality: the merged model's logits against base plus adapter, on sample text.

Both run from mapped files, so that a model larger than memory can be checked, slowly.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["FILE", "SAMPLES", "Certificate", "Outputs", "certify", "distance", "outputs"]

FILE = "merge_certificate.json"
SAMPLES = (
    "The quick brown fox jumps over the lazy dog. 12 apples, 3.50 EUR, by 14 March: ok?",
    "def area(r):\n    return 3.14159 * r ** 2  # of a circle\n",
    "Dear Ms Novak, thank you for your letter of 2 May. We shall send the three parcels to Brno on Monday.",
    "In 1969 people first walked on the Moon; the question is why it took so long to plan the way back.",
)


@dataclass(frozen=True)
class Certificate:
    """largest_difference: of any logit; share: of the largest logit. kl_mean, kl_max: KL(adapter || merged) of the
    next-token (or label) distributions, nats; nan for models without logits. top1_agreement: 0 to 1. distance: root
    mean square over all logits; of_effect: as a share of what the adapter itself changes, nan where not looked at."""

    tokens: int
    largest_difference: float
    share: float
    kl_mean: float
    kl_max: float
    top1_agreement: float
    dtype: str
    distance: float = math.nan
    of_effect: float = math.nan

    def write(self, folder: Path, name: str = FILE) -> None:
        held = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in dataclasses.asdict(self).items()}
        (folder / name).write_text(json.dumps(held, indent=2), encoding="utf-8")

    def lines(self, other: str = "base + adapter") -> list[str]:
        out = [
            f"largest logit difference to {other}: {self.largest_difference:.3g}; "
            f"same top token: {100 * self.top1_agreement:.1f} %"
        ]
        if not math.isnan(self.of_effect):
            out.append(f"rounding to {self.dtype} costs {100 * self.of_effect:.2g} % of what the adapter changes")
        if not math.isnan(self.kl_mean):
            out.append(
                f"KL divergence: mean {self.kl_mean:.2g}, largest {self.kl_max:.2g} nats over {self.tokens} tokens"
            )
        return out


@dataclass(frozen=True)
class Outputs:
    """values (tokens, classes), float32 on the CPU: logits, or the last hidden states of a model without a head."""

    values: Tensor
    logits: bool


@torch.inference_mode()
def outputs(model: Any, tokenizer: Any, texts: Sequence[str]) -> Outputs:
    """Run a model on texts, one at a time, without labels."""
    found, logits = [], True
    for text in texts:
        batch = dict(tokenizer(text, return_tensors="pt", truncation=True, max_length=128).to(model.device))
        batch.pop("token_type_ids", None)
        out: Any = model(**batch)
        logits = out.get("logits") is not None
        value = out["logits"] if logits else out["last_hidden_state"]
        found.append(value.float().cpu().flatten(0, -2))
    return Outputs(torch.cat(found), logits)


def certify(before: Outputs, after: Outputs, dtype: str) -> Certificate:
    """Compare two models' `outputs` on the same texts."""
    a, b = before.values, after.values
    difference = float((a - b).abs().max())
    mean = largest = math.nan
    if before.logits:
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1).clamp(min=0)
        mean, largest = float(kl.mean()), float(kl.max())
    agree = float((a.argmax(-1) == b.argmax(-1)).double().mean())
    share = difference / max(float(a.abs().max()), 1e-12)
    return Certificate(len(a), difference, share, mean, largest, agree, dtype, distance(before, after))


def distance(before: Outputs, after: Outputs) -> float:
    """Root mean square of the difference over all values."""
    return float((before.values - after.values).double().square().mean().sqrt())
