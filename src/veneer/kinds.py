"""The kinds of methods: a method is one final subclass of one of them (method.py has the contract)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .errors import AdapterError, CannotMerge
from .int8 import int8_weight
from .kernels import low_rank_linear, low_rank_reference, mask_like
from .method import Method, Spec, Weights

if TYPE_CHECKING:
    from .config import PeftConfig
    from .site import Site
    from .view import View

__all__ = [
    "Additive", "Attach", "Gate", "LowRank", "Method", "Prompt", "Replace", "Reweight", "Routed", "Spec", "Weights",
]  # fmt: skip


class Additive(Method):
    """y = base(x) + side(x);  W' = W + delta,  b' = b + bias_delta.

    by_weight: for methods whose delta is dense: y is one product with W' where the weight's own precision is
    float32 or better, so that the sum keeps small changes; elsewhere the side path runs.
    """

    by_weight: ClassVar[bool] = False
    everywhere: ClassVar[bool] = True  # False: `acts(p, x, take)` says on which tokens (aLoRA)

    @abstractmethod
    def delta(self, p: View) -> Tensor:
        """(out, inp / groups, *kernel), p.scaling included."""

    def side(self, p: View, x: Tensor) -> Tensor:
        """What the adapter adds to the output, without the bias change."""
        return p.site.op(x, self.delta(p), None)

    def bias_delta(self, p: View) -> Tensor | None:
        return None

    def dense(self, p: View) -> bool:
        """With by_weight: whether at this layer's sizes the change is cheaper as a weight than by `side`."""
        return True

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        plain = not args and not kwargs and not any(p.dropping for p in ps)
        if self.by_weight and plain and base.exact_for(x) and all(map(self.dense, ps)):
            return ps[0].site.op(x, *self.merged(ps, base.weight(), base.bias()))
        y = base(x, *args, **kwargs)
        for p in ps:
            y = y + self.side(p, p.drop(x)).to(y.dtype)
            d = self.bias_delta(p)
            if d is not None:
                y = y + p.site.per_feature(d).to(y.dtype)
        return y

    def merged(self, ps: Sequence[View], W: Tensor, b: Tensor | None) -> Weights:
        for p in ps:
            W = W + self.delta(p)
            d = self.bias_delta(p)
            if d is not None:
                b = d if b is None else b + d
        return W, b


class Routed(Additive):
    """y = base(x) + side(x), where the side depends on the call or on other tokens: no weight equals it."""

    mergeable = False

    @abstractmethod
    def side(self, p: View, x: Tensor) -> Tensor: ...

    def delta(self, p: View) -> Tensor:
        raise CannotMerge(f"{self.name} on {p.site!r} depends on the call, so no weight equals it; keep it unmerged")


class LowRank(Additive):
    """delta = scaling * B @ A, never formed in the forward pass.

    steady: outside training the factors follow from the tensors alone, so stacks of them may be kept between calls.
    """

    steady: ClassVar[bool] = False

    @abstractmethod
    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        """B (out, k) and A (k, inp); for convolutions B (out, k / groups, 1, ...) and A (k, inp, *kernel)."""

    def read(self, p: View, x: Tensor, A: Tensor) -> Tensor:
        """A x; for methods that read the input in a way of their own while they train."""
        return p.site.down(x, A)

    def side(self, p: View, x: Tensor) -> Tensor:
        B, A = self.factors(p)
        return p.site.up(self.read(p, x, A), B * p.scaling)

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        if type(self).side is not LowRank.side:
            return super().forward(ps, x, base, args, kwargs)
        usual = type(self).read is LowRank.read and len(ps) == 1 and not args and not kwargs
        if usual and ps[0].dropout_rate < 1 and base.plain(x):
            return self._at_once(ps[0], x)
        y = base(x, *args, **kwargs)
        for p in ps:
            B, A = self.factors(p)
            y = p.site.accumulate(y, self.read(p, p.drop(x), A), B, p.scaling)
            d = self.bias_delta(p)
            if d is not None:
                y = y + p.site.per_feature(d).to(y.dtype)
        return y

    def _at_once(self, p: View, x: Tensor) -> Tensor:
        """Base and change of a plain linear layer in one autograd node."""
        B, A = self.factors(p)
        W, b = p.site.weight(), p.site.bias()
        rate = p.dropout_rate
        keep = mask_like(x, rate) if rate else None
        if W.dtype == A.dtype == B.dtype:
            y = low_rank_linear(x, W, b, A, B, p.scaling, keep, rate, int8_weight(p.site.module))
        else:
            y = low_rank_reference(x, W, b, A, B, p.scaling, keep, rate)
        d = self.bias_delta(p)
        return y if d is None else y + d.to(y.dtype)

    def delta(self, p: View) -> Tensor:
        B, A = self.factors(p)
        return p.site.compose(B, A) * p.scaling


class Gate(Method):
    """y = post(base(pre(x))), both linear in their argument; the merged weight follows from them.

    `pre` and `post` act on the last axis. Several adapters: `pre` in the order they were added, or the reverse
    where `last_first`; `post` in the order they were added.
    """

    last_first: ClassVar[bool] = False
    post_sees_bias: ClassVar[bool] = True
    patches: ClassVar[bool] = False  # on a convolution, pre acts on the unfolded patch, as fold() says

    def pre(self, p: View, x: Tensor) -> Tensor:
        return x

    def post(self, p: View, y: Tensor) -> Tensor:
        return y

    def gates(self, p: View) -> tuple[bool, bool]:
        """Which of pre and post this adapter uses; the other is skipped."""
        kind = type(self)
        return kind.pre is not Gate.pre, kind.post is not Gate.post

    def fold(self, p: View, W: Tensor) -> Tensor:
        """The weight of base(pre(x)), W being the base's."""
        return p.site.fold_input(lambda v: self.pre(p, v), W)

    def by_weight(self, site: Site) -> bool:
        """Whether the forward pass computes the new weight first."""
        return self.patches and bool(site.kernel)

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        if self.by_weight(ps[0].site):
            return ps[0].site.op(x, *self.merged(ps, base.weight(), base.bias()))
        for p in reversed(ps) if self.last_first else ps:
            if self.gates(p)[0]:
                x = p.site.on_input(partial(self.pre, p), x)
        y = base(x, *args, **kwargs)
        posts = [p for p in ps if self.gates(p)[1]]
        b = None if self.post_sees_bias or not posts else base.bias()
        y = y if b is None else y - posts[0].site.per_feature(b)
        for p in posts:
            y = p.site.on_output(partial(self.post, p), y)
        return y if b is None else y + posts[0].site.per_feature(b)

    def merged(self, ps: Sequence[View], W: Tensor, b: Tensor | None) -> Weights:
        for p in ps if self.last_first else reversed(ps):
            if self.gates(p)[0]:
                W = self.fold(p, W)
        for p in ps:
            if self.gates(p)[1]:
                W = self.post(p, W.movedim(0, -1)).movedim(-1, 0)
                if b is not None and self.post_sees_bias:
                    b = self.post(p, b)
        return W, b


class Reweight(Method):
    """y = op(x, weight(W)) + bias(b). Several adapters sum their changes, or chain where `chained`."""

    chained: ClassVar[bool] = False

    @abstractmethod
    def weight(self, p: View, W: Tensor) -> Tensor:
        """The new weight, same shape as W: (out, inp / groups, *kernel)."""

    def bias(self, p: View, W: Tensor, b: Tensor | None) -> Tensor | None:
        return b

    def merged(self, ps: Sequence[View], W: Tensor, b: Tensor | None) -> Weights:
        if self.chained or len(ps) == 1:
            for p in ps:
                W, b = self.weight(p, W), self.bias(p, W, b)
            return W, b
        news = [(self.weight(p, W), self.bias(p, W, b)) for p in ps]
        if b is not None:
            b = b + sum(n - b for _, n in news if n is not None)
        return W + sum(w - W for w, _ in news), b

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        W, b = base.weight(), base.bias()
        dropped = ps[0].drop(x) if len(ps) == 1 else x
        # the base sees x whole, the change sees it with dropout; a quantised base computes in its own way
        if dropped is not x or ps[0].site.quantised:
            new, nb = self.merged(ps, W, b)
            y = base(x, *args, **kwargs) + ps[0].site.op(dropped, new - W, None)
            return y if b is None or nb is None else y + ps[0].site.per_feature(nb - b)
        return ps[0].site.op(x, *self.merged(ps, W, b))


class Replace(Method):
    """A trained copy stands in for the module; the last active adapter's copy runs."""

    container: ClassVar[str]

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        passing = site.module._non_persistent_buffers_set
        return {
            f"{self.container}.{n}": Spec(tuple(t.shape), isinstance(t, torch.nn.Parameter), dtype=t.dtype, like="copy")
            for n, t in _tensors(site.module)
            if n not in passing
        }

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        mine, base = p.copy_of_module(self.container), p.site.module
        with torch.no_grad():
            for (_, copy), (_, t) in zip(_tensors(mine), _tensors(base), strict=True):
                copy.copy_(t)
        return None

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        return ps[-1].copy_of_module(self.container)(x, *args, **kwargs)

    def merged(self, ps: Sequence[View], W: Tensor, b: Tensor | None) -> Weights:
        copy: Any = ps[-1].copy_of_module(self.container)
        return copy.weight, getattr(copy, "bias", None)


def _tensors(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """A module's own parameters and buffers by name."""
    return sorted([*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])


class Attach(Method):
    """Acts on the call of a whole module, an attention or a decoder block, rather than on a linear map in it.

    Besides the tensors on each such module an adapter may hold whole modules, once (`modules`), and act where a call
    of the model begins and ends. What one part hands to the next in a call goes through p.data.
    """

    sites = frozenset({"block"})
    mergeable = False

    def targets(self, cfg: Any, names: Iterable[tuple[str, torch.nn.Module]]) -> list[str] | None:
        """The modules to act on, of these names; None: as target_modules says, like any method's."""
        return None

    def modules(self, cfg: Any, model: Any, fill: bool) -> dict[str, torch.nn.Module]:
        """name -> a module of the adapter's own, trained and saved whole. fill=False: a file's tensors follow."""
        return {}

    @abstractmethod
    def act(self, ps: Sequence[View], base: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the module returns with active adapters `ps`; base(*args, **kwargs) is the module itself."""

    def begin(self, cfg: Any, parts: dict[str, Any], model: Any, call: dict[str, Any]) -> dict[str, Any]:
        """What the call's parts find in p.data, before any of them runs. parts: the adapter's `modules`; call: the
        model's arguments by name, which it may add to."""
        return {}

    def finish(self, cfg: Any, parts: dict[str, Any], model: Any, call: dict[str, Any], out: Any, data: Any) -> Any:
        """The model's output; data: what `begin` gave."""
        return out

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Any:
        return self.act(ps, base, args if x is None else (x, *args), kwargs)

    def merged(self, ps: Sequence[View], W: Tensor, b: Tensor | None) -> Weights:
        raise CannotMerge(f"{self.name} on {ps[0].site!r} acts on the module's call and has no weight")


class Prompt(ABC):
    """Virtual tokens (gives = "prompt") or a key/value cache (gives = "cache") before the model's input.

    An adapter's tensors live in an encoder module of its own, `prompt_encoder.<adapter>.*` in a state dict;
    its call returns the finished prompt, (n, width), which is what the file holds. prompts/ does the rest:
    sizes, masks, positions, labels, caches, generation.
    """

    name: ClassVar[str] = ""
    Config: ClassVar[type[PeftConfig]]
    gives: ClassVar[str] = "prompt"
    example: ClassVar[dict[str, Any]] = {}  # settings that a small model needs, where the defaults do not fit it

    @abstractmethod
    def encoder(self, cfg: Any, embedding: torch.nn.Module, fill: bool) -> torch.nn.Module:
        """The adapter's module, sized by cfg; `embedding` is the base's input embedding. fill=False: a file's
        tensors follow, so initial values need no work."""

    def prompt(self, encoder: torch.nn.Module, cfg: Any, tasks: Tensor | None) -> Tensor:
        """(1 or rows, n, width); tasks: one task number a row, for methods with several."""
        return encoder()[None]

    takes: ClassVar[tuple[str, ...]] = ()  # arguments of a call that are the method's own, beside task_ids

    def trained(self, encoder: torch.nn.Module) -> list[torch.nn.Parameter]:
        """The encoder's parameters that training changes."""
        return list(encoder.parameters())

    def finish(self, cfg: Any, call: dict[str, Any], own: dict[str, Any], run: Callable[..., Any]) -> Any:
        """run(**call), the base's output for a call with the prompt in front; a method with a loss of its own puts
        it there. own: the arguments that `takes` names, None where the caller gave none."""
        return run(**call)

    def cache(self, encoder: torch.nn.Module, cfg: Any) -> list[tuple[Tensor, Tensor]]:
        """One (keys, values) pair a layer, each (1, heads, n, head width)."""
        raise AdapterError(f"{self.name} gives virtual tokens, not a key/value cache")

    def saved(self, encoder: torch.nn.Module, cfg: Any) -> dict[str, Tensor]:
        """File key -> tensor."""
        return {"prompt_embeddings": encoder()}

    def loaded(self, encoder: torch.nn.Module, cfg: Any, tensors: dict[str, Tensor]) -> torch.nn.Module:
        """The module that holds a file's tensors; it may replace `encoder`. Raises AdapterError for a shape
        that does not fit."""
        from .prompts.table import finished

        return finished(self.name, encoder, tensors["prompt_embeddings"])
