"""What the sites of quantised linear layers share, and what merging into one costs."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import AdapterError, CannotMerge, PeftWarning
from ..site import LinearSite

__all__ = ["AskedSite", "MergeError", "QuantisedSite", "summary"]


@dataclass(frozen=True)
class MergeError:
    """What quantising a merged weight W' = W + D anew, to Q, loses. Frobenius norms.

    weight: |Q - W'| / |W'|. change: |Q - W'| / |D|; above 1 the rounding is larger than what the adapters do.
    kept: <Q - W, D> / |D|^2, the share of the change that is still there. change and kept are nan where D is 0.
    """

    weight: float
    change: float
    kept: float

    @classmethod
    def of(cls, before: Tensor, wanted: Tensor, got: Tensor) -> MergeError:
        before, wanted, got = (t.detach().float() for t in (before, wanted, got))
        lost, delta = float((got - wanted).norm()), wanted - before
        size = float(delta.norm())
        whole = max(float(wanted.norm()), 1e-30)
        if size == 0.0:
            return cls(lost / whole, math.nan, math.nan)
        return cls(lost / whole, lost / size, float(((got - before) * delta).sum()) / size**2)


def summary(errors: Mapping[str, MergeError]) -> str:
    """One sentence on the layers' errors, by their names."""
    worst = max(errors, key=lambda n: errors[n].weight)
    mean = sum(e.weight for e in errors.values()) / len(errors)
    changed = [e for e in errors.values() if not math.isnan(e.change)]
    kept = sum(e.kept for e in changed) / len(changed) if changed else math.nan
    ratio = sum(e.change for e in changed) / len(changed) if changed else math.nan
    return (
        f"quantising anew moved the merged weights by {100 * mean:.2g} % on average (most: {worst}, "
        f"{100 * errors[worst].weight:.2g} %), {ratio:.2g} times the adapters' own change, of which {100 * kept:.3g} % "
        "is still there"
    )


class QuantisedSite(LinearSite):
    """A linear layer with a packed, frozen weight. Its call is the library's own and may round the input, too, so
    adapters act around the call or add to it, and never compute in its place.

    library: its name in messages. A subclass says how the packed weight is read (`weight`), made (`requantise`), kept
    (`packed`) and put back (`restore`).
    """

    quantised = True
    library: ClassVar[str]

    merge_error: MergeError | None = None

    def size(self) -> tuple[int, int]:
        module: Any = self.module
        return module.out_features, module.in_features

    def plain(self) -> bool:
        return False

    @abstractmethod
    def weight(self) -> Tensor:
        """The numbers that the packed weight stands for, (out, inp), a new tensor."""

    @abstractmethod
    def requantise(self, W: Tensor) -> None:
        """Give the layer this weight (out, inp), float32, quantised as the one it had."""

    @abstractmethod
    def packed(self) -> Any:
        """All that `requantise` replaces."""

    @abstractmethod
    def restore(self, packed: Any) -> None:
        """Undo `requantise`; also where the model has moved to another device meanwhile."""

    def put(self, W: Tensor, b: Tensor | None) -> Any:
        before, old, old_b = self.weight(), self.packed(), self.bias()
        try:
            with torch.no_grad():
                self.requantise(W.to(self.device))
                self.merge_error = MergeError.of(before, W, self.weight())
        except Exception:
            self.restore(old)
            raise
        if b is not None:
            trained = old_b is not None and old_b.requires_grad
            kind = self.dtype if old_b is None else old_b.dtype
            self.put_bias(torch.nn.Parameter(b.to(kind), requires_grad=trained))
        return old, old_b

    def put_back(self, old: Any) -> None:
        packed, b = old
        self.restore(packed)
        self.merge_error = None
        self.put_bias(b if b is None or b.device == self.device else b.to(self.device))

    def put_bias(self, b: Any) -> None:
        self.module._parameters["bias"] = b

    def stand_in(self, W: Tensor, b: Tensor | None) -> Any:
        raise AdapterError(f"{self!r}: a {self.library} weight has no float tensor that could stand in for it")


class AskedSite(QuantisedSite):
    """A packed layer whose weight is read from what it answers to unit vectors, so that any of its library's kernels
    will do. Quantising a merged weight anew needs data that is not here, so nothing merges into it."""

    def check(self, dropout: float) -> None:
        x = torch.zeros(1, self.inp, dtype=self.dtype, device=self.device, requires_grad=True)
        with torch.enable_grad():
            learns = self.module(x).requires_grad
        if not learns:
            warnings.warn(
                f"{self!r}: this {self.library} kernel gives its input no gradient: layers before this one do not "
                "learn through it. Load the model with a kernel that can train",
                PeftWarning,
                stacklevel=2,
            )

    def bias(self) -> Tensor | None:
        module: Any = self.module
        return module.bias

    def put_bias(self, b: Any) -> None:
        module: Any = self.module
        module.bias = b

    @torch.no_grad()
    def weight(self) -> Tensor:
        b = self.bias()
        self.put_bias(None)  # adding and taking it away again would round
        try:
            return self.module(torch.eye(self.inp, dtype=self.dtype, device=self.device)).mT
        finally:
            self.put_bias(b)

    def requantise(self, W: Tensor) -> None:
        raise CannotMerge(
            f"{self!r}: {self.library} quantises with training data, so a merged weight cannot be packed anew here; "
            "keep the adapter unmerged, or merge it into the original model (`veneer merge --base ORIGINAL`)"
        )

    def packed(self) -> Any:
        return None

    def restore(self, packed: Any) -> None:
        pass
