"""Shared tensors: which layers hold one, that training and copying keep it so, files, and refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from veneer import PeftModel, get_peft_model, share
from veneer.errors import AdapterError
from veneer.methods.ia3 import IA3Config
from veneer.methods.ln_tuning import LNTuningConfig
from veneer.methods.loha import LoHaConfig
from veneer.methods.lora import LoraConfig
from veneer.methods.vera import VeraConfig
from veneer.tuner import Tuner

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q = nn.Linear(WIDTH, WIDTH)
        self.v = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU(), nn.Linear(12, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return x + self.mlp(torch.relu(self.q(x)) * self.v(x))


class Net(nn.Module):
    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def net() -> Net:
    torch.manual_seed(0)
    return Net()


X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["q", "v"], "r": 3, **more})


def a_of(t: Any, leaf: str = "q", adapter: str = "default") -> list[nn.Parameter]:
    return [getattr(b, leaf).lora_A[adapter].weight for b in t.model.layers]


def pattern(params: list[nn.Parameter]) -> list[int]:
    """Which parameter each layer holds, numbered by first appearance."""
    order: dict[int, int] = {}
    return [order.setdefault(id(p), len(order)) for p in params]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("all", [0] * 5),
        ("pairs", [0, 0, 1, 1, 2]),
        ("groups:2", [0, 0, 1, 1, 2]),
        ("groups:4", [0, 0, 0, 0, 1]),
    ],
)
def test_which_layers_share(words: str, wanted: list[int]) -> None:
    t = Tuner(net(), lora(share={"lora_A": words}))
    assert pattern(a_of(t, "q")) == wanted
    assert pattern(a_of(t, "v")) == wanted
    assert a_of(t, "q")[0] is not a_of(t, "v")[0]
    assert pattern([b.q.lora_B["default"].weight for b in t.model.layers]) == [0, 1, 2, 3, 4]


def test_other_shapes_leave_their_group() -> None:
    t = Tuner(net(), lora(share={"lora_A": "groups:3"}, rank_pattern={"layers.1.q": 2}))
    assert pattern(a_of(t)) == [0, 1, 0, 2, 2]


def test_numbered_names() -> None:
    t = Tuner(
        net(),
        lora(target_modules=["0", "2"], exclude_modules=["layers.0", "layers.2"], share={"lora_A": "all"}),
    )
    first = [b.mlp[0].lora_A["default"].weight for b in t.model.layers]
    second = [b.mlp[2].lora_A["default"].weight for b in t.model.layers]
    assert pattern(first) == pattern(second) == [0] * 5
    paths = ("h.3.attn.q", "h.3.mlp.0", "layers.3", "lin", "h.1.experts.7.up")
    assert [share.leaf_name(p) for p in paths] == ["q", "mlp.0", "layers", "lin", "up"]


@pytest.mark.parametrize(
    ("config", "head"),
    [
        (lora(share={"lora_A": "all"}), "lora_A"),
        (lora(share={"lora_A": "all"}, use_dora=True), "lora_A"),
        (lora(share={"lora_A": "pairs", "lora_B": "all"}), "lora_B"),
        (LoHaConfig(target_modules=["q"], r=2, share={"hada_w1_a": "all"}), "hada_w1_a"),
        (VeraConfig(target_modules=["q"], r=2, share={"vera_lambda_d": "all"}), "vera_lambda_d"),
        (IA3Config(target_modules=["q"], feedforward_modules=[], share={"ia3_l": "all"}), "ia3_l"),
        (LNTuningConfig(target_modules=["norm"], share={"ln_tuning_layers": "all"}), "ln_tuning_layers"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_identity_at_init_and_one_gradient_for_all(config: Any, head: str) -> None:
    model = net()
    before = model(X)
    t = Tuner(model, config)
    torch.testing.assert_close(t(X), before)
    for p in t.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.1)
    free = copy.deepcopy(t)
    untie(free)
    torch.testing.assert_close(t(X), free(X))
    t(X).square().sum().backward()
    free(X).square().sum().backward()
    summed: dict[int, torch.Tensor] = {}
    for (_, a), (_, b) in zip(t.adapted_layers(), free.adapted_layers(), strict=True):
        for p, q in zip(a.parameters_of("default"), b.parameters_of("default"), strict=True):
            summed[id(p)] = summed.get(id(p), torch.zeros_like(q)) + q.grad
    held = {id(p): p for _, a in t.adapted_layers() for p in a.parameters_of("default")}
    assert len(held) < sum(1 for _, b in free.adapted_layers() for _ in b.parameters_of("default"))
    for key, p in held.items():
        torch.testing.assert_close(p.grad, summed[key], atol=1e-5, rtol=1e-4)


def untie(t: Tuner) -> None:
    """Give every layer its own Parameter again."""
    for _, layer in t.adapted_layers():
        entry = layer.entries["default"]
        for key, spec in entry.specs.items():
            if spec.train:
                holder, leaf = entry.where[key.removesuffix(".weight").replace(".", "_")]
                setattr(holder, leaf, nn.Parameter(getattr(holder, leaf).detach().clone()))
        layer.changed()


def test_copies_and_moves_keep_it_shared() -> None:
    t = Tuner(net(), lora(share={"lora_A": "all"}))
    counted = sum(p.numel() for p in t.parameters() if p.requires_grad)
    assert counted == 2 * 3 * WIDTH + 10 * 3 * WIDTH
    for other in (copy.deepcopy(t), t.double(), t.float()):
        assert pattern(a_of(other)) == [0] * 5
    optimizer = torch.optim.SGD([p for p in t.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        t(X).square().mean().backward()
        optimizer.step()
    assert pattern(a_of(t)) == [0] * 5
    assert all(torch.equal(a_of(t)[0], p) for p in a_of(t))
    t.load_state_dict(copy.deepcopy(t.state_dict()))
    assert pattern(a_of(t)) == [0] * 5


def test_tie_again_after_the_tie_was_lost() -> None:
    t = Tuner(net(), lora(share={"lora_A": "all"}))
    for b in t.model.layers:
        b.q.lora_A["default"].weight = nn.Parameter(b.q.lora_A["default"].weight.detach().clone())
    assert pattern(a_of(t)) == [0, 1, 2, 3, 4]
    share.tie(t, "default")
    assert pattern(a_of(t)) == [0] * 5


def trained(config: Any) -> Any:
    model = get_peft_model(net(), config)
    torch.manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.2)
    return model


def test_a_file_is_plain_peft(tmp_path: Path) -> None:
    model = trained(lora(share={"lora_A": "pairs"}))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path))
    torch.testing.assert_close(theirs(X), model(X))
    mine = PeftModel.from_pretrained(net(), str(tmp_path))
    torch.testing.assert_close(mine(X), model(X))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_compact_file_holds_one_copy(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = trained(lora(share={"lora_A": "all", "lora_B": "pairs"}))
    model.save_pretrained(tmp_path / "compact", compact=True)
    model.save_pretrained(tmp_path / "whole")
    files = [load_file(tmp_path / d / "adapter_model.safetensors") for d in ("compact", "whole")]
    sizes = [sum(t.nbytes for t in file.values()) for file in files]
    assert sizes[0] < 0.6 * sizes[1]
    again = PeftModel.from_pretrained(
        net(), str(tmp_path / "compact"), is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    torch.testing.assert_close(again(X), model(X))
    assert pattern(a_of(again.base_model)) == [0] * 5


def test_keys_compact_and_expand() -> None:
    t = Tuner(net(), lora(target_modules=["q"], share={"lora_A": "pairs"}))
    key = "base_model.model.layers.{}.q.lora_A.weight"
    assert share.groups(t, "default") == [[key.format(0), key.format(1)], [key.format(2), key.format(3)]]
    for prefix in ("base_model.model.", ""):
        whole = {f"{prefix}{p}.{k}": getattr(h, leaf).detach() for p, k, _, h, leaf in t.tensor_names("default")}
        small = share.compact(whole, t, "default")
        assert len(whole) - len(small) == 2
        back = share.expand(small, t, "default")
        assert back.keys() == whole.keys()
        assert all(torch.equal(back[k], whole[k]) for k in whole)
        second = f"{prefix}layers.1.q.lora_A.weight"
        with pytest.raises(AdapterError, match="different values"):
            share.expand({**whole, second: whole[second] + 1}, t, "default")


@pytest.mark.parametrize(
    "given", ["all", {"lora_A": "some"}, {"lora_A": "groups:1"}, {"lora_A": "groups:x"}, {3: "all"}]
)
def test_bad_words(given: Any) -> None:
    with pytest.raises(ValueError, match=r'"groups:N"'):
        lora(share=given)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="handoff"):
        lora(share={"lora_A": "all"}, handoff=True)
    with pytest.raises(AdapterError, match=r"no tensor 'lora_a'.*did you mean 'lora_A'.*it has: lora_A, lora_B"):
        Tuner(net(), lora(share={"lora_a": "all"}))
    with pytest.raises(AdapterError, match="it has: vera_lambda_"):
        Tuner(net(), VeraConfig(target_modules=["q"], r=2, share={"vera_A": "all"}))
    for start in ("pissa", "olora"):
        model = net()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(AdapterError, match=f"share cannot be used with init_lora_weights='{start}'"):
            Tuner(model, lora(share={"lora_A": "all"}, init_lora_weights=start))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_tensor_that_starts_from_the_weight_is_refused() -> None:
    with pytest.raises(AdapterError, match="'lora_magnitude_vector' of DORA starts from each layer's own weight"):
        Tuner(net(), lora(use_dora=True, share={"lora_magnitude_vector": "all"}))
    model = net()
    with torch.no_grad():
        for i, b in enumerate(model.layers):
            b.norm.weight.add_(i)
    with pytest.raises(AdapterError, match="ln_tuning_layers"):
        Tuner(model, LNTuningConfig(target_modules=["norm"], share={"ln_tuning_layers": "all"}))
