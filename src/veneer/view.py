"""View: one adapter's tensors on one layer, as its method sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .kinds import Method, Spec
    from .layer import Adapted
    from .site import Site

__all__ = ["Entry", "Scalings", "View", "attribute", "own_fields"]


class View:
    """One adapter's tensors on one layer, handed to the method (`p` in method.py).

    It reads through to the containers at each access, so `.to()`, FSDP, functional_call and deepcopy need no care.
    """

    def __init__(self, layer: Adapted, name: str, dtype: torch.dtype | None = None):
        self.layer, self.name, self.dtype = layer, name, dtype
        entry = layer.entries[name]
        self.entry, self.method, self.where, self.raw = entry, entry.method, entry.where, entry.raw
        self.held: dict[str, nn.Module] | None = None  # of a traced layer: its modules by container, see live.py

    def __getattr__(self, key: str) -> Any:
        if key in ("where", "raw", "layer"):  # not set yet while copy and pickle rebuild the object
            raise AttributeError(key)
        try:
            holder, leaf = self.where[key]
        except KeyError:
            raise AttributeError(f"{self.method.name} has no tensor {key!r} on {self.site!r}") from None
        t = getattr(holder, leaf)
        if t.dtype == self.dtype or self.dtype is None or key in self.raw or not t.is_floating_point():
            return t
        return t.to(self.dtype)

    def has(self, key: str) -> bool:
        return key in self.where

    def fill(self, key: str, value: Tensor) -> None:
        """Write an initial value."""
        holder, leaf = self.where[key]
        with torch.no_grad():
            getattr(holder, leaf).copy_(value)

    @property
    def site(self) -> Site:
        return self.layer.site

    @property
    def cfg(self) -> Any:
        return self.entry.cfg

    @property
    def scaling(self) -> float:
        return self.entry.scaling

    @property
    def training(self) -> bool:
        return self.layer.training

    @property
    def memory(self) -> dict[str, Any]:
        return self.entry.memory

    @property
    def data(self) -> dict[str, Any]:
        """Per-call data from the context."""
        return self.layer.host.given()

    @property
    def dropping(self) -> bool:
        """Whether `drop` changes what it is given."""
        name = self.method.dropout
        return name is not None and self.layer.training and getattr(self.cfg, name, 0.0) > 0

    def drop(self, x: Tensor) -> Tensor:
        if self.method.dropout is None or not self.layer.training:
            return x
        module = self.copy_of_module(self.method.dropout)
        return x if isinstance(module, nn.Identity) or not x.is_floating_point() else module(x)

    @property
    def dropout_rate(self) -> float:
        """The rate of `drop` as it acts now: 0 outside training."""
        if self.method.dropout is None or not self.layer.training:
            return 0.0
        module = self.copy_of_module(self.method.dropout)
        return module.p if isinstance(module, nn.Dropout) and module.training else 0.0

    def copy_of_module(self, container: str) -> nn.Module:
        if self.held is not None:
            return self.held[container]
        return self.layer._modules[container][self.name]  # type: ignore[index]


class Entry:
    """What the layer knows of one adapter besides its tensors."""

    def __init__(self, cfg: Any, method: Method, specs: dict[str, Spec]):
        self.cfg, self.method, self.specs = cfg, method, specs
        self.shared: dict[str, Spec] = {}
        self.where: dict[str, tuple[Any, str]] = {}
        self.raw = frozenset(attribute(k) for k, s in specs.items() if s.raw)
        self.start: tuple[Tensor, Tensor] | None = None  # the first A and B, where data took them out of the base
        self.memory: dict[str, Any] = {}  # what the method keeps on this layer between calls; not saved
        self.scaling = method.scaling(cfg)


class Scalings(MutableMapping[str, float]):
    """`layer.scaling`: adapter name -> the number that multiplies its change, as the entries hold it."""

    def __init__(self, entries: Mapping[str, Any]):
        self.entries = entries

    def keep(self) -> None:
        """Hold the numbers of now, whatever becomes of the entries."""
        self.entries = {name: SimpleNamespace(scaling=entry.scaling) for name, entry in self.entries.items()}

    def __getitem__(self, name: str) -> float:
        return self.entries[name].scaling  # type: ignore[no-any-return]

    def __setitem__(self, name: str, value: float) -> None:
        self.entries[name].scaling = value

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"a scaling is part of its adapter; delete that: layer.delete_adapter({name!r})")

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        return repr(dict(self))


def attribute(storage_name: str) -> str:
    """How a view calls a stored tensor: "lora_A.weight" -> "lora_A", "lora_B.bias" -> "lora_B_bias"."""
    return storage_name.removesuffix(".weight").replace(".", "_")


@cache
def own_fields(config: Any) -> frozenset[str]:
    """A config's fields beside those that every config has: what `layer.r["default"]` may ask for."""
    from .config import AdapterConfig

    common = {f.name for f in dataclasses.fields(AdapterConfig)}
    return frozenset(f.name for f in dataclasses.fields(config)) - common
