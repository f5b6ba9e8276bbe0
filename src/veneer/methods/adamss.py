"""AdaMSS: the outputs are clustered by the weight's principal subspace; each cluster gets a low-rank change of its
own inside it. Zheng et al. 2025, OpenReview 8ZdWmpYxT0, section 3.

    [W' b'] rows of cluster k = [W b] rows of cluster k + B_k A_k V

    adamss_A.<k> (rank_k, r)          starts as the top right singular vectors of the cluster's rows of U
    adamss_B.<k> (rows of k, rank_k)  starts at zero
    adamss_newB (r, inp + 1)          frozen, in the file: V of the randomised decomposition [W b] = U S V; inp
                                      columns and one for the bias (no bias: inp)

Clusters are those of k-means on U's rows, recomputed from the base's weight on loading (scikit-learn). rank_k is at
most subspace_rank, the cluster's rows and r. With use_asa, from step init_warmup to final_warmup (schedule.py) the
clusters with the least importance are frozen, until asa_target_subspaces over all layers train. Merges. Beyond peft:
transformers' Conv1D. Departure: asa_target_subspaces clusters train at the end (peft: one fewer).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import AdapterConfig, veneer_field
from ..errors import MissingExtra
from ..kinds import LowRank, Spec
from ..site import Site
from ..view import View


@dataclass
class AdamssConfig(AdapterConfig):
    """r: size of the principal subspace. num_subspaces: clusters a layer. subspace_rank: rank of a cluster's change;
    with use_dynamic_rank only as many as there are singular values, squared, over svd_threshold of the largest.

    random_seed: of the decomposition. use_asa: freeze clusters in training; asa_target_subspaces: how many train at
    the end; init_warmup, final_warmup: first and last step of that; mask_interval: steps between; the rest: memory
    of importance and deviation, and the exponent of the fall.
    """

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: Literal["orthogonal"] | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0
    exclude_modules: list[str] | str | None = veneer_field()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "ADAMSS"
        if self.init_weights not in ("orthogonal", None, False):  # False: as None, random
            raise ValueError(f"init_weights must be 'orthogonal' or None, got {self.init_weights}")
        if self.use_asa and self.init_warmup >= self.final_warmup:
            raise ValueError(
                "`init_warmup` must be smaller than `final_warmup` when `use_asa=True` so that ASA has a non-empty "
                f"pruning ramp, got init_warmup={self.init_warmup} and final_warmup={self.final_warmup}."
            )
        if self.use_asa and self.mask_interval <= 0:
            raise ValueError(
                f"`mask_interval` must be a positive integer when `use_asa=True`, got {self.mask_interval}."
            )
        for key, kind in (("asa_target_subspaces", "integer"), ("asa_schedule_exponent", "number")):
            if self.use_asa and getattr(self, key) <= 0:
                raise ValueError(f"`{key}` must be a positive {kind} when `use_asa=True`, got {getattr(self, key)}.")


def decomposed(cfg: AdamssConfig, site: Site) -> tuple[Tensor, Tensor]:
    """U (out, r) and V (r, inp or inp + 1) of [W b], float32."""
    W, b = site.weight().detach().float(), site.bias()
    W = W if b is None else torch.cat([W, b.detach().float()[:, None]], dim=1)
    devices = [W.device] if W.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(cfg.random_seed)
        U, _, V = torch.svd_lowrank(W, q=min(cfg.r, *W.shape), niter=2)
    return U, V.mT.contiguous()


def clustered(U: Tensor, n: int) -> list[list[int]]:
    """Rows of each cluster, as files expect them."""
    try:
        from sklearn.cluster import KMeans
    except ImportError as e:
        raise MissingExtra("AdaMSS clusters a weight's rows with scikit-learn: pip install 'veneer[adamss]'") from e
    means = KMeans(n_clusters=n, init="random", n_init=1, max_iter=10, random_state=123456789)
    labels = torch.from_numpy(means.fit(U.cpu().numpy()).labels_)
    return [rows for k in range(n) if (rows := (labels == k).nonzero().flatten().tolist())]


def ranks(cfg: AdamssConfig, U: Tensor, clusters: Sequence[list[int]]) -> list[int]:
    """The rank of each cluster's change."""
    out = []
    for rows in clusters:
        rank = min(cfg.subspace_rank, len(rows), U.shape[1])
        if cfg.use_dynamic_rank:
            values = torch.linalg.svdvals(U[rows]).square()
            rank = min(rank, int((values > cfg.svd_threshold * values[0]).sum()))
        out.append(max(rank, 1))
    return out


class AdaMSS(LowRank):
    Config = AdamssConfig
    prefix = "adamss_"
    defaults = "adamss"
    settings: ClassVar[frozenset[str]] = frozenset()
    example: ClassVar[dict[str, Any]] = {"r": 8, "num_subspaces": 3}
    exempt: ClassVar[dict[str, str]] = {
        "loaded before the base": "the tensors' shapes follow from the clusters of the base's rows",
    }

    def check(self, cfg: Any, site: Site) -> None:
        for key in ("r", "num_subspaces"):
            if getattr(cfg, key) <= 0:
                raise ValueError(f"`{key}` must be a positive integer, got {getattr(cfg, key)} ({site!r})")

    def by_place(self, cfgs: Sequence[Any], sites: Sequence[Site]) -> Sequence[Any]:
        made = []
        for cfg, site in zip(cfgs, sites, strict=True):
            own = copy.copy(cfg)
            if site.stored.is_meta:
                raise ValueError(
                    f"AdaMSS on {site!r} needs the base's weight, and it is on the meta device; load the base's "
                    "weights first"
                )
            U, own.V = decomposed(cfg, site)
            own.clusters = clustered(U, min(cfg.num_subspaces, site.out))
            own.starts = [
                torch.linalg.svd(U[rows], full_matrices=False)[2][:k]
                for rows, k in zip(own.clusters, ranks(cfg, U, own.clusters), strict=True)
            ]
            made.append(own)
        return made

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        out = {f"adamss_A.{k}": Spec(tuple(A.shape)) for k, A in enumerate(cfg.starts)}
        sizes = [(len(rows), len(A)) for rows, A in zip(cfg.clusters, cfg.starts, strict=True)]
        out |= {f"adamss_B.{k}": Spec(shape) for k, shape in enumerate(sizes)}
        at, column = [], 0
        total = sum(k for _, k in sizes)
        for rows, (_, k) in zip(cfg.clusters, sizes, strict=True):
            at.append((torch.tensor(rows)[:, None] * total + column + torch.arange(k)).flatten())
            column += k
        where = torch.cat(at)
        out["adamss_newB"] = Spec(tuple(cfg.V.shape), train=False, value=cfg.V)
        out["adamss_at"] = Spec(tuple(where.shape), train=False, save=False, value=where, dtype=torch.long)
        return out

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        for k, A in enumerate(cfg.starts):
            p.fill(f"adamss_A_{k}", A)
            B = getattr(p, f"adamss_B_{k}")
            p.fill(f"adamss_B_{k}", torch.zeros_like(B) if cfg.init_weights else 0.01 * torch.randn_like(B))
        return None

    def parts(self, p: View) -> tuple[Tensor, Tensor]:
        """The clusters' B on the rows and columns of one (out, ranks) matrix, and their A one below the other."""
        n, frozen = len(p.cfg.starts), p.memory.get("frozen", ())
        get = lambda key, k: getattr(p, key).detach() if k in frozen else getattr(p, key)
        A = torch.cat([get(f"adamss_A_{k}", k) for k in range(n)])
        B = torch.cat([get(f"adamss_B_{k}", k).flatten() for k in range(n)])
        full = B.new_zeros(p.site.out * len(A)).index_put((p.adamss_at,), B)
        return full.reshape(p.site.out, len(A)), A

    def factors(self, p: View) -> tuple[Tensor, Tensor]:
        B, A = self.parts(p)
        return B, A @ p.adamss_newB[:, : p.site.inp]

    def bias_delta(self, p: View) -> Tensor | None:
        if p.adamss_newB.shape[1] == p.site.inp:
            return None
        B, A = self.parts(p)
        return B @ (A @ p.adamss_newB[:, -1]) * p.scaling

    def forward(self, ps: Sequence[View], x: Tensor, base: Any, args: tuple, kwargs: dict) -> Tensor:
        """The bias enters with the input's product: one pass for both."""
        y = base(x, *args, **kwargs)
        for p in ps:
            B, A = self.parts(p)
            down, n = A @ p.adamss_newB, p.site.inp
            h = F.linear(x, down[:, :n], None if down.shape[1] == n else down[:, n])
            y = p.site.accumulate(y, h, B, p.scaling)
        return y

    # -- the schedule ------------------------------------------------------------------------------------
    def scheduled(self, cfg: Any) -> bool:
        return cfg.use_asa and not cfg.inference_mode

    def on_step(self, cfg: Any, ps: dict[str, View], step: int, memory: dict[str, Tensor]) -> None:
        for p in ps.values():
            _hold(p)
        if not cfg.init_warmup < step <= cfg.final_warmup:
            return
        for path, p in ps.items():
            memory.setdefault(f"{path}.frozen", torch.zeros(_count(p), dtype=torch.bool))
            self.remember(cfg, path, p, memory)
        if step % cfg.mask_interval == 0:
            self.freeze(cfg, ps, step, memory)
            for key in [k for k in memory if not k.endswith(".frozen")]:
                del memory[key]

    def on_resume(self, cfg: Any, ps: dict[str, View], memory: dict[str, Tensor]) -> None:
        """Frozen clusters give no gradient from now on; they still count as trainable until the next step, for an
        optimizer that is yet to be built and given its saved state."""
        for path, p in ps.items():
            if f"{path}.frozen" in memory:
                p.memory["frozen"] = frozenset(memory[f"{path}.frozen"].nonzero().flatten().tolist())

    def remember(self, cfg: Any, path: str, p: View, memory: dict[str, Tensor]) -> None:
        """Running means of |p grad| and of its distance from the mean so far, for the clusters that train."""
        for k in range(_count(p)):
            for key in (f"adamss_A_{k}", f"adamss_B_{k}"):
                t = getattr(p, key)
                if memory[f"{path}.frozen"][k] or t.grad is None:
                    continue
                mean, unsure = f"{path}.{key}.importance", f"{path}.{key}.uncertainty"
                if mean not in memory:
                    memory[mean], memory[unsure] = torch.zeros_like(t), torch.zeros_like(t)
                now, before = (t * t.grad).abs(), memory[mean].to(t)
                memory[unsure] = memory[unsure].to(t).lerp((now - before).abs(), 1 - cfg.asa_uncertainty_beta)
                memory[mean] = before.lerp(now, 1 - cfg.asa_importance_beta)

    def freeze(self, cfg: Any, ps: dict[str, View], step: int, memory: dict[str, Tensor]) -> None:
        """Stop the training of the least important clusters of all layers together."""
        total = sum(_count(p) for p in ps.values())
        left = 1 - (step - cfg.init_warmup) / (cfg.final_warmup - cfg.init_warmup)
        end = cfg.asa_target_subspaces
        budget = max(0, int(end + (total - end) * left**cfg.asa_schedule_exponent))
        scores = {
            (path, k): _score(memory, path, k)
            for path, p in ps.items()
            for k in range(_count(p))
            if not memory[f"{path}.frozen"][k]
        }
        for path, k in sorted(scores, key=scores.__getitem__)[: max(0, len(scores) - budget)]:
            memory[f"{path}.frozen"][k] = True
        self.on_resume(cfg, ps, memory)
        for p in ps.values():
            _hold(p)


def _count(p: View) -> int:
    return len(p.cfg.starts)


def _hold(p: View) -> None:
    """Frozen clusters keep their value: no gradient, so no optimizer step."""
    for k in p.memory.get("frozen", ()):
        for key in (f"adamss_A_{k}", f"adamss_B_{k}"):
            t = getattr(p, key)
            t.requires_grad_(False)
            t.grad = None


def _score(memory: dict[str, Tensor], path: str, k: int) -> float:
    """Importance of one cluster: that of its two factors, each a mean over its entries."""
    names = [f"{path}.adamss_{side}_{k}" for side in "AB"]
    known = [n for n in names if f"{n}.importance" in memory]
    return sum(float((memory[f"{n}.importance"] * memory[f"{n}.uncertainty"]).mean()) for n in known)
