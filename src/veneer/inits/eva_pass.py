"""EVA's passes over the data: which rows each layer sees, and when its directions have settled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import AdapterError, PeftWarning
from .pca import IncrementalPCA
from .prepared import progress

ROUNDS = 10  # how often the data is passed at most


class Layer:
    """One layer: its name, the module that is called, and what is known of its inputs."""

    def __init__(self, name: str, module: nn.Module, r: int, rho: float):
        self.name, self.module, self.r = name, module, r
        self.pca = IncrementalPCA(max(r, round(r * rho)))
        self.rank = r
        self.cosine: Tensor | None = None  # of each direction with what it was one batch before
        self.waiting: list[Tensor] = []
        self.same_as: Layer | None = None

    @property
    def source(self) -> Layer:
        return self if self.same_as is None else self.same_as

    def settled(self, tau: float) -> bool:
        """Whether the directions that the layer would get now stay as they are."""
        return self.cosine is not None and bool((self.cosine[: self.rank] >= tau).all())

    def see(self, rows: Tensor) -> None:
        """Merge rows; they wait until there are as many as directions."""
        self.waiting.append(rows)
        if sum(map(len, self.waiting)) < self.pca.n:
            return
        before = None if self.pca.rows == 0 else self.pca.components
        self.pca.update(torch.cat(self.waiting))
        self.waiting = []
        if before is not None:
            self.cosine = F.cosine_similarity(before, self.pca.components)

    def components(self, whiten: bool) -> Tensor:
        pca = self.source.pca
        V = pca.components[: self.rank]
        if whiten:
            V = V / pca.values[: self.rank, None].sqrt()
        return V.float().contiguous()


@dataclass(frozen=True)
class Passes:
    """How a batch is run and read; see get_eva_state_dict."""

    forward: Callable[[Any, Any], Any]
    of_batch: Callable[[Any, Any], Any] | None
    of_layer: Callable[..., Tensor] | Mapping[str, Callable[..., Tensor]] | None
    gather: bool
    show: bool

    def rows(self, x: Tensor, batch: Any, name: str) -> Tensor:
        make: Any = self.of_layer.get(name) if isinstance(self.of_layer, Mapping) else self.of_layer
        out = x.flatten(0, -2) if make is None else make(x, batch, name)
        if not bool(torch.isfinite(out).all()):
            raise AdapterError(f"EVA: the inputs of {name} are not finite: a batch or the base's weights hold NaN")
        return out.detach().float() if not self.gather else _everyone(out.detach().float())


def for_language_model(model_input: Any, peft_config: Any) -> Any:
    """(row, position) of every token that counts: not padding, and with a label unless use_label_mask is off."""
    if not isinstance(model_input, Mapping):
        raise ValueError(
            f"batches must be mappings with input_ids, got {type(model_input).__name__}; pass forward_fn and "
            "prepare_model_inputs_fn of your own (None for every row)"
        )
    mask = model_input.get("attention_mask")
    ids = model_input.get("input_ids", mask)
    if ids is None:
        return None
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    eva = peft_config.eva_config
    if eva.use_label_mask and model_input.get("labels") is not None:
        labels = model_input["labels"]
        if labels.shape == mask.shape:
            mask = mask & (labels != eva.label_mask_value)
    return mask.nonzero()


def rows_for_language_model(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """The counting tokens' rows of a layer's input; all rows where the layer sees something else than tokens."""
    x = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    if model_input is None or x.dim() != 3:
        return x.flatten(0, -2)
    return x[model_input[:, 0].to(x.device), model_input[:, 1].to(x.device)]


def _everyone(rows: Tensor) -> Tensor:
    """The rows of all processes; each must see as many."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def run(model: nn.Module, layers: list[Layer], data: Iterable[Any], config: Any, passes: Passes) -> None:
    """Pass batches until every layer has settled."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tau = config.eva_config.tau
    _find_same(model, layers, data, device, passes)
    for turn in range(ROUNDS):
        for batch in progress(data, f"EVA: round {turn + 1}", passes.show):
            _one_batch(model, layers, _to(batch, device), config, passes)
            if any(x.source.pca.rows == 0 for x in layers):
                continue
            distribute(layers)
            if all(x.source.settled(tau) for x in layers):
                return
        _check_enough(layers)  # the same rows once more would hold nothing new
    open_ones = [x.name for x in layers if not x.source.settled(tau)]
    warnings.warn(
        f"EVA: after {ROUNDS} rounds the directions of {len(open_ones)} layers ({open_ones[0]}, ...) still move by "
        f"more than tau={tau} allows; they are used as they are",
        PeftWarning,
        stacklevel=4,
    )


def _check_enough(layers: list[Layer]) -> None:
    short = [x for x in layers if x.source.pca.rows == 0]
    if short:
        raise AdapterError(
            f"EVA: {short[0].name} ({len(short)} layers) saw fewer rows than the {short[0].pca.n} directions it needs; "
            "give more or larger batches, or lower r or rho"
        )


def _one_batch(model: nn.Module, layers: list[Layer], batch: Any, config: Any, passes: Passes) -> None:
    facts = batch if passes.of_batch is None else passes.of_batch(batch, config)
    handles = []
    for layer in layers:
        if layer.same_as is None and not layer.settled(config.eva_config.tau):

            def hook(module: nn.Module, args: tuple[Any, ...], layer: Layer = layer) -> None:
                layer.see(passes.rows(args[0], facts, layer.name))

            handles.append(layer.module.register_forward_pre_hook(hook))
    try:
        passes.forward(model, batch)
    finally:
        for h in handles:
            h.remove()


def _find_same(model: nn.Module, layers: list[Layer], data: Iterable[Any], device: Any, passes: Passes) -> None:
    """Let layers that get the same input share one decomposition, seen on the first batch."""
    seen: dict[Any, Layer] = {}
    handles = []
    for layer in layers:

        def hook(module: nn.Module, args: tuple[Any, ...], layer: Layer = layer) -> None:
            x = args[0].detach().double()
            ramp = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
            key = (x.shape, float(x.sum()), float(x.square().sum()), float((x @ ramp).square().sum()), layer.r)
            first = seen.setdefault(key, layer)
            layer.same_as = None if first is layer else first

        handles.append(layer.module.register_forward_pre_hook(hook))
    batch = next(iter(data), None)
    try:
        if batch is None:
            raise AdapterError("EVA: the dataloader is empty")
        passes.forward(model, _to(batch, device))
    finally:
        for h in handles:
            h.remove()
    unseen = [x.name for x in layers if x not in seen.values() and x.same_as is None]
    if unseen:
        raise AdapterError(f"EVA: forward_fn passed nothing through {', '.join(unseen[:5])}")


def distribute(layers: list[Layer]) -> None:
    """Ranks by explained variance: the sum of all r goes to the directions that explain most."""
    budget = sum(x.r for x in layers)
    shares = [(float(v), i) for i, x in enumerate(layers) for v in x.source.pca.explained]
    best = sorted(shares, key=lambda s: s[0], reverse=True)[:budget]
    for i, x in enumerate(layers):
        x.rank = sum(1 for _, j in best if j == i)


def _to(batch: Any, device: torch.device) -> Any:
    if torch.is_tensor(batch):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: _to(v, device) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_to(v, device) for v in batch)
    return batch
