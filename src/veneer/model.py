"""PeftModel: a model with adapters, under the names that users and libraries know; the task classes are thin."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from . import base_mark, files, hub, prompts, registry, schedule, state
from . import inject as injection
from .config import PeftConfig, PromptLearningConfig
from .context import BASE, Host, Rows
from .errors import AdapterError, PeftWarning
from .grow import make_room
from .replace import SavedModule
from .status import layer_status, model_status
from .tuner import Tuner
from .walk import walk


def _signed_like(model: nn.Module, base: nn.Module) -> Any:
    """model.forward under the signature of the base's: a Trainer keeps the data columns that the signature names."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(type(base).forward)  # type: ignore[attr-defined]
    return MethodType(forward, model)


class PeftModel(nn.Module):
    """A base model with one or more adapters.

    base_model: the Tuner that holds the adapted model, or the model itself for prompt methods. peft_config: adapter
    name -> config.
    """

    heads: tuple[str, ...] = ()  # modules that a task trains whole, where the model has them
    _hf_peft_config_loaded = True  # what transformers' Trainer asks of a quantised model: it has adapters to train

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        fill: bool = True,
        **kwargs: Any,
    ):
        super().__init__()
        self.modules_to_save: set[str] | None = None
        self.prompt_configs: dict[str, Any] | None = None
        self.base_model: Any
        self._add_heads(peft_config, model)
        if isinstance(peft_config, PromptLearningConfig):
            self.base_model = model
            self.prompt_configs = {}
            self.prompt_host = Host()
            self.prompt_encoder = nn.ModuleDict()
            self.add_adapter(adapter_name, peft_config, fill=fill)
            self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        else:
            tuner = registry.method_of(peft_config).tuner_class() or self._tuner_class()
            self.base_model = tuner(
                model,
                peft_config,
                adapter_name,
                low_cpu_mem_usage=low_cpu_mem_usage,
                autocast_adapter_dtype=autocast_adapter_dtype,
                fill=fill,
            )
            self._note(peft_config, adapter_name)
        self._inputs_need_grad()
        self.forward = _signed_like(self, model)  # type: ignore[method-assign]

    def _replicate_for_data_parallel(self) -> PeftModel:
        """A replica calls its own forward, not that of the model it was copied from."""
        replica = super()._replicate_for_data_parallel()
        replica.__dict__.pop("forward", None)
        return replica

    @staticmethod
    def _tuner_class() -> type[Tuner]:
        return Tuner

    # -- what it is ------------------------------------------------------------------------------------
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "_modules" not in self.__dict__ or "base_model" not in self._modules:
                raise
            return getattr(self.base_model, name)

    @property
    def peft_config(self) -> dict[str, Any]:
        return self.base_model.peft_config if self.prompt_configs is None else self.prompt_configs

    @property
    def host(self) -> Host:
        return self.base_model.host if self.prompt_configs is None else self.prompt_host

    @property
    def active_adapters(self) -> list[str]:
        return list(self.host.active)

    @property
    def active_adapter(self) -> Any:
        active = self.host.active
        return active[0] if len(active) == 1 else list(active)

    @property
    def active_peft_config(self) -> Any:
        return self.peft_config[self.host.active[0]]

    @property
    def peft_type(self) -> Any:
        return self.active_peft_config.peft_type

    @property
    def task_type(self) -> Any:
        return getattr(self.active_peft_config, "task_type", None)

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.get_base_model(), "dtype", None)

    def get_base_model(self) -> nn.Module:
        """The base model (with adapted layers in it, where they are)."""
        return self.base_model if self.prompt_configs is not None else self.base_model.model

    # -- adapters ----------------------------------------------------------------------------------------
    def _add_heads(self, cfg: Any, model: nn.Module) -> None:
        """A freshly made task head is trained and saved without being asked for."""
        if not self.heads or not hasattr(cfg, "modules_to_save"):
            return
        present = {path.rpartition(".")[2] for path, _ in injection.candidates(model)}
        own = [h for h in self.heads if h in present]
        given = cfg.modules_to_save or []
        named = [given] if isinstance(given, str) else list(given)
        new = [h for h in own if h not in named]
        if new:
            cfg.modules_to_save = [*named, *new]

    def _note(self, cfg: Any, name: str) -> None:
        if cfg.base_model_name_or_path is None:
            cfg.base_model_name_or_path = hub.name_of(self.get_base_model())
        wanted = getattr(cfg, "modules_to_save", None)
        if wanted:
            self.modules_to_save = (self.modules_to_save or set()) | set(
                [wanted] if isinstance(wanted, str) else wanted
            )

    def _inputs_need_grad(self) -> None:
        """Gradient checkpointing of a frozen model needs an input that carries gradients."""
        model: Any = self.get_base_model()
        on = any(m.__dict__.get("gradient_checkpointing", False) for _, m in walk(model))
        if on and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """Let a base's embedding output require gradients, where its inputs cannot. Returns the base."""
        base: Any = self.get_base_model()
        packed = getattr(base, "is_loaded_in_8bit", False) or getattr(base, "is_loaded_in_4bit", False)
        if not (packed or getattr(base, "is_quantized", False)):
            if hasattr(base, "enable_input_require_grads"):
                base.enable_input_require_grads()
            elif hasattr(base, "get_input_embeddings"):
                base.get_input_embeddings().register_forward_hook(lambda m, args, out: out.requires_grad_(True))
        return model

    @property
    def has_active_enabled_adapter(self) -> bool:
        return self.host.enabled and bool(self.host.active)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether convert_to_lora can turn this adapter into a LoRA."""
        return self.prompt_configs is None and self.base_model.supports_lora_conversion(adapter_name)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        fill: bool = True,
    ) -> None:
        """Add an adapter beside the others; it is not active before set_adapter, save that an adaption prompt takes
        over at once.

        Raises ValueError for a name in use or a config that does not fit beside those there.
        """
        self._add_heads(peft_config, self.get_base_model())
        prompt = isinstance(peft_config, PromptLearningConfig)
        if prompt != (self.prompt_configs is not None):
            raise ValueError(
                f"The provided `peft_type` '{peft_config.peft_type}' is not compatible with the {self.peft_type} "
                "adapters of "
                "this model: prompt methods and layer methods do not mix; use a model of its own for it"
            )
        if not prompt:
            self.base_model.autocast_adapter_dtype = autocast_adapter_dtype
            self.base_model.add_adapter(adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage, fill=fill)
            if peft_config.is_adaption_prompt:
                self.set_adapter(adapter_name)
        else:
            assert self.prompt_configs is not None
            if adapter_name in self.prompt_configs:
                raise ValueError(f"Adapter with name {adapter_name!r} already exists. Please use a different name.")
            if not self.prompt_configs:
                for p in self.base_model.parameters():
                    p.requires_grad_(False)
            self.prompt_configs[adapter_name] = peft_config
            prompts.setup(self, adapter_name, peft_config, fill=fill)
            injection.save_whole(self.base_model, self.prompt_host, adapter_name, peft_config)
        self._note(peft_config, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        if self.prompt_configs is None:
            self.base_model.delete_adapter(adapter_name)
            self._count_saved()
            return
        if adapter_name not in self.prompt_configs:
            have = ", ".join(map(repr, self.prompt_configs)) or "none"
            raise ValueError(
                f"Adapter {adapter_name} does not exist: {adapter_name!r} not found; this model has: {have}"
            )
        del self.prompt_configs[adapter_name], self.prompt_encoder[adapter_name]
        for _, m in self._saved():
            m.delete_adapter(adapter_name)
        left = [n for n in self.host.active if n != adapter_name] or list(self.prompt_configs)[:1]
        self.host.activate(left)
        self._count_saved()

    def _count_saved(self) -> None:
        """modules_to_save names what the adapters that are left save whole; None for nothing."""
        self.modules_to_save = None
        for name, cfg in self.peft_config.items():
            self._note(cfg, name)

    def known(self, names: str | Sequence[str]) -> list[str]:
        """The names as a list; ValueError for one that is not an adapter of this model."""
        listed = [names] if isinstance(names, str) else list(names)
        for n in listed:
            if n not in self.peft_config:
                have = ", ".join(map(repr, self.peft_config)) or "none"
                raise ValueError(f"Adapter {n!r} not found; this model has: {have}")
        return listed

    def _saved(self) -> Iterator[tuple[str, SavedModule]]:
        return ((n, m) for n, m in walk(self) if isinstance(m, SavedModule))

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an adapter (or several, for methods that add up) active and trainable."""
        if self.prompt_configs is None:
            self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)
            return
        names = self.known(adapter_name)
        self.host.activate(names)
        for n in self.prompt_configs:
            on = n in names and not inference_mode
            for p in prompts.trained(self, n):
                p.requires_grad_(on)
            for _, m in self._saved():
                m.require_grad(n, on)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train, or not, whether they are active or not."""
        if self.prompt_configs is None:
            self.base_model.set_requires_grad(adapter_names, requires_grad)
            return
        for n in self.known(adapter_names):
            for p in prompts.trained(self, n):
                p.requires_grad_(requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model's own output inside the block."""
        if self.prompt_configs is None:
            with self.base_model.disabled():
                yield
            return
        before = self.host.enabled
        self.host.enable(False)
        try:
            yield
        finally:
            self.host.enable(before)

    # -- calls ---------------------------------------------------------------------------------------------
    def _rows(self, kwargs: dict[str, Any], widened: int = 1) -> Any:
        """A context for `adapter_names`, checked before any layer runs. widened: copies of each row that a search
        makes."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            return nullcontext()
        if self.prompt_configs is not None:
            raise AdapterError("adapter_names works for adapters on layers; prompt methods serve one adapter a batch")
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode; call model.eval() first")
        strange = sorted({n for n in names if n != BASE} - set(self.peft_config))
        if strange:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(strange)} in adapter_names; this model has: "
                + ", ".join(self.peft_config)
            )
        held = getattr(kwargs.get("past_key_values"), "get_seq_length", int)  # tokens in the cache; int() is 0
        return self.host.call(rows=Rows.of(list(names), widened, int(held()) > 0))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward. adapter_names: one adapter name a row, "__base__" for none."""
        with self._rows(kwargs):
            if self.prompt_configs is not None and self.host.enabled:
                return prompts.forward(self, self.active_peft_config, args, kwargs)
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's generate. adapter_names: one adapter name a prompt, whatever the number of beams."""
        configs = (kwargs.get("generation_config"), getattr(self.get_base_model(), "generation_config", None))
        sizes = [
            next((n for n in (kwargs.get(key), *(getattr(c, key, None) for c in configs)) if n is not None), 1)
            for key in ("num_beams", "num_return_sequences")
        ]
        with self._rows(kwargs, max(sizes)):
            if self.prompt_configs is not None and self.host.enabled:
                return prompts.generate(self, self.active_peft_config, args, kwargs)
            base: Any = self.get_base_model()
            if self.prompt_configs is not None:
                return base.generate(*args, **kwargs)
            with self.base_model.call(args, kwargs):
                return base.generate(*args, **kwargs)

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        return prompts.get_prompt(self, batch_size, task_ids)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        return prompts.saved_tensors(self, adapter_name)["prompt_embeddings"]

    # -- numbers ---------------------------------------------------------------------------------------------
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained, all) parameters; packed 4-bit weights count what they stand for."""
        trained = total = 0
        for p in self.parameters():
            n = getattr(p, "ds_numel", 0) or p.numel()
            if type(p).__name__ == "Params4bit":
                storage = getattr(p, "quant_storage", None)
                n *= 2 * (storage.itemsize if storage is not None else 1)
            total += n
            trained += n if p.requires_grad else 0
        return trained, total

    def print_trainable_parameters(self) -> None:
        trained, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def get_layer_status(self) -> Any:
        return layer_status(self)

    def get_model_status(self) -> Any:
        return model_status(self)

    # -- files -------------------------------------------------------------------------------------------------
    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        compact: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write adapter_config.json, adapter_model.safetensors and a model card; no network, ever.

        "default" goes into the folder itself, other adapters into folders of their names. compact: a smaller file
        that only veneer reads (shared tensors once, veneer's own config keys).
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        for n in names:
            if n not in self.peft_config:
                have = list(self.peft_config)
                raise ValueError(
                    f"You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                    f"{have} - got {names}."
                )
        for n in names:
            hub.save_adapter(
                self,
                n,
                save_directory,
                safe=safe_serialization,
                embeddings=save_embedding_layers,
                compact=compact,
                main=is_main_process,
                initial=path_initial_model_for_weight_conversion,
                tensors=kwargs.get("state_dict"),
            )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """A model with a saved adapter. strict: every tensor must find its place, else LoadError says which not."""
        if config is None:
            where = {k: v for k, v in kwargs.items() if k != "torch_device"}
            config = PeftConfig.from_pretrained(model_id, **where)
        elif not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {type(config)}")
        config.inference_mode = not is_trainable
        make_room(model, config)
        target = TASKS.get(_plain(config.task_type), PeftModel) if cls in (PeftModel, *TASKS.values()) else cls
        config.allow_unmatched = True  # strict loading of the tensors finds every real mismatch
        out = target(
            model,
            config,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=strict,
            fill=not strict,
        )
        out._load(model_id, adapter_name, strict=strict, key_mapping=key_mapping, is_trainable=is_trainable, **kwargs)
        out.eval() if not is_trainable else out.train()
        return out

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        strict: bool = True,
        **kwargs: Any,
    ) -> state.LoadReport:
        """Read a saved adapter beside the others (or its tensors into one of the same name)."""
        fresh = adapter_name not in self.peft_config
        if fresh:
            config = PeftConfig.from_pretrained(model_id, **kwargs)
            config.inference_mode = not is_trainable
            config.allow_unmatched = True
            self.add_adapter(
                adapter_name,
                config,
                low_cpu_mem_usage=strict,
                fill=not strict,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )
        try:
            report = self._load(
                model_id, adapter_name, strict=strict, key_mapping=key_mapping, is_trainable=is_trainable, **kwargs
            )
        except Exception:
            if fresh:
                self.delete_adapter(adapter_name)
            raise
        if not is_trainable:
            self.eval()
        return report

    def _load(
        self, model_id: Any, adapter: str, *, strict: bool, is_trainable: bool, key_mapping: Any = None, **kwargs: Any
    ) -> state.LoadReport:
        kwargs.pop("torch_device", None)
        ignore = bool(kwargs.pop("ignore_mismatched_sizes", False))
        tensors, path = state.read(model_id, **kwargs)
        tensors = hub.renamed(tensors, key_mapping) if key_mapping else hub.todays_names(self, adapter, tensors)
        report = hub.put(self, adapter, tensors, ignore_mismatched_sizes=ignore)
        if strict:
            report.check(path)
        base_mark.warn_if_other(self.get_base_model(), path)
        active = self.host.active  # beside an adapter that trains, another waits until it is active
        waits = adapter not in active and not all(self.peft_config[n].inference_mode for n in active)
        self.set_requires_grad(adapter, is_trainable and not waits)
        if is_trainable and self.prompt_configs is None and adapter in schedule.names(self.base_model):
            found = files.locate(model_id, schedule.FILE, **kwargs)
            if found is not None:
                schedule.load(self.base_model, adapter, found)
        return report

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload what save_pretrained writes to a repository; see hub.push."""
        return hub.push(self, repo_id, **options)

    def create_or_update_model_card(self, output_dir: str) -> None:
        hub.write_card(self, output_dir, self.active_peft_config)


class PeftModelForSequenceClassification(PeftModel):
    heads = ("classifier", "score")


class PeftModelForTokenClassification(PeftModel):
    heads = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel):
    heads = ("qa_outputs",)


class PeftModelForCausalLM(PeftModel):
    pass


class PeftModelForSeq2SeqLM(PeftModel):
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As PeftModel.generate, by keyword alone: TypeError for an input by position."""
        if args:
            raise TypeError(
                f"generate() of an encoder-decoder takes keywords alone, got {len(args)} by position; name the input, "
                "as in generate(input_ids=...)"
            )
        return super().generate(**kwargs)


class PeftModelForFeatureExtraction(PeftModel):
    pass


TASKS: dict[str | None, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def _plain(task: Any) -> str | None:
    return None if task is None else str(getattr(task, "value", task))


def _name_base(cfg: PeftConfig, name: str | None) -> None:
    """The config names the base as the base does, where that has a name."""
    before = cfg.base_model_name_or_path
    if name is None or name == before:
        return
    cfg.base_model_name_or_path = name
    if before is not None:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{before}' to '{name}', the base "
            "model's own; the adapter's file will name that one",
            PeftWarning,
            stacklevel=3,
        )


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Wrap a model with a new adapter. mixed: allow adapters of several methods at once (PeftMixedModel)."""
    if any(getattr(m, "is_adapter_wrapper", False) for m in model.modules()):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=2,
        )
    _name_base(peft_config, hub.name_of(model))
    if revision is not None:
        if peft_config.revision not in (None, revision):
            warnings.warn(
                f"peft config has already set base model revision to {peft_config.revision}, overwriting with revision "
                f"{revision}",
                PeftWarning,
                stacklevel=2,
            )
        peft_config.revision = revision
    if mixed:
        from .mixed import PeftMixedModel

        return PeftMixedModel(model, peft_config, adapter_name=adapter_name)
    task = _plain(peft_config.task_type)
    target = TASKS.get(task, PeftModel)
    return target(
        model,
        peft_config,
        adapter_name=adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
