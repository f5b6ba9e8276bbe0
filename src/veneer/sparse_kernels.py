"""A sparse matrix whose places are fixed and whose values train: products with it, and the gradient at its places."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .kernels import plain_autograd

__all__ = ["Pattern", "pattern_of", "sparse_fits", "version_of"]


def version_of(t: Tensor) -> int:
    """How often a tensor was written to; tensors of inference mode do not count."""
    return 0 if t.is_inference() else t._version


class Pattern:
    """The places of a sparse S (out, inp): flat indices or (2, k) rows and columns, each once. Also in the orders that
    sparse products want, which are found once."""

    def __init__(self, at: Tensor, out: int, inp: int):
        self.at, self.version, self.shape = at, version_of(at), (out, inp)
        with torch.inference_mode(False):  # a first call for inference makes what training goes on with
            i, j = at.long() if at.dim() == 2 else (at.long() // inp, at.long() % inp)
            self.i, self.j = i, j
            self.rows, self.columns = self._order(i, j, out, inp), self._order(j, i, inp, out)

    def holds(self, at: Tensor) -> bool:
        """Whether this is still the pattern of `at`."""
        return at is self.at and version_of(at) == self.version

    @staticmethod
    def _order(major: Tensor, minor: Tensor, many: int, width: int) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        order = (major * width + minor).argsort()
        starts = torch.bincount(major, minlength=many).cumsum(0)
        return order, torch.cat([starts.new_zeros(1), starts]).int(), minor[order].int(), (many, width)

    def matrix(self, values: Tensor) -> Tensor:
        """S, sparse."""
        return self._sparse(self.rows, values)

    def transposed(self, values: Tensor) -> Tensor:
        """S^T, sparse."""
        return self._sparse(self.columns, values)

    @staticmethod
    def _sparse(which: tuple[Tensor, Tensor, Tensor, tuple[int, int]], values: Tensor) -> Tensor:
        order, starts, minor, shape = which
        with warnings.catch_warnings():  # torch announces, once a process, that its sparse layouts are in beta
            warnings.simplefilter("ignore", UserWarning)
            return torch.sparse_csr_tensor(starts, minor, values[order], shape, check_invariants=False)

    def sample(self, left: Tensor, right: Tensor) -> Tensor:
        """Entries of left @ right^T at S's places, (k,), in their own order; left (out, m), right (inp, m)."""
        order = self.rows[0]
        like = self._sparse(self.rows, left.new_zeros(len(order)))
        found = torch.sparse.sampled_addmm(like, left, right.mT, beta=0.0).values()
        return torch.empty_like(found).index_copy_(0, order, found)

    def dense(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.shape).index_put((self.i, self.j), values)


def pattern_of(memory: dict[str, Any], at: Tensor, out: int, inp: int) -> Pattern:
    """The Pattern of `at`, kept in an adapter's memory until its places change."""
    found = memory.get("pattern")
    if found is None or not found.holds(at):
        found = memory["pattern"] = Pattern(at, out, inp)
    return found


def sparse_fits(*tensors: Tensor) -> bool:
    """Whether sparse products can stand in for dense ones: one dtype that they know, and plain autograd."""
    dtype = tensors[0].dtype
    known = dtype in (torch.float32, torch.float64) and all(t.dtype == dtype for t in tensors)
    return known and plain_autograd(tensors[0])
