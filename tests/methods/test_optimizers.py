"""LoRA+, LoRA-FA and the Riemannian preconditioner: twenty steps beside peft's, and what each is for."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import peft
import peft.optimizers
import pytest
import torch
from peft.optimizers import lorafa as peft_lorafa
from torch import Tensor, nn

import veneer
from veneer import optimizers
from veneer.errors import AdapterError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(9, 20)
        self.up, self.down = nn.Linear(20, 14), nn.Linear(14, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1, groups=2)
        self.ln, self.head = nn.LayerNorm(12), nn.Linear(12, 6)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.down(torch.tanh(self.up(self.emb(ids))))
        return self.head(self.ln(self.conv(h.mT).mT))


def model(package: Any, **options: Any) -> Any:
    """A model with one adapter; both packages get the same tensors."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], "init_lora_weights": False, **options}
    made = package.get_peft_model(Net(), package.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(3)
    for _, p in sorted((n, p) for n, p in made.named_parameters() if "lora_" in n):
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return made


def losses(made: Any, optimizer: Any, steps: int = 20) -> list[float]:
    generator = torch.Generator().manual_seed(5)
    out = []
    for _ in range(steps):
        ids, goal = torch.randint(0, 9, (4, 5), generator=generator), torch.randn(4, 5, 6, generator=generator)
        loss = (made(ids) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(float(loss.detach()))
    return out


def beside(make: Callable[[Any, Any], Any], **options: Any) -> tuple[Any, Any]:
    """Train under both packages and compare losses and tensors; returns (veneer's model, its optimizer)."""
    theirs, ours = model(peft, **options), model(veneer, **options)
    a, b = make(peft.optimizers, theirs), make(optimizers, ours)
    want, got = losses(theirs, a), losses(ours, b)
    assert want[-1] != pytest.approx(want[0], rel=1e-3), "nothing was trained"
    assert got == pytest.approx(want, rel=1e-4)
    mine = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(mine[name], p, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    return ours, b


RS = {"use_rslora": True, "rank_pattern": {"down": 2}}


@pytest.mark.parametrize("options", [{}, RS, {"use_dora": True}, {"modules_to_save": ["head", "ln"]}], ids=str)
def test_loraplus_equals_peft(options: dict[str, Any]) -> None:
    kw = {"lr": 1e-3, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1}
    beside(lambda o, m: o.create_loraplus_optimizer(m, torch.optim.AdamW, **kw), **options)


def test_loraplus_groups_equal_peft() -> None:
    options = {"target_modules": ["up", "emb", "conv"], "modules_to_save": ["head", "ln"], "bias": "lora_only"}
    kw = {"lr": 1e-3, "loraplus_lr_ratio": 8, "loraplus_weight_decay": 0.2, "loraplus_lr_embedding": 3e-4}
    seen = []
    for package, module in ((peft, peft.optimizers), (veneer, optimizers)):
        made = model(package, **options)
        names = {id(p): n for n, p in made.named_parameters()}
        found = module.create_loraplus_optimizer(made, torch.optim.AdamW, **kw)
        seen.append({names[id(p)]: (g["lr"], g["weight_decay"]) for g in found.param_groups for p in g["params"]})
    assert seen[0] == seen[1]
    assert len(set(seen[1].values())) == 4


@pytest.mark.parametrize("options", [{}, RS, {"modules_to_save": ["head"]}], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lorafa_equals_peft(options: dict[str, Any], decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # peft projects in bfloat16 where the device has it, also for float32 tensors: its own formula without that
    monkeypatch.setattr(peft_lorafa, "autocast", lambda *a, **k: contextlib.nullcontext())
    kw = {"r": 4, "lora_alpha": 6, "lr": 1e-2, "weight_decay": decay}
    ours, _ = beside(lambda o, m: o.create_lorafa_optimizer(m, **kw), **options)
    assert not any(p.requires_grad for n, p in ours.named_parameters() if "lora_A" in n)


@pytest.mark.parametrize("options", [{}, RS, {"modules_to_save": ["head"]}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_riemannian_equals_peft(options: dict[str, Any], kind: Any) -> None:
    beside(lambda o, m: o.create_riemannian_optimizer(m, kind, lr=1e-3, reg=0.03), **options)


def test_riemannian_with_a_closure_is_the_same_step() -> None:
    plain, closed = model(veneer), model(veneer)
    one, two = (optimizers.create_riemannian_optimizer(m, torch.optim.SGD, lr=0.1, reg=0.03) for m in (plain, closed))
    ids = torch.arange(8).reshape(2, 4)
    plain(ids).square().mean().backward()
    one.step()

    def closure() -> Tensor:
        two.zero_grad()
        loss = closed(ids).square().mean()
        loss.backward()
        return loss

    two.step(closure)
    for p, q in zip(plain.parameters(), closed.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_projected_too(groups: int) -> None:
    """On a convolution the projected step is that of the matrices of each group."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups))
    made = veneer.get_peft_model(
        net, veneer.LoraConfig(r=2, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    )
    found = optimizers.create_lorafa_optimizer(made, r=2, lora_alpha=6, lr=0.1)
    made(torch.randn(2, 4, 6, 6)).square().mean().backward()
    layer = made.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    pair = found.pairs[id(B)]
    got = optimizers.lorafa.projected(pair, B.grad)
    for i in range(groups):
        a, g = A.flatten(1).chunk(groups)[i], B.grad.flatten(1).chunk(groups)[i]
        want = g @ torch.linalg.inv(a @ a.T) / 9
        torch.testing.assert_close(got.flatten(1).chunk(groups)[i], want, rtol=1e-3, atol=1e-5)


def saved_bytes(made: Any, x: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters left out."""
    own = {p.data_ptr() for p in made.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made(x).sum().backward()
    return sum(kept.values())


def test_lorafa_drops_the_input() -> None:
    """With A frozen, a chain of adapted layers keeps r numbers a token and layer in the place of its whole width."""
    torch.manual_seed(0)
    width, r, tokens, depth = 256, 4, 64, 4
    base = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
    config = veneer.LoraConfig(r=r, target_modules=[str(i) for i in range(depth)])
    plain = veneer.get_peft_model(copy.deepcopy(base), config)
    lean = veneer.get_peft_model(base, copy.deepcopy(config))
    optimizers.create_lorafa_optimizer(lean, r=r, lora_alpha=8, lr=1e-3)
    x = torch.randn(tokens, width)
    before, after = saved_bytes(plain, x), saved_bytes(lean, x)
    assert before >= depth * tokens * width * 4
    assert after <= depth * tokens * r * 4 * 2
    assert after < before / 20


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: optimizers.create_riemannian_optimizer(m, torch.optim.AdamW, lr=1e-3, reg=0.0), "above 0"),
        (
            lambda m: optimizers.create_loraplus_optimizer(m, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=0),
            "2\\*\\*4",
        ),
        (lambda m: optimizers.create_lorafa_optimizer(m, 4, 6, 1e-3, use_rslora=True), "'default'"),
        (lambda m: optimizers.create_lorafa_optimizer(m, 4, 6, -1.0), "lr=-1.0"),
    ],
)
def test_settings_that_do_not_fit(make: Any, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        make(model(veneer))


def test_models_without_pairs() -> None:
    made = veneer.get_peft_model(Net(), veneer.IA3Config(target_modules=["up"], feedforward_modules=[]))
    with pytest.raises(AdapterError, match="lora_A and lora_B"):
        optimizers.create_lorafa_optimizer(made, 4, 6, 1e-3)
    with pytest.raises(AdapterError, match="lora_A/lora_B"):
        optimizers.create_riemannian_optimizer(made, torch.optim.AdamW, lr=1e-3)
    made.requires_grad_(False)
    with pytest.raises(AdapterError, match="no parameter trains"):
        optimizers.create_loraplus_optimizer(made, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=2)
