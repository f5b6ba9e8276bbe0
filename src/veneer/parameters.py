"""target_parameters: adapters on parameters of modules that are not layers, such as the stacked weights of
experts.

A 3-D parameter (E, a, b) is E maps: the last axis is read and the middle one written, or the other way where
the module says `is_transposed`. Its weight is seen as (E, out, inp); a 2-D parameter as (out, inp). Several
parameters of one module are nested wrappers, the last outermost. In a call the adapted parameter stands in
for the stored one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import AdapterError
from .layer import Adapted
from .replace import SavedModule, TokenHolder
from .site import Site
from .targets import match_parameters

if TYPE_CHECKING:
    from .kinds import Method
    from .tuner import Tuner


class ParameterSite(Site):
    """One parameter of a module, by name."""

    kind = "parameter"
    substitutes = True

    def __init__(self, module: nn.Module, name: str, parameter: str):
        self.names = (parameter, "")
        stored = module._parameters[parameter]
        assert stored is not None  # match_parameters found it
        self.stacked = stored.dim() == 3
        self.transposed = self.stacked and bool(getattr(module, "is_transposed", False))
        self.experts = stored.shape[0] if self.stacked else 1
        super().__init__(module, name)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.stored.shape))
        return f"{self.name}.{self.names[0]} ({shape})"

    def size(self) -> tuple[int, int]:
        out, inp = self.stored.shape[-2:]
        return (inp, out) if self.transposed else (out, inp)

    def check(self, dropout: float) -> None:
        if dropout > 0:
            raise ValueError(
                f"{self!r}: dropout={dropout} does not work with target_parameters, which show no input to "
                "drop from; "
                "set lora_dropout=0"
            )

    def to_canonical(self, W: Tensor) -> Tensor:
        return W.mT if self.transposed else W

    def from_canonical(self, W: Tensor) -> Tensor:
        return W.mT if self.transposed else W

    def compose(self, B: Tensor, A: Tensor) -> Tensor:
        """B (out, r * E) with the experts of one rank side by side, A (r * E, inp) with the ranks of one
        expert."""
        if not self.stacked:
            return B @ A
        down = A.reshape(self.experts, -1, self.inp)
        up = B.reshape(self.out, -1, self.experts).permute(2, 0, 1)
        return torch.bmm(up, down)

    def op(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        raise AdapterError(f"{self!r}: how a module uses its parameter is its own; only its weight can be adapted")


def plain_modules(model: nn.Module, prefix: str = "", *, saved: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Modules of the base under the names they had before anything was wrapped; `saved`: also those that
    adapters train whole."""
    for name, child in model.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, TokenHolder):
            child = child.token_adapter
        if saved and isinstance(child, SavedModule):
            child = child.original_module
        if isinstance(child, Adapted):
            child = child.get_base_layer()
        elif getattr(child, "is_adapter_wrapper", False):
            continue
        yield path, child
        yield from plain_modules(child, path, saved=saved)


def parameter_layers(
    tuner: Tuner, cfg: Any, method: Method, taken: set[int]
) -> Iterator[tuple[str, Adapted, nn.Module, str]]:
    """(name with the parameter's, wrapper, parent, attribute) for each parameter that the config names, the
    inner before the outer. taken: ids of modules that the config adapts as layers.

    Raises ValueError where the method cannot adapt parameters, the module is adapted as a layer too, or
    another adapter of this model has other parameters.
    """
    wanted = getattr(cfg, "target_parameters", None)
    if not wanted:
        return
    if "parameter" not in method.sites:
        raise ValueError(f"{method.name} does not work with target_parameters; plain LoRA does (use_dora=False)")
    found = match_parameters(
        tuner.model,
        wanted,
        names=plain_modules(tuner.model),
        allow_unmatched=getattr(cfg, "allow_unmatched", False),
        modules_given=bool(getattr(cfg, "target_modules", None)),
    )
    _same_set(tuner, {f"{path}.{parameter}" for path, _, parameter in found})
    outer: dict[str, nn.Module] = {}
    for path, module, parameter in found:
        name, (where, _, leaf) = f"{path}.{parameter}", path.rpartition(".")
        parent = tuner.model.get_submodule(where) if where else tuner.model
        top = outer.get(path) or getattr(parent, leaf)
        layer = next((w for w in _chain(top) if w.site.names[0] == parameter), None)
        if layer is None:
            if id(module) in taken or any(not isinstance(w.site, ParameterSite) for w in _chain(top)):
                raise ValueError(
                    f"Trying to wrap an `nn.Parameter` of layer '{path}' of type {type(module).__name__}, which is not "
                    f"a valid target. {name} is in target_parameters and the layer is also adapted through "
                    "target_modules; take it out of one of them (target_modules=[] adapts parameters alone)"
                )
            layer = Adapted(ParameterSite(module, path, parameter), tuner.host, base=top)
            outer[path] = layer
        yield name, layer, parent, leaf


def _chain(module: nn.Module) -> Iterator[Adapted]:
    while isinstance(module, Adapted):
        yield module
        module = module.base_layer


def _same_set(tuner: Tuner, wanted: set[str]) -> None:
    sites = [layer.site for _, layer in tuner.adapted_layers() if isinstance(layer.site, ParameterSite)]
    present = {f"{s.name}.{s.names[0]}" for s in sites}
    if present and present != wanted:
        raise ValueError(
            "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
            f"parameters, but got {sorted(wanted)} for the new adapter and {sorted(present)} for those there"
        )
