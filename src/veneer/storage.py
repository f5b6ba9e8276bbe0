"""Where adapters' tensors live: containers on the layer, one entry an adapter, named as users and files know them
(`layer.lora_A["default"].weight`)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import AdapterError
from .kinds import Spec
from .site import Site


class Named(dict[str, Any]):
    """Adapter name -> value; as in a module's container, an entry is an attribute, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no adapter {name!r} here") from None


class BufferDict(nn.Module):
    """A dict of buffers, as nn.ParameterDict is one of parameters."""

    def __init__(self, buffers: Mapping[str, Tensor] | None = None, persistent: bool = False):
        super().__init__()
        self.persistent = persistent
        if buffers is not None:
            self.update(buffers)

    def __getitem__(self, key: str) -> Tensor:
        return self._buffers[key]  # type: ignore[return-value]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._buffers.pop(key, None)
        self.register_buffer(key, value, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]
        self._non_persistent_buffers_set.discard(key)

    def __contains__(self, key: object) -> bool:
        return key in self._buffers

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def keys(self) -> Any:
        return self._buffers.keys()

    def values(self) -> Any:
        return self._buffers.values()

    def items(self) -> Any:
        return self._buffers.items()

    def pop(self, key: str) -> Tensor:
        out = self[key]
        del self[key]
        return out

    def clear(self) -> None:
        for key in list(self._buffers):
            del self[key]

    def update(self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        for key, value in dict(buffers).items():
            self[key] = value

    def twin(self, value: Tensor) -> Tensor:
        """An equal tensor that is held here under another name, else `value`: what is never written needs one place."""
        like = lambda t: t.shape == value.shape and t.dtype == value.dtype and t.device == value.device
        same = lambda t: t is value or (like(t) and not t.is_meta and torch.equal(t, value))
        return next((t for t in self.values() if same(t)), value)

    def extra_repr(self) -> str:
        return "\n".join(f"({k}): {v.dtype} {tuple(v.shape)}" for k, v in self.items())


_CONTAINER = nn.ModuleDict()


def check_name(adapter: str) -> None:
    """Raise AdapterError for a name that no container can have an entry under."""
    if not isinstance(adapter, str) or not adapter or "." in adapter:
        raise AdapterError(
            f"adapter name {adapter!r}: use a non-empty name without dots; it becomes part of tensor names"
        )
    if hasattr(_CONTAINER, adapter):
        raise AdapterError(
            f"adapter name {adapter!r} is an attribute of torch's modules, which hold adapters under their names; "
            f"choose another, such as {adapter + '_adapter'!r}"
        )


class Slot(nn.Module):
    """Holds the tensors of one adapter under one name."""

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={tuple(p.shape)}" for k, p in self._parameters.items() if p is not None)


def _bare(cls: type[nn.Module]) -> Any:
    """A module of this class without its constructor's random draws."""
    made = object.__new__(cls)
    nn.Module.__init__(made)
    return made


def _linear(shape: tuple[int, ...], _: Site) -> nn.Module:
    m = _bare(nn.Linear)
    m.__dict__.update(out_features=shape[0], in_features=shape[1])  # plain numbers: nn.Module's own search is slow
    m._parameters["bias"] = None
    return m


def _conv(shape: tuple[int, ...], site: Site, down: bool) -> nn.Module:
    base: Any = site.module
    n = len(site.kernel)
    m = _bare(
        type(base) if type(base) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) else (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    )
    keys = ("kernel_size", "stride", "padding", "dilation", "padding_mode", "_reversed_padding_repeated_twice")
    for key in keys:
        setattr(m, key, getattr(base, key))
    if not down:
        m.kernel_size = m.stride = m.dilation = (1,) * n
        m.padding, m.padding_mode, m._reversed_padding_repeated_twice = (0,) * n, "zeros", [0] * (2 * n)
    m.groups = (site.inp if down else site.inp // max(site.groups, 1)) // shape[1] if down else site.groups
    m.in_channels, m.out_channels = (site.inp, shape[0]) if down else (shape[1] * site.groups, shape[0])
    m.transposed, m.output_padding = False, (0,) * n
    m.register_parameter("bias", None)
    return m


def make_slot(spec: Spec, site: Site) -> nn.Module:
    if spec.like == "linear" and len(spec.shape) == 2:
        return _linear(spec.shape, site)
    if spec.like == "copy":
        return copy.deepcopy(site.module)
    if spec.like in ("conv-down", "conv-up"):
        return _conv(spec.shape, site, spec.like == "conv-down")
    return Slot()


def place(owner: nn.Module, storage: str, adapter: str, spec: Spec, value: Tensor, site: Site) -> None:
    """Put a tensor into owner's container for `storage` ("lora_A.weight", "vera_lambda_b", "net.0.weight")."""
    head, _, leaf = storage.partition(".")
    tensor: Any = nn.Parameter(value, requires_grad=False) if spec.train else value
    if not leaf:
        _box(owner, head, nn.ParameterDict if spec.train else BufferDict)[adapter] = tensor
        return
    boxes = _box(owner, head, nn.ModuleDict)
    *inner, leaf = leaf.split(".")
    if adapter not in boxes:
        boxes[adapter] = Slot() if inner else make_slot(spec, site)
    slot = boxes[adapter]
    for part in inner:
        if part not in slot._modules:
            slot.add_module(part, make_slot(spec, site))
        slot = slot._modules[part]
    if spec.train:
        slot.register_parameter(leaf, tensor)
    else:
        slot.register_buffer(leaf, tensor, persistent=False)


def _box(owner: nn.Module, head: str, kind: type[nn.Module]) -> Any:
    """The container of that name, made where it is missing. Two methods on one layer may want the name for containers
    of different kinds (LoRA's lora_A holds modules, AdaLoRA's parameters): the second takes a name of its own."""
    for name in (head, f"{head}_{kind.__name__}"):
        box = owner._modules.get(name)
        if box is None:
            box = owner._modules[name] = kind()  # not add_module, which asks the base layer for the name, too
        if type(box) is kind:
            return box
    raise AssertionError(f"{head} has a container of each kind")


def _holding(owner: nn.Module, head: str, adapter: str) -> Any:
    """The container that has the adapter's entry, or None."""
    names = (head, *(f"{head}_{kind.__name__}" for kind in (nn.ModuleDict, nn.ParameterDict, BufferDict)))
    boxes: list[Any] = [owner._modules[n] for n in names if n in owner._modules]
    return next((box for box in boxes if adapter in box), None)


def holder_of(owner: nn.Module, storage: str, adapter: str) -> tuple[Any, str]:
    """(module, attribute) such that getattr(module, attribute) is the tensor."""
    head, *inner = storage.split(".")
    box = _holding(owner, head, adapter)
    if not inner:
        return box, adapter
    *path, leaf = inner
    return box[adapter].get_submodule(".".join(path)), leaf


def remove(owner: nn.Module, storage: str, adapter: str) -> None:
    box = _holding(owner, storage.partition(".")[0], adapter)
    if box is not None:
        del box[adapter]


def empty(spec: Spec, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    return torch.empty(spec.shape, device=device, dtype=spec.dtype or dtype)
