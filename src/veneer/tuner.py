"""Tuner: a base model whose layers are adapted, and every operation over its layers."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import attach, registry, schedule, storage
from . import inject as injection
from .config import PeftConfig
from .context import Host
from .errors import AdapterError, PeftWarning
from .inits import title
from .kinds import Method
from .layer import Adapted
from .replace import SavedModule
from .site import Site
from .tying import tied_with_embedding
from .view import attribute
from .walk import walk

#: methods that peft's tuners have and nothing here calls: compat/on_tuners.py
PEFT_ONLY = (
    "_get_kasa_loss", "_get_monteclora_loss", "_init_tinylora_v", "_init_vblora_vector_bank",
    "get_nb_savable_parameters", "print_savable_parameters",
)  # fmt: skip


class Tuner(nn.Module):
    """`model`: the base, changed in place. `peft_config`: adapter name -> config. `host`: what is active.

    Keys in state dicts and files begin with the tuner's own place ("base_model.") and "model.".
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str = "default",
        *,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
        autocast_adapter_dtype: bool = True,
        fill: bool = True,
    ):
        super().__init__()
        self.model = model
        self.host = Host()
        self.peft_config: dict[str, Any] = {}
        self.methods: dict[str, Method] = {}
        self.reading: dict[str, Method] = {}  # adapters whose methods take arguments of a call
        self.shared_specs: dict[str, dict[str, Any]] = {}
        self.targeted: dict[str, list[str]] = {}
        self.replicated: list[list[int]] | None = None  # ranges of layer_replication, once they are in place
        self.schedules: dict[str, schedule.Schedule] = {}
        self.scheduling = False  # whether an adapter may have one: names are looked at only then
        self._trained_places: dict[str, list[tuple[dict[str, Any], str]]] = {}
        self._trained_at = -1
        self.attached = attach.Attached(self)
        self.autocast_adapter_dtype = autocast_adapter_dtype
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        for name, cfg in configs.items():
            self.add_adapter(name, cfg, low_cpu_mem_usage=low_cpu_mem_usage, fill=fill)
        self.set_adapter(next(iter(configs)), inference_mode=next(iter(configs.values())).inference_mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "_modules" not in self.__dict__ or "model" not in self._modules:
                raise
            if name in PEFT_ONLY:
                from .compat import on_tuners

                return partial(getattr(on_tuners, name.lstrip("_")), self)
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.call(args, kwargs):
            out = self.model(*args, **kwargs)
        if self.scheduling and self.training and self.host.enabled and torch.is_grad_enabled() and schedule.names(self):
            self._watched()
            schedule.add_loss(self, out, kwargs)
        return out

    @torch.compiler.assume_constant_result
    def _watched(self) -> bool:
        """In compiled code done while the graph is made, never when it runs."""
        schedule.watch(self)
        return True

    @property
    def update_and_allocate(self) -> Callable[[int], None]:
        """update_and_allocate(step): the active adapters' schedules, where the training loop runs them itself."""
        if not schedule.names(self):
            raise AttributeError("no active adapter has a schedule (AdaLoRA, AdaMSS with use_asa)")
        return partial(schedule.by_hand, self)

    def call(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A context for what this call gives to the adapters (task ids); those arguments are taken out of `kwargs`."""
        if not self.reading:
            return nullcontext()
        names = frozenset().union(*(m.reads for m in self.reading.values()))
        return self._given(self.reading, names, args, kwargs)

    def extra_loss(self) -> Tensor | float:
        """What the active adapters' methods add to a training loss; 0.0 where none does or the model is in eval."""
        return self.losses_of(self.host.active if self.training and self.host.enabled else ())

    def losses_of(self, names: Iterable[str], only: str | None = None) -> Any:
        """The sum of what these adapters' methods, or the one method named, add to a loss; 0.0 where none does."""
        total: Any = 0.0
        for name in names:
            method = registry.method_of(self.peft_config[name])
            if type(method).extra_loss is not Method.extra_loss and only in (None, method.name):
                part = method.extra_loss([m.view(name) for _, m in self.adapted_layers() if name in m.entries])
                total = total if part is None else total + part
        return total

    @contextmanager
    def _given(self, reading: Any, names: frozenset[str], args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
        data = {n: kwargs.pop(n) for n in sorted(names) if kwargs.get(n) is not None}
        for n in names:
            kwargs.pop(n, None)
        batch = next((v for k, v in [("", a) for a in args] + list(kwargs.items()) if torch.is_tensor(v)), None)
        for n, given in data.items():
            if batch is not None and len(given) != len(batch):
                raise ValueError(f"{n} has {len(given)} entries and the batch {len(batch)} rows; give one a row")
        acting = self.host.rows.names if self.host.rows is not None else self.host.active
        for name, method in reading.items():
            if name in acting:
                method.check_call(self.peft_config[name], data)
        with self.host.call(**data), ExitStack() as stack:
            for method in dict.fromkeys(reading.values()):
                watching = method.listener(self, args, kwargs)
                if watching is not None:
                    stack.enter_context(watching)
            yield
            if self.host.data and self.training and torch.is_grad_enabled():
                self.host.remember()

    @property
    def model_type(self) -> str | None:
        config = getattr(self.model, "config", None)
        if isinstance(config, dict):
            return config.get("model_type")
        return getattr(config, "model_type", None)

    def adapter_dtype(self, site: Site) -> torch.dtype:
        """float32 masters over a half precision base unless autocast_adapter_dtype is off; else the base's dtype."""
        if not site.dtype.is_floating_point:
            return torch.get_default_dtype()
        if self.autocast_adapter_dtype and site.dtype in (torch.float16, torch.bfloat16):
            return torch.float32
        return torch.get_default_dtype() if site.dtype.itemsize < 2 else site.dtype

    # -- walking ---------------------------------------------------------------------------------------
    def adapted_layers(self) -> Iterator[tuple[str, Adapted]]:
        return ((n, m) for n, m in walk(self.model) if isinstance(m, Adapted))

    def saved_modules(self) -> Iterator[tuple[str, SavedModule]]:
        return ((n, m) for n, m in walk(self.model) if isinstance(m, SavedModule))

    def wrappers(self) -> Iterator[tuple[str, Any]]:
        """Every module that the engine put in place of another."""
        return ((n, m) for n, m in walk(self.model) if getattr(type(m), "is_adapter_wrapper", False))

    # -- adapters --------------------------------------------------------------------------------------
    def add_adapter(self, name: str, cfg: Any, *, low_cpu_mem_usage: bool = False, fill: bool = True) -> None:
        """Inject an adapter. It is not active before set_adapter, except where it is the first."""
        self.check_new(name, cfg)
        first = not self.peft_config
        self.peft_config[name] = cfg
        self.prefix = registry.method_of(cfg).prefix
        if registry.method_of(cfg).reads:
            self.reading[name] = registry.method_of(cfg)
        self.methods[name] = registry.method_of(cfg)
        self.scheduling |= type(self.methods[name]).scheduled is not Method.scheduled
        if first:
            for p in self.model.parameters():
                p.requires_grad_(False)
        try:
            self.targeted[name] = injection.inject(self, name, cfg, meta=low_cpu_mem_usage, fill=fill)
            injection.save_whole(self.model, self.host, name, cfg, meta=low_cpu_mem_usage)
        except Exception:
            self.peft_config.pop(name)
            self.reading.pop(name, None)
            self.methods.pop(name, None)
            self.attached.remove(name)
            for _, m in list(self.wrappers()):
                m.delete_adapter(name)
            raise
        if not self.host.active:
            self.host.activate((name,))
        self.host.version += 1
        if not cfg.inference_mode:
            self.train_biases(name, cfg)
        self.require_grad(name, name in self.host.active and not cfg.inference_mode)

    def check_new(self, name: str, cfg: Any) -> None:
        storage.check_name(name)
        if name in self.peft_config:
            raise ValueError(f"Adapter with name {name!r} already exists. Please use a different name.")
        method = registry.method_of(cfg)
        if name in method.prefix:
            warnings.warn(
                f"Adapter name {name!r} should not be contained in the prefix {method.prefix!r}. This may lead to "
                "reinitialization of the adapter weights during loading.",
                PeftWarning,
                stacklevel=3,
            )
        own = method.tuner_class()
        if own is not None and not isinstance(self, own):
            raise ValueError(
                f"{method.name} acts on the whole model's call, which this model was not made for; make it with "
                f"get_peft_model(base, {type(cfg).__name__}(...))"
            )
        for other in self.peft_config.values():
            if not self.mixes and registry.method_of(other).prefix != method.prefix:
                raise ValueError(
                    f"this model has {other.peft_type} adapters and cannot take {cfg.peft_type} beside them; "
                    "use get_peft_model(..., mixed=True)"
                )
            if registry.method_of(other).exclusive != method.exclusive:
                alone = type(method if method.exclusive else registry.method_of(other)).__name__
                raise ValueError(
                    f"{alone} cannot be combined with adapters that don't use {alone}, since it modifies the base "
                    f"weights: adapter {name!r} does not fit beside {', '.join(map(repr, self.peft_config))}"
                )
        changing = [c for c in (*self.peft_config.values(), cfg) if registry.method_of(c).changes_base(c)]
        if self.peft_config and changing and not method.exclusive:
            with_init = [title(c) for c in changing if hasattr(c, "init_lora_weights")]
            warnings.warn(
                f"{with_init[0] if with_init else changing[0].peft_type} changes the base weights of the model and "
                "should thus not be used with other adapters, which were made for the base as it was: give each a "
                "model of its own, or save this one with path_initial_model_for_weight_conversion, as a plain LoRA",
                PeftWarning,
                stacklevel=3,
            )
        biased = [n for n, c in {**self.peft_config, name: cfg}.items() if getattr(c, "bias", "none") != "none"]
        if len(biased) > 1:
            raise ValueError(
                f"{type(self).__name__} supports only 1 adapter with bias. When using multiple adapters, set bias to "
                f"'none' for all adapters (now set: {', '.join(biased)})"
            )

    mixes = False
    prefix = ""  # what the names of the adapters' tensors begin with

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and its tensors; the first of those left becomes active where none is."""
        if adapter_name not in self.peft_config:
            have = ", ".join(map(repr, self.peft_config)) or "none"
            raise ValueError(
                f"Adapter {adapter_name} does not exist: {adapter_name!r} not found; this model has: {have}"
            )
        if any(adapter_name in layer.merged_adapters for _, layer in self.adapted_layers()):
            raise AdapterError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        for _, m in list(self.wrappers()):
            m.delete_adapter(adapter_name)
        for key in self.shared_specs.pop(adapter_name, {}):
            storage.remove(self, key, adapter_name)
        self.attached.remove(adapter_name)
        del self.peft_config[adapter_name]
        self.reading.pop(adapter_name, None)
        self.methods.pop(adapter_name, None)
        self.targeted.pop(adapter_name, None)
        self.schedules.pop(adapter_name, None)
        self.host.unfrozen.discard(adapter_name)
        left = tuple(n for n in self.host.active if n != adapter_name)
        self.host.activate(left)
        if not left and self.peft_config:
            self.set_adapter(next(iter(self.peft_config)))

    def known(self, names: str | Iterable[str]) -> list[str]:
        """The names as a list; ValueError for one that is not an adapter of this model."""
        listed = [names] if isinstance(names, str) else list(names)
        for n in listed:
            if n not in self.peft_config:
                have = ", ".join(map(repr, self.peft_config)) or "none"
                raise ValueError(f"Adapter {n!r} not found; this model has: {have}")
        return listed

    @property
    def active_adapters(self) -> list[str]:
        return list(self.host.active)

    @property
    def active_adapter(self) -> str | list[str]:
        return self.host.active[0] if len(self.host.active) == 1 else list(self.host.active)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate adapters and make exactly their tensors trainable (none in inference mode).

        A merged model is unmerged first, with a warning.
        """
        names = self.known(adapter_name)
        if self.host.merged and any(layer.merged for _, layer in self.adapted_layers()):
            warnings.warn(
                "Adapter cannot be set when the model is merged. Unmerging the model first.", PeftWarning, stacklevel=2
            )
            self.unmerge_adapter()
        if len(names) > 1:
            for path, wrapper in self.saved_modules():
                both = [n for n in names if n in wrapper.modules_to_save]
                if len(both) > 1:
                    raise ValueError(
                        f"Only one adapter can be set at a time for ModulesToSaveWrapper: {path} has a copy of its own "
                        f"in each of {', '.join(both)}"
                    )
        if self.host.apart:
            for _, m in self.wrappers():
                m.own_active = None
            self.host.apart = False
        self.host.activate(names)
        for n in self.peft_config:
            on = n in names and not inference_mode
            if on or self._may_train(n):
                self.require_grad(n, on)

    def _may_train(self, adapter: str) -> bool:
        """Whether a tensor of the adapter requires gradients, by the engine's doing or a caller's."""
        held = self._trained(adapter)
        return adapter in self.host.unfrozen or any(parameters[leaf].requires_grad for parameters, leaf in held)

    def _trained(self, adapter: str) -> list[tuple[dict[str, Any], str]]:
        """Where the adapter's trained tensors are, found once: (a module's _parameters, name)."""
        if self._trained_at != self.host.structure:
            self._trained_places, self._trained_at = {}, self.host.structure
        found = self._trained_places.get(adapter)
        if found is None:
            places: list[tuple[Any, str]] = []
            for _, m in self.wrappers():
                if isinstance(m, SavedModule):
                    places += m.floating(adapter)
                elif adapter in getattr(m, "entries", ()):
                    places += m.trained_places(adapter)
            for key, spec in self.shared_specs.get(adapter, {}).items():
                if spec.train:
                    places.append(storage.holder_of(self, key, adapter))
            for part in self.attached.modules(adapter).values():
                places += [(m, n) for m in part.modules() for n, p in m._parameters.items() if p is not None]
            found = self._trained_places[adapter] = [(holder._parameters, leaf) for holder, leaf in places]
        return found

    def require_grad(self, adapter: str, on: bool) -> None:
        for parameters, leaf in self._trained(adapter):
            parameters[leaf].requires_grad_(on)
        if on:
            self.host.unfrozen.add(adapter)
        else:
            self.host.unfrozen.discard(adapter)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for n in self.known(adapter_names):
            self.require_grad(n, requires_grad)

    def train_biases(self, name: str, cfg: Any) -> None:
        """bias="all": every bias of the base is trained; "<method>_only": those of the adapted layers."""
        mode = getattr(cfg, "bias", "none")
        if mode in (None, "none"):
            return
        if mode == "all":
            for key, p in self.model.named_parameters():
                if key.rpartition(".")[2] == "bias" and "lora_" not in key and ".original_module." not in key:
                    p.requires_grad_(True)
        elif str(mode).endswith("_only"):
            for _, layer in self.adapted_layers():
                b = layer.bias
                if name in layer.entries and b is not None:
                    b.requires_grad_(True)
        else:
            raise NotImplementedError(
                f"Requested bias: {mode}, is not implemented; use 'none', 'all' or '<method>_only'"
            )

    def enable_adapter_layers(self) -> None:
        self.host.enable(True)
        for _, m in self.wrappers():
            m.own_enabled = True

        self.host.irregular = False

    def disable_adapter_layers(self) -> None:
        self.host.enable(False)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before = self.host.enabled
        mixed = before and self.host.irregular and any(not m.own_enabled for _, m in self.wrappers())
        if mixed:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. This is most "
                "likely unintentional. After exiting the disable_adapter context, all adapters will be enabled",
                PeftWarning,
                stacklevel=4,
            )
        self.host.enable(False)
        try:
            yield
        finally:
            self.enable_adapter_layers() if mixed else self.host.enable(before)

    # -- merging ----------------------------------------------------------------------------------------
    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Put adapters into the base's weights; `unmerge_adapter` restores them bit for bit."""
        names = None if adapter_names is None else self.known(adapter_names)
        done: list[Adapted] = []
        try:
            for _, layer in self.adapted_layers():
                layer.merge(safe_merge=safe_merge, adapter_names=names)
                done.append(layer)
        except Exception:
            for layer in done:
                layer.unmerge()
            raise
        if errors := self.merge_errors():
            from .backends.quantised import summary

            warnings.warn(
                f"The base is quantised: {summary(errors)}. merge_errors() has the layers; merging into the original "
                "weights loses nothing (`veneer merge --merge-into original`)",
                PeftWarning,
                stacklevel=2,
            )

    def merge_errors(self) -> dict[str, Any]:
        """Layer path -> backends.quantised.MergeError of the quantised layers that adapters are merged into."""
        found = ((n, getattr(m.site, "merge_error", None)) for n, m in self.adapted_layers())
        return {n: error for n, error in found if error is not None}

    def unmerge_adapter(self) -> None:
        for _, layer in self.adapted_layers():
            layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model with the adapters in its weights and no trace of veneer."""
        self.merge_adapter(adapter_names, safe_merge=safe_merge)
        return self._unwrapped(lambda layer: layer.base_layer, self.known(adapter_names) if adapter_names else None)

    def unload(self) -> nn.Module:
        """The base model as it was, without the adapters."""
        self.unmerge_adapter()
        self.attached.detach()
        return self._unwrapped(lambda layer: layer.base_layer, [])

    def _unwrapped(self, base_of: Callable[[Adapted], nn.Module], saved: Sequence[str] | None) -> nn.Module:
        wrappers = list(self.wrappers())
        for name, m in reversed(wrappers):  # what is inside a wrapper before the wrapper itself
            if isinstance(m, Adapted):
                new: nn.Module = base_of(m)
            else:
                new = m.unwrapped(saved)
            path, _, leaf = name.rpartition(".")
            parent = self.model.get_submodule(path) if path else self.model
            setattr(parent, leaf, new)
        self._untie([name for name, _ in wrappers])
        return self.model

    def _untie(self, unwrapped: Sequence[str]) -> None:
        """A merged embedding may no longer be its head's: then the config must not tie them again on loading.
        Where both came out equal they become one tensor again, as do an encoder's and a decoder's embeddings."""
        config: Any = getattr(self.model, "config", None)
        if config is None or not getattr(config, "tie_word_embeddings", False):
            return
        get_in, get_out = (
            getattr(self.model, "get_input_embeddings", None),
            getattr(self.model, "get_output_embeddings", None),
        )
        if get_in is None or get_out is None:
            return
        first, second = get_in(), get_out()
        if first is None or second is None:
            return
        there = dict(self.model.named_modules(remove_duplicate=False))
        for module in (there[name] for name in unwrapped if name in there):
            weight = module._parameters.get("weight")
            if weight is not None and weight.shape == first.weight.shape and torch.equal(weight, first.weight):
                module.weight = first.weight
        if first.weight is second.weight:
            return
        if self._one(first.weight, second.weight):
            second.weight = first.weight
        else:
            warnings.warn(
                "Setting config.tie_word_embeddings to False: merging gave the embeddings and the head, which shared a "
                "weight, one each, and a saved model holds both. Adapt them with ensure_weight_tying=True to keep one.",
                PeftWarning,
                stacklevel=4,
            )
            config.tie_word_embeddings = False

    def _one(self, a: Tensor, b: Tensor) -> bool:
        """Whether two merged weights are one: equal, or the same up to rounding where every adapter keeps them tied."""
        if torch.equal(a, b):
            return True
        tied = all(getattr(c, "ensure_weight_tying", False) for c in self.peft_config.values())
        return tied and torch.allclose(a, b, rtol=2e-2, atol=1e-3 * float(a.abs().max()))

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        **options: Any,
    ) -> Any:
        """A new LoRA or IA3 adapter from a weighted sum of others; see combine.add_weighted_adapter; returns its
        report."""
        from .combine import add_weighted_adapter
        from .combine_vectors import add_weighted_vectors

        if adapters and all(self.peft_config[n].peft_type == "IA3" for n in self.known(adapters)):
            return add_weighted_vectors(self, adapters, weights, adapter_name)
        return add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, **options)

    # -- what was adapted -------------------------------------------------------------------------------
    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the layers that the adapters' target_modules matched, each once."""
        return list(dict.fromkeys(n for names in self.targeted.values() for n in names))

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Paths of the parameters that the adapters' target_parameters matched."""
        sites = (layer.site for _, layer in self.adapted_layers() if layer.site.kind == "parameter")
        return [f"{site.name}.{site.names[0]}" for site in sites]

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """A model's config as a dict, whatever kind it is; {"model_type": "custom"} where there is none."""
        config: Any = getattr(model, "config", None)
        if config is None:
            return {"model_type": "custom"}
        if isinstance(config, dict):
            return config
        own = getattr(config, "to_dict", None)
        return dataclasses.asdict(config) if own is None else own()

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        return tied_with_embedding(self.model)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether convert_to_lora can turn this adapter into a LoRA."""
        from .to_lora import convertible

        return convertible(self, adapter_name)

    # -- names ---------------------------------------------------------------------------------------------
    def tensor_names(self, adapter: str) -> Iterator[tuple[str, str, Any, Any, str]]:
        """(layer path, file key, Spec, holder, attribute) of every declared tensor of an adapter; the path of a
        shared tensor is empty."""
        for path, layer in self.adapted_layers():
            entry = layer.entries.get(adapter)
            if entry is None:
                continue
            for key, spec in entry.specs.items():
                yield (path, spec.file or key, spec, *entry.where[attribute(key)])
        for key, spec in self.shared_specs.get(adapter, {}).items():
            yield ("", spec.file or key, spec, *storage.holder_of(self, key, adapter))
        yield from self.attached.tensor_names(adapter)
