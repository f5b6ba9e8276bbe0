"""What the engine does to be quick gives what the plain way gives: kept stacks of a mixed batch, switching without a
walk over the model, combining through products of the factors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer import combine_layers, row_cache
from veneer.combine_math import Part, best_of_rank, concatenate, decompose, relative_error, split
from veneer.context import Rows
from veneer.errors import PeftWarning


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: Any) -> Any:
        return self.b(torch.tanh(self.a(x)))


def mixed(names: str = "pqt", **options: Any) -> Any:
    """An adapter a letter, of ranks 2, 3, ..., none of them the identity."""
    torch.manual_seed(0)
    config = lambda i: veneer.LoraConfig(r=2 + i, target_modules=["a", "b"], init_lora_weights=False, **options)
    model = veneer.get_peft_model(Two(), config(0), names[0])
    for i, name in enumerate(names[1:], 1):
        model.add_adapter(name, config(i))
    return model.eval()


def kept(model: Any) -> Any:
    return model.base_model.model.a.kept.stacks


def reference(model: Any, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    with torch.enable_grad():  # the kept stacks are for calls without gradients
        return model(x, adapter_names=names).detach()


@pytest.mark.parametrize(
    "names",
    [["p", "q", "t"], ["p", "q", "p", "t", "p"], ["__base__", "q", "q", "__base__"], ["__base__", "__base__"], ["t"]],
    ids=" ".join,
)
@pytest.mark.parametrize("shape", [(), (5,)], ids=["rows", "sequences"])
def test_kept_stacks_equal_the_reference(names: list[str], shape: tuple[int, ...]) -> None:
    model, x = mixed(), torch.randn(len(names), *shape, 6)
    with torch.no_grad():
        first, stacks = model(x, adapter_names=names), kept(model)
        with model.host.call(rows=Rows.of(names, goes_on=True)):
            again = model.base_model(x)
    assert stacks is not None
    assert kept(model) is stacks
    assert torch.equal(first, again)
    torch.testing.assert_close(first, reference(model, x, names))


def changes() -> dict[str, Any]:
    def layer(m: Any) -> Any:
        return m.base_model.model.a

    def step(m: Any) -> None:
        with torch.no_grad():
            layer(m).lora_A["q"].weight.add_(1.0)

    def point(m: Any) -> None:
        layer(m).lora_B["q"].weight.data = torch.ones(10, 3)

    def parameter(m: Any) -> None:
        layer(m).lora_B["q"].weight = nn.Parameter(torch.ones(10, 3))

    def unseen(m: Any) -> None:  # no version counter moves
        layer(m).lora_A["q"].weight.data.mul_(3.0)

    def sharded(m: Any) -> None:
        m.train()
        layer(m).lora_A["q"].weight.data.mul_(3.0)
        m.eval()

    def again(m: Any) -> None:
        m.delete_adapter("q")
        m.add_adapter("q", veneer.LoraConfig(r=3, target_modules=["a", "b"], init_lora_weights=False))

    return {
        "in place": step,
        "data": point,
        "parameter": parameter,
        "unseen": unseen,
        "in training": sharded,
        "scaling": lambda m: layer(m).set_scale("q", 5.0),
        "added again": again,
        "cast": lambda m: m.double().float(),
    }


@pytest.mark.parametrize("change", changes().values(), ids=changes().keys())
def test_a_change_of_an_adapter_is_seen(change: Any) -> None:
    model, names, x = mixed(), ["p", "q"], torch.randn(2, 6)
    with torch.no_grad():
        model(x, adapter_names=names)
        change(model)
        model.eval()
        got = model(x, adapter_names=names)
    torch.testing.assert_close(got, reference(model, x, names))


def test_only_the_last_batch_is_kept_and_copies_hold_none() -> None:
    model, x = mixed(), torch.randn(2, 6)
    with torch.no_grad():
        model(x, adapter_names=["p", "q"])
        before = kept(model)
        model(x, adapter_names=["q", "t"])
    assert kept(model) is not before
    assert kept(copy.deepcopy(model)) is None
    assert kept(pickle.loads(pickle.dumps(model))) is None
    model.train()
    assert kept(model) is None


def test_decoding_keeps_its_stacks_and_the_next_prompt_does_not() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes))
    config = lambda: veneer.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model: Any = veneer.get_peft_model(base, config(), "p")
    model.add_adapter("q", config())
    layer, names = model.eval().base_model.model.model.layers[0].self_attn.q_proj, ["p", "q"]
    ids = torch.randint(3, 40, (2, 4))
    with torch.no_grad():
        past = model(input_ids=ids, adapter_names=names, use_cache=True).past_key_values
        stacks = layer.kept.stacks
        model(input_ids=ids[:, :1], past_key_values=past, adapter_names=names, use_cache=True)
        assert layer.kept.stacks is stacks
        first = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, adapter_names=names)
        assert layer.kept.stacks is not stacks
        layer.lora_B["q"].weight.data.mul_(-40.0)
        model.base_model.model.model.layers[0].self_attn.v_proj.lora_B["q"].weight.data.mul_(-40.0)
        second = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, adapter_names=names)
        model.set_adapter("q")
        alone = model.generate(input_ids=ids[1:], max_new_tokens=6, do_sample=False)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])
    assert torch.equal(second[1], alone[0])


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_dora": True}], ids=str)
def test_other_adapters_take_the_reference(options: dict[str, Any]) -> None:
    model, x = mixed(**options), torch.randn(2, 6)
    with torch.no_grad():
        got = model(x, adapter_names=["p", "q"])
    assert kept(model) is None
    torch.testing.assert_close(got, reference(model, x, ["p", "q"]))


def test_inference_mode_and_tensors_made_in_it() -> None:
    model, names, x = mixed(), ["p", "q"], torch.randn(2, 6)
    with torch.inference_mode():
        got = model(x, adapter_names=names)
        assert kept(model) is not None
        model.base_model.model.a.lora_A["q"].weight = nn.Parameter(torch.ones(3, 6), requires_grad=False)
        other = model(x, adapter_names=names)
    assert kept(model) is None
    assert not torch.equal(got, other)


def test_nothing_is_kept_where_gradients_are_wanted() -> None:
    model, x = mixed(), torch.randn(2, 6)
    layer, rows = model.base_model.model.a, Rows.of(["p", "q"])
    assert row_cache.product(layer, rows, x) is None
    with torch.no_grad():
        assert row_cache.product(layer, rows, x) is not None


# -- switching -----------------------------------------------------------------------------------------------
def trained(model: Any) -> set[str]:
    return {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad}


def test_switching_does_not_walk_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed("pqts")
    model.set_adapter("q")
    monkeypatch.setattr("veneer.tuner.walk", lambda _: pytest.fail("set_adapter walked over the model"))
    monkeypatch.setattr(nn.Module, "named_modules", lambda *_, **__: pytest.fail("set_adapter walked over the model"))
    monkeypatch.setattr(type(model.base_model), "wrappers", lambda _: iter(()))
    for name in ("p", "q"):
        model.set_adapter(name)
        assert model.active_adapter == name


@pytest.mark.parametrize("inference", [False, True])
def test_switching_trains_the_active_adapter_alone(inference: bool) -> None:
    model = mixed()
    for p in model.parameters():  # not through the engine
        p.requires_grad_("lora_" in "".join(n for n, q in model.named_parameters() if q is p))
    assert trained(model) == {"p", "q", "t"}
    model.set_adapter("q", inference_mode=inference)
    assert trained(model) == (set() if inference else {"q"})


def test_switching_freezes_what_a_caller_unfroze_in_part() -> None:
    model = mixed()
    model.base_model.model.b.lora_B["t"].weight.requires_grad_(True)
    model.set_adapter("q")
    assert trained(model) == {"q"}


def test_switching_undoes_what_layers_were_set_to() -> None:
    model = mixed()
    model.base_model.model.a.set_adapter("t")
    assert trained(model) == {"p", "t"}
    model.set_adapter("q")
    assert trained(model) == {"q"}
    assert model.base_model.model.a.active_adapters == ["q"]
    model.base_model.model.b.merge()
    with pytest.warns(PeftWarning, match="merged"):
        model.set_adapter("p")
    assert not model.base_model.model.b.merged


def test_a_copy_switches_its_own_adapters() -> None:
    model = mixed()
    model.set_adapter("q")
    other = copy.deepcopy(model)
    other.set_adapter("t")
    assert (trained(model), trained(other)) == ({"q"}, {"t"})


# -- combining -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rank", [1, 4, 40])
def test_best_of_rank_is_the_svd(groups: int, rank: int) -> None:
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(groups, *shape, dtype=torch.float64)
    parts = [Part(draw(30, 5), draw(5, 50) * 10.0**-i, w, 2.0) for i, w in enumerate((0.5, -0.3, 0.2))]
    found = best_of_rank(parts, rank)
    assert found is not None
    (B, A), error = found
    expected = split(*decompose(*concatenate(parts)), rank, None)
    assert (B.shape, A.shape) == (expected[0].shape, expected[1].shape)
    torch.testing.assert_close(B @ A, expected[0] @ expected[1])
    assert float(error) == pytest.approx(relative_error(parts, expected), abs=1e-7)


def test_best_of_rank_leaves_dependent_rows_to_qr() -> None:
    torch.manual_seed(0)
    A = torch.randn(1, 4, 20, dtype=torch.float64)
    A[:, 3] = A[:, 2]
    B = torch.randn(1, 9, 4, dtype=torch.float64)
    assert best_of_rank([Part(B, A, 1.0, 1.0)], 2) is None
    assert best_of_rank([Part(B, torch.zeros_like(A), 1.0, 1.0)], 2) is None
    zero = best_of_rank([Part(torch.zeros_like(B), torch.randn_like(A), 1.0, 1.0)], 2)
    assert zero is not None
    assert zero[1] == 0.0
    assert not zero[0][0].any()


def stacked(layers: int = 6) -> Any:
    """Three adapters of ranks 2, 3 and 4 on layers of two shapes; the last layer's factors are dependent."""
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(8, 12) if i % 2 == 0 else nn.Linear(12, 8) for i in range(layers)])
    names = [str(i) for i in range(layers)]
    config = lambda r: veneer.LoraConfig(r=r, target_modules=names, init_lora_weights=False, alpha_pattern={"0": 3})
    model: Any = veneer.get_peft_model(net, config(2), "p")
    for name, r in (("q", 3), ("t", 4)):
        model.add_adapter(name, config(r))
    last = model.base_model.model[layers - 1]
    with torch.no_grad():
        last.lora_A["q"].weight[:2] = last.lora_A["p"].weight
    return model


@pytest.mark.parametrize("svd_rank", [None, 3])
def test_layers_combined_at_once_or_alone(monkeypatch: pytest.MonkeyPatch, svd_rank: int | None) -> None:
    model, sizes, real = stacked(), [], combine_layers.best_of_rank

    def counted(parts: list[Part], rank: int) -> Any:
        sizes.append(len(parts[0].A))
        return real(parts, rank)

    monkeypatch.setattr(combine_layers, "best_of_rank", counted)
    asked: Any = {"adapters": ["p", "q", "t"], "weights": [0.5, -0.3, 0.2], "svd_rank": svd_rank}
    together = model.base_model.add_weighted_adapter(**asked, adapter_name="together")
    assert sorted(sizes) == [1, 2, 3]  # layer 0 has a scaling of its own
    monkeypatch.setattr(combine_layers, "BATCH", 1)
    alone = model.base_model.add_weighted_adapter(**asked, adapter_name="alone")
    assert sizes[3:] == [1] * 6
    assert list(together.errors) == list(alone.errors) == [f"{i}" for i in range(6)]
    for path, error in alone.errors.items():
        assert together.errors[path] == pytest.approx(error, abs=1e-6)
        layer = model.base_model.model[int(path)]
        torch.testing.assert_close(layer.get_delta_weight("together"), layer.get_delta_weight("alone"))
