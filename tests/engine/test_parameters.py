"""target_parameters: adapters on expert weights, against peft and against their own merged weight."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import veneer

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=3, moe_intermediate_size=24, head_dim=8)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=3, head_dim=8)),
}
IDS = torch.tensor([[1, 2, 3, 4], [7, 8, 9, 5]])
EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]


class Experts(nn.Module):
    """Three experts, each of them down after up, and a matrix that all of them read through."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 10, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 10))
        self.mix = nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        h = torch.einsum("eoi,bi->ebo", self.up, x).relu()
        return torch.einsum("eoi,ebi->bo", self.down, h) @ self.mix.T


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()
        torch.manual_seed(1)
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        return self.lin(self.experts(x))


ALL = ["experts.up", "experts.down", "experts.mix"]


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval() if name in MODELS else Net()


def adapted(name, **options):
    model = veneer.get_peft_model(build(name), veneer.LoraConfig(**options)).eval()
    assert veneer.set_peft_model_state_dict(model, random_tensors(model)).ok
    return model


def random_tensors(model, adapter="default"):
    torch.manual_seed(2)
    found = veneer.get_peft_model_state_dict(model, adapter_name=adapter)
    return {k: torch.randn_like(found[k]) * 0.2 for k in sorted(found)}


def run(model, name):
    torch.manual_seed(3)
    return model(IDS).logits if name in MODELS else model(torch.randn(5, 6))


CASES = [
    *((name, {"target_parameters": EXPERTS, "target_modules": ["q_proj"], "r": 2}) for name in MODELS),
    ("gpt_oss", {"target_parameters": EXPERTS[:1], "r": 2, "use_rslora": True}),
    (
        "net",
        {"target_parameters": ALL, "target_modules": ["lin"], "r": 2, "rank_pattern": {"experts.down": 3}},
    ),
    ("net", {"target_parameters": ["up"], "r": 2, "lora_alpha": 3, "alpha_pattern": {"up": 7}}),
    ("net", {"target_parameters": ["lin.weight"], "r": 2}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_equals_peft_in_names_outputs_and_gradients(name, options):
    ours = adapted(name, **options)
    theirs = peft.get_peft_model(build(name), peft.LoraConfig(**options)).eval()
    assert {k: t.shape for k, t in peft.get_peft_model_state_dict(theirs).items()} == {
        k: t.shape for k, t in veneer.get_peft_model_state_dict(ours).items()
    }
    assert set(theirs.state_dict()) == set(ours.state_dict())
    peft.set_peft_model_state_dict(theirs, random_tensors(ours))
    expected, got = run(theirs, name), run(ours, name)
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(got, run(build(name), name), atol=1e-3)
    expected.square().sum().backward()
    got.square().sum().backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    mine = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert grads.keys() == mine.keys()
    for n, g in grads.items():
        assert torch.allclose(mine[n], g, rtol=1e-3, atol=1e-5 * g.abs().max().item()), n


@pytest.mark.parametrize(("name", "options"), CASES)
def test_merged_equals_forward_and_unmerging_is_exact(name, options):
    ours = adapted(name, **options)
    before, y = {n: t.clone() for n, t in ours.state_dict().items()}, run(ours, name)
    ours.merge_adapter()
    assert torch.allclose(run(ours, name), y, atol=1e-4 * y.abs().max().item())
    ours.unmerge_adapter()
    assert all(torch.equal(t, before[n]) for n, t in ours.state_dict().items())
    with ours.disable_adapter():
        assert torch.equal(run(ours, name), run(build(name), name))
    plain = ours.merge_and_unload()
    assert torch.allclose(run(plain, name), y, atol=1e-4 * y.abs().max().item())
    assert set(plain.state_dict()) == set(build(name).state_dict())


def test_a_fresh_adapter_changes_nothing_and_half_precision_runs():
    model = build("gpt_oss").to(torch.bfloat16)
    y = model(IDS).logits
    ours = veneer.get_peft_model(model, veneer.LoraConfig(target_parameters=EXPERTS))
    assert torch.equal(ours(IDS).logits, y)
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert len(trained) == 8
    assert {p.dtype for p in trained} == {torch.float32}


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_in_backward_gives_the_same_gradients(reentrant):
    x = torch.randn(5, 6, requires_grad=True)
    grads = []
    for wrap in (lambda f, v: f(v), lambda f, v: checkpoint(f, v, use_reentrant=reentrant)):
        ours = adapted("net", target_parameters=ALL, r=2).train()
        wrap(ours, x).square().sum().backward()
        grads.append({n: p.grad for n, p in ours.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.allclose(g, grads[1][n]) and g.abs().max() > 0 for n, g in grads[0].items())


def test_two_adapters_switch_add_up_and_leave():
    ours = adapted("net", target_parameters=ALL, r=2)
    alone = run(ours, "net")
    ours.add_adapter("b", veneer.LoraConfig(target_parameters=ALL, r=3, init_lora_weights=False))
    assert torch.equal(run(ours, "net"), alone)
    ours.base_model.set_adapter(["default", "b"])
    both = run(ours, "net")
    assert not torch.allclose(both, alone, atol=1e-2)
    ours.merge_adapter()
    assert torch.allclose(run(ours, "net"), both, rtol=1e-4, atol=1e-3)
    ours.unmerge_adapter()
    ours.delete_adapter("b")
    ours.set_adapter("default")
    assert torch.equal(run(ours, "net"), alone)
    assert type(ours.unload().experts) is Experts


def test_save_and_load(tmp_path):
    ours = adapted("net", target_parameters=ALL, r=2)
    ours.save_pretrained(tmp_path)
    y = run(ours, "net")
    assert torch.equal(run(veneer.PeftModel.from_pretrained(build("net"), tmp_path), "net"), y)
    assert torch.equal(run(veneer.PeftModel.from_pretrained(build("net"), tmp_path, low_cpu_mem_usage=True), "net"), y)
    assert torch.allclose(run(peft.PeftModel.from_pretrained(build("net"), tmp_path), "net"), y, rtol=1e-5, atol=1e-3)


def test_an_error_in_the_call_restores_the_parameters():
    ours = adapted("net", target_parameters=ALL, r=2)
    experts = ours.base_model.model.experts.get_base_layer()
    held = dict(experts._parameters)
    with pytest.raises(RuntimeError):
        ours(torch.randn(5, 7))
    assert all(experts._parameters[n] is p for n, p in held.items())


def test_a_batch_that_mixes_adapters_is_refused():
    ours = adapted("net", target_parameters=ALL, r=2)
    with pytest.raises(veneer.AdapterError, match="cannot mix adapters"):
        ours(torch.randn(2, 6), adapter_names=["default", "__base__"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_parameters": ["experts.up"], "lora_dropout": 0.1}, "lora_dropout=0"),
        ({"target_parameters": ["experts.up"], "use_dora": True}, "use_dora=False"),
        ({"target_parameters": ["experts.up"], "lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["experts.upp"]}, "experts.up"),
        ({"target_parameters": ["lin.bias"]}, "dimensions"),
        ({"target_parameters": ["lin.weight"], "target_modules": ["lin"]}, "target_modules"),
        ({"target_parameters": ["experts.up"], "init_lora_weights": "pissa"}, "stack of experts"),
    ],
)
def test_what_cannot_be_is_said(options, words):
    with pytest.raises(ValueError, match=words):
        veneer.get_peft_model(Net(), veneer.LoraConfig(**options))


def test_adapters_of_one_model_name_the_same_parameters():
    ours = adapted("net", target_parameters=["experts.up"], r=2)
    with pytest.raises(ValueError, match="same set"):
        ours.add_adapter("b", veneer.LoraConfig(target_parameters=["experts.down"]))
    assert list(ours.peft_config) == ["default"]
