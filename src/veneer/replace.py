"""modules_to_save: a module trained whole, a copy of it per adapter, saved with the adapter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .context import Host
from .errors import AdapterError


class Wrapper(nn.Module):
    """A module of the engine's in place of one of the base's, beside those that adapt a layer's map."""

    is_adapter_wrapper = True

    own_active: tuple[str, ...] | None
    own_enabled: bool
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """A file's key below this module -> the key in the module's own state dict."""
        raise NotImplementedError

    @property
    def _adapters(self) -> set[str]:
        raise NotImplementedError

    @property
    def active_adapters(self) -> list[str]:
        raise NotImplementedError

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names


class TokenHolder(Wrapper):
    """Holds the adapter of trained embedding rows under the name that files know, `token_adapter`."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.token_adapter: Any = layer
        self.own_active: tuple[str, ...] | None = None
        self.own_enabled = True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "token_adapter" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.token_adapter, name)

    @property
    def original_module(self) -> nn.Module:
        return self.token_adapter.get_base_layer()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(*args, **kwargs)

    adapter_layer_names = ("token_adapter.trainable_tokens_delta",)

    @property
    def _adapters(self) -> set[str]:
        return set(self.token_adapter.entries)

    @property
    def active_adapters(self) -> list[str]:
        return [n for n in self.token_adapter.active_adapters if n in self._adapters]

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        key = "token_adapter.trainable_tokens_delta"
        return {key: f"{key}.{adapter_name}"}

    def delete_adapter(self, adapter: str) -> None:
        """The adapter's tensors are the inner layer's, which is deleted from by itself."""

    def unwrapped(self, adapters: Any = None) -> nn.Module:
        return self.token_adapter


class SavedModule(Wrapper):
    """Stands where the module stood; runs the active adapter's copy, or the original where none is active."""

    def __init__(self, module: nn.Module, name: str, host: Host):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.site_name, self.host = name, host
        self.own_active: tuple[str, ...] | None = None
        self.own_enabled = True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" not in self.__dict__ or "original_module" not in self._modules:
                raise
            return getattr(self.running(), name)

    def add(self, adapter: str, meta: bool = False) -> None:
        with torch.no_grad():
            made = copy.deepcopy(self.original_module)
        if meta:
            made = made.to("meta")
        for p in made.parameters():
            if p.is_floating_point():
                p.requires_grad_(True)
        self.host.unfrozen.add(adapter)
        self.host.structure += 1
        self.modules_to_save[adapter] = made
        self.look_up_live()

    adapter_layer_names = ("modules_to_save",)

    @property
    def _adapters(self) -> set[str]:
        return set(self.modules_to_save.keys())

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self.modules_to_save:
            return {}
        held = self.modules_to_save[adapter_name].state_dict()
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in held}

    def delete_adapter(self, adapter: str) -> None:
        if adapter in self.modules_to_save:
            del self.modules_to_save[adapter]
            self.host.structure += 1
            self.look_up_live()

    @property
    def active_adapters(self) -> list[str]:
        names = self.host.active if self.own_active is None else self.own_active
        return [n for n in names if n in self.modules_to_save]

    def set_adapter(self, adapter_names: Any, inference_mode: bool = False) -> None:
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        for adapter in self.modules_to_save:
            self.require_grad(adapter, adapter in names and not inference_mode)
        self.own_active = names
        self.host.apart = True
        self.look_up_live()

    def enable_adapters(self, enabled: bool) -> None:
        self.own_enabled = enabled
        self.host.irregular |= not enabled

    @property
    def disable_adapters(self) -> bool:
        return not (self.host.enabled and self.own_enabled)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            self.require_grad(name, requires_grad)

    def require_grad(self, adapter: str, on: bool) -> None:
        if adapter in self.modules_to_save:
            if on:
                self.host.unfrozen.add(adapter)
            for holder, leaf in self.floating(adapter):
                getattr(holder, leaf).requires_grad_(on)

    def floating(self, adapter: str) -> list[tuple[nn.Module, str]]:
        """(module, attribute) of the parameters of an adapter's copy that can have gradients."""
        inside = self.modules_to_save[adapter].modules() if adapter in self.modules_to_save else ()
        return [(m, n) for m in inside for n, p in m._parameters.items() if p is not None and p.is_floating_point()]

    def running(self) -> nn.Module:
        """The module that a call uses now."""
        if not (self.host.enabled and self.own_enabled):
            return self.original_module
        if torch.compiler.is_dynamo_compiling():
            self.traced()
            return self.__dict__["live"][0]  # type: ignore[no-any-return]
        return self._active()

    def _active(self) -> nn.Module:
        active = self.active_adapters
        return self.modules_to_save[active[-1]] if active else self.original_module

    @torch.compiler.assume_constant_result
    def traced(self) -> bool:
        """Called while a graph is made, never when it runs."""
        if "live" not in self.__dict__:
            self.host.traced.append(self)
        self.__dict__["live"] = (self._active(),)  # in a tuple: not a submodule
        return True

    def look_up_live(self) -> None:
        """Give compiled code the copy that is active now."""
        if "live" in self.__dict__:
            self.traced()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = self.host.rows
        if rows is None or not (self.host.enabled and self.own_enabled):
            return self.running()(*args, **kwargs)
        if not args:
            raise AdapterError(f"{self.site_name}: adapter_names needs the module's input by position, not by name")
        x, *rest = args
        index = rows.for_batch(len(x), self.site_name)
        out: torch.Tensor | None = None
        names = [n if n in self.modules_to_save else None for n in rows.names] + [None]
        for i in index.unique().tolist():  # whole modules cannot be stacked: one pass for each that occurs
            name = names[i]
            module = self.original_module if name is None else self.modules_to_save[name]
            where = (index == i).nonzero().squeeze(1).to(x.device)
            part = module(x[where], *rest, **kwargs)
            if not isinstance(part, torch.Tensor):
                raise AdapterError(f"{self.site_name}: adapter_names needs a module that returns a tensor")
            if out is None:
                out = part.new_empty((len(x), *part.shape[1:]))
            out = out.index_copy(0, where, part)
        assert out is not None
        return out

    def unwrapped(self, adapters: Any = None) -> nn.Module:
        """The module to leave behind: the active copy, or the original where `adapters` names none of them."""
        names = self.active_adapters if adapters is None else [n for n in adapters if n in self.modules_to_save]
        return self.modules_to_save[names[-1]] if names else self.original_module
