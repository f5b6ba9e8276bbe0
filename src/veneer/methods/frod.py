"""FRoD: like layers share a basis; each trains its scale factors and a few entries off their diagonal.
Wan et al. 2025, arXiv:2512.23485, section 3; the basis is that of Kempf et al. 2023, arXiv:2110.03380 (HO-CSD).

    W = U diag(l0) V^T;   W' = W + U (diag(l - l0) + S) V^T,   S sparse

    frod_lambda_l (inp,)              starts at l0, the lengths of the columns of W V^-T
    frod_lambda_s_values (k,)         start at zero; k = sparse_rate * inp^2
    base_model.frod_V.<like> (inp, inp), frod_s_indices.<like> (2, k), frod_s_size.<like> (2,)    frozen, shared
    frod_U (out, inp), frod_l0 (inp,)                             frozen, found again in the base on loading

<like> is the last two parts of a layer's name, of which equal layers make one group. V follows from the weights of
a group and the places in S from projection_prng_key, so a file without them (save_projection=False) is complete for
the same base. Merges. Departures from peft: the base's own weight carries what does not change, so a fresh adapter
over a half precision base changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import AdapterConfig, veneer_field
from ..errors import AdapterError
from ..frod_kernels import composed, factored
from ..kinds import Additive, Spec
from ..site import Site
from ..sparse_kernels import Pattern, pattern_of, sparse_fits
from ..view import View


@dataclass
class FrodConfig(AdapterConfig):
    """sparse_rate: share of the entries off the diagonal that are trained. regularization_alpha: pi of HO-CSD.

    projection_prng_key: seed of their places. save_projection: put bases and places into the file. frod_dropout: on
    the adapter's input. progressbar: show one while bases are found. init_weights: False adds noise, for tests.
    runtime_offload_base_weight: part of the file format; the base's weight is in use here, so it stays.
    """

    projection_prng_key: int = 0
    save_projection: bool = True
    frod_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 0.001
    progressbar: bool = True
    runtime_offload_base_weight: bool = False
    exclude_modules: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "FROD"
        if not 0 <= self.sparse_rate <= 1:
            raise ValueError(f"`sparse_rate` should be between 0 and 1, got {self.sparse_rate}")


def group(name: str) -> str:
    """What a layer's group is called, in files too: the last two parts of its name, numbers of layers left out."""
    parts = name.split(".")
    if parts[-3:] == ["attention", "output", "dense"]:  # BERT has another output.dense in each layer
        return "attention_output"
    return parts[-1] if len(parts) == 1 or parts[-2].isdigit() else f"{parts[-2]}_{parts[-1]}"


def joint_basis(sites: Sequence[Site], pi: float, dtype: torch.dtype, ticks: Iterator[int]) -> Tensor:
    """V (inp, inp) with W_i = U_i diag(l_i) V^T for every layer of the group, the lengths of U_i's columns one."""
    next(ticks, None)
    rows = [s.weight().detach().to(torch.promote_types(s.dtype, torch.float32)) for s in sites]
    stack = torch.cat(rows)
    if stack.shape[0] < stack.shape[1]:
        return torch.linalg.svd(stack, full_matrices=True)[2].mT.contiguous().to(dtype)
    Q, R = torch.linalg.qr(stack)
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    inverses = [torch.linalg.inv(q.mT @ q + pi * eye) for q in Q.split([len(W) for W in rows])]
    mean = inverses[0]
    for inverse in inverses[1:]:
        mean = mean + inverse
    return (R.mT @ torch.linalg.eigh(mean / len(inverses))[1]).to(dtype)


def places(n: int, rate: float, generator: torch.Generator) -> Tensor:
    """(2, k) distinct places off the diagonal of an (n, n) matrix."""
    k = min(max(1, int(rate * n * n)), n * (n - 1)) if rate else 0
    flat = torch.randperm(n * (n - 1), generator=generator)[:k]
    row, column = flat // max(n - 1, 1), flat % max(n - 1, 1)
    return torch.stack([row, column + (column >= row)])


def _ticks(count: int, shown: bool) -> Iterator[int]:
    from tqdm.auto import tqdm

    yield from tqdm(range(count), desc="FRoD: joint bases", disable=not shown)


def stored_dtype(site: Site) -> torch.dtype:
    fits = site.dtype.is_floating_point and site.dtype.itemsize > 1
    return site.dtype if fits else torch.get_default_dtype()


def few(p: View, x: Tensor) -> bool:
    """Whether x has so few vectors that passing them through the factors costs less than a weight made of them."""
    n, out, tokens = p.site.inp, p.site.out, x.numel() // p.site.inp
    return 2 * n * tokens < out * tokens + 2 * n * out


class FRoD(Additive):
    Config = FrodConfig
    prefix = "frod_lambda_"
    dropout = "frod_dropout"
    defaults = "frod"
    by_weight = True

    def shared(self, cfg: Any, sites: Sequence[Site]) -> dict[str, Spec]:
        groups: dict[str, list[Site]] = {}
        for site in sites:
            groups.setdefault(group(site.name), []).append(site)
        generator = torch.Generator(device="cpu").manual_seed(cfg.projection_prng_key)
        out, ticks = {}, _ticks(len(groups), cfg.progressbar)
        spec = partial(Spec, train=False, save=cfg.save_projection)
        for name in sorted(groups):
            like = groups[name]
            n, dtype = like[0].inp, stored_dtype(like[0])
            if any(s.inp != n for s in like):
                sizes = ", ".join(repr(s) for s in like if s.inp != n)
                raise AdapterError(
                    f"FRoD gives layers named {name!r} one basis, and their inputs differ: {like[0]!r}, {sizes}; "
                    "take some out of target_modules"
                )
            at = places(n, cfg.sparse_rate, generator)
            basis = partial(joint_basis, like, cfg.regularization_alpha, dtype, ticks)
            out[f"frod_V.{name}"] = spec((n, n), dtype=dtype, value=basis)
            out[f"frod_s_indices.{name}"] = spec(tuple(at.shape), value=at)
            out[f"frod_s_size.{name}"] = spec((2,), value=torch.tensor([n, n]))
        return out

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        n = site.inp
        k = places(n, cfg.sparse_rate, torch.Generator()).shape[1]
        return {
            "frod_lambda_l": Spec((n,), raw=True),
            "frod_lambda_s_values": Spec((k,), raw=True),
            "frod_U": Spec((site.out, n), train=False, save=False, dtype=stored_dtype(site)),
            "frod_l0": Spec((n,), train=False, save=False, raw=True),
        }

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        self.restore(p, cfg, weight)
        for key, start in (("frod_lambda_l", p.frod_l0), ("frod_lambda_s_values", torch.zeros(()))):
            p.fill(key, start if cfg.init_weights else start + 0.1 * torch.randn_like(getattr(p, key)))
        return None

    def restore(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> None:
        W = weight().detach()
        scaled = torch.linalg.solve(self.basis(p).double(), W.mT.double()).mT  # U diag(l0)
        lengths = scaled.norm(dim=0)
        p.fill("frod_l0", lengths)
        p.fill("frod_U", scaled / lengths.clamp(min=torch.finfo(scaled.dtype).tiny))

    def basis(self, p: View) -> Tensor:
        return getattr(p, f"frod_V_{group(p.site.name)}")

    def pattern(self, p: View) -> Pattern:
        at = getattr(p, f"frod_s_indices_{group(p.site.name)}")
        return pattern_of(p.memory, at, p.site.inp, p.site.inp)

    def delta(self, p: View) -> Tensor:
        U, V, l, values = p.frod_U, self.basis(p), p.frod_lambda_l - p.frod_l0, p.frod_lambda_s_values
        if sparse_fits(U, l, values):
            return composed(U, V, l, values, self.pattern(p)) * p.scaling
        core = self.core(p, l) * p.scaling
        return U @ core @ V.mT

    def core(self, p: View, diagonal: Tensor) -> Tensor:
        """diag(diagonal) + S"""
        row, column = getattr(p, f"frod_s_indices_{group(p.site.name)}")
        core = torch.diag(diagonal).index_put((row, column), p.frod_lambda_s_values)
        return core.to(p.dtype or core.dtype)

    def side(self, p: View, x: Tensor) -> Tensor:
        if not few(p, x):
            return p.site.op(x, self.delta(p), None)
        core = self.core(p, p.frod_lambda_l - p.frod_l0) * p.scaling
        return x @ self.basis(p) @ core.mT @ p.frod_U.mT

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        p = ps[0]
        plain = len(ps) == 1 and not args and not kwargs and not p.dropping and p.scaling == 1
        if not (plain and few(p, x) and base.exact_for(x)):
            return super().forward(ps, x, base, args, kwargs)
        U, V, b = p.frod_U, self.basis(p), base.bias()  # the whole weight by its factors: no base product
        if sparse_fits(x, U, p.frod_lambda_l, p.frod_lambda_s_values):
            return factored(x, U, V, p.frod_lambda_l, p.frod_lambda_s_values, b, self.pattern(p))
        return F.linear(x @ V @ self.core(p, p.frod_lambda_l).mT, U, b)
