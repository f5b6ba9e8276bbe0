"""Adapted, the only wrapper: it holds a base layer and any number of adapters, of any methods.

The maths is the method's; this file decides which adapters act, in which dtype, and whether the base already holds
them (merged).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import arrival, row_cache, rows, storage
from .base_calls import Base, Stacked
from .context import Host
from .errors import AdapterError, CannotMerge, PeftWarning
from .kinds import Additive, Method, Spec, Weights
from .live import Box, Live
from .site import Site
from .view import Entry, Scalings, View, attribute, own_fields

Group = tuple[Method, tuple[View, ...]]


class Adapted(nn.Module):
    """A base layer with its adapters."""

    is_adapter_wrapper = True
    adapts_a_layer = True  # of what is inside only base_layer may hold wrappers (walk.py)

    def __init__(self, site: Site, host: Host, base: nn.Module | None = None):
        """base: the module to call, where it is not the site's own (another Adapted around it)."""
        super().__init__()
        self.base_layer = site.module if base is None else base
        self.site, self.host = site, host
        self.entries: dict[str, Entry] = {}
        self._scalings = Scalings(self.entries)
        self.merged_adapters: list[str] = []
        self.own_active: tuple[str, ...] | None = None
        self.own_enabled = True
        self._derived: set[str] = set()  # names that adapters here have, or had, of `Method.derived`
        self._backup: Any = None
        self._plans: dict[torch.dtype | None, tuple[Group, ...]] = {}
        self._plans_version = -1
        self.waiting: set[str] = set()  # adapters loaded before the base's weight (arrival.py)
        self.live: Live | None = None  # once compiled code has it
        self.kept = row_cache.Kept()
        self.training = site.module.training

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks is the base's own; an adapted attention's weights are handed out adapted."""
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        site = self.__dict__.get("site")
        if site is None or "base_layer" not in modules or (name.startswith("_") and name not in site.private):
            return super().__getattr__(name)
        if site.substitutes and name in site.names:
            W, b = self.effective()
            return site.from_canonical(W) if name == site.names[0] else b
        try:
            return getattr(self.get_base_layer(), name)
        except AttributeError:
            found = {n: getattr(e.cfg, name) for n, e in self.entries.items() if name in own_fields(e.cfg.__class__)}
            made = {n: e.method.derived[name] for n, e in self.entries.items() if name in e.method.derived}
            if not found and name not in self._derived:
                return self._shared(name)
            return storage.Named(found | {n: of(self.view(n)) for n, of in made.items()})

    def _shared(self, name: str) -> Any:
        """The container of a tensor that an adapter here shares with other layers; AttributeError for another name."""
        for entry in self.entries.values():
            for key in entry.shared:
                if key == name:
                    return entry.where[attribute(key)][0]
        raise AttributeError(f"{type(self.get_base_layer()).__name__!r} object has no attribute {name!r}")

    # -- adapters --------------------------------------------------------------------------------------
    def add(
        self,
        name: str,
        cfg: Any,
        method: Method,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        shared: tuple[nn.Module, dict[str, Spec]] | None = None,
    ) -> View:
        """Create an adapter's tensors (not filled) and return its view."""
        method.check(cfg, self.site)
        specs = method.tensors(cfg, self.site)
        entry = Entry(cfg, method, specs)
        base_dtype = self.site.dtype if self.site.dtype.is_floating_point else torch.get_default_dtype()
        for key, spec in specs.items():
            if spec.value is None:
                filed = spec.train or spec.save  # what no file brings is filled here and now
                value = storage.empty(spec, (device if filed else None) or self.site.device, dtype or base_dtype)
            else:
                assert isinstance(spec.value, Tensor)
                value = spec.value if self.site.stored.is_meta else spec.value.to(self.site.device)
            storage.place(self, key, name, spec, value, self.site)
            entry.where[attribute(key)] = storage.holder_of(self, key, name)
        if shared is not None:
            owner, entry.shared = shared
            for key in entry.shared:
                entry.where[attribute(key)] = storage.holder_of(owner, key, name)
        if method.dropout is not None:
            if method.dropout not in self._modules:
                self._modules[method.dropout] = Box(self)  # its name may be a setting's (module_dropout)
            rate = getattr(cfg, method.dropout, 0.0)
            drops: Any = self._modules[method.dropout]
            drops[name] = nn.Dropout(rate) if rate > 0 else nn.Identity()
        self.entries[name] = entry
        self._derived.update(method.derived)
        self.changed()
        return View(self, name)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.merged_adapters:
            raise AdapterError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first. (On "
                f"{self.site!r}.)"
            )
        entry = self.entries.pop(adapter_name, None)
        self.waiting.discard(adapter_name)
        if entry is None:
            return
        for key in entry.specs:
            storage.remove(self, key, adapter_name)
        if entry.method.dropout is not None:
            drops: Any = self._modules[entry.method.dropout]
            del drops[adapter_name]
        if self.own_active is not None:
            self.own_active = tuple(n for n in self.own_active if n != adapter_name)
        self.changed()

    def changed(self) -> None:
        """Forget cached views."""
        self._plans_version = -1
        self.kept.stacks = None
        self.host.structure += 1
        self.look_up_live()

    def look_up_live(self) -> None:
        """Give compiled code the adapters that are active now."""
        if self.live is not None:
            self.live = Live(self, None)

    @torch.compiler.assume_constant_result
    def traced(self, dtype: torch.dtype | None) -> bool:
        """Called while a graph is made, never when it runs."""
        if self.live is None:
            self.host.traced.append(self)
        if self.live is None or dtype not in self.live.groups:
            self.live = Live(self, dtype)
        return True

    def train(self, mode: bool = True) -> Adapted:
        if mode:
            self.kept.stacks = None
        return super().train(mode)

    @property
    def active_adapters(self) -> list[str]:
        return list(self.host.active if self.own_active is None else self.own_active)

    @property
    def enabled(self) -> bool:
        return self.host.enabled and self.own_enabled

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def disable_adapters(self) -> bool:
        return not self.enabled

    def _containers(self, trained: bool) -> tuple[str, ...]:
        kept = {k.partition(".")[0]: s.train for e in self.entries.values() for k, s in e.specs.items()}
        drops = {e.method.dropout: False for e in self.entries.values() if e.method.dropout is not None}
        return tuple(name for name, train in {**drops, **kept}.items() if train is trained)

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The containers of trained tensors."""
        return self._containers(True)

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """The other containers with an entry an adapter."""
        return ("scaling", *self._containers(False))

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.entries)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate adapters on this layer alone; the model's set_adapter does all layers, without a walk."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for adapter in self.entries:
            self.require_grad(adapter, adapter in names and not inference_mode)
        self.own_active = tuple(names)
        self.host.apart = True
        self.changed()

    def enable_adapters(self, enabled: bool) -> None:
        self.own_enabled = enabled
        self.host.irregular |= not enabled
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            for adapter in self.entries:
                self.require_grad(adapter, False)
        self.changed()

    def parameters_of(self, adapter: str) -> Iterable[nn.Parameter]:
        """The trained tensors of an adapter on this layer, shared ones left out."""
        return (getattr(holder, leaf) for holder, leaf in self.trained_places(adapter))

    def trained_places(self, adapter: str) -> list[tuple[Any, str]]:
        """(module, attribute) of each of them."""
        entry = self.entries[adapter]
        return [entry.where[attribute(key)] for key, spec in entry.specs.items() if spec.train]

    def require_grad(self, adapter: str, on: bool) -> None:
        if on:
            self.host.unfrozen.add(adapter)
        for p in self.parameters_of(adapter):
            p.requires_grad_(on)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.entries:
                self.require_grad(name, requires_grad)

    # -- what acts ----------------------------------------------------------------------------------------
    def groups(self, names: Sequence[str], dtype: torch.dtype | None) -> tuple[Group, ...]:
        """Adapters in order, neighbours of one method together."""
        if self.waiting:
            arrival.catch_up(self)
        out: list[tuple[Method, list[View]]] = []
        for name in names:
            if name in self.entries:
                view = View(self, name, dtype)
                if out and out[-1][0] is view.method:
                    out[-1][1].append(view)
                else:
                    out.append((view.method, [view]))
        return tuple((m, tuple(v)) for m, v in out)

    def view(self, adapter: str, dtype: torch.dtype | None = None) -> View:
        """One adapter's tensors, handed out in `dtype` (None: as stored)."""
        if self.waiting:
            arrival.catch_up(self)
        return View(self, adapter, dtype)

    @property
    def scaling(self) -> Scalings:
        return self._scalings

    @scaling.setter
    def scaling(self, values: Mapping[str, float]) -> None:
        """As any assignment: whoever read the scalings before keeps the numbers that he read."""
        values = dict(values)
        self._scalings.keep()
        self._scalings = Scalings(self.entries)
        self._scalings.update(values)

    def plan(self, dtype: torch.dtype | None) -> tuple[Group, ...]:
        if torch.compiler.is_dynamo_compiling():
            self.traced(dtype)
            assert self.live is not None
            return self.live.groups[dtype] if self.enabled and not self.merged_adapters else ()
        if self._plans_version != self.host.version:
            self._plans = {}
            self._plans_version = self.host.version
        found = self._plans.get(dtype)
        if found is None:
            live = self.enabled and not self.merged_adapters
            found = self.groups(self.active_adapters, dtype) if live else ()
            if not self.waiting:
                self._plans[dtype] = found
        return found

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """Adapters compute in the activations' dtype; their own tensors may be float32 masters."""
        if x.is_floating_point():
            return x.dtype
        return self.site.dtype if self.site.dtype.is_floating_point else torch.get_default_dtype()

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self.merged_adapters:
            self._while_merged()
        if self.site.substitutes:
            return self._substituted(args if x is None else (x, *args), kwargs)
        if self.host.rows is not None and self.enabled:
            return rows.forward(self, self.host.rows, x, args, kwargs)
        base: Any = self.base_layer
        dtype = self.compute_dtype(x)
        groups = self.plan(dtype)
        if not groups:
            return base(x, *args, **kwargs)
        base = Base(self.site, dtype)
        for method, views in groups[:-1]:
            base = Stacked(base, method, views)
        method, views = groups[-1]
        return method.forward(views, x, base, args, kwargs)

    def _substituted(self, args: tuple, kwargs: dict) -> Any:
        """Call the base with the adapted weight in the place of its own, or by a method that acts on the call."""
        groups = self._whole_call()
        if not groups:
            return self.base_layer(*args, **kwargs)
        if self.site.whole:
            call: Any = self.base_layer
            for method, views in groups:
                call = partial(_called, method, views, call)
            return call(*args, **kwargs)
        with self.site.stand_in(*self.effective()):
            return self.base_layer(*args, **kwargs)

    def _whole_call(self) -> tuple[Group, ...]:
        """The adapters that act where one weight serves the whole call."""
        dtype = self.site.dtype if self.site.dtype.is_floating_point else torch.get_default_dtype()
        rows_now = self.host.rows
        if rows_now is None or not self.enabled:
            return self.plan(dtype)
        used = {rows_now.names[i] if i >= 0 else "" for i in rows_now.index.tolist()}
        acting = {n if n in self.entries else "" for n in used}
        if len(acting) > 1:
            parameter = self.site.kind == "parameter"
            start = "lora.ParamWrapper does not support mixed adapter batches yet. " if parameter else ""
            raise AdapterError(
                f"{start}{self.site!r} uses one weight for the whole batch, so adapter_names cannot mix adapters "
                f"here ({', '.join(sorted(repr(n or '__base__') for n in acting))}); run one batch an adapter"
            )
        return self.groups(sorted(acting - {""}), dtype)

    def effective(self) -> Weights:
        """(weight, bias) that act now, in the site's layout; gradients reach the adapters through them."""
        if self.merged_adapters:
            self._while_merged()
        W, b = self.site.weight(), self.site.bias()
        for method, views in self._whole_call():
            if not method.mergeable:
                raise CannotMerge(f"{method.name} on {self.site!r} depends on the input and has no weight")
            W, b = method.merged(views, W, b)
        return W, b

    def _while_merged(self) -> None:
        if not self.enabled:
            self.unmerge()  # a disabled layer is the base
        elif self.host.rows is not None:
            raise AdapterError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    # -- merging --------------------------------------------------------------------------------------------
    def merged_weights(self, names: Sequence[str]) -> Weights:
        """(weight, bias) with these adapters, in float32 at least, in the site's layout."""
        for name in names:
            if name in self.entries and not self.entries[name].method.mergeable:
                method = self.entries[name].method
                raise CannotMerge(method.cannot_merge(self.site))
        W, b = self.site.weight().detach(), self.site.bias()
        work = torch.promote_types(W.dtype, torch.float32)
        W, b = W.to(work), None if b is None else b.detach().to(work)
        with torch.no_grad():
            for method, views in self.groups(names, work):
                shape = W.shape
                W, b = method.merged(views, W, b)
                if W.shape != shape:
                    raise CannotMerge(
                        f"{method.name} on {self.site!r} reads all channels while the layer has {self.site.groups} "
                        "groups, so no weight of the layer's shape equals it; keep it unmerged"
                    )
        return W, b

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Put adapters into the base's weight. The base's own parameters are kept aside for `unmerge`.

        Raises ValueError where the merged weight holds NaN or infinity and safe_merge is set.
        """
        names = self.active_adapters if adapter_names is None else list(adapter_names)
        asked = [n for n in names if n in self.entries]
        names = [n for n in asked if n not in self.merged_adapters]
        if not names:
            if asked:
                warnings.warn("All adapters are already merged, nothing to do", PeftWarning, stacklevel=2)
            return
        everything = [*self.merged_adapters, *names]
        if self._backup is not None:  # sums and orders are those of one merge of all of them
            self.site.put_back(self._backup)
            self._backup = None
        W, b = self.merged_weights(everything)
        if safe_merge and not (torch.isfinite(W).all() and (b is None or torch.isfinite(b).all())):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken: on "
                f"{self.site!r} it gives NaN or infinity, so nothing was merged into this layer"
            )
        self._backup = self.site.put(W, b)
        self.host.merged = True
        self.merged_adapters = everything
        self.changed()

    def unmerge(self) -> None:
        """Restore the base's own parameters, bit for bit."""
        if not self.merged_adapters:
            return
        self.site.put_back(self._backup)
        self._backup, self.merged_adapters = None, []
        self.changed()

    def get_base_layer(self) -> nn.Module:
        base: nn.Module = self.base_layer
        while isinstance(base, Adapted):
            base = base.base_layer
        return base

    def delta(self, adapter: str) -> Tensor:
        """The change an adapter makes to the weight, (out, inp / groups, *kernel), float32 at least."""
        W, method = self.site.weight().detach(), self.entries[adapter].method
        work = torch.promote_types(W.dtype, torch.float32)
        if isinstance(method, Additive):  # of one that acts on some tokens alone, the change there
            with torch.no_grad():
                return method.delta(self.view(adapter, work)).to(work)
        new, _ = self.merged_weights([adapter])
        return new - W.to(new.dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The same in the layout of the layer's own weight."""
        return self.site.from_canonical(self.delta(adapter)).to(self.site.dtype)

    # -- scaling, under peft's names -------------------------------------------------------------------------
    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.entries:
            entry = self.entries[adapter]
            self.scaling[adapter] = scale * entry.method.scaling(entry.cfg)

    def scale_layer(self, scale: float) -> None:
        for adapter in self.active_adapters:
            if adapter in self.scaling:
                self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for adapter in self.active_adapters:
            if adapter in self.entries:
                entry = self.entries[adapter]
                self.scaling[adapter] = (
                    entry.method.scaling(entry.cfg) if scale is None else self.scaling[adapter] / scale
                )

    # -- the base's own face -----------------------------------------------------------------------------------
    @property
    def weight(self) -> Tensor:
        if self.site.read_directly:
            return self.site.from_canonical(self.effective()[0]).to(self.site.dtype)
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        if self.site.read_directly:
            b = self.effective()[1]
            return None if b is None else b.to(self.site.dtype)
        return self.base_layer._parameters.get("bias")

    @property
    def in_features(self) -> int:
        return self.site.inp

    @property
    def out_features(self) -> int:
        return self.site.out

    def _get_name(self) -> str:
        """In a printed model: the first adapter's method and the kind of layer, "lora.Linear"."""
        base = type(self.get_base_layer()).__name__
        if base in ("Conv1D", "NonDynamicallyQuantizableLinear"):
            base = "Linear"
        if self.site.kind == "parameter":
            base = "ParamWrapper"
        first = next(iter(self.entries.values()), None)
        return type(self).__name__ if first is None else f"{first.method.name.lower()}.{base}"

    def extra_repr(self) -> str:
        what = [f"parameter_name={self.site.names[0]!r}"] if self.site.kind == "parameter" else []
        return ", ".join(what + [f"{n}: {e.method.name}" for n, e in self.entries.items()])


def _called(method: Method, views: tuple[View, ...], base: Any, *args: Any, **kwargs: Any) -> Any:
    return method.forward(views, None, base, args, kwargs)  # type: ignore[arg-type]


def adapted_layers(model: nn.Module) -> Iterable[tuple[str, Adapted]]:
    """Every Adapted of a model with its path."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Adapted))
