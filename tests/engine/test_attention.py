"""nn.MultiheadAttention as an adapted layer, against peft and against its own merged weight."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

import veneer

WIDTH, HEADS = 16, 4
KINDS = [{"batch_first": True}, {"bias": False}, {"add_bias_kv": True, "add_zero_attn": True}]


class Block(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, **kwargs)
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, q, k):
        return self.lin(self.mha(q, k, value=k)[0])


def tensors_for(model, scale=0.3):
    torch.manual_seed(1)
    return {k: torch.randn_like(t) * scale for k, t in veneer.get_peft_model_state_dict(model).items()}


def adapted(make, **options):
    model = veneer.get_peft_model(make(), veneer.LoraConfig(**options)).eval()
    assert veneer.set_peft_model_state_dict(model, tensors_for(model)).ok
    return model


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equals_peft_in_names_outputs_and_gradients(kind):
    options = {"target_modules": ["mha", "lin"], "r": 3, "lora_alpha": 5}
    ours = adapted(lambda: Block(**kind), **options)
    theirs = peft.get_peft_model(Block(**kind), peft.LoraConfig(**options)).eval()
    names = set(peft.get_peft_model_state_dict(theirs))
    assert names == set(veneer.get_peft_model_state_dict(ours))
    assert set(theirs.state_dict()) == set(ours.state_dict())
    peft.set_peft_model_state_dict(theirs, tensors_for(ours))
    q, k = torch.randn(5, 2, WIDTH), torch.randn(5, 2, WIDTH)
    expected, got = theirs(q, k), ours(q, k)
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(got, Block(**kind)(q, k), atol=1e-2)
    with torch.no_grad():
        assert torch.allclose(ours(q, k), expected, atol=1e-5)
    expected.square().sum().backward()
    got.square().sum().backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    mine = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert grads.keys() == mine.keys()
    for (
        n,
        g,
    ) in grads.items():  # peft adds the projection's change twice and derives it once; ours is the true gradient
        factor = 2 if "out_proj" in n else 1
        assert torch.allclose(mine[n], factor * g, rtol=1e-3, atol=1e-4 * g.abs().max().item()), n


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_merged_equals_forward_and_unmerging_is_exact(kind, dora):
    ours = adapted(lambda: Block(**kind), target_modules=["mha"], r=3, use_dora=dora)
    q, k = torch.randn(5, 2, WIDTH), torch.randn(5, 2, WIDTH)
    before, y = {n: t.clone() for n, t in ours.state_dict().items()}, ours(q, k)
    ours.merge_adapter()
    assert torch.allclose(ours(q, k), y, atol=1e-5)
    ours.unmerge_adapter()
    assert all(torch.equal(t, before[n]) for n, t in ours.state_dict().items())
    with ours.disable_adapter():
        assert torch.equal(ours(q, k), Block(**kind)(q, k))
    plain = ours.merge_and_unload()
    assert type(plain.mha) is nn.MultiheadAttention
    assert isinstance(plain.mha.out_proj, nn.Linear)
    assert torch.allclose(plain(q, k), y, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing(dora):
    model = veneer.get_peft_model(Block(), veneer.LoraConfig(target_modules=["mha"], use_dora=dora))
    q, k = torch.randn(5, 2, WIDTH), torch.randn(5, 2, WIDTH)
    assert torch.allclose(model(q, k), Block()(q, k), atol=1e-6)


def test_an_output_projection_named_alone_acts():
    ours = adapted(Block, target_modules=["out_proj"], r=3)
    q = torch.randn(5, 2, WIDTH)
    y = ours(q, q)
    assert not torch.allclose(y, Block()(q, q), atol=1e-2)
    ours.merge_adapter()
    assert torch.allclose(ours(q, q), y, atol=1e-5)


def test_two_adapters_switch_and_add_up():
    ours = adapted(Block, target_modules=["mha"], r=3)
    ours.add_adapter("b", veneer.LoraConfig(target_modules=["mha"], r=2, init_lora_weights=False))
    q = torch.randn(5, 2, WIDTH)
    a = ours(q, q)
    ours.set_adapter("b")
    b = ours(q, q)
    assert not torch.allclose(a, b, atol=1e-3)
    ours.base_model.set_adapter(["default", "b"])
    both = ours(q, q)
    ours.merge_adapter()
    assert torch.allclose(ours(q, q), both, atol=1e-5)
    ours.unmerge_adapter()
    ours.delete_adapter("b")
    ours.set_adapter("default")
    assert torch.equal(ours(q, q), a)


def test_a_batch_that_mixes_adapters_is_refused_and_a_uniform_one_served():
    ours = adapted(Block, target_modules=["mha"], r=3)
    q = torch.randn(5, 2, WIDTH)
    with pytest.raises(veneer.AdapterError, match="cannot mix adapters"):
        ours(q, q, adapter_names=["default", "__base__"])
    assert torch.allclose(ours(q, q, adapter_names=["default"] * 2), ours(q, q))


@pytest.mark.parametrize("targets", [["self_attn"], ["linear1", "linear2"], ["self_attn", "linear1"], ["out_proj"]])
def test_fused_inference_of_an_encoder_sees_the_adapters(targets):
    def make():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 24, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)

    ours = adapted(make, target_modules=targets, r=3)
    x = torch.randn(3, 5, WIDTH)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    slow = ours(x, src_key_padding_mask=mask)
    with torch.no_grad():
        fast = ours(x, src_key_padding_mask=mask)
    assert torch.allclose(fast[~mask], slow[~mask], atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(make().eval()(x, src_key_padding_mask=mask)[~mask], fast[~mask], atol=1e-2)


def test_projections_of_unlike_sizes_are_refused_by_name():
    with pytest.raises(veneer.AdapterError, match=r"mha .*kdim=8"):
        veneer.get_peft_model(Block(kdim=8, vdim=8), veneer.LoraConfig(target_modules=["mha"]))


def test_dropout_on_an_attention_is_announced():
    with pytest.warns(veneer.PeftWarning, match="dropout"):
        veneer.get_peft_model(Block(), veneer.LoraConfig(target_modules=["mha"], lora_dropout=0.5))


def test_an_error_in_the_call_leaves_the_module_as_it_was():
    ours = adapted(Block, target_modules=["mha"], r=3)
    base = ours.base_model.model.mha.get_base_layer()
    held = base._parameters["in_proj_weight"]
    with pytest.raises((AssertionError, RuntimeError)):
        ours(torch.randn(5, 2, WIDTH + 1), torch.randn(5, 2, WIDTH + 1))
    assert base._parameters["in_proj_weight"] is held
