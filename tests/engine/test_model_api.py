"""PeftModel's verbs: add, set, delete, disable, several at once, rows of a batch, generation, status."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from api_zoo import adapted, bert, llama, logits, lora, moved, tokens
from torch import nn

import veneer


def grads_on(model: Any) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


# -- adapters ----------------------------------------------------------------------------------------
def test_set_adapter_switches() -> None:
    model = adapted("default", "b")
    first = logits(model)
    model.set_adapter("b")
    second = logits(model)
    assert model.active_adapter == "b"
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_several_active_add_up() -> None:
    model = adapted("default", "b")
    model.set_adapter(["default", "b"])
    assert model.active_adapters == ["default", "b"]
    both = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), both, atol=1e-5, rtol=1e-5)


def test_delete_adapter_activates_one_that_is_left() -> None:
    model = adapted("default", "b", "c")
    model.set_adapter("c")
    y = logits(model)
    model.delete_adapter("b")
    assert torch.equal(logits(model), y)
    model.set_adapter("default")
    first = logits(model)
    model.set_adapter("c")
    model.delete_adapter("c")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), first)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("verb", ["set_adapter", "delete_adapter", "set_requires_grad"])
def test_unknown_names_are_errors_that_list_the_known(verb: str) -> None:
    model = adapted("default", "b")
    with pytest.raises(ValueError, match="'nope' not found; this model has: 'default', 'b'"):
        getattr(model, verb)("nope")
    assert model.active_adapters == ["default"]


def test_a_name_in_use_is_an_error() -> None:
    model = adapted("default")
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", lora())


def test_a_config_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model = adapted("default")
    y, names = logits(model), list(model.state_dict())
    with pytest.raises(ValueError, match="no_such_layer"):
        model.add_adapter("b", lora(target_modules=["no_such_layer"]))
    assert list(model.peft_config) == ["default"]
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model), y)


def test_disable_adapter_is_the_base() -> None:
    model, base = adapted("default"), logits(llama())
    y = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), y)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(logits(model), y)


def test_modules_to_save_follow_the_active_adapter() -> None:
    config = lora(target_modules=["query"], task_type="TOKEN_CLS")
    model = veneer.get_peft_model(bert(), config)
    assert "classifier" in model.peft_config["default"].modules_to_save
    model.add_adapter("b", lora(target_modules=["query"], task_type="TOKEN_CLS"))
    base = logits(bert())
    moved(model)
    first = logits(model)
    model.set_adapter("b")
    torch.testing.assert_close(logits(model), base)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    x = tokens(2)
    mixed = logits(model, x, adapter_names=["b", "default"])
    torch.testing.assert_close(mixed[1], logits(model, x)[1], atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    assert type(merged.classifier) is nn.Linear
    torch.testing.assert_close(logits(merged), first, atol=1e-5, rtol=1e-5)


# -- who trains -----------------------------------------------------------------------------------------
def scenario(package: Any) -> list[set[str]]:
    """Names with requires_grad after each step of a session with several adapters."""
    kwargs = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = package.get_peft_model(llama(), package.LoraConfig(**kwargs))
    out = [grads_on(model)]
    model.add_adapter("b", package.LoraConfig(**kwargs, modules_to_save=["lm_head"]))
    out.append(grads_on(model))
    model.set_adapter("b")
    out.append(grads_on(model))
    model.add_adapter("c", package.LoraConfig(**{**kwargs, "target_modules": ["o_proj", "q_proj"]}))
    out.append(grads_on(model))
    model.base_model.set_adapter(["default", "c"])
    out.append(grads_on(model))
    model.set_requires_grad("c", requires_grad=False)
    out.append(grads_on(model))
    with model.disable_adapter():
        pass
    out.append(grads_on(model))
    model.set_adapter("default", inference_mode=True)
    out.append(grads_on(model))
    model.set_adapter("c")
    model.delete_adapter("c")
    out.append(grads_on(model))
    return out


def test_requires_grad_with_several_adapters_equals_peft() -> None:
    ours, theirs = scenario(veneer), scenario(peft)
    for step, (a, b) in enumerate(zip(ours[:5], theirs[:5], strict=True)):
        assert a == b, (step, a ^ b)
    assert ours[7] == theirs[7] == set()
    # a set_requires_grad is kept over disable_adapter; what a user froze stays frozen
    assert ours[5] == theirs[5]
    assert ours[6] == ours[5]


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_trained_biases_equal_peft(bias: str) -> None:
    names = []
    for package in (veneer, peft):
        config = package.LoraConfig(r=4, target_modules=["query"], bias=bias, task_type="TOKEN_CLS")
        names.append(grads_on(package.get_peft_model(bert(), config)))
    assert names[0] == names[1]


def test_one_adapter_with_bias_only() -> None:
    model = veneer.get_peft_model(bert(), lora(target_modules=["query"], bias="all"))
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("b", lora(target_modules=["query"], bias="all"))


# -- mixed model, injection -----------------------------------------------------------------------------------
def test_mixed_model() -> None:
    model = veneer.get_peft_model(llama(), lora(), adapter_name="a", mixed=True)
    assert isinstance(model, veneer.PeftMixedModel)
    model.add_adapter("b", veneer.LoHaConfig(r=3, target_modules=["q_proj", "o_proj"]))
    model.add_adapter("c", veneer.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    outputs = []
    for names in (["a"], ["b"], ["c"], ["a", "b", "c"], ["c", "b", "a"]):
        model.set_adapter(names)
        if len(names) == 1:
            moved(model, seed=len(outputs))
        outputs.append(logits(model))
    model.merge_adapter()
    torch.testing.assert_close(logits(model), outputs[-1], atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model), outputs[-1])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    model.delete_adapter("b")
    model.set_adapter(["a"])
    assert torch.equal(logits(model), outputs[0])


def test_a_plain_model_refuses_another_method() -> None:
    model = adapted("default")
    with pytest.raises(ValueError, match="mixed=True"):
        model.add_adapter("b", veneer.LoHaConfig(r=3, target_modules=["q_proj"]))


def test_inject_adapter_in_model() -> None:
    base = llama()
    model = veneer.inject_adapter_in_model(lora(), base)
    assert model is base
    moved(model)
    y = logits(model)
    tensors = {k: v.clone() for k, v in veneer.get_peft_model_state_dict(model).items()}
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), llama())
    assert tensors.keys() == peft.get_peft_model_state_dict(theirs).keys()
    for package, config in ((veneer, lora()), (peft, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))):
        other = package.inject_adapter_in_model(config, llama())
        report = package.set_peft_model_state_dict(other, tensors)
        assert not report.unexpected_keys
        torch.testing.assert_close(logits(other), y, atol=1e-6, rtol=1e-6)


def test_inject_adapter_from_a_state_dict_and_onto_meta() -> None:
    model = veneer.inject_adapter_in_model(lora(target_modules="all-linear"), llama())
    tensors = {k: v for k, v in veneer.get_peft_model_state_dict(model).items() if ".layers.1." in k and "k_proj" in k}
    other = veneer.inject_adapter_in_model(lora(), llama(), state_dict=tensors, low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in other.named_parameters() if "lora_" in n)
    report = veneer.set_peft_model_state_dict(other, tensors, low_cpu_mem_usage=True)
    assert report.ok, report.text()
    assert not any(p.is_meta for p in other.parameters())
    names = {n for n, m in other.named_modules() if hasattr(m, "base_layer")}
    assert names == {"model.layers.1.self_attn.k_proj"}


def test_low_cpu_mem_usage_makes_no_memory() -> None:
    model = veneer.get_peft_model(llama(), lora(), low_cpu_mem_usage=True)
    own = [p for n, p in model.named_parameters() if "lora_" in n]
    assert own
    assert all(p.is_meta for p in own)
    veneer.set_peft_model_state_dict(
        model, veneer.get_peft_model_state_dict(adapted("default")), low_cpu_mem_usage=True
    )
    assert torch.equal(logits(model), logits(adapted("default")))


# -- as other code uses it ---------------------------------------------------------------------------------------
def test_deepcopy_of_a_model_with_several_adapters() -> None:
    model = adapted("default", "b")
    other = copy.deepcopy(model)
    other.set_adapter("b")
    y = logits(model)
    moved(other, seed=9)
    assert torch.equal(logits(model), y)
    assert model.active_adapter == "default"


def test_gradient_checkpointing_of_a_frozen_base() -> None:
    gradients = []
    for reentrant in (None, True, False):
        model = veneer.get_peft_model(llama(), lora(task_type="CAUSAL_LM"))
        moved(model).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        assert all(torch.allclose(other[n], g, atol=1e-7) for n, g in gradients[0].items())


def test_wrapping_twice_warns() -> None:
    model = adapted("default")
    with pytest.warns(UserWarning, match="second time"):
        veneer.get_peft_model(model.base_model.model, lora(target_modules=["o_proj"]))


def test_classes_by_task() -> None:
    model = adapted("default")
    assert type(model) is veneer.PeftModelForCausalLM
    assert type(veneer.get_peft_model(llama(), lora())) is veneer.PeftModel
    with pytest.raises(ValueError, match="Invalid task type"):
        lora(task_type="CAUSAL")
    assert model.config is model.base_model.model.config
    assert model.get_base_model() is model.base_model.model
    assert model.peft_type == veneer.PeftType.LORA == "LORA"
    assert hasattr(model, "nothing_of_this_name") is False
