"""What the data-driven initial values share: the layers they look at, and how their findings wait for `fill`."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import registry
from ..errors import AdapterError
from ..files import write_bin, write_tensors
from ..inject import candidates
from ..site import Site, site_of
from ..targets import match_targets
from ..view import View

NOTES = "_veneer_initial"  # in a module's __dict__: {name of the initial value: what was found}


class Wanted(NamedTuple):
    """A layer that a config would adapt: its path, its site, the config resolved for it."""

    name: str
    site: Site
    cfg: Any


def wanted(model: nn.Module, config: Any) -> list[Wanted]:
    """The linear layers of a plain model that a LoraConfig adapts. Raises AdapterError where there are none."""
    cfg = copy.deepcopy(config)
    method = registry.method("LORA")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    method.prepare(cfg, model, kind)
    matches = match_targets(
        model,
        cfg,
        model_type=kind,
        is_adaptable=lambda m: site_of(m, "", method.sites) is not None,
        names=candidates(model),
        kind=method.defaults,
    )
    out = []
    for m in matches:
        site = site_of(m.module, m.name, frozenset({"linear"}))
        if site is not None:
            out.append(Wanted(m.name, site, cfg.for_layer(m.name)))
    if not out:
        raise AdapterError(
            f"No supported layers found: init_lora_weights={config.init_lora_weights!r} looks at linear layers "
            "(nn.Linear, Conv1D), and "
            f"target_modules={config.target_modules!r} names none"
        )
    return out


def tuner_in(model: nn.Module) -> Any:
    """The Tuner of a PeftModel or of a model that inject_adapter_in_model changed; None for a plain model."""
    from ..tuner import Tuner

    if isinstance(model, Tuner):
        return model
    base = model._modules.get("base_model")
    if isinstance(base, Tuner):
        return base
    held = model.__dict__.get("_veneer_tuner")
    return None if held is None else held[0]


def note(module: nn.Module, name: str, found: Any) -> None:
    """Leave a finding with the layer, where `fill` takes it."""
    module.__dict__.setdefault(NOTES, {})[name] = found


def take(p: View, name: str, function: str) -> Any:
    """The finding left for this layer; it is used up."""
    notes = p.site.module.__dict__.get(NOTES, {})
    if name not in notes:
        raise ValueError(
            f"nothing was prepared for this layer: call {function} on the base model before the adapter is made. A "
            "file that says this initial value belongs to the changed base of its training and not to this one; "
            "write it with save_pretrained of the trained model, which stores it against the original base"
        )
    found = notes.pop(name)
    if not notes:
        del p.site.module.__dict__[NOTES]
    return found


def keep_start(p: View) -> None:
    """Remember the initial factors: the base lost them, and a file needs them to be read on the original base."""
    B, A = p.lora_B, p.lora_A
    p.layer.entries[p.name].start = (A.detach().clone(), B.detach().clone())


def write_cache(path: str | os.PathLike, tensors: dict[str, Tensor]) -> None:
    """safetensors for a name that says so, else PyTorch's own format; `files.read_tensors` reads both."""
    out = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    path = os.fspath(path)
    (write_tensors if path.endswith(".safetensors") else write_bin)(path, out)


def pattern_key(name: str, names: Iterable[str]) -> str:
    """A pattern that means this layer alone: its path, anchored where another path ends in it."""
    return f"^{re.escape(name)}" if any(n.endswith("." + name) for n in names) else name


def progress(items: Iterable[Any], what: str, show: bool) -> Any:
    """The items under a progress bar, or as they are."""
    if not show:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=what)
