"""The contract between the engine and a method's maths.

A method is one final subclass of one kind. It is stateless: the engine makes a single instance of it and
hands it views. A view `p` is one adapter's tensors on one layer (`p.lora_A`, ...), plus

    p.cfg       the config, already resolved for this layer (rank and alpha patterns applied)
    p.site      the layer as a linear map: out, inp, kernel, groups, op (see site.py)
    p.scaling   a number that multiplies the change; users may alter it on the layer
    p.drop(x)   the adapter's dropout
    p.training  whether the layer trains

The laws every method keeps (tests/laws runs them over the registry):

    identity at init      a fresh adapter leaves the model's output as it was
    forward == merged     for one adapter and for several; unmerge gives the base back bit for bit
    mixed == alone        a batch whose rows use different adapters equals each row computed alone
    save == load == peft  names and shapes in the file are those that peft writes and reads
    gradcheck             gradients agree with finite differences in double precision

Weights are handed out in one layout, whatever the layer class: (out, inp / groups, *kernel).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .defaults import default_targets

if TYPE_CHECKING:
    from .config import PeftConfig
    from .site import Site
    from .view import View

Weights = tuple[Tensor, "Tensor | None"]


@dataclass(frozen=True)
class Spec:
    """One declared tensor: its shape and how it is stored.

    train: a parameter; otherwise a frozen buffer. save: part of the checkpoint. raw: handed to the formula in
    its own dtype, not cast to the computation's. like: the module class that holds it, so that
    `layer.lora_A["default"]` is an nn.Linear ("linear", "conv-down", "conv-up", or "copy" of the layer's own). file:
    the checkpoint name where it differs from the storage name. value: the initial tensor, for tensors that
    layers share; a function that makes it, where that is costly and a file may bring it.
    """

    shape: tuple[int, ...]
    train: bool = True
    save: bool = True
    raw: bool = False
    like: str | None = None
    file: str | None = None
    dtype: torch.dtype | None = None
    value: Tensor | Callable[[], Tensor] | None = None


class Method(ABC):
    """What every kind shares. Subclass a kind below, not this."""

    name: ClassVar[str] = ""
    Config: ClassVar[type[PeftConfig]]
    sites: ClassVar[frozenset[str]] = frozenset({"linear"})
    dropout: ClassVar[str | None] = None
    mergeable: ClassVar[bool] = True
    prefix: ClassVar[str] = ""
    exempt: ClassVar[dict[str, str]] = {}  # law -> why it does not hold for this method
    settings: ClassVar[frozenset[str]] = (
        frozenset()
    )  # of those that `scaling` or shapes tell (alpha): the formula's own
    exclusive: ClassVar[bool] = False  # changes the base so that adapters of other methods of its type do not fit
    defaults: ClassVar[str] = "lora"  # whose default targets, where target_modules is None (defaults.py)
    example: ClassVar[dict[str, Any]] = {}  # settings that a small model needs, where the defaults do not fit it
    needs_others: ClassVar[bool] = False  # acts through other adapters of the model (X-LoRA, Arrow): none alone
    reads: ClassVar[frozenset[str]] = frozenset()  # a call's arguments that it takes, one entry a row: p.data[name]

    def variant(self, cfg: Any) -> str | None:
        """The registry name of the method that a config's options select, when it is another one (DoRA)."""
        return None

    def tuner_class(self) -> Any:
        """A Tuner of its own, for a method that acts on the model's call (X-LoRA); None: the usual one."""
        return None

    def prepare(self, cfg: Any, model: torch.nn.Module, model_type: str | None) -> None:
        """Fill in what the config leaves to the model's architecture."""
        if not cfg.target_modules and not getattr(cfg, "target_parameters", None) and cfg.target_modules is None:
            found = default_targets(model, model_type, self.defaults)
            cfg.target_modules = found if isinstance(found, str) else set(found)

    def check(self, cfg: Any, site: Site) -> None:
        """Raise ValueError where the settings do not fit the layer."""

    @abstractmethod
    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        """Storage name -> Spec, for one layer. "lora_A.weight" is read as p.lora_A, "lora_B.bias" as
        p.lora_B_bias."""

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        """Fill p's tensors in place; return a new base weight or None. `weight()` is the base's, detached."""
        return None

    def restore(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> None:
        """Fill the tensors that a file does not hold, from the base and from those that it does; after loading."""

    def check_call(self, cfg: Any, data: dict[str, Any]) -> None:
        """Raise ValueError where what a call gave for `reads` does not fit; once a call, before any layer runs."""

    def extra_loss(self, ps: Sequence[View]) -> Tensor | None:
        """What training adds to the loss for one adapter, a number; ps: its views on all layers."""
        return None

    def listener(self, tuner: Any, args: tuple, kwargs: dict[str, Any]) -> AbstractContextManager | None:
        """A context around a call of the model or its generate, for methods that watch the base's calls in it."""
        return None

    def changes_base(self, cfg: Any) -> bool:
        """Whether `init` returns a new base weight: then it runs on loading, too."""
        return False

    def shared(self, cfg: Any, sites: Sequence[Site]) -> dict[str, Spec]:
        """Tensors held once per adapter, sized by all target layers (VeRA's projections); Spec.value is set."""
        return {}

    def ties(self, cfg: Any) -> dict[str, int | None]:
        """Storage name ("lily_A") -> how many layers in a row hold one tensor, None: all. Layers count that one entry
        of target_modules names and that are of one size."""
        return {}

    def by_place(self, cfgs: Sequence[Any], sites: Sequence[Site]) -> Sequence[Any]:
        """Each layer's config, where a layer's tensors depend on its place among all (its seed, its group)."""
        return cfgs

    schedule_fields: ClassVar[tuple[str, ...]] = ()  # settings that on_step changes

    def scheduled(self, cfg: Any) -> bool:
        """Whether on_step is to run after each optimizer step (schedule.py)."""
        return False

    def on_step(self, cfg: Any, ps: dict[str, View], step: int, memory: dict[str, Tensor]) -> None:
        """After the optimizer's step number `step`, from 1; ps: layer path -> view, gradients still in place.
        memory: kept between calls and saved with the adapter during training."""

    def on_resume(self, cfg: Any, ps: dict[str, View], memory: dict[str, Tensor]) -> None:
        """After memory and tensors of a saved run are back."""

    def output_loss(self, ps: Sequence[View]) -> Tensor | None:
        """As extra_loss, for scheduled methods whose callers expect it in the model's own output loss."""
        return None

    #: attributes of a layer that peft keeps and that follow from other tensors here: name -> what an adapter's is
    derived: ClassVar[dict[str, Callable[[View], Any]]] = {}

    def to_disk(self, cfg: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """File key -> tensor as the file has them, where its form is its own (VB-LoRA's top k)."""
        return tensors

    def from_disk(self, cfg: Any, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The other way. shapes: those of the tensors in place, by file key."""
        return tensors

    def scaling(self, cfg: Any) -> float:
        return 1.0

    def cannot_merge(self, site: Site) -> str:
        """What a refused merge says, where `mergeable` is false."""
        return f"{self.name} on {site!r} depends on the input and has no merged weight"

    @abstractmethod
    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        """The adapted layer's output for active adapters `ps`."""

    @abstractmethod
    def merged(self, ps: Sequence[View], W: Tensor, b: Tensor | None) -> Weights:
        """Weight and bias such that the plain layer computes what `forward` does without dropout."""
