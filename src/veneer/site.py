"""One view of every layer that can be adapted: a linear map with (out, inp, kernel, groups) and an `op`.

Whatever the class, weights come and go as (out, inp / groups, *kernel): transformers' Conv1D is transposed, an
embedding is the linear map of a one-hot row, its weight (width, rows).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .errors import AdapterError, CannotMerge


class Site(ABC):
    """A layer seen as a linear map. `kind` is what a method lists in its `sites`.

    experts: how many maps a 3-D parameter stacks. names: the module's weight and bias. substitutes: the
    module's own forward does more than this map, so adapters act by a weight that stands in for it.
    whole: the site is the module's call itself, not a weight in it.
    read_directly: the parent reads the layer's weight itself, so the wrapper's `weight` is the adapted one.
    grouped: the weight is quantised with one scale for each group of inputs (GPTQ), which QALoRA pools.
    quantised: the weight is packed (backends/): it is read by value, and writing one loses something.
    """

    kind: ClassVar[str]
    kernel: tuple[int, ...] = ()
    groups: int = 1
    experts: int = 1
    names: tuple[str, str] = ("weight", "bias")
    substitutes: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    read_directly: bool = False
    grouped: bool = False
    quantised: ClassVar[bool] = False
    private: ClassVar[frozenset[str]] = frozenset()  # underscored attributes that parents read

    def __init__(self, module: nn.Module, name: str = ""):
        self.module, self.name = module, name
        self.out, self.inp = self.size()

    def __repr__(self) -> str:
        shape = "x".join(map(str, (self.out, self.inp, *self.kernel)))
        return f"{self.name or type(self.module).__name__} ({shape})"

    @abstractmethod
    def size(self) -> tuple[int, int]:
        """(out, inp)"""

    @abstractmethod
    def op(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """The layer's own operation with another weight, its number of outputs free."""

    def plain(self) -> bool:
        """Whether calling the module is x W^T + b and nothing else: its class's own forward, no hooks, no weight
        of a class that computes in another way."""
        return False

    # -- the base's weight --------------------------------------------------------------------------
    @property
    def stored(self) -> Tensor:
        return getattr(self.module, self.names[0])

    def weight(self) -> Tensor:
        """(out, inp / groups, *kernel), a view of the base's weight."""
        return self.to_canonical(self.stored)

    def bias(self) -> Tensor | None:
        return self._held(self.names[1]).get(self.names[1])

    def _held(self, name: str) -> dict[str, Any]:
        """Where the module has a parameter: FSDP1 puts views of its flat one beside the registered ones in a call."""
        own = self.module.__dict__
        return own if name in own else own["_parameters"]  # type: ignore[no-any-return]

    def check(self, dropout: float) -> None:
        """Raise where this layer cannot be adapted, or not with this dropout on the adapter's input."""

    def to_canonical(self, W: Tensor) -> Tensor:
        return W

    def from_canonical(self, W: Tensor) -> Tensor:
        return W

    def put(self, W: Tensor, b: Tensor | None) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Give the layer new parameters and return the old objects, which `put_back` restores.

        New Parameter objects rather than in-place writes: unmerging is exact, and a weight tied to another
        layer (an embedding and its head) stays as it was over there.
        """
        held = self.module._parameters
        old_w, old_b = held[self.names[0]], held.get(self.names[1])
        assert old_w is not None
        data = self.from_canonical(W).to(old_w.dtype).contiguous()
        held[self.names[0]] = nn.Parameter(data, requires_grad=old_w.requires_grad)
        if b is not None:
            trained = old_b is not None and old_b.requires_grad
            held[self.names[1]] = nn.Parameter(b.to(old_w.dtype), requires_grad=trained)
        return old_w, old_b

    def put_back(self, old: tuple[nn.Parameter, nn.Parameter | None]) -> None:
        now = self.stored
        for name, p in zip(self.names, old, strict=True):
            if p is not None and (p.device, p.dtype) != (now.device, now.dtype):  # the model was moved or cast
                p.data = p.data.to(device=now.device, dtype=now.dtype)
            if p is not None or name in self.module._parameters:
                self.module._parameters[name] = p

    @contextmanager
    def stand_in(self, W: Tensor, b: Tensor | None) -> Iterator[None]:
        """While it lasts the module reads these for its own weight and bias; gradients flow through them."""
        old = {name: held[name] for name in self.names if name in (held := self._held(name))}
        dtype = old[self.names[0]].dtype
        try:
            self._held(self.names[0])[self.names[0]] = self.from_canonical(W).to(dtype)
            if b is not None and self.names[1] in old:
                self._held(self.names[1])[self.names[1]] = b.to(dtype)
            yield
        finally:
            for name, value in old.items():
                self._held(name)[name] = value

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def device(self) -> torch.device:
        return self.stored.device

    # -- low-rank products --------------------------------------------------------------------------
    def down(self, x: Tensor, A: Tensor) -> Tensor:
        return self.op(x, A, None)

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        return F.linear(h, B)

    def accumulate(self, y: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
        """y + scaling * up(h, B)"""
        return y + self.up(h, B * scaling).to(y.dtype)

    def compose(self, B: Tensor, A: Tensor) -> Tensor:
        """The weight of `up(down(x))`."""
        return B @ A

    def ungrouped(self, W: Tensor) -> Tensor:
        """The weight as that of a layer without groups, which reads every input: (out, inp, *kernel)."""
        return W

    # -- gates: functions on the last axis -----------------------------------------------------------
    def on_input(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return f(x)

    def on_output(self, f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        return f(y)

    def fold_input(self, f: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
        """The weight of op(f(x)), for linear f: W @ f(identity).T"""
        eye = torch.eye(self.inp, dtype=W.dtype, device=W.device)
        return W @ f(eye).mT

    def per_feature(self, v: Tensor) -> Tensor:
        """A vector of `out` numbers, shaped to broadcast over the layer's output."""
        return v


def spread(W: Tensor, groups: int) -> Tensor:
    """(out, n / groups, *kernel) -> (out, n, *kernel): each group of outputs keeps its own inputs, zero elsewhere."""
    if groups == 1:
        return W
    wide = W.new_zeros(groups, groups, W.shape[0] // groups, *W.shape[1:])  # (of the output, of the input, ...)
    own = torch.arange(groups, device=W.device)
    wide = wide.index_put((own, own), W.unflatten(0, (groups, -1)))
    return wide.movedim(1, 2).flatten(2, 3).flatten(0, 1)


def _accumulate(y: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
    """One product that adds onto y, without a full-size tensor for the change."""
    if y.dtype != h.dtype or h.dtype != B.dtype or isinstance(scaling, Tensor):
        return y + (F.linear(h, B) * scaling).to(y.dtype)
    rows = y.numel() // y.shape[-1]  # not -1: a rank may be zero
    flat = torch.addmm(y.reshape(rows, -1), h.reshape(rows, h.shape[-1]), B.mT, alpha=scaling)
    return flat.reshape(y.shape)


def watched(module: nn.Module) -> bool:
    """Whether somebody sees the module's calls: hooks, or a forward put over its class's."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def _plain(module: nn.Module) -> bool:
    own = type(module._parameters.get("weight")) is nn.Parameter
    return own and not watched(module) and not _has_any_global_hook()


class LinearSite(Site):
    kind = "linear"

    def plain(self) -> bool:
        return type(self.module).forward is nn.Linear.forward and _plain(self.module)

    def accumulate(self, y: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
        return _accumulate(y, h, B, scaling)

    def size(self) -> tuple[int, int]:
        return self.stored.shape[0], self.stored.shape[1]

    def op(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, W, b)


class Conv1DSite(Site):
    """transformers' Conv1D: a Linear whose weight is stored (inp, out)."""

    kind = "linear"

    def plain(self) -> bool:
        return type(self.module).__module__ == "transformers.pytorch_utils" and _plain(self.module)

    def accumulate(self, y: Tensor, h: Tensor, B: Tensor, scaling: float) -> Tensor:
        return _accumulate(y, h, B, scaling)

    def size(self) -> tuple[int, int]:
        return self.stored.shape[1], self.stored.shape[0]

    def to_canonical(self, W: Tensor) -> Tensor:
        return W.T

    def from_canonical(self, W: Tensor) -> Tensor:
        return W.T

    def op(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, W, b)


class EmbeddingSite(Site):
    """A row look-up: the linear map of a one-hot vector; op(ids, W) with W (out, rows)."""

    kind = "embedding"

    def size(self) -> tuple[int, int]:
        return self.stored.shape[1], self.stored.shape[0]

    def to_canonical(self, W: Tensor) -> Tensor:
        return W.T

    def from_canonical(self, W: Tensor) -> Tensor:
        return W.T

    def scale(self, y: Tensor) -> Tensor:
        scale = getattr(self.module, "embed_scale", None)  # Gemma, BART and kin scale what they look up
        return y if scale is None else y * torch.as_tensor(scale, dtype=y.dtype, device=y.device)

    def op(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        m = self.module
        y = F.embedding(x, W.T, m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse)  # type: ignore[arg-type]
        return self.scale(y)

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        m = self.module
        y = F.embedding(x, A.T, m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse)  # type: ignore[arg-type]
        return self.scale(y)

    def on_input(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        raise AdapterError(f"{self!r}: an embedding's input is a token id; nothing can be applied to it")

    def fold_input(self, f: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
        raise AdapterError(f"{self!r}: an embedding's input is a token id; nothing can be folded into it")


class ConvSite(Site):
    """Conv1d, Conv2d, Conv3d with stride, padding (all modes), dilation and groups."""

    kind = "conv"

    def __init__(self, module: nn.Module, name: str = ""):
        self.kernel = tuple(module.kernel_size)  # type: ignore[arg-type]
        self.groups = module.groups  # type: ignore[assignment]
        self.conv: Any = getattr(F, f"conv{len(self.kernel)}d")
        super().__init__(module, name)

    def size(self) -> tuple[int, int]:
        return self.module.out_channels, self.module.in_channels  # type: ignore[return-value]

    def _padded(self, x: Tensor) -> tuple[Tensor, Any]:
        m: Any = self.module
        if m.padding_mode == "zeros":
            return x, m.padding
        return F.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode), 0

    def op(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        m: Any = self.module
        x, padding = self._padded(x)
        return self.conv(x, W, b, m.stride, padding, m.dilation, self.inp // W.shape[1])

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        m: Any = self.module
        x, padding = self._padded(x)
        return self.conv(x, A, None, m.stride, padding, m.dilation, self.inp // A.shape[1])

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        return self.conv(h, B.reshape(*B.shape[:2], *[1] * len(self.kernel)), None, 1, 0, 1, self.groups)

    def compose(self, B: Tensor, A: Tensor) -> Tensor:
        if self.groups > 1 and A.shape[1] == self.inp:
            raise CannotMerge(
                f"{self!r}: this adapter reads all {self.inp} input channels while the layer's {self.groups} groups "
                f"read {self.inp // self.groups} each, so no weight of the layer's shape equals it; keep it unmerged"
            )
        B2, A2 = B.flatten(1), A.flatten(1)
        if self.groups == 1:
            return (B2 @ A2).reshape(len(B), self.inp, *self.kernel)
        Bg, Ag = B2.unflatten(0, (self.groups, -1)), A2.unflatten(0, (self.groups, -1))
        return torch.bmm(Bg, Ag).reshape(len(B), self.inp // self.groups, *self.kernel)

    def ungrouped(self, W: Tensor) -> Tensor:
        return W if W.shape[1] == self.inp else spread(W, self.groups)

    def on_input(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        axis = -1 - len(self.kernel)
        return f(x.movedim(axis, -1)).movedim(-1, axis)

    def on_output(self, f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        return self.on_input(f, y)

    def fold_input(self, f: Callable[[Tensor], Tensor], W: Tensor) -> Tensor:
        eye = torch.eye(self.inp, dtype=W.dtype, device=W.device)
        M = f(eye)  # row i: what input channel i becomes
        if self.groups == 1:
            return torch.einsum("oc...,ic->oi...", W, M)
        g, size = self.groups, self.inp // self.groups
        blocks = M.reshape(g, size, g, size)
        own = torch.stack([blocks[i, :, i] for i in range(g)])
        if math.isclose(blocks.norm().item(), own.norm().item(), rel_tol=1e-6):
            Wg = W.unflatten(0, (g, -1))
            return torch.einsum("goc...,gic->goi...", Wg, own).flatten(0, 1)
        raise CannotMerge(f"{self!r}: the change mixes channels of different groups; keep the adapter unmerged")

    def per_feature(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *[1] * len(self.kernel))


class ModuleSite(Site):
    """Any module, for methods that put a trained copy in its place."""

    kind = "module"

    def size(self) -> tuple[int, int]:
        weight = self.module._parameters.get("weight")
        if weight is None:
            return 0, 0
        return weight.shape[0], weight.shape[-1]

    def op(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        raise AdapterError(f"{self!r}: {type(self.module).__name__} is not a linear map")


class BlockSite(ModuleSite):
    """A module whose whole call a method acts on: an attention, a decoder block."""

    kind = "block"
    substitutes = True
    names = ("", "")
    whole = True

    def __repr__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"

    @property
    def stored(self) -> Tensor:
        """Its first parameter: where the adapter's tensors go, and in which precision."""
        return next(self.module.parameters())


def site_of(module: nn.Module, name: str = "", wanted: frozenset[str] | None = None) -> Site | None:
    """The Site of a module, or None where veneer has no view of it. `wanted`: the kinds a method supports."""
    from .attention import AttentionSite
    from .backends import site_of_backend
    from .backends.refused import why_not

    if wanted is not None and "block" in wanted:
        return BlockSite(module, name)
    site: Site | None = site_of_backend(module, name)
    if site is None and why_not(module) is None:
        if isinstance(module, nn.Linear):
            site = LinearSite(module, name)
        elif isinstance(module, nn.Embedding):
            site = EmbeddingSite(module, name)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            site = ConvSite(module, name)
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            site = Conv1DSite(module, name)
        elif isinstance(module, nn.MultiheadAttention):
            site = AttentionSite(module, name)
    if wanted is not None and "module" in wanted and (site is None or site.kind not in wanted):
        return ModuleSite(module, name)
    return site if site is not None and (wanted is None or site.kind in wanted) else None
