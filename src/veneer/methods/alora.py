"""aLoRA: a LoRA that acts from its invocation tokens on, so that what came before is the base's, cache and all.
Greenewald et al. 2025, arXiv:2504.12397, section 3.

    y_t = W x_t + [t >= t0] s B A x_t,   t0: where alora_invocation_tokens last begin in the row; never, without them

    lora_A.weight (r, inp)   lora_B.weight (out, r)   lora_B.bias (out,)
No merged weight, since it depends on the token. A key/value cache that the base alone has filled may be passed on. On
layers called outside a model's call, where no token ids are known, it acts everywhere. An invocation that a cached call
of the model cuts in two is not seen; generate(prefill_chunk_size=...) sees it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import AdapterError, PeftWarning
from ..int8 import int8_weight
from ..kernels import plain_autograd
from ..row_kernels import add_rows, linear_and_rows
from ..site import Site
from ..view import View
from .lora import LoraFactors, lora_bias_delta, lora_check

KEY = "alora:"  # + adapter: in a call's data, (rows, tokens), where it acts
AT = "alora at:"  # + adapter: the numbers of those tokens, counted row by row, so that a layer can gather them
NEVER = torch.iinfo(torch.int64).max


def starts(ids: Tensor, tokens: Sequence[int], end: int | None = None) -> Tensor:
    """Where `tokens` last begin in each row of ids (rows, length), among the first `end`; NEVER where they do not."""
    ids = ids[:, :end]
    if ids.shape[1] < len(tokens):
        return torch.full((len(ids),), NEVER, device=ids.device)
    wanted = torch.as_tensor(tokens, dtype=ids.dtype, device=ids.device)
    hits = (ids.unfold(1, len(tokens), 1) == wanted).all(-1)
    last = hits.shape[1] - 1 - hits.flip(1).int().argmax(1)
    return torch.where(hits.any(1), last, NEVER)


class Watch:
    """Says, before each call of the base within one call of the model, on which tokens each adapter acts.

    tokens: adapter -> its invocation. prompt: the input's ids (rows, length); what is generated after it invokes
    nothing, and where the base reads it in pieces an invocation is found across them.
    """

    def __init__(self, host: Any, tokens: dict[str, Sequence[int]], prompt: Tensor | None):
        self.host, self.tokens, self.prompt = host, tokens, prompt
        self.fresh: bool | None = None  # whether the first call found no cache
        self.begun: dict[str, Tensor] = {}

    def before(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        cache: Any = kwargs.get("past_key_values")
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        if ids is None and embeds is not None and "alora_offsets" not in self.host.data:
            warnings.warn(
                "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for this forward "
                "pass; pass input_ids, or alora_offsets with one entry a row",
                PeftWarning,
                stacklevel=2,
            )
        given = ids if ids is not None else embeds
        if given is None or (ids is not None and (ids.is_floating_point() or ids.dim() != 2)):
            return  # not a language model's call
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        self.fresh = not past if self.fresh is None else self.fresh
        known = getattr(cache, "alora_starts", {}) if past else {}
        where = torch.arange(past, past + given.shape[1], device=given.device)
        self.begun = {n: self.begin(n, ids, given, past, known.get(n)) for n in self.tokens}
        acting = {n: where >= first[:, None] for n, first in self.begun.items()}
        self.host.data.update({KEY + n: mask for n, mask in acting.items()})
        if plain_autograd(given):
            self.host.data.update({AT + n: mask.flatten().nonzero()[:, 0] for n, mask in acting.items()})

    def begin(self, name: str, ids: Tensor | None, given: Tensor, past: int, known: Tensor | None) -> Tensor:
        """(rows,) the first column on which an adapter acts, counted from the cache's beginning."""
        offsets = self.host.data.get("alora_offsets")
        if offsets is not None:  # counted from the end, None or 0: nowhere
            n = past + given.shape[1]
            return torch.tensor([NEVER if not o or o < 1 else n - int(o) for o in offsets], device=given.device)
        first = torch.full((len(given),), NEVER, device=given.device)
        if ids is not None and (whole := self.whole(len(ids), past)) is not None:
            first = starts(whole, self.tokens[name]).to(first.device)
        elif ids is not None:
            end = None if self.prompt is None else max(self.prompt.shape[1] - past, 0)
            found = starts(ids, self.tokens[name], end)
            first = torch.where(found == NEVER, first, found + past)
        if known is None:
            return first
        if len(known) != len(first):
            raise AdapterError(f"the cache was filled for {len(known)} rows and is used for {len(first)}")
        return torch.where(first == NEVER, known.to(first.device), first)

    def whole(self, rows: int, past: int) -> Tensor | None:
        """The prompt for so many rows, where this call reads the prompt, or a piece of it, from its beginning on."""
        prompt = self.prompt
        if prompt is None or not self.fresh or past >= prompt.shape[1] or not len(prompt) or rows % len(prompt):
            return None
        return prompt.repeat_interleave(rows // len(prompt), 0)

    def after(self, module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Leave the starts on the cache, for calls that go on from it."""
        cache: Any = kwargs.get("past_key_values")
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if hasattr(cache, "get_seq_length"):
            cache.alora_starts = self.begun


class ALoRA(LoraFactors):
    sites = frozenset({"linear"})
    mergeable = False
    everywhere = False
    reads = frozenset({"alora_offsets"})
    example: ClassVar[dict[str, Any]] = {"alora_invocation_tokens": [1]}
    exempt: ClassVar[dict[str, str]] = {
        "forward == merged": "it acts on some tokens of a row and not on others, so no weight is the forward's",
        "compiled == eager": "each call hooks the model to find where the adapter begins, which one graph cannot hold",
    }

    def check(self, cfg: Any, site: Site) -> None:
        lora_check(cfg, site)
        if not cfg.alora_invocation_tokens:
            raise ValueError("alora_invocation_tokens is empty: give the token ids that switch the adapter on")

    @contextmanager
    def listener(self, tuner: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
        configs = {n: c for n, c in tuner.peft_config.items() if getattr(c, "alora_invocation_tokens", None)}
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        prompt = ids if torch.is_tensor(ids) and ids.dim() == 2 and not ids.is_floating_point() else None
        watch = Watch(tuner.host, {n: c.alora_invocation_tokens for n, c in configs.items()}, prompt)
        first = tuner.model.register_forward_pre_hook(watch.before, with_kwargs=True)
        last = tuner.model.register_forward_hook(watch.after, with_kwargs=True)
        try:
            yield
        finally:
            first.remove()
            last.remove()

    def acts(self, p: View, x: Tensor, take: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor | None:
        """(rows, tokens, 1), true where the adapter acts; None: everywhere. take: x's rows of the batch's."""
        where = p.data.get(KEY + p.name)
        if where is None:
            return None
        where = take(where)
        if x.shape[:-1] == where.shape:
            return where[..., None]
        if x.dim() == 2 and len(x) == where.numel():  # tokens of all rows in one line
            return where.reshape(-1, 1)
        raise AdapterError(
            f"aLoRA on {p.site!r}: its input {tuple(x.shape)} is not one vector for each of the call's "
            f"{tuple(where.shape)} tokens; take the layer out of target_modules"
        )

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        plain = not args and not kwargs and base.plain(x)
        at = self.some(ps[0], x) if plain and len(ps) == 1 else None
        if at is not None and not base.weight().requires_grad and int8_weight(ps[0].site.module) is None:
            y, picked = linear_and_rows(x, base.weight(), base.bias(), at)
            return add_rows(y, self.at_rows(ps[0], picked).to(y.dtype), at)
        y = base(x, *args, **kwargs)
        for p in ps:
            at = self.some(p, x)
            if at is not None:
                change = self.at_rows(p, x.flatten(0, -2).index_select(0, at)).to(y.dtype)
                y = y.flatten(0, -2).index_add(0, at, change).view(y.shape)
                continue
            (B, A), where, bias = self.factors(p), self.acts(p, x), lora_bias_delta(p)
            h = p.site.down(p.drop(x), A)
            y = p.site.accumulate(y, h if where is None else h * where, B, p.scaling)
            if bias is not None:
                y = y + (bias if where is None else bias * where).to(y.dtype)
        return y

    def some(self, p: View, x: Tensor) -> Tensor | None:
        """The numbers of the tokens on which the adapter acts, where they are some of all and can be gathered."""
        where, at = self.acts(p, x), p.data.get(AT + p.name)
        if where is None or at is None or len(at) == where.numel() or not plain_autograd(x):
            return None
        return at

    def at_rows(self, p: View, picked: Tensor) -> Tensor:
        """What the adapter adds to these tokens' outputs, (n, out); picked: (n, inp)."""
        B, A = self.factors(p)
        return F.linear(F.linear(p.drop(picked), A), B * p.scaling, lora_bias_delta(p))
