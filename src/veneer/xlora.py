"""X-LoRA's side of the model: the experts' loading, the first pass that finds the scalings, its key/value cache, logs.

Each call of the base runs it twice: once without the experts, for the hidden states from which the classifier takes the
scalings, and once with them. In generation with a cache the first pass has a cache of its own, which goes with the
caller's: what reorders, repeats or cuts one does the same to the other.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import registry, state
from .config import PeftConfig
from .errors import AdapterError
from .kinds import Additive
from .methods.xlora import FIRST_PASS, SCALINGS, XLoraConfig, kept, mixture
from .tuner import Tuner

_WITHIN = "base_model.lora_model."
_TOGETHER = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")


class Classifier(NamedTuple):
    """An X-LoRA adapter's settings as they act now; setting one acts at the next call."""

    config: Any

    @property
    def override_scaling_pass_value(self) -> float:
        return self.config.scaling_pass_value


class XLoraTuner(Tuner):
    """A Tuner with one X-LoRA adapter and its experts "0", "1", ..."""

    name: str | None = None  # the X-LoRA adapter
    passing = False  # within the first pass
    latest: Tensor | None = None
    logging = False

    def add_adapter(self, name: str, cfg: Any, **kwargs: Any) -> None:
        if not isinstance(cfg, XLoraConfig):
            super().add_adapter(name, cfg, **kwargs)
            return
        if self.name is not None:
            raise ValueError(f"this model has the X-LoRA adapter {self.name!r}; one model takes one")
        before = list(self.peft_config)
        try:
            for i, path in enumerate((cfg.adapters or {}).values()):
                self._load_expert(str(i), _source(cfg.beside.get(i), path))
            super().add_adapter(name, cfg, **kwargs)
        except Exception:
            for added in [n for n in self.peft_config if n not in before]:
                super().delete_adapter(added)
            raise
        self.name = name
        self.log: list[Tensor] = []
        self.open_calls: list[Any] = []
        self.handles = [
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after, always_call=True),
        ]

    def _load_expert(self, name: str, path: str) -> None:
        cfg = PeftConfig.from_pretrained(path)
        method = registry.method_of(cfg)
        if str(getattr(cfg.peft_type, "value", cfg.peft_type)) != "LORA" or not isinstance(method, Additive):
            raise ValueError(f"X-LoRA's experts are LoRA adapters; {path} is {method.name}")
        if getattr(cfg, "modules_to_save", None):
            raise ValueError(f"{path} saves whole modules ({cfg.modules_to_save}), which X-LoRA cannot mix")
        cfg.inference_mode = cfg.allow_unmatched = True
        super().add_adapter(name, cfg, low_cpu_mem_usage=True, fill=False)
        tensors, source = state.read(path)
        state.put(self, name, tensors).check(source)

    @property
    def experts(self) -> list[str]:
        return [] if self.name is None else [str(i) for i in range(len(self.cfg.adapters))]

    @property
    def cfg(self) -> Any:
        """The X-LoRA adapter's config."""
        return self.peft_config[self.name or ""]

    def require_grad(self, adapter: str, on: bool) -> None:
        super().require_grad(adapter, on)
        if adapter == self.name:
            for expert in self.experts:
                super().require_grad(expert, on and self.cfg.use_trainable_adapters)
        elif adapter in self.experts and self.name in self.host.active and self.cfg.use_trainable_adapters:
            super().require_grad(adapter, any(p.requires_grad for _, p in self._classifier()))

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.experts:
            raise ValueError(
                f"{adapter_name!r} is an expert of the X-LoRA adapter {self.name!r}; delete that one first"
            )
        super().delete_adapter(adapter_name)
        if adapter_name == self.name:
            self._unhook()

    def _unhook(self) -> None:
        for h in self.handles:
            h.remove()
        self.name, self.latest = None, None

    def _unwrapped(self, *args: Any) -> nn.Module:
        if self.name is not None:
            self._unhook()
        return super()._unwrapped(*args)

    # -- a call ----------------------------------------------------------------------------------------------
    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        acting = self.host.active if self.host.rows is None else self.host.rows.names
        if self.passing or not self.host.enabled or self.name not in acting:
            return None
        kwargs = self._with_cache(kwargs)
        c = mixture(self.cfg, self._hidden(args, kwargs), self._layers(), self.training)
        if self.logging:
            self.log.append(c.detach())
        data: dict[str, Any] = {SCALINGS: kept(self.cfg, c)}
        call = self.host.call(**data)
        call.__enter__()
        self.open_calls.append(call)
        self.latest = c.detach()
        return args, kwargs

    def _after(self, *_: Any) -> None:
        if self.passing or not self.open_calls:
            return
        if self.training and torch.is_grad_enabled():
            self.host.remember()
        self.open_calls.pop().__exit__(None, None, None)

    def _classifier(self) -> list[tuple[str, Tensor]]:
        boxes = [
            (k, self._modules[k.partition(".")[0]], k.partition(".")[2]) for k in self.shared_specs[self.name or ""]
        ]
        return [(key, getattr(box[self.name], leaf)) for key, box, leaf in boxes]  # type: ignore[index]

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        flat = [t for _, t in self._classifier()]
        return list(zip(flat[::2], flat[1::2], strict=True))

    def _hidden(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The last hidden state of the base on this input, (rows, tokens, hidden), without gradient."""
        asked = {k: v for k, v in kwargs.items() if k not in ("labels", "return_dict", "output_hidden_states")}
        cache = asked.get("past_key_values")
        if cache is not None:
            asked["past_key_values"] = cache.first_pass
        if "logits_to_keep" in inspect.signature(type(self.model).forward).parameters:
            asked["logits_to_keep"] = 1
        with torch.no_grad(), self._first_pass():
            result = self.model(*args, **asked, output_hidden_states=True, return_dict=True)
        states = getattr(result, "hidden_states", None)
        if states is None:
            raise AdapterError(
                f"X-LoRA needs the hidden states of the base, and {type(self.model).__name__} gives none"
            )
        h = states[-1]
        if h.shape[-1] != self.cfg.hidden_size:
            raise AdapterError(f"XLoraConfig(hidden_size={self.cfg.hidden_size}): the base's states have {h.shape[-1]}")
        return h.to(self._layers()[0][0].dtype)

    @contextmanager
    def _first_pass(self) -> Iterator[None]:
        value, host = self.cfg.scaling_pass_value, self.host
        data: dict[str, Any] = {FIRST_PASS: True}
        if value:
            shape = (1, 1, len(self.cfg.layer_at), len(self.experts))
            data = {SCALINGS: kept(self.cfg, torch.full(shape, float(value), device=self._layers()[0][0].device))}
        enabled, mixed = host.enabled, host.rows is not None
        self.passing = True
        try:
            if mixed and not value:
                host.enable(False)
            with host.call(**data):
                yield
        finally:
            self.passing = False
            if mixed and not value:
                host.enable(enabled)

    def _with_cache(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments, with a cache for the first pass beside the caller's where one is used."""
        model: Any = self.model
        cache = kwargs.get("past_key_values")
        if cache is None:
            config = getattr(model, "config", None)
            wanted = kwargs.get("use_cache")
            if wanted is None:
                wanted = getattr(config, "use_cache", False) and not self.training
            if not wanted or not callable(getattr(model, "can_generate", None)) or not model.can_generate():
                return kwargs
            from transformers import DynamicCache

            cache = DynamicCache(config=config)
        if "first_pass" not in vars(cache):
            _pair(cache)
        return {**kwargs, "past_key_values": cache}

    # -- under peft's names ------------------------------------------------------------------------------------
    @property
    def internal_xlora_classifier(self) -> Classifier:
        """What scripts look up of the classifier: `config` and `override_scaling_pass_value`."""
        if self.name is None:
            raise AttributeError("this model has no X-LoRA adapter any more")
        return Classifier(self.cfg)

    def set_topk_lora(self, value: int | None) -> None:
        """Experts that a token keeps; None: all. Raises ValueError for more than there are."""
        if value is not None and not 1 <= value <= len(self.experts):
            raise ValueError(f"top_k_lora must be from 1 to {len(self.experts)}, got {value}")
        self.cfg.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        self.cfg.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        return self.cfg.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Weight of each expert in the first pass, 0 for the base alone; None: 1 / the number of experts."""
        self.cfg.scaling_pass_value = 1 / len(self.experts) if value is None else value

    def get_latest_scalings(self) -> Tensor | None:
        """The last call's scalings, (rows, tokens, layers, experts), detached; None before the first call."""
        return self.latest

    def enable_scalings_logging(self) -> None:
        self.logging = True

    def disable_scalings_logging(self) -> None:
        """Stop logging; what was logged stays."""
        self.logging = False

    def clear_scalings_log(self) -> None:
        self.log = []

    def get_scalings_log(self) -> list[Tensor]:
        return list(self.log)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """Number of tokens -> (positions in the log, scalings)."""
        out: dict[int, tuple[list[int], list[Tensor]]] = {}
        for i, c in enumerate(self.log):
            positions, tensors = out.setdefault(c.shape[1], ([], []))
            positions.append(i)
            tensors.append(c)
        return out


def _source(beside: str | None, path: str) -> str:
    """Where an expert is read from: beside the classifier's file, else where the config says. What peft writes beside
    it is the base model and a part of the expert's layers, so that is passed over."""
    if beside is None or any(k.startswith(_WITHIN) for k in state.read(beside)[0]):
        return path
    return beside


def _pair(cache: Any) -> None:
    """Give an empty cache a twin for the first pass that follows what is done to it."""
    if cache.get_seq_length():
        raise AdapterError(
            "past_key_values was filled without X-LoRA: the first pass needs a cache of its own from the start; begin "
            "with an empty cache, or none"
        )
    cache.first_pass = copy.deepcopy(cache)
    for name in _TOGETHER:
        if hasattr(cache, name):
            setattr(cache, name, _Both(cache, name))


class _Both:
    """A cache's method that acts on its twin, too."""

    def __init__(self, cache: Any, name: str):
        self.cache, self.name = cache, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        getattr(type(self.cache), self.name)(self.cache.first_pass, *args, **kwargs)
        return getattr(type(self.cache), self.name)(self.cache, *args, **kwargs)
