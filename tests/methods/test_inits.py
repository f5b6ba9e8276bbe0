"""LoRA's data-driven initial values beside peft's: the same tensors, ranks and base, and files that load in both."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import veneer
from veneer.errors import AdapterError
from veneer.inits import loftq


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(20, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def batches(n: int = 3, rows: int = 40, scale: Tensor | None = None) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    mix = torch.randn(20, 20, generator=g) * (torch.logspace(0.3, -1, 20) if scale is None else scale)
    return [torch.randn(rows, 20, generator=g) @ mix + 0.3 for _ in range(n)]


def peft_corda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """peft's function; the module asks for `attr`, of which a dataclass decorator is all it uses."""
    if "attr" not in sys.modules:
        monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    return preprocess_corda


def same_parameters(ours: nn.Module, theirs: nn.Module, tol: float = 1e-6) -> None:
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], atol=tol, rtol=tol, msg=lambda m, n=name: f"{n}: {m}")


# -- CorDA -----------------------------------------------------------------------------------------------------
def corda(package: Any, preprocess: Any, settings: Any, run: bool = True, **options: Any) -> Any:
    net = Net()
    config = package.LoraConfig(
        r=4, lora_alpha=6, target_modules=["up", "down"], init_lora_weights="corda", corda_config=settings, **options
    )
    quiet = {"show_progress_bar": False} if package is veneer else {}
    preprocess(net, config, run_model=(lambda: [net(x) for x in batches()]) if run else None, **quiet)
    return package.get_peft_model(net, config)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"down": 3}}], ids=str)
def test_corda_equals_peft(method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = corda(peft, peft_corda(monkeypatch), CordaConfig(corda_method=method), **options)
    ours = corda(veneer, veneer.preprocess_corda, veneer.CordaConfig(corda_method=method), **options)
    same_parameters(ours, theirs)
    x = batches(1)[0]
    torch.testing.assert_close(ours(x), Net()(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kept", ["covariance_file", "cache_file"])
def test_corda_reads_what_it_and_peft_kept(kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = corda(veneer, veneer.preprocess_corda, veneer.CordaConfig())
    for name, package, preprocess, kind in (
        ("peft.pt", peft, peft_corda(monkeypatch), CordaConfig),
        ("veneer.pt", veneer, veneer.preprocess_corda, veneer.CordaConfig),
        ("veneer.safetensors", veneer, veneer.preprocess_corda, veneer.CordaConfig),
    ):
        path = str(tmp_path / name)
        corda(package, preprocess, kind(**{kept: path}))
        again = corda(veneer, veneer.preprocess_corda, veneer.CordaConfig(**{kept: path}), run=False)
        same_parameters(again, fresh)


# -- LoRA-GA ---------------------------------------------------------------------------------------------------
def lora_ga(package: Any, settings: Any, **options: Any) -> Any:
    net = Net()
    config = package.LoraConfig(
        r=3, lora_alpha=5, target_modules=["up"], init_lora_weights="lora_ga", lora_ga_config=settings, **options
    )

    def step() -> None:
        for x in batches():
            net(x.requires_grad_()).square().mean().backward()

    package.preprocess_loraga(net, config, step)
    torch.manual_seed(1)
    return package.get_peft_model(net, config)


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
def test_lora_ga_equals_peft(direction: str, scale: str) -> None:
    theirs = lora_ga(peft, LoraGAConfig(direction=direction, scale=scale, stable_gamma=9))
    ours = lora_ga(veneer, veneer.LoraGAConfig(direction=direction, scale=scale, stable_gamma=9))
    same_parameters(ours, theirs)
    x = batches(1)[0]
    torch.testing.assert_close(ours(x), Net()(x), atol=1e-5, rtol=1e-4)


def test_lora_ga_leaves_the_model_as_it_was_and_caches(tmp_path: Path) -> None:
    net, path = Net(), str(tmp_path / "gradients.pt")
    net.down.weight.requires_grad_(False)
    config = veneer.LoraConfig(
        r=3, target_modules=["up"], init_lora_weights="lora_ga", lora_ga_config=veneer.LoraGAConfig()
    )
    seen = []

    def step() -> None:
        for x in batches():
            net(x).square().mean().backward()
            seen.append([p.grad is not None for p in net.parameters()])

    veneer.preprocess_loraga(net, config, step, cache_file=path)
    assert not any(any(row) for row in seen)  # collected as they come, and no others
    assert [p.requires_grad for p in net.parameters()] == [True, True, False, True]
    g = next(iter(torch.load(path, weights_only=True).values()))
    other = Net()
    for x in batches():
        other(x).square().mean().backward()
    torch.testing.assert_close(g, other.up.weight.grad / 3)
    veneer.preprocess_loraga(Net(), config, lambda: pytest.fail("the cache was there"), cache_file=path)


# -- files of a base that data changed ----------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("name", ["corda", "lora_ga"])
def test_a_file_is_read_on_the_original_base(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    if name == "corda":
        made = corda(veneer, veneer.preprocess_corda, veneer.CordaConfig(), rank_pattern={"down": 3}, **options)
    else:
        made = lora_ga(veneer, veneer.LoraGAConfig(), **options)
    with torch.no_grad():
        for n, p in made.named_parameters():
            if "lora_" in n:
                p.add_(torch.randn_like(p) * 0.1)
    x = batches(1)[0]
    want = made(x)
    assert float((want - Net()(x)).detach().abs().max()) > 0.05
    made.save_pretrained(str(tmp_path))
    for package in (veneer, peft):
        loaded = package.PeftModel.from_pretrained(Net(), str(tmp_path))
        torch.testing.assert_close(loaded(x), want, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        for n, p in made.named_parameters():
            if "lora_" in n:
                p.zero_()
    assert veneer.set_peft_model_state_dict(made, load_file(tmp_path / "adapter_model.safetensors")).ok
    torch.testing.assert_close(made(x), want)


@pytest.mark.parametrize("name", ["corda", "lora_ga"])
def test_nothing_prepared_is_an_error(name: str) -> None:
    function = {"corda": "preprocess_corda", "lora_ga": "preprocess_loraga"}[name]
    with pytest.raises(AdapterError, match=f"{function}.*up \\(16x20\\)"):
        veneer.get_peft_model(Net(), veneer.LoraConfig(r=3, target_modules=["up"], init_lora_weights=name))


# -- EVA -------------------------------------------------------------------------------------------------------
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip


def texts(n: int = 8) -> list[dict[str, Tensor]]:
    g, out = torch.Generator().manual_seed(1), []
    for _ in range(n):
        ids = torch.randint(0, 50, (6, 12), generator=g)
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[0, 8:], labels[:, :3] = 0, -100
        out.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return out


TARGETS = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]


def eva(package: Any, targets: list[str] = TARGETS, **settings: Any) -> Any:
    config = package.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(targets), init_lora_weights="eva",
        eva_config=package.EvaConfig(**{"tau": 0.9, **settings}), task_type="CAUSAL_LM",
    )  # fmt: skip
    made = package.get_peft_model(llama(), config)
    package.initialize_lora_eva_weights(made, texts(), show_progress_bar=False)
    return made


@pytest.mark.parametrize(
    "settings",
    [{}, {"adjust_scaling_factors": False}, {"whiten": True}, {"rho": 1.0}, {"use_label_mask": False, "rho": 3.0}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:lora with eva")
def test_eva_equals_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    # peft whitens a decomposition once for each layer that shares it: q_proj alone, then
    targets = ["q_proj", "o_proj", "down_proj"] if "whiten" in settings else TARGETS
    theirs, ours = eva(peft, targets, **settings), eva(veneer, targets, **settings)
    same_parameters(ours, theirs, 1e-5)
    mine, other = ours.peft_config["default"], theirs.peft_config["default"]
    assert mine.rank_pattern == other.rank_pattern
    assert mine.alpha_pattern == other.alpha_pattern
    scalings = {n: m.scaling["default"] for n, m in ours.named_modules() if hasattr(m, "lora_A")}
    assert scalings == {n: m.scaling["default"] for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    with torch.no_grad():
        for n, p in ours.named_parameters():
            if "lora_B" in n:
                p.add_(torch.randn_like(p) * 0.1)
    ours.save_pretrained(str(tmp_path))
    ids = texts(1)[0]["input_ids"]
    want = ours(input_ids=ids).logits
    for package in (veneer, peft):
        loaded = package.PeftModel.from_pretrained(llama(), str(tmp_path))
        torch.testing.assert_close(loaded(input_ids=ids).logits, want, atol=1e-5, rtol=1e-4)


def test_eva_gives_ranks_to_what_explains_most_and_drops_the_rest(tmp_path: Path) -> None:
    """A layer whose inputs are nearly one direction beside one with many: the second gets the ranks."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.flat, self.deep = nn.Linear(20, 6), nn.Linear(20, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.flat(x[0]) + self.deep(x[1])

    g = torch.Generator().manual_seed(2)
    wide = torch.logspace(1, 0.2, 20)
    data = [(torch.randn(60, 20, generator=g) * 1.0, torch.randn(60, 20, generator=g) * wide) for _ in range(6)]
    config = veneer.LoraConfig(
        r=3, lora_alpha=6, target_modules=["flat", "deep"], init_lora_weights="eva",
        eva_config={"rho": 2.0, "tau": 0.5},
    )  # fmt: skip
    made = veneer.get_peft_model(Two(), config)
    found = {"deep": torch.linalg.qr(torch.randn(20, 6))[0].T.contiguous()}  # flat got none
    veneer.initialize_lora_eva_weights(made, eva_state_dict=found)
    assert [n for n, _ in made.base_model.adapted_layers() if "default" in _.entries] == ["deep"]
    deep = made.base_model.model.deep
    assert torch.equal(deep.lora_A["default"].weight, found["deep"])
    assert deep.scaling["default"] == 2.0
    made.save_pretrained(str(tmp_path))
    x = data[0]
    for package in (veneer, peft):
        loaded = package.PeftModel.from_pretrained(Two(), str(tmp_path))
        torch.testing.assert_close(loaded(x), made(x), atol=1e-5, rtol=1e-4)
    config = veneer.LoraConfig(
        r=3, target_modules=["flat", "deep"], init_lora_weights="eva", eva_config={"rho": 2.0, "tau": 0.5}
    )
    plain = veneer.get_eva_state_dict(Two(), data, config, lambda m, b: m(b), None, None, show_progress_bar=False)
    ranks = {n: len(A) for n, A in plain.items()}
    assert sum(ranks.values()) == 6
    assert ranks["deep"] > ranks["flat"] > 0


def test_eva_says_what_is_missing() -> None:
    made = veneer.get_peft_model(Net(), veneer.LoraConfig(target_modules=["up"], init_lora_weights="eva"))
    with pytest.raises(ValueError, match="dataloader is required"):
        veneer.initialize_lora_eva_weights(made)
    with pytest.raises(AdapterError, match="empty"):
        veneer.initialize_lora_eva_weights(made, [], show_progress_bar=False)
    with pytest.raises(AdapterError, match="a batch is a str; batches are the model's arguments by name"):
        veneer.initialize_lora_eva_weights(made, ["text"], prepare_model_inputs_fn=None, show_progress_bar=False)
    broken = torch.full((40, 20), float("nan"))
    for data, said in (
        ([torch.randn(1, 20)], "fewer rows"),
        ([torch.randn(2, 20)], "fewer rows"),  # ten times two rows are two rows
        ([broken], "the inputs of .*up are not finite"),
    ):
        with pytest.raises(AdapterError, match=said):
            veneer.initialize_lora_eva_weights(
                made, data, forward_fn=lambda m, x: m(x), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
                show_progress_bar=False,
            )  # fmt: skip


# -- LoftQ -----------------------------------------------------------------------------------------------------
def test_nf4_of_a_block_by_hand() -> None:
    W = torch.zeros(1, 70)
    W[0, :5] = torch.tensor([2.0, -2.0, 1.0, 0.15, -0.05])
    W[0, 64] = 3.0  # a block of its own
    got = loftq.quantised(W, 4)
    codes = torch.tensor(loftq.NF4)
    want = torch.tensor([2.0, -2.0, *(2 * codes[(codes - v / 2).abs().argmin()] for v in (1.0, 0.15, -0.05))])
    torch.testing.assert_close(got[0, :5], want)
    assert float(got[0, 64]) == 3.0
    assert float(got[0, 5:64].abs().max()) == 0.0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("make", [lambda: nn.Linear(96, 64), lambda: Conv1D(64, 96)], ids=["linear", "conv1d"])
def test_loftq_steps_lower_the_loss_whatever_alpha_is(bits: int, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(make())
    original = base[0].weight.detach().clone()
    losses = []
    for turns in (1, 5):
        for alpha in (8, 24):
            net = nn.Sequential(make())
            net[0].weight.data.copy_(original)
            made = veneer.get_peft_model(
                net,
                veneer.LoraConfig(
                    r=8, lora_alpha=alpha, target_modules=["0"], init_lora_weights="loftq",
                    loftq_config={"loftq_bits": bits, "loftq_iter": turns},
                ),
            )  # fmt: skip
            layer = made.base_model.model[0]
            left = original - layer.base_layer.weight - layer.get_delta_weight("default")
            losses.append(float(left.norm()))
            stored = layer.base_layer.weight.detach().flatten(1)
            torch.testing.assert_close(loftq.quantised(stored, bits), stored, atol=2e-3, rtol=1e-2)
    plain = float((original - loftq.quantised(original, bits)).norm())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[2] == pytest.approx(losses[3], rel=1e-3)
    assert losses[2] < losses[0] < plain


def test_replace_lora_weights_loftq(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "model.safetensors")
    original = {n: net.get_submodule(n).weight.detach().clone() for n in ("up", "down")}
    for m in (net.up, net.down):
        m.weight.data = loftq.quantised(m.weight.data, 4)
    made = veneer.get_peft_model(net, veneer.LoraConfig(r=4, lora_alpha=12, target_modules=["up", "down"]))
    seen = []

    def keep(model: nn.Module, name: str) -> bool:
        seen.append(name)
        return name == "up"

    veneer.replace_lora_weights_loftq(made, str(tmp_path), callback=keep)
    assert seen == ["up", "down"]
    up, down = made.base_model.model.up, made.base_model.model.down
    gap = original["up"] - up.base_layer.weight
    S = torch.linalg.svdvals(gap)
    assert float((gap - up.get_delta_weight("default")).norm()) == pytest.approx(float(S[4:].norm()), rel=1e-4)
    assert float(down.lora_B["default"].weight.abs().max()) == 0.0
    with pytest.raises(AdapterError, match="no safetensors file"):
        veneer.replace_lora_weights_loftq(made, str(tmp_path / "nowhere"))


# -- settings --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, "rho"),
        ({"init_lora_weights": "eva", "eva_config": {"roh": 2.0}}, "did you mean 'rho'"),
        ({"init_lora_weights": "corda", "corda_config": {"corda_method": "ipn"}}, "did you mean 'ipm'"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"scale": "stabel"}}, "did you mean 'stable'"),
        ({"init_lora_weights": "loftq"}, "`loftq_config` must be specified"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, "loftq_bits=3"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        veneer.LoraConfig(target_modules=["up"], **options)


def test_unused_settings_are_named() -> None:
    with pytest.warns(UserWarning, match="`eva_config` specified but will be ignored"):
        veneer.LoraConfig(target_modules=["up"], eva_config=veneer.EvaConfig())
