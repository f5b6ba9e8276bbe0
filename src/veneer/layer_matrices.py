"""What an adapter adds to each layer, as matrices: A, B, delta, and its size and rank.

For low-rank methods norm and singular values come from two thin QR factorisations of the factors and a (k, k)
product, so the (out, in) delta is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .errors import AdapterError
from .kinds import Additive, LowRank
from .layer import Adapted, adapted_layers


@dataclass(frozen=True)
class Matrices:
    """One adapter on one layer. For low-rank methods delta = scaling * B @ A, with A (k, in) and B (out, k);
    of a convolution A is (k, in * kernel). A and B are None for other methods, which have a delta only.

    A, B are the trained tensors themselves where the method stores them as they are: changing them changes
    the model. shape: that of `delta()`, (out, in), or (out, in / groups, *kernel) of a convolution.
    """

    name: str
    adapter: str
    shape: tuple[int, ...]
    scaling: float
    A: Tensor | None
    B: Tensor | None
    layer: Adapted = field(repr=False)

    def __repr__(self) -> str:
        of = lambda t: None if t is None else tuple(t.shape)
        where = f"{self.name!r}, adapter={self.adapter!r}, shape={self.shape}, scaling={self.scaling:g}"
        return f"Matrices({where}, A={of(self.A)}, B={of(self.B)})"

    def delta(self) -> Tensor:
        """The change of the layer's weight, formed now: `shape`, detached, float32 at least.

        Raises CannotMerge for a method whose change depends on the input, and AdapterError while adapters are
        merged into the layer where the change is one of the base's weight.
        """
        if self.A is None or self.B is None:
            if self.layer.merged_adapters and not isinstance(self.layer.entries[self.adapter].method, Additive):
                raise AdapterError(f"{self.name}: adapters are merged into this weight; call unmerge_adapter() first")
            return self.layer.delta(self.adapter)
        work = torch.promote_types(self.A.dtype, torch.float32)
        return (self.B.detach().to(work) @ self.A.detach().to(work) * self.scaling).reshape(self.shape)

    def singular_values(self) -> Tensor:
        """Of the delta as a matrix (out, columns), largest first, float64 on the CPU; min(k, out, columns) of
        them."""
        if self.A is None or self.B is None:
            return torch.linalg.svdvals(self.delta().flatten(1).double().cpu())
        return delta_singular_values(self.A, self.B, self.scaling)

    def norm(self) -> float:
        """Frobenius norm of the delta."""
        if self.A is None or self.B is None:
            return float(torch.linalg.vector_norm(self.delta()))
        return float(torch.linalg.vector_norm(self.singular_values()))

    def effective_rank(self) -> float:
        """See `effective_rank` below."""
        return effective_rank(self.singular_values())


def matrices(model: nn.Module, adapter: str | None = None) -> dict[str, Matrices]:
    """Layer name -> Matrices of one adapter (by default the active one), in model order.

    model: a PeftModel, a Tuner, or any module that holds adapted layers. Names are those of the base model
    ("model.layers.3.self_attn.q_proj"). Raises AdapterError for an unknown adapter, and where it has to be
    named because several are active.
    """
    name = one_adapter(model, adapter)
    return {path: _of(path, layer, name) for path, layer in named_layers(model) if name in layer.entries}


def _of(path: str, layer: Adapted, adapter: str) -> Matrices:
    method, site = layer.entries[adapter].method, layer.site
    A = B = None
    if isinstance(method, LowRank) and type(method).delta is LowRank.delta and site.groups == 1:
        B, A = (t.flatten(1) for t in method.factors(layer.view(adapter)))
    shape = (site.out, site.inp // site.groups, *site.kernel)
    return Matrices(path, adapter, shape, float(layer.scaling[adapter]), A, B, layer)


def named_layers(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Adapted layers with their names in the base model, whatever wraps it."""
    from .tuner import Tuner

    tuner = next((m for m in model.modules() if isinstance(m, Tuner)), None)
    return iter(adapted_layers(model)) if tuner is None else tuner.adapted_layers()


def one_adapter(model: nn.Module, adapter: str | None) -> str:
    """The adapter meant: the one named, or the active one. Raises AdapterError where that is none or
    several."""
    layers = [layer for _, layer in named_layers(model)]
    if not layers:
        raise AdapterError(f"{type(model).__name__} holds no adapted layers")
    known = list(dict.fromkeys(n for layer in layers for n in layer.entries))
    if adapter is None:
        active = [n for n in layers[0].active_adapters if n in known]
        if len(active) != 1:
            raise AdapterError(f"{len(active)} adapters are active; name one of {', '.join(map(repr, known))}")
        return active[0]
    if adapter not in known:
        raise AdapterError(f"Adapter {adapter!r} not found on any layer; there are: {', '.join(map(repr, known))}")
    return adapter


def delta_singular_values(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Singular values of ``scaling * b @ a``, largest first, in float64.

    Args:
        a: (r, in)
        b: (out, r)
        scaling: any real number; its sign does not matter.

    Returns:
        (min(r, in, out),)
    """
    r_a = torch.linalg.qr(a.detach().double().cpu().T, mode="r").R
    r_b = torch.linalg.qr(b.detach().double().cpu(), mode="r").R
    return torch.linalg.svdvals(r_b @ r_a.T) * abs(scaling)


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the singular values taken as a distribution (Roy and Vetterli 2007, section 2).

    Lies between 1 and the number of non-zero values; 0 for a delta that is zero.
    """
    total = float(singular_values.sum())
    if total <= 0:
        return 0.0
    p = singular_values / total
    p = p[p > 0]
    return math.exp(float(-(p * p.log()).sum()))
