"""EVA: A holds the directions in which a layer's inputs vary most, and ranks go where more variance is explained.
Paischer et al. 2024, arXiv:2410.07170, section 3.

    x = U S V^T over batches;   A_i = V_{r_i}^T,   B = 0;   sum of r_i = sum of r, the r_i by explained variance

The base stays, so the finished adapter is an ordinary one. Before initialize_lora_eva_weights has seen data, A is
drawn as by default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError
from ..view import View
from . import default
from .eva_pass import Layer, Passes, for_language_model, rows_for_language_model, run
from .eva_write import write
from .prepared import tuner_in, wanted


def fill(A: Tensor, B: Tensor, weight: Callable[[], Tensor], p: View, cfg: Any) -> None:
    default.fill(A, B, weight, p, cfg)


def _call(model: Any, inputs: Any) -> Any:
    if not isinstance(inputs, Mapping):
        raise AdapterError(
            f"EVA: a batch is a {type(inputs).__name__}; batches are the model's arguments by name, or "
            "pass forward_fn to call it another way"
        )
    return model(**inputs)


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[Any, Any], Any] = _call,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = for_language_model,
    prepare_layer_inputs_fn: Callable[..., Tensor] | dict[str, Callable[..., Tensor]] | None = rows_for_language_model,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """{layer name: A (rank of the layer, inp)} from the inputs that each target layer sees.

    model: a PeftModel with an EVA adapter (its adapters are off meanwhile), or a base model with `peft_config`.
    dataloader: batches, passed again from the start until every layer's leading directions have settled, ten
    times at most. forward_fn(model, batch) runs the model. prepare_model_inputs_fn(batch, config) is called before
    each batch; its result is the third word of prepare_layer_inputs_fn(input, that, name) -> rows (n, inp), which
    leaves out padding and masked labels by default (None: every row). gather_distributed_inputs: under
    torch.distributed, each process sees the rows of all.

    Layers with the same input share one decomposition. Raises ValueError for a config of another kind, batches that
    run out before a layer has seen enough rows, or an empty dataloader.
    """
    config = peft_config if peft_config is not None else _config(model, adapter_name)
    if str(config.init_lora_weights).lower() != "eva":
        raise ValueError(f"init_lora_weights must be 'eva', not {config.init_lora_weights!r}")
    layers = _layers(model, config, adapter_name)
    passes = Passes(
        forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, gather_distributed_inputs, show_progress_bar
    )
    host = getattr(model, "host", None)
    was_training, was_enabled = model.training, host.enabled if host is not None else True
    model.eval()
    try:
        if host is not None:
            host.enable(False)
        with torch.no_grad():
            run(model, layers, dataloader, config, passes)
    finally:
        model.train(was_training)
        if host is not None:
            host.enable(was_enabled)
    return {layer.name: layer.components(config.eva_config.whiten) for layer in layers if layer.rank > 0}


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Any] = _call,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = for_language_model,
    prepare_layer_inputs_fn: Callable[..., Tensor] | dict[str, Callable[..., Tensor]] | None = rows_for_language_model,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give an EVA adapter of a PeftModel its initial values and ranks; its config's rank_pattern and alpha_pattern
    say what became of them. A layer whose rank is zero is left as it was.

    eva_state_dict: what get_eva_state_dict returned; otherwise it is made from dataloader. For the other arguments
    see there. Raises ValueError where neither is given or a name is no layer of the adapter.
    """
    config = _config(model, adapter_name)
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, config, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    write(model, eva_state_dict, adapter_name, config)


def _config(model: nn.Module, adapter_name: str) -> Any:
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise AdapterError(f"no adapter {adapter_name!r} in this {type(model).__name__}; it has {list(configs)}")
    return configs[adapter_name]


def _layers(model: nn.Module, config: Any, adapter_name: str) -> list[Layer]:
    """The linear layers to look at, under their names in the base."""
    tuner = tuner_in(model)
    if tuner is None:
        return [Layer(w.name, w.site.module, w.cfg.r, config.eva_config.rho) for w in wanted(model, config)]
    out = []
    for name, layer in tuner.adapted_layers():
        if adapter_name in layer.entries and layer.site.kind == "linear":
            r = layer.entries[adapter_name].cfg.r
            out.append(Layer(name, layer, r, config.eva_config.rho))
    if not out:
        raise AdapterError(f"adapter {adapter_name!r} has no linear layer, and EVA looks at those only")
    return out
