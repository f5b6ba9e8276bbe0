"""The config base: what every adapter's config holds, JSON in and out, and patterns -> the config of one layer."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import warnings
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, ClassVar

from . import registry
from .errors import AdapterError, PeftWarning
from .version import __version__

CONFIG_NAME = "adapter_config.json"

# What peft calls its own version in files; a reader of either tool decides by it which keys to expect.
PEFT_FORMAT = "0.21.2"


def commit_of(distribution: str) -> str | None:
    """The commit that an installed distribution was built from, where the installer noted it (PEP 610)."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import distribution as installed

    try:
        origin = installed(distribution).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    return None if origin is None else json.loads(origin).get("vcs_info", {}).get("commit_id")


def format_version() -> str:
    """What a new config notes as `peft_version`. A development version says little by itself: the commit goes along,
    "UNKNOWN" where it cannot be found."""
    if ".dev" not in PEFT_FORMAT:
        return PEFT_FORMAT
    commit = None
    try:
        commit = commit_of("peft")
    except Exception as e:  # noqa: BLE001 whatever an installer left there, it must not keep configs from being made
        warnings.warn(
            "A dev version of PEFT is used but there was an error while trying to determine the commit hash: "
            f"{type(e).__name__}: {e}. Configs will note the version without it",
            PeftWarning,
            stacklevel=4,
        )
    return f"{PEFT_FORMAT}@{commit or 'UNKNOWN'}"


class _StrEnum(str, Enum):
    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


PeftType: Any = Enum("PeftType", [(name, name) for name in registry.types()], type=_StrEnum)  # type: ignore[misc]


class TaskType(_StrEnum):
    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def _plain(value: Any) -> Any:
    """JSON's own types; sets sorted so that the same config writes the same bytes."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(_plain(v) for v in value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def veneer_field(default: Any = None) -> Any:
    """A field of veneer's own: kept out of the files that peft reads."""
    return field(default=default, metadata={"veneer": True})


@dataclass
class PeftConfig:
    """Fields of every adapter.

    task_type: one of TaskType, selects the model class. peft_type: the method. base_model_name_or_path, revision:
    the model the adapter was trained on. inference_mode: load frozen. allow_unmatched: pass over names in
    target_modules and modules_to_save that match nothing, while others match.
    """

    task_type: str | TaskType | None = None
    peft_type: str | Enum | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    allow_unmatched: bool = veneer_field(False)

    # Keys of the file format without a field here: those that acted where the adapter was made and do nothing after,
    # and those that ask for a variant that veneer does not have.
    spent: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[frozenset[str]] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "peft_type" and isinstance(value, str) and value in PeftType.__members__:
            value = PeftType[value]
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        if self.task_type is not None:
            if str(getattr(self.task_type, "value", self.task_type)) not in TaskType.__members__:
                raise ValueError(
                    f"Invalid task type: {self.task_type!r}. Must be one of the following task types: "
                    f"{', '.join(TaskType.__members__)}."
                )
        if self.peft_version is None:
            self.peft_version = format_version()

    # -- names that other libraries read ------------------------------------------------------------
    @property
    def is_prompt_learning(self) -> bool:
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        return False

    def to_dict(self) -> dict[str, Any]:
        """All fields; veneer's own only where they are set."""
        own = {f.name: f.default for f in dataclasses.fields(self) if f.metadata.get("veneer")}
        return {k: v for k, v in asdict(self).items() if k not in own or v != own[k]}

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)

    # -- files ---------------------------------------------------------------------------------------
    def to_file_dict(self, compact: bool = False) -> dict[str, Any]:
        """What goes into adapter_config.json. Veneer's own keys are left out unless `compact`: then only veneer
        reads the file."""
        hidden = () if compact else tuple(f.name for f in dataclasses.fields(self) if f.metadata.get("veneer"))
        return {k: _plain(v) for k, v in self.to_dict().items() if k not in hidden}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write adapter_config.json into a folder, made where it is missing."""
        folder = os.fspath(save_directory)
        if os.path.isfile(folder):
            raise AssertionError(f"save_pretrained needs a folder, and {folder} is a file")
        from .files import write_json

        out = self.to_file_dict(compact=bool(kwargs.get("compact", False)))
        if (auto := kwargs.get("auto_mapping_dict")) is not None:
            out["auto_mapping"] = auto
        write_json(os.path.join(folder, CONFIG_NAME), out)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Upload adapter_config.json to a repository; see hub.push."""
        from .hub import push

        return push(self, repo_id, **options)

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Build the config class that kwargs["peft_type"] names, else this class; unknown keys are dropped with
        one warning that names them."""
        target = registry.config_class(kwargs["peft_type"]) if kwargs.get("peft_type") else cls
        known = {f.name for f in dataclasses.fields(target) if f.init}
        unknown = {k: v for k, v in kwargs.items() if k not in known | target.spent}
        asked = sorted(k for k in target.unsupported if unknown.pop(k, None))
        if asked:
            raise AdapterError(
                f"this adapter uses {', '.join(f'{k}={kwargs[k]!r}' for k in asked)}, which veneer does not have; "
                f"without "
                "it the adapter would compute something else, so it is not loaded"
            )
        matters = sorted(k for k, v in unknown.items() if v not in (None, False, {}, [], ""))
        harmless = sorted(set(unknown) - set(matters))
        if unknown:
            said = [f"{', '.join(matters)} (set to a value, so the adapter may behave differently)"] * bool(matters)
            said += [f"{', '.join(harmless)} (empty, so nothing is lost)"] * bool(harmless)
            warnings.warn(
                f"Unexpected keyword arguments {sorted(unknown)} for class {target.__name__}, these are ignored. "
                f"Of these {'; '.join(said)}. The file says peft_version={kwargs.get('peft_version')!r}; "
                f"veneer {__version__} reads the format of peft {PEFT_FORMAT}.",
                PeftWarning if matters else UserWarning,
                stacklevel=3,
            )
        return target(**{k: v for k, v in kwargs.items() if k in known})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Read adapter_config.json from a folder or the hub. A local folder never touches the network."""
        from .files import HUB_KEYS, locate

        hub = {k: kwargs.pop(k) for k in list(kwargs) if k in HUB_KEYS}
        path = locate(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub)
        if path is None:
            raise ValueError(f"Can't find '{CONFIG_NAME}' at '{pretrained_model_name_or_path}'")
        fields = {**cls.from_json_file(path), **kwargs}
        if not fields.get("peft_type"):
            raise TypeError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}. "
                f"{path} is not the config of an adapter."
            )
        made = cls.from_peft_type(**fields)
        made.located(pretrained_model_name_or_path, subfolder=subfolder, **hub)
        return made

    def located(self, source: str | os.PathLike, **hub: Any) -> None:
        """Where the file was read from, for a config that names others beside it."""

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike, **kwargs: Any) -> dict[str, Any]:
        """The fields in a file. What belongs to a run and not to the adapter (runtime_config) is left out."""
        with open(path_json_file, encoding="utf-8") as f:
            try:
                return {k: v for k, v in json.load(f).items() if k != "runtime_config"}
            except json.JSONDecodeError as e:
                raise AdapterError(f"{path_json_file}:{e.lineno}: not valid JSON: {e.msg}") from e

    @classmethod
    def _get_peft_type(cls, model_id: str, **kwargs: Any) -> str:
        subfolder = kwargs.pop("subfolder", None)
        from .files import HUB_KEYS, locate

        hub = {k: v for k, v in kwargs.items() if k in HUB_KEYS}
        path = locate(model_id, CONFIG_NAME, subfolder=subfolder, **hub)
        if path is None:
            raise ValueError(f"Can't find '{CONFIG_NAME}' at '{model_id}'")
        return cls.from_json_file(path)["peft_type"]


@dataclass
class AdapterConfig(PeftConfig):
    """Fields of the methods that adapt layers.

    target_modules: names (matched as suffixes), a regex, or "all-linear"; None: by architecture.
    exclude_modules: the same, taken out. layers_to_transform: indices of the layers to adapt, with layers_pattern
    naming the list that holds them. layers: the same in words ("every:2", "last:4", "first:25%", "encoder").
    modules_to_save: modules trained whole and saved with the adapter.
    share: {"lora_A": "all" | "pairs" | "groups:4"}, tensors that several layers hold in common.
    handoff: a trained layer's A becomes the next layer's initial value.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers: str | list[str] | None = veneer_field()
    share: dict[str, str] | None = veneer_field()
    handoff: bool = veneer_field(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")
        if self.share is not None:
            from . import share

            share.validate(self.share, self.handoff)

    # how patterns change the config of one layer: (pattern field, config field)
    PATTERNS: ClassVar[tuple[tuple[str, str], ...]] = (
        ("rank_pattern", "r"),
        ("alpha_pattern", "lora_alpha"),
        ("alpha_pattern", "alpha"),
    )

    def for_layer(self, name: str) -> Any:
        """This config with rank_pattern and alpha_pattern applied for one layer; itself where none applies."""
        changes = {}
        for pattern, key in self.PATTERNS:
            table = getattr(self, pattern, None)
            if table and key in self.__dataclass_fields__:
                from .targets import resolve_pattern

                now = getattr(self, key)
                value = resolve_pattern(table, name, now)
                if value != now:
                    changes[key] = value
        if not changes:
            return self
        out = copy.copy(self)
        out.__dict__.update(changes)
        return out


@dataclass
class PromptLearningConfig(PeftConfig):
    """Fields of the methods that put virtual tokens before the input.

    num_virtual_tokens: how many. token_dim, num_attention_heads, num_layers: the base's sizes, filled in from its
    config. num_transformer_submodules: 1 for a decoder or encoder, 2 for both.
    """

    num_virtual_tokens: int = None  # type: ignore[assignment]
    token_dim: int = None  # type: ignore[assignment]
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    @property
    def is_prompt_learning(self) -> bool:
        return True
