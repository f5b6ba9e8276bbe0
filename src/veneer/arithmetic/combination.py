"""Weighted sums and other ranks of LoRA adapters, folder to folder, without the base.

The maths is that of add_weighted_adapter (combine.py): "cat" is exact, "svd" the best approximation of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import state
from ..combine import SELECTION
from ..errors import AdapterError
from ..opened import skeleton_of
from .folders import Result, Source, check_new, common_base, read_source, write_folder

__all__ = ["combine_adapters", "resize_adapter"]


def combine_adapters(
    adapters: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    combination_type: str = "cat",
    *,
    base: str | None = None,
    seed: int | None = None,
    **options: Any,
) -> Result:
    """Write the weighted sum of LoRA adapters into a new folder.

    weights: one an adapter, of either sign (negation, task arithmetic); 1 each by default. options: svd_rank,
    svd_error, svd_clamp, density, majority_sign_method, as for add_weighted_adapter. seed: for the dare types.
    Raises AdapterError or ValueError, with the reason, where no LoRA adapter equals or approximates the sum.
    """
    if not adapters:
        raise AdapterError("name at least one adapter")
    path = check_new(out)
    sources = [read_source(folder, f"adapter{i}") for i, folder in enumerate(adapters)]
    base = common_base(sources, base)
    whole = _whole(sources)
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    tuner = skeleton_of({s.name: (s.config, s.lora) for s in sources}, zeros=True)
    numbers = [1.0] * len(sources) if weights is None else list(weights)
    names = [s.name for s in sources]
    done = tuner.add_weighted_adapter(names, numbers, "result", combination_type, **options)
    config = _config(tuner.peft_config["result"], sources, base)
    ranks = {n: m.entries["result"].cfg.r for n, m in tuner.adapted_layers() if "result" in m.entries}
    write_folder(path, config, {**state.collect(tuner, "result"), **whole}, sources[0].folder)
    return Result(path, done.errors, ranks)


def resize_adapter(adapter: str | Path, out: str | Path, rank: int | None = None, error: float | None = None) -> Result:
    """Write a LoRA adapter with another rank: the best approximation there is (Eckart and Young 1936), by QR of the
    factors and an SVD of the small product; a larger rank is exact.

    rank: of every layer; or error: each layer's smallest rank that is off by no more than this share.
    Raises AdapterError unless exactly one of the two is given.
    """
    if (rank is None) == (error is None):
        raise AdapterError("give the new rank, or the error to allow: one of the two")
    return combine_adapters([adapter], out, [1.0], "svd", svd_rank=rank, svd_error=error)


def _whole(sources: Sequence[Source]) -> dict[str, Tensor]:
    """Tensors of modules trained whole: copied where one source has them, or all have them equal."""
    out: dict[str, Tensor] = {}
    for s in sources:
        for key, t in s.whole.items():
            if key in out and not (out[key].shape == t.shape and bool((out[key] == t).all())):
                raise AdapterError(
                    f"{key} was trained whole by more than one adapter, and there is one place for it; combine "
                    "adapters of which one holds it"
                )
            out[key] = t
    return out


def _config(made: Any, sources: Sequence[Source], base: str | None) -> Any:
    """What the sources share, in the terms of their own configs."""
    first = sources[0].config
    same = all(getattr(s.config, k) == getattr(first, k) for s in sources for k in SELECTION)
    if same and not isinstance(first.target_modules, type(None)):
        for k in SELECTION:
            setattr(made, k, getattr(first, k))
    replicated = [s.config.layer_replication for s in sources]
    if any(r != replicated[0] for r in replicated):
        raise AdapterError("the adapters differ in layer_replication; they belong to models of different depth")
    made.layer_replication = replicated[0]
    for k in ("task_type", "auto_mapping", "revision", "lora_dropout", "fan_in_fan_out"):
        setattr(made, k, getattr(first, k))
    made.base_model_name_or_path = base
    saved = [m for s in sources for m in (s.config.modules_to_save or [])]
    made.modules_to_save = list(dict.fromkeys(saved)) or None
    return made
