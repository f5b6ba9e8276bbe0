"""What the laws share: a two-layer model around a case's module, adapters with random tensors, distances."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from law_cases import CASES, Case
from torch import Tensor, nn

from veneer import registry
from veneer.context import Rows
from veneer.tuner import Tuner

LAYERS = ["first", "second"]
MAIN_SITES = {"Linear", "Conv1D", "Conv2d", "Conv2d-groups", "Embedding"}


class Net(nn.Module):
    """Two of a case's modules side by side: what layers share and what they do not both show."""

    def __init__(self, make: Callable[[], nn.Module]):
        super().__init__()
        torch.manual_seed(7)
        self.first, self.second = make(), make()
        for p in self.parameters():  # a norm's ones and zeros would hide a swapped weight
            p.data.add_(torch.randn_like(p) * 0.1)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + 0.5 * self.second(x)


def config(case: Case, package: Any = None, **changes: Any) -> Any:
    """The case's config, of veneer or of another package with the same names."""
    entry = registry.METHODS[case.method_name]
    name = entry.config
    kwargs = {"target_modules": LAYERS, **case.cfg_kwargs, **changes}
    if package is not None:
        return getattr(package, name)(**kwargs)
    return registry.method(case.method_name).Config(**kwargs)


def build(
    case: Case, dtype: torch.dtype = torch.float32, adapters: int = 1, mixes: bool = False, **changes: Any
) -> Tuner:
    """A fresh model with `adapters` adapters named "a0", "a1", ... of the case, at their initial values."""
    tuner = _Mixing if mixes else Tuner
    net = Net(case.make_module).to(dtype).eval()
    torch.manual_seed(1)
    keep = changes.pop("autocast_adapter_dtype", True)
    t = tuner(net, config(case, **changes), "a0", autocast_adapter_dtype=keep)
    for i in range(1, adapters):
        t.add_adapter(f"a{i}", config(case, **{**other(case, i), **changes}))
    return t.eval()


def other(case: Case, i: int) -> dict[str, Any]:
    """What the i-th adapter must have of its own to be active beside the first: rows, for methods that train rows."""
    rows_trained = case.cfg_kwargs.get("token_indices")
    return {} if rows_trained is None else {"token_indices": [(t + (0, 1, 6)[i]) % 11 for t in rows_trained]}


class _Mixing(Tuner):
    mixes = True


def tensors(t: Tuner, name: str, train: bool = True) -> Iterator[tuple[str, Tensor]]:
    """An adapter's (trained) tensors, each once."""
    seen: set[int] = set()
    for path, key, spec, holder, leaf in t.tensor_names(name):
        value = getattr(holder, leaf)
        if (spec.train or not train) and id(value) not in seen:
            seen.add(id(value))
            yield f"{path}.{key}", value


def randomize(t: Tuner, scale: float = 0.2, seed: int = 3) -> Tuner:
    """Move every trained tensor of every adapter, each adapter differently."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in t.peft_config:
            for _, p in tensors(t, name):
                p.add_(torch.randn(p.shape, generator=generator).to(p) * scale)
    return t


def data(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(5)
    x = case.make_input()
    return x.to(dtype) if x.is_floating_point() else x


def base_state(t: Tuner) -> dict[str, Tensor]:
    """Clones of the base's own tensors by name of layer."""
    out = {}
    for path in LAYERS:
        layer: Any = t.model.get_submodule(path)
        for name, p in getattr(layer, "base_layer", layer).named_parameters():
            out[f"{path}.{name}"] = p.detach().clone()
    return out


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))


@contextmanager
def rows(t: Tuner, names: list[str]) -> Iterator[None]:
    with t.host.call(rows=Rows.of(names)):
        yield


def exempt(case: Case, law: str) -> None:
    """Skip where the method's own file says that, and why, a law does not hold for it.

    A reason may be for layers with groups alone: "forward == merged with groups".
    """
    method: Any = registry.method(case.method_name)
    reasons = getattr(type(method), "exempt", {})
    law = f"{law} with groups" if "groups" in case.site_name and f"{law} with groups" in reasons else law
    if law in reasons:
        pytest.skip(f"{case.method_name} is exempt from {law!r}: {reasons[law]}")


def every_case(only: Callable[[Case], bool] = lambda c: True) -> Any:
    """The cases of the registry; those that only vary a site which another case has stood for are `slow`."""
    chosen = [c for c in CASES if only(c)]
    first = {(c.method_name, c.variant): c.id for c in reversed(CASES)}
    stands = {c.id for c in CASES if c.id == first[c.method_name, c.variant] or c.site_name in MAIN_SITES}
    marked = [c if c.id in stands else pytest.param(c, marks=pytest.mark.slow) for c in chosen]
    return pytest.mark.parametrize("case", marked, ids=[c.id for c in chosen])
