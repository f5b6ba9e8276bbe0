"""Frozen linear layers multiplied in 8-bit integers while their adapters train: faster where the CPU has VNNI.

    with int8_base(model, batches):    # or int8_base(...).on() for good; eval mode keeps its floats
        ...                            # not the same numbers: `errors` says how far off each layer is

    x W^T  ~  s_x (x_q W_q^T) s_W      x_q = round((x / c) / s_x)     W_q = round((W c) / s_W)
    g W    ~  s_g (u_q W_q) / c        u = g s_W,  u_q = round(u / s_g)

with a scale for each row of x, W and u (LLM.int8(), arXiv 2208.07339, section 2), both products from one W_q
(SwitchBack, arXiv 2304.13013), and c, a number for each input channel, which takes the outliers of x over to W:
c_j = sqrt(max|x_j| / max|W_j|) (SmoothQuant, arXiv 2211.10438, equation 4, alpha = 0.5). The adapters' own products
and gradients stay in floats.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Int8Base", "Int8Weight", "int8_base", "int8_is_faster", "int8_weight", "quantise_rows"]

#: frozen weights whose products are done in int8 just now
_active: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, n) as int8 (rows, n) and the scale of each row, (rows, 1), in x's dtype."""
    scale = x.abs().amax(1, keepdim=True).div_(127).clamp_(min=torch.finfo(x.dtype).tiny)
    return (x / scale).round_().to(torch.int8), scale


class Inputs:
    """What layers that read one tensor share: c, and the rows quantised last (q, k and v; gate and up)."""

    def __init__(self, c: Tensor):
        self.c, self.inverse = c, c.reciprocal()
        self._source: weakref.ref[Tensor] | None = None
        self._version = -1
        self._rows: tuple[Tensor, Tensor] | None = None

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x / c, quantised."""
        known = None if self._source is None else self._source()
        if self._rows is None or known is not x or self._version != x._version:
            self._rows = quantise_rows(x.reshape(-1, x.shape[-1]) * self.inverse)
            self._source, self._version = weakref.ref(x), x._version
        return self._rows


class Int8Weight:
    """A frozen weight W (out, inp) as int8, and its two products."""

    def __init__(self, W: Tensor, inputs: Inputs):
        self.inputs, self.version = inputs, W._version
        self.q, scale = quantise_rows(W.detach() * inputs.c)
        self.scale = scale.view(-1)  # (out,)

    def product(self, x: Tensor, out: Tensor) -> None:
        """out (rows, out_features) = x W^T of x (..., inp)."""
        q, scale = self.inputs.rows(x)
        torch.mul(torch._int_mm(q, self.q.mT), scale, out=out).mul_(self.scale)

    def input_gradient(self, g: Tensor) -> Tensor:
        """g W (rows, inp) of g (rows, out)."""
        q, scale = quantise_rows(g * self.scale)
        return torch.mul(torch._int_mm(q, self.q), scale).mul_(self.inputs.inverse)


def int8_weight(module: nn.Module) -> Int8Weight | None:
    """The int8 form of a layer's weight, where its products are to be done with it."""
    if not _active or not module.training:
        return None
    W: Any = module._parameters["weight"]
    found: Int8Weight | None = _active.get(W)
    return found if found is not None and found.version == W._version else None


def int8_is_faster(rows: int = 256, width: int = 576) -> bool:
    """Whether this machine multiplies int8 matrices in less than 0.7 of the time that float32 takes (tried: 10 ms)."""
    x, W = torch.ones(rows, width), torch.ones(width, width)
    q, r = x.to(torch.int8), W.to(torch.int8)

    def seconds(run: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(lambda: torch._int_mm(q, r.mT)) < 0.7 * seconds(lambda: x @ W.mT)


class Int8Base:
    """What `int8_base` made of a model; on() and off() switch it, `with` does both.

    errors: for each layer's name, |int8 - float| / |float| of its outputs on the batches it was tried with. Layers
    with more than the tolerance keep their floats.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Callable[[], Any]], tolerance: float):
        self.errors: dict[str, float] = {}
        self.weights: dict[nn.Module, Int8Weight] = {}
        layers = dict(_adapted_layers(model))
        training, runs = model.training, list(batches)
        model.eval()  # the fast path steps aside for the hooks; nothing is dropped
        try:
            with torch.no_grad():
                for inputs, members in _shared_inputs(layers, runs):
                    self.weights |= {layers[name]: Int8Weight(_weight(layers[name]), inputs) for name in members}
                self.errors = _errors(layers, self.weights, runs)
        finally:
            model.train(training)
        for name, module in layers.items():
            if not self.errors.get(name, float("inf")) <= tolerance:
                self.weights.pop(module, None)

    def on(self) -> Int8Base:
        for module, weight in self.weights.items():
            _active[_weight(module)] = weight
        return self

    def off(self) -> None:
        for module in self.weights:
            _active.pop(_weight(module), None)

    def __enter__(self) -> Int8Base:
        return self.on()

    def __exit__(self, *_: Any) -> None:
        self.off()

    def __repr__(self) -> str:
        return f"Int8Base({len(self.weights)} of {len(self.errors)} layers)"


def int8_base(model: nn.Module, batches: Iterable[Callable[[], Any]], tolerance: float = 0.05) -> Int8Base:
    """The int8 products of `model`'s frozen float32 linear layers on the CPU; nothing changes before `on()` or `with`.

    They are used by the layers that do base and adapter at once: LoRA and its kin on plain nn.Linear layers.

    Args:
        batches: calls that run the model on examples of its input, such as `lambda: model(**batch)`; two are plenty.
        tolerance: the largest relative error of a layer's outputs that is accepted.
    """
    return Int8Base(model, batches, tolerance)


def _weight(module: nn.Module) -> Tensor:
    weight: Any = module._parameters["weight"]
    return weight  # type: ignore[no-any-return]


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The frozen float32 nn.Linear layers on the CPU that adapters are around, by the names of their wrappers."""
    from .layer import Adapted

    for name, wrapper in model.named_modules():
        module = wrapper.get_base_layer() if isinstance(wrapper, Adapted) else None
        if module is None or type(module).forward is not nn.Linear.forward:
            continue
        weight = _weight(module)
        plain = type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.device.type == "cpu"
        if plain and not weight.requires_grad:
            yield name, module


def _shared_inputs(layers: dict[str, nn.Module], runs: list[Callable[[], Any]]) -> list[tuple[Inputs, list[str]]]:
    """c for each tensor that some layers read, with those layers' names."""
    highest: dict[str, Tensor] = {}
    reads: dict[str, int] = {}
    held: list[Tensor] = []  # a tensor that is let go may give its id to another

    def see(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, args: Any) -> None:
            x = args[0]
            top = x.reshape(-1, x.shape[-1]).abs().amax(0)
            highest[name] = top if name not in highest else torch.maximum(highest[name], top)
            if name not in reads:
                reads[name] = id(x)
                held.append(x)

        return hook

    _with_hooks([module.register_forward_pre_hook(see(name)) for name, module in layers.items()], runs)
    groups: dict[int, list[str]] = {}
    for name, tensor in reads.items():
        groups.setdefault(tensor, []).append(name)
    found = []
    for members in groups.values():
        x = torch.stack([highest[name] for name in members]).amax(0).clamp_(min=1e-5)
        w = torch.stack([_weight(layers[name]).abs().amax(0) for name in members]).amax(0).clamp_(min=1e-5)
        found.append((Inputs((x / w).sqrt_()), members))
    return found


def _errors(
    layers: dict[str, nn.Module], weights: dict[nn.Module, Int8Weight], runs: list[Callable[[], Any]]
) -> dict[str, float]:
    """The relative error of each layer's outputs over all runs."""
    sums: dict[str, list[float]] = {}

    def see(name: str, weight: Int8Weight) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            bias: Any = module._parameters["bias"]
            wanted = (y if bias is None else y - bias).reshape(-1, y.shape[-1])
            got = torch.empty_like(wanted)
            weight.product(args[0], got)
            off, whole = sums.setdefault(name, [0.0, 0.0])
            sums[name] = [off + float((got - wanted).square().sum()), whole + float(wanted.square().sum())]

        return hook

    hooks = [
        module.register_forward_hook(see(name, weights[module])) for name, module in layers.items() if module in weights
    ]
    _with_hooks(hooks, runs)
    return {name: (off / whole) ** 0.5 if whole else 0.0 for name, (off, whole) in sums.items()}


def _with_hooks(hooks: list[RemovableHandle], runs: list[Callable[[], Any]]) -> None:
    try:
        for run in runs:
            run()
    finally:
        for hook in hooks:
            hook.remove()
