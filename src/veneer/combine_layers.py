"""The layers' part of add_weighted_adapter: layers of one shape are computed at once, the others one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .combine_checks import ON_FACTORS
from .combine_math import Part, Settings, best_of_rank, combine, rank_within, relative_error
from .layer import Adapted
from .site import Site

if TYPE_CHECKING:
    from .tuner import Tuner

Named = tuple[str, Adapted]
BATCH = 1 << 24  # bytes of factors that are worked on at once


@dataclass
class New:
    """One layer of the result."""

    A: Tensor
    B: Tensor
    bias: Tensor | None
    rank: int
    error: float


@dataclass
class Job:
    tuner: Tuner
    adapters: list[str]
    weights: list[float]
    settings: Settings
    lora_bias: bool
    new: dict[str, New] = field(default_factory=dict)


def combine_layers(job: Job, layers: Sequence[Named]) -> dict[str, New]:
    """What becomes of each layer, in their order."""
    made = {path: new for alike in _batches(job, layers) for path, new in _combine_alike(job, alike)}
    return {path: made[path] for path, _ in layers}


def _factors(layer: Adapted, name: str) -> tuple[Tensor, Tensor]:
    """B and A as they are stored."""
    view = layer.view(name)
    B, A = (
        (view.lora_embedding_B, view.lora_embedding_A) if layer.site.kind == "embedding" else (view.lora_B, view.lora_A)
    )
    return B.detach(), A.detach()


def _batches(job: Job, named: Sequence[Named]) -> Iterator[list[Named]]:
    """The layers that are computed at once: those alike in all but values, up to BATCH bytes of factors; the others
    one by one."""
    alike: dict[Any, list[Named]] = {}
    sizes: dict[Any, int] = {}
    for path, layer in named:
        key: Any = path
        stored = [_factors(layer, n) for n in job.adapters if n in layer.entries]
        if _single(job, layer):
            shapes = tuple((t.shape, t.dtype, t.device) for pair in stored for t in pair)
            scales = tuple((n, layer.scaling[n]) for n in job.adapters if n in layer.entries)
            key = shapes, scales, layer.site.groups, layer.site.kind
        alike.setdefault(key, []).append((path, layer))
        sizes[key] = 8 * sum(t.numel() for pair in stored for t in pair)
    for key, members in alike.items():
        most = max(1, BATCH // sizes[key])
        yield from (members[first : first + most] for first in range(0, len(members), most))


def _parts(job: Job, layers: Sequence[Adapted]) -> list[Part]:
    """Their factors, each a stack over the layers, in double precision where the device has it: B (layers, groups,
    out / groups, k), A (layers, groups, k, columns)."""
    parts, first = [], layers[0]
    for name, weight in zip(job.adapters, job.weights, strict=True):
        if name in first.entries:
            pairs = zip(*(_factors(layer, name) for layer in layers), strict=True)
            B, A = (torch.stack(ts).flatten(2).unflatten(1, (first.site.groups, -1)) for ts in pairs)
            work = torch.float32 if A.device.type == "mps" else torch.float64
            parts.append(Part(B.to(work), A.to(work), weight, first.scaling[name]))
    return parts


def _combine_alike(job: Job, alike: Sequence[Named]) -> Iterator[tuple[str, New]]:
    layers = [layer for _, layer in alike]
    s, site, parts = job.settings, layers[0].site, _parts(job, layers)
    ranks = [p.A.shape[-2] * site.groups for p in parts]
    if _single(job, layers[0]):
        rank = s.svd_rank or max(ranks)
        _check_groups(rank, site)
        quick = best_of_rank(parts, rank // site.groups)
        if quick is not None:
            (B, A), errors = quick
            for i, (path, layer) in enumerate(alike):
                yield path, New(A[i], B[i], _bias(job, layer), rank, float(errors[i]))
            return
    for i, (path, layer) in enumerate(alike):
        own = [Part(p.B[i], p.A[i], p.weight, p.scaling) for p in parts]
        yield path, _combine_layer(job, path, layer, own, ranks)


def _combine_layer(job: Job, path: str, layer: Adapted, parts: list[Part], ranks: list[int]) -> New:
    s, site = job.settings, layer.site
    if s.combination_type in ON_FACTORS and len(set(ranks)) > 1:
        raise ValueError(
            f"All adapters must have the same r value when using combination_type {s.combination_type!r}; on "
            f"{path} they have {', '.join(map(str, ranks))}. 'cat' and the svd types combine any ranks."
        )
    by_svd = s.combination_type.endswith("svd")
    rank = (s.svd_rank or max(ranks)) if by_svd else sum(ranks) if s.combination_type == "cat" else ranks[0]
    if s.svd_error is not None:
        rank = rank_within(parts, s.svd_error) * site.groups
    _check_groups(rank, site)
    B, A = combine(parts, s, rank // site.groups)
    return New(A, B, _bias(job, layer), rank, relative_error(parts, (B, A)))


def _check_groups(rank: int, site: Site) -> None:
    if rank % site.groups:
        raise ValueError(f"svd_rank={rank} on {site!r}: must be a multiple of the convolution's {site.groups} groups")


def _single(job: Job, layer: Adapted) -> bool:
    """Whether the plain "svd" is asked for, of factors in single precision or less, with double to work in."""
    s = job.settings
    if s.combination_type != "svd" or any(v is not None for v in (s.svd_clamp, s.svd_driver, s.svd_error)):
        return False
    stored = [p for n in job.adapters if n in layer.entries for p in layer.parameters_of(n)]
    return all(p.dtype.itemsize <= 4 and p.device.type != "mps" for p in stored)


def _bias(job: Job, layer: Adapted) -> Tensor | None:
    """lora_B's bias: the weighted sum of those there are."""
    if not job.lora_bias:
        return None
    total = torch.zeros(layer.site.out, device=layer.site.device)
    for name, weight in zip(job.adapters, job.weights, strict=True):
        if name in layer.entries and layer.view(name).has("lora_B_bias"):
            total = total + weight * layer.scaling[name] * layer.view(name).lora_B_bias.detach().float()
    return total
