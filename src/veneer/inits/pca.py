"""Principal components of rows that come in batches. Ross et al. 2008, "Incremental learning for robust visual
tracking", section 3.1.

Kept are the mean, the total variance and the leading `n` directions; a batch is merged by one thin SVD of the
directions so far (scaled by their singular values), the centred batch, and a row for the shift of the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

SEED, POWER = 42, 4  # of the randomised SVD: every run, and peft's, finds the same directions


class IncrementalPCA:
    """n: how many directions. components (n, columns), values (n,) singular values, rows seen so far."""

    def __init__(self, n: int):
        self.n, self.rows = n, 0
        self.mean: Tensor
        self.variance: Tensor
        self.components: Tensor
        self.values: Tensor

    @torch.no_grad()
    def update(self, X: Tensor) -> None:
        """Merge rows X (rows, columns); there must be at least n of them in the first batch."""
        m, before = len(X), self.rows
        mean, variance = X.double().mean(0), X.double().var(0, unbiased=False)
        centred = (X - mean).to(X.dtype)
        if before == 0:
            merged, self.mean, self.variance = centred, mean, variance
        else:
            total = before + m
            shift = self.mean - mean
            spread = before * m / total
            merged = torch.cat([self.values[:, None] * self.components, centred, spread**0.5 * shift[None]])
            self.variance = (self.variance * before + variance * m + shift.square() * spread) / total
            self.mean = (self.mean * before + mean * m) / total
        self.rows += m
        V, S = self._leading(merged)
        self.components, self.values = V[: self.n], S[: self.n]

    def _leading(self, M: Tensor) -> tuple[Tensor, Tensor]:
        """Right singular vectors as rows, the largest entry of each positive, and singular values."""
        with torch.random.fork_rng(devices=[M.device] if M.is_cuda else []):
            torch.manual_seed(SEED)
            _, S, V = torch.svd_lowrank(M, q=min(2 * self.n, *M.shape), niter=POWER)
        V = V.T
        largest = V.gather(1, V.abs().argmax(1, keepdim=True))
        return V * largest.sign(), S

    @property
    def explained(self) -> Tensor:
        """Each direction's share of the total variance, (n,)."""
        return self.values.square() / (self.rows * self.variance.sum()).to(self.values)
