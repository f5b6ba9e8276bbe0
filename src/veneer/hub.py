"""Adapters as folders: config, tensors and a card, written beside and renamed; read from a folder or the hub."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import base_mark, convert, prompts, schedule, sharded, state, vocabulary
from .files import BIN_NAME, SAFE_NAME, write_bin, write_json, write_tensors, write_text

if TYPE_CHECKING:
    from .model import PeftModel


def name_of(model: nn.Module) -> str | None:
    """Where the base came from: a hub id or a folder, as transformers recorded it."""
    config = getattr(model, "config", None)
    name = config.get("_name_or_path") if isinstance(config, dict) else getattr(config, "_name_or_path", None)
    return getattr(model, "name_or_path", None) or name or None


def tensors_of(model: PeftModel, adapter: str, *, compact: bool = False) -> dict[str, Tensor]:
    """File key -> tensor of one adapter."""
    if model.prompt_configs is None:
        return state.collect(model.base_model, adapter, compact=compact)
    out = dict(prompts.saved_tensors(model, adapter))
    out.update({p.key: p.get().detach() for p in state.module_places(model.base_model, adapter, "base_model.")})
    return out


def save_adapter(
    model: PeftModel,
    adapter: str,
    folder: str,
    *,
    safe: bool,
    embeddings: str | bool,
    compact: bool,
    main: bool,
    initial: str | None,
    tensors: dict[str, Tensor] | None,
) -> None:
    """One adapter into its folder."""
    out = tensors_of(model, adapter, compact=compact) if tensors is None else state.only(tensors, model, adapter)
    out.update(vocabulary.embeddings(model, adapter, embeddings))
    if any(map(sharded.is_sharded, out.values())):
        out, main = sharded.whole(out), main and sharded.main_here()
    config = copy.copy(model.peft_config[adapter])
    out, against = convert.self_contained(model, adapter, out, config)
    if initial is not None and against is config:
        out, against = convert.against_initial(model, adapter, initial, out, config)
    config = against
    if not main:
        return
    where = os.path.join(folder, adapter) if adapter != "default" else folder
    if safe:
        layout = {"veneer_layout": "compact"} if compact else {}
        write_tensors(os.path.join(where, SAFE_NAME), out, {**layout, **_base_mark(model)})
    else:
        write_bin(os.path.join(where, BIN_NAME), out)
    if model.prompt_configs is None:
        schedule.save(model.base_model, adapter, where, out)
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = name_of(model.get_base_model())
    auto = None
    if config.task_type is None and getattr(config, "auto_mapping", None) is None:
        base = model.get_base_model()
        auto = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    fields = config.to_file_dict(compact=compact)
    if auto is not None:
        fields["auto_mapping"] = auto
    if not compact and _chosen_apart(config):
        fields["target_modules"] = sorted(model.base_model.targeted[adapter])
    write_json(os.path.join(where, "adapter_config.json"), fields)
    write_card(model, folder, config)


def _chosen_apart(config: Any) -> bool:
    """Whether keys that only veneer reads, which the file leaves out, choose among the layers."""
    own = {field.name for field in dataclasses.fields(config) if field.metadata.get("veneer")}
    return any(getattr(config, name) for name in {"layers", "exclude_modules", "allow_unmatched"} & own)


def push(
    saver: Any,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **options: Any,
) -> Any:
    """Write what `saver.save_pretrained` writes into a folder of its own and upload that to a hub repository, made
    where it is missing. options: save_pretrained's. Returns the commit's description."""
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi(token=token)
    options = {k: v for k, v in options.items() if k not in ("max_shard_size", "use_temp_dir", "tags")}
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        saver.save_pretrained(folder, **options)
        return api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {type(saver).__name__}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _base_mark(model: PeftModel) -> dict[str, str]:
    """What the header of the adapter's file says about the base."""
    import json

    mark = base_mark.mark_of(model.get_base_model())
    return {} if mark is None else {base_mark.KEY: json.dumps(mark)}


_ROOT = "base_model.model."
_PIPELINES = {
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "text-generation",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def _tags(model: Any, name: str, kind: str) -> list[str]:
    """The card's tags: the base model's own, what the hub searches by (the base's name, its library), the method."""
    own = list(getattr(model, "model_tags", None) or ())
    library = ["transformers"] * any(c.__module__.startswith("transformers.") for c in type(model).__mro__)
    return sorted({*own, *library, *[f"base_model:adapter:{name}"] * bool(name), kind, "veneer"})


def write_card(model: PeftModel, folder: str, config: Any) -> None:
    """A README.md that says what the adapter is; one that is there is left as it is."""
    path = os.path.join(folder, "README.md")
    if os.path.exists(path):
        return
    base = name_of(model.get_base_model()) or ""
    kind = str(getattr(config.peft_type, "value", config.peft_type)).lower()
    task = str(getattr(config.task_type, "value", config.task_type))
    tags = [f"- {t!r}" for t in _tags(model.get_base_model(), base, kind)]
    head = ["---", *[f"base_model: {base!r}"] * bool(base), "library_name: peft", "tags:", *tags]
    if task in _PIPELINES:
        head.append(f"pipeline_tag: {_PIPELINES[task]}")
    trained, total = model.get_nb_trainable_parameters()
    text = [
        *head,
        "---",
        "",
        f"# {kind} adapter{f' for {base}' if base else ''}",
        "",
        f"A {kind} adapter ({task}), written by veneer; it loads in veneer and in peft.",
        "",
        "```python",
        "from veneer import PeftModel",
        f"model = PeftModel.from_pretrained(base_model, {folder!r})",
        "```",
        "",
        f"Trainable parameters when it was saved: {trained:,} of {total:,}.",
        "",
        *base_mark.lines(base_mark.mark_of(model.get_base_model())),
    ]
    write_text(path, "\n".join(text))


def renamed(tensors: dict[str, Tensor], mapping: dict[str, str] | None) -> dict[str, Tensor]:
    """Keys, without the wrapper's "base_model.model.", through {regex: replacement}, the first that matches."""
    return {_renamed(key, mapping): t for key, t in tensors.items()} if mapping else tensors


def _renamed(key: str, mapping: dict[str, str]) -> str:
    inner = key.removeprefix(_ROOT)
    for pattern, replacement in mapping.items():
        new, n = re.subn(pattern, replacement, inner)
        if n:
            return key.removesuffix(inner) + new
    return key


def todays_names(model: PeftModel, adapter: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's keys, where the base's modules were called otherwise when it was written: transformers keeps such
    renamings for its models' own files. Keys that fit as they are stay."""
    if model.prompt_configs is not None:
        return tensors
    mapping = _renamings(model.get_base_model())
    if not mapping:
        return tensors
    known = {place.key for place in state.places(model.base_model, adapter, _ROOT)}
    new = {key: _renamed(key, mapping) for key in tensors}
    return {new[key] if key not in known and new[key] in known else key: t for key, t in tensors.items()}


def _renamings(base: Any) -> dict[str, str]:
    """{regex of an old path: the path now} of a transformers model."""
    own = getattr(base, "_checkpoint_conversion_mapping", None)
    if own:
        return dict(own)
    if not hasattr(base, "base_model_prefix"):
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    plain = [t for t in get_model_conversion_mapping(base, add_legacy=False) if type(t) is WeightRenaming]
    return {s: t.target_patterns[0] for t in plain for s in t.source_patterns if s.startswith("^")}


def put(
    model: PeftModel,
    adapter: str,
    tensors: dict[str, Tensor],
    *,
    ignore_mismatched_sizes: bool = False,
    biases: bool = False,
) -> state.LoadReport:
    """A file's tensors into an adapter of a model. biases: also into biases of the base that the adapter's own
    settings do not train."""
    if model.prompt_configs is not None:
        return _put_prompt(model, adapter, tensors, ignore_mismatched_sizes)
    base: Any = model.get_base_model()
    held = dict(base.named_parameters()) if biases else {}

    def embedding(key: str, value: Tensor) -> bool:
        bias = held.get(key.removeprefix("base_model.model.")) if key.endswith(".bias") else None
        if bias is not None and bias.shape == value.shape:
            bias.data = value.to(bias)
            return True
        return vocabulary.take(base, key, value)

    return state.put(
        model.base_model, adapter, tensors, ignore_mismatched_sizes=ignore_mismatched_sizes, extra=embedding
    )


def _put_prompt(model: PeftModel, adapter: str, tensors: dict[str, Tensor], ignore: bool) -> state.LoadReport:
    left = dict(tensors)
    report = state.LoadReport()
    wanted = list(prompts.saved_tensors(model, adapter))
    own = {k: left.pop(k) for k in wanted if k in left}
    report.missing_keys += [k for k in wanted if k not in own]
    if not report.missing_keys:
        prompts.load_tensors(model, adapter, own)
        report.loaded += len(own)
    for place in state.module_places(model.base_model, adapter, "base_model."):
        value = left.pop(place.key, None)
        if value is None:
            report.missing_keys.append(place.key)
        elif value.shape != place.get().shape:
            report.mismatched_keys.append(f"{place.key}: file {tuple(value.shape)}, model {tuple(place.get().shape)}")
        else:
            place.get().data = value.to(place.get())
            report.loaded += 1
    report.unexpected_keys = list(left)
    if ignore:
        report.mismatched_keys.clear()
    return report
