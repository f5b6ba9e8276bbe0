"""What methods that act on whole modules (kinds.Attach) hold on the model: modules of an adapter's own, and a place in
every call of the base, where it begins and where it ends."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from . import registry
from .kinds import Attach, Spec

if TYPE_CHECKING:
    from .tuner import Tuner


class Attached:
    """The adapters of one tuner that have modules of their own: `tuner.<module>[adapter]`."""

    def __init__(self, tuner: Tuner):
        self.tuner = tuner
        self.parts: dict[str, list[str]] = {}
        self.calls: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []  # data before, the call, what began in it
        self.hooks: list[Any] = []

    def add(self, adapter: str, cfg: Any, method: Any, *, fill: bool) -> None:
        """Make the adapter's modules, if its method has any."""
        made = method.modules(cfg, self.tuner.model, fill) if isinstance(method, Attach) else {}
        if not made:
            return
        self.parts[adapter] = list(made)
        self.tuner.host.structure += 1
        for name, module in made.items():
            if name not in self.tuner._modules:
                self.tuner.add_module(name, nn.ModuleDict())
            self._box(name)[adapter] = module
        if not self.hooks:
            model = self.tuner.model
            self.hooks = [
                model.register_forward_pre_hook(self._begin, with_kwargs=True),
                model.register_forward_hook(self._finish, with_kwargs=True, always_call=True),
            ]

    def remove(self, adapter: str) -> None:
        for name in self.parts.pop(adapter, []):
            del self._box(name)[adapter]
        if not self.parts:
            self.detach()

    def detach(self) -> None:
        """Leave the model's calls alone."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def require_grad(self, adapter: str, on: bool) -> None:
        for module in self.modules(adapter).values():
            module.requires_grad_(on)

    def modules(self, adapter: str) -> dict[str, nn.Module]:
        return {name: self._box(name)[adapter] for name in self.parts.get(adapter, [])}

    def tensor_names(self, adapter: str) -> Iterator[tuple[str, str, Spec, Any, str]]:
        """As Tuner.tensor_names. Files call every adapter "default" here."""
        for part, whole in self.modules(adapter).items():
            for path, module in whole.named_modules():
                for leaf, p in module._parameters.items():
                    if p is not None:
                        key = ".".join(x for x in (part, "default", path, leaf) if x)
                        yield "", key, Spec(tuple(p.shape)), module, leaf

    def _box(self, name: str) -> Any:
        return self.tuner._modules[name]

    def _acting(self) -> list[str]:
        host = self.tuner.host
        if not host.enabled:
            return []
        return [n for n in (host.active if host.rows is None else host.rows.names) if n in self.parts]

    def _begin(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        host = self.tuner.host
        call = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        began: dict[str, Any] = {}
        self.calls.append((host.data, call, began))
        for name in self._acting():
            cfg = self.tuner.peft_config[name]
            began[name] = registry.method_of(cfg).begin(cfg, self.modules(name), model, call)
        host.data = {**host.data, **began}
        return ((), call) if began else (args, kwargs)

    def _finish(self, model: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        self.tuner.host.data, call, began = self.calls.pop()
        if out is None:  # the call failed
            return None
        for name, data in began.items():
            cfg = self.tuner.peft_config[name]
            out = registry.method_of(cfg).finish(cfg, self.modules(name), model, call, out, data)
        return out
