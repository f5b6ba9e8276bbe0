"""MonteCLoRA: A is trained under noise whose size is learned. Seth et al. 2024, arXiv:2411.04358, section 4.

    y = W x + s B (A + eps sum_k w_k Z_k) x in training,   Z_k ~ N(0, diag(c)),  c_i = exp(2 std_i) chi2_r,
    w = softmax of a normal with the Laplace moments of Dirichlet(exp(e));   s B A x in eval
    loss + mean over layers of kl_loss_weight (KL of c's Wishart + of Z + of the Dirichlet) + sum w^2 (use_entropy)

    lora_A.weight (r, inp)   lora_B.weight (out, r)
    lora_monteclora_sampler.std_prior (r,)   .expert_weights_prior (num_samples,)   std and e
    lora_monteclora_sampler.gaussian_var_prior (r, r)   .expert_weights (num_samples,)   frozen; kept for the file
Merges: outside training it is plain LoRA. The weighted sum of the Z_k is one Gaussian of variance c sum w^2, and is
drawn as one; the divergence of Z is its mean over c, in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import inits
from ..kinds import Spec
from ..site import Site
from ..view import View
from .lora import LoraFactors, lora_tensors

SAMPLER = "lora_monteclora_sampler"


def weights(e: Tensor, z: Tensor) -> Tensor:
    """The mixture's weights (..., K) from standard normals z, by the Laplace approximation of Dirichlet(exp(e))."""
    k, inverse = e.shape[-1], torch.exp(-e)
    variance = inverse * (1 - 2 / k) + inverse.sum(-1, keepdim=True) / k**2
    return torch.softmax(e - e.mean(-1, keepdim=True) + variance.clamp(min=0).sqrt() * z, -1)


def wishart_kl(std: Tensor) -> Tensor:
    """KL(Wishart(diag(exp(2 std)), r) || Wishart(I, r))."""
    return std.shape[-1] / 2 * (torch.exp(2 * std) - 1 - 2 * std).sum(-1)


def gaussian_kl(std: Tensor, samples: int) -> Tensor:
    """The mean over chi2_r of samples * KL(N(0, diag(exp(2 std) chi2_r)) || N(0, I))."""
    r = std.shape[-1]
    log_chi2 = torch.digamma(torch.tensor(r / 2)).item() + math.log(2)
    return samples / 2 * (r * torch.exp(2 * std) - 1 - 2 * std - log_chi2).sum(-1)


def dirichlet_kl(e: Tensor, prior: float) -> Tensor:
    """KL(Dirichlet(exp(e)) || Dirichlet(prior, .., prior))."""
    q, k = e.exp(), e.shape[-1]
    total = q.sum(-1)
    const = k * math.lgamma(prior) - math.lgamma(k * prior)
    mean_log = torch.digamma(q) - torch.digamma(total)[..., None]
    return torch.lgamma(total) - torch.lgamma(q).sum(-1) + const + ((q - prior) * mean_log).sum(-1)


class MonteCLoRA(LoraFactors):
    sites = frozenset({"linear"})
    exempt: ClassVar[dict[str, str]] = {
        "bf16 activations": "the sampler's tensors act in training only, and the law asks all for gradients in eval; "
        "test_noise_in_half_precision checks training",
    }
    example: ClassVar[dict[str, Any]] = {"monteclora_config": {"num_samples": 4}}

    def tensors(self, cfg: Any, site: Site) -> dict[str, Spec]:
        r, k = cfg.r, cfg.monteclora_config.num_samples
        return {
            **lora_tensors(cfg, site),
            f"{SAMPLER}.std_prior": Spec((r,)),
            f"{SAMPLER}.expert_weights_prior": Spec((k,)),
            f"{SAMPLER}.gaussian_var_prior": Spec((r, r), train=False),
            f"{SAMPLER}.expert_weights": Spec((k,), train=False),
        }

    def init(self, p: View, cfg: Any, weight: Callable[[], Tensor]) -> Tensor | None:
        k = cfg.monteclora_config.num_samples
        p.fill(f"{SAMPLER}_std_prior", torch.rand(cfg.r))
        p.fill(f"{SAMPLER}_expert_weights_prior", torch.rand(k))
        p.fill(f"{SAMPLER}_gaussian_var_prior", torch.eye(cfg.r))
        p.fill(f"{SAMPLER}_expert_weights", torch.full((k,), 1 / k))
        return inits.initial(p, cfg, weight)

    def read(self, p: View, x: Tensor, A: Tensor) -> Tensor:
        return p.site.down(x, A + self.noise(p, A) if p.training else A)

    def noise(self, p: View, A: Tensor) -> Tensor:
        """One draw of eps sum_k w_k Z_k, (r, inp)."""
        std, e = getattr(p, f"{SAMPLER}_std_prior"), getattr(p, f"{SAMPLER}_expert_weights_prior")
        w = weights(e, torch.randn_like(e))
        chi2 = torch.randn(len(A), len(A), dtype=A.dtype, device=A.device).square().sum(1)
        size = std.exp() * chi2.sqrt() * w.square().sum().sqrt()
        return size[:, None] * torch.randn_like(A) * p.cfg.monteclora_config.sample_scaler

    def extra_loss(self, ps: Sequence[View]) -> Tensor | None:
        cfg = ps[0].cfg.monteclora_config
        e = torch.stack([getattr(p, f"{SAMPLER}_expert_weights_prior") for p in ps])
        kl = dirichlet_kl(e, cfg.dirichlet_prior).sum()
        by_rank: dict[int, list[Tensor]] = {}
        for p in ps:
            by_rank.setdefault(p.cfg.r, []).append(getattr(p, f"{SAMPLER}_std_prior"))
        for stds in by_rank.values():
            std = torch.stack(stds)
            kl = kl + (wishart_kl(std) + gaussian_kl(std, cfg.num_samples)).sum()
        entropy = weights(e, torch.randn_like(e)).square().sum() if cfg.use_entropy else 0.0
        return (cfg.kl_loss_weight * kl + entropy) / len(ps)
