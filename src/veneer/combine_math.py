"""The arithmetic of add_weighted_adapter on one layer's factors.

Factors come as stacks over a convolution's groups: B (groups, out / groups, k), A (groups, k, columns); delta
= B @ A. A layer without groups is a stack of one. Every function returns factors whose scaling is 1.

Sources: TIES, Yadav et al. 2023, arXiv:2306.01708, section 3; DARE, Yu et al. 2023, arXiv:2311.03099, section
3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Part:
    """One adapter on the layer: weight is the user's, scaling the layer's own (lora_alpha / r or the
    like)."""

    B: Tensor
    A: Tensor
    weight: float
    scaling: float

    @property
    def amount(self) -> float:
        return self.weight * self.scaling


@dataclass(frozen=True)
class Settings:
    combination_type: str
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"
    svd_error: float | None = None


def rank_within(parts: Sequence[Part], error: float) -> int:
    """The smallest rank per group, at least 1, whose best approximation of the weighted sum is off by no more than
    this share of its norm."""
    squares = decompose(*concatenate(parts))[1].square()
    left = squares.flip(-1).cumsum(-1).flip(-1).sum(tuple(range(squares.dim() - 1)))  # what cutting at k loses
    return max(int((left > error**2 * left[0]).sum()), 1)


def concatenate(parts: Sequence[Part]) -> Factors:
    """sum of weight * delta, exactly; the rank is the sum of the ranks."""
    return torch.cat([p.B * p.amount for p in parts], -1), torch.cat([p.A for p in parts], -2)


def combine(parts: Sequence[Part], s: Settings, rank: int) -> Factors:
    """The new factors, of rank `rank` per group (the sum of the ranks for "cat")."""
    kind = s.combination_type
    if kind == "cat":
        return concatenate(parts)
    if kind == "svd":
        return split(*decompose(*concatenate(parts), s.svd_driver), rank, s.svd_clamp)
    if kind.endswith("_svd"):
        deltas = [p.B @ p.A * p.scaling for p in parts]
        merged = mix(deltas, [p.weight for p in parts], kind.removesuffix("_svd"), s)
        U, S, Vh = torch.linalg.svd(merged, full_matrices=False, driver=s.svd_driver)
        return split(U, S, Vh, rank, s.svd_clamp)
    # On factors each takes the root of the amount; a negative one's sign goes to A alone, or it would cancel.
    roots = [abs(p.amount) ** 0.5 for p in parts]
    signed = [r if p.amount >= 0 else -r for r, p in zip(roots, parts, strict=True)]
    A = mix([p.A for p in parts], signed, kind, s)
    return mix([p.B for p in parts], roots, kind, s), A


def decompose(B: Tensor, A: Tensor, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD (U, S, Vh) of B @ A without forming it: QR of both factors, SVD of the small product."""
    QB, RB = torch.linalg.qr(B)
    QA, RA = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(RB @ RA.mT, full_matrices=False, driver=driver)
    return QB @ U, S, Vh @ QA.mT


def best_of_rank(parts: Sequence[Part], rank: int) -> tuple[Factors, Tensor] | None:
    """The best factors of a rank with A's rows orthonormal, as `split(*decompose(...))` has them, and the relative
    error over the groups: through products of the factors with themselves, a fifth of the work of QR and SVD.

    The parts may be stacks of layers of one shape, (layers, groups, ...); so is what is returned, an error a layer.

    The parts in double precision; squaring leaves half of its digits, so it is for factors stored in float32 or less.
    The sum is B D A with D the parts' amounts. With A = S L Q^T (S the rows' lengths) and V the eigenvectors of
    L^T S D B^T B D S L, the new factors are (B D S L V, V^T L^-1 S^-1 A). None where A's rows are too nearly dependent,
    on any of the layers.
    """
    B, A = torch.cat([p.B for p in parts], -1), torch.cat([p.A for p in parts], -2)
    D = B.new_tensor([p.amount for p in parts for _ in range(p.A.shape[-2])]).unsqueeze(-1)
    square = A @ A.mT
    S = square.diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-1)
    L, info = torch.linalg.cholesky_ex(square / (S * S.mT))
    if bool(info.any()):
        return None
    inverse = torch.linalg.solve_triangular(L, torch.eye(L.shape[-1], dtype=L.dtype, device=L.device), upper=False)
    condition = torch.linalg.matrix_norm(L) * torch.linalg.matrix_norm(inverse)
    if not bool((condition < 1e4).all()):
        return None
    left = D * S * L
    squares, V = torch.linalg.eigh(left.mT @ (B.mT @ B) @ left)
    squares, V = squares.flip(-1).clamp(min=0), V.flip(-1)[..., :rank]
    total, lost = squares.sum((-2, -1)), squares[..., rank:].sum((-2, -1))
    missing = rank - V.shape[-1]
    new = F.pad(B @ (left @ V), (0, missing)), F.pad((V.mT @ inverse / S.mT) @ A, (0, 0, 0, missing))
    return new, torch.where(total > 0, lost / total, 0.0).sqrt()


def split(U: Tensor, S: Tensor, Vh: Tensor, rank: int, clamp: float | None) -> Factors:
    """The best factors of a rank, (U S, Vh), filled up with zeros where the product has less.

    clamp: a quantile; both factors are cut at its value. It is taken over the entries with either sign, since
    an SVD leaves the signs of its vectors open.
    """
    B, A = U[..., :rank] * S[..., None, :rank], Vh[..., :rank, :]
    if clamp is not None:
        entries = torch.cat([B.flatten(), A.flatten()])
        limit = quantile(torch.cat([entries, -entries]), clamp)
        B, A = B.clamp(-limit, limit), A.clamp(-limit, limit)
    missing = rank - B.shape[-1]
    return F.pad(B, (0, missing)), F.pad(A, (0, 0, 0, missing))


def quantile(values: Tensor, q: float) -> Tensor:
    """torch.quantile, linear between neighbours, for tensors of any size."""
    ordered = values.sort().values
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low)


def mix(tensors: Sequence[Tensor], weights: Sequence[float], kind: str, s: Settings) -> Tensor:
    """Weighted sum of tensors of one shape, pruned and with signs elected as `kind` says."""
    if kind != "linear":
        assert s.density is not None
        prune = drop_and_rescale if kind.startswith("dare") else keep_largest
        tensors = [prune(t, s.density) for t in tensors]
    stack = torch.stack(list(tensors))
    w = torch.tensor(weights, dtype=stack.dtype, device=stack.device).reshape(-1, *[1] * (stack.dim() - 1))
    if kind not in ("ties", "dare_ties"):
        return (stack * w).sum(0)
    voted = stack * w.sign()  # a negative weight votes against its adapter's signs
    majority = elect(voted, s.majority_sign_method)
    agrees = voted.sign() == majority
    return (stack * w * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def keep_largest(t: Tensor, density: float) -> Tensor:
    """TIES's trim: the share `density` of entries that are largest in size; the rest zero."""
    k = int(density * t.numel())
    flat, out = t.flatten(), torch.zeros_like(t.flatten())
    kept = flat.abs().topk(k).indices
    out[kept] = flat[kept]
    return out.reshape(t.shape)


def drop_and_rescale(t: Tensor, density: float) -> Tensor:
    """DARE: keep each entry with probability `density`, divide by it; the expectation stays."""
    return t * torch.bernoulli(torch.full_like(t, density)) / density


def elect(stack: Tensor, method: str) -> Tensor:
    """TIES's sign for each entry, by total mass or by the number of signs; a draw counts as positive."""
    votes = stack.sum(0) if method == "total" else stack.sign().sum(0)
    return torch.where(votes >= 0, 1.0, -1.0).to(stack.dtype)


def relative_error(parts: Sequence[Part], new: Factors) -> float:
    """||new - sum of weight * delta|| / ||sum of weight * delta||, Frobenius, through QR of the factors; 0
    where both are zero, infinity where only the sum is."""
    B, A = concatenate(parts)
    exact = norm_of_product(B, A)
    gap = norm_of_product(torch.cat([B, -new[0]], -1), torch.cat([A, new[1]], -2))
    if exact == 0:
        return 0.0 if gap == 0 else float("inf")
    return gap / exact


def norm_of_product(B: Tensor, A: Tensor) -> float:
    RB = torch.linalg.qr(B, mode="r").R
    RA = torch.linalg.qr(A.mT, mode="r").R
    return float(torch.linalg.vector_norm(RB @ RA.mT))
