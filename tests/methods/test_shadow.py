"""Shadow networks: the same as peft, and through the usual calls of PeftModel."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from prompt_zoo import CLOSE, batch, make
from safetensors.torch import load_file

import veneer
from veneer.errors import AdapterError
from veneer.model import PeftModel, get_peft_model

NARROW = {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2, "shadow_intermediate_size": 20}
OWN = {"share_embeddings": False, "shadow_num_hidden_layers": 2, "update_hidden_size": 5, "r": 4}
CASES = [
    ("llama", "CAUSAL_LM", {}),
    ("gpt2", "CAUSAL_LM", NARROW),
    ("opt", "CAUSAL_LM", {"layers_to_transform": None}),
    ("llama", "SEQ_CLS", {}),
    ("llama", "CAUSAL_LM", NARROW),
    ("llama", "CAUSAL_LM", OWN),
    ("llama", "CAUSAL_LM", {"target_modules": ["layers.1"], "shadow_alpha": 0.5, "auxiliary_loss_weight": 0.0}),
]


def both(arch: str, task: str, settings: dict[str, Any], open_up: bool = True) -> list[Any]:
    out = []
    for package in (veneer, peft):
        base = make(arch, task)
        torch.manual_seed(3)
        cfg = package.ShadowConfig(**{"task_type": task, "shadow_dropout": 0.0, **settings})
        out.append(package.get_peft_model(base, cfg).eval())
        if open_up:
            nudge(out[-1])
    return out


def nudge(model: Any, seed: int = 5) -> None:
    """Let the shadow be felt: U starts at zero."""
    draw = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if "shadow_up." in name:
            p.data.copy_(torch.randn(p.shape, generator=draw))


@pytest.mark.parametrize(("arch", "task", "settings"), CASES)
def test_equals_peft_and_files_go_both_ways(arch: str, task: str, settings: dict, tmp_path: Any) -> None:
    ours, theirs = both(arch, task, settings)
    for pad in (None, "left", "right"):
        data = batch(task, pad)
        with torch.no_grad():
            a, b = ours(**data), theirs(**data)
        torch.testing.assert_close(a.logits, b.logits, **CLOSE)
        torch.testing.assert_close(a.loss, b.loss, **CLOSE)
    for who, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(str(tmp_path / who))
    x, y = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert x.keys() == y.keys()
    assert all(torch.equal(x[k], y[k]) for k in x)  # the initial values, too, are peft's
    configs = [peft.PeftConfig.from_pretrained(str(tmp_path / who)).to_dict() for who in ("ours", "theirs")]
    for c in configs:
        c["target_modules"], c["modules_to_save"] = sorted(c["target_modules"]), sorted(set(c["modules_to_save"] or ()))
    heads = [set(c.pop("modules_to_save")) for c in configs]  # peft lists heads that are not there
    assert configs[0] == configs[1]
    assert heads[0] <= heads[1]
    here = PeftModel.from_pretrained(make(arch, task), str(tmp_path / "theirs"))
    there = peft.PeftModel.from_pretrained(make(arch, task), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        torch.testing.assert_close(here(**data).loss, b.loss, **CLOSE)
        torch.testing.assert_close(there(**data).logits, a.logits, **CLOSE)


@pytest.mark.parametrize(("arch", "settings"), [("llama", {}), ("gpt2", NARROW), ("llama", OWN)])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generates_as_peft(arch: str, settings: dict, search: dict) -> None:
    ours, theirs = both(arch, "CAUSAL_LM", settings)
    data, how = batch("CAUSAL_LM", None, labels=False), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert ours.generate(**data, **how, **search).equal(theirs.generate(**data, **how, **search))


def test_left_padded_row_generates_as_alone() -> None:
    """Departure: peft's shadow counts positions through the padding."""
    model, data = both("gpt2", "CAUSAL_LM", {})[0], batch("CAUSAL_LM", "left", labels=False)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    alone = model.generate(input_ids=data["input_ids"][1:, 2:], **how)
    assert model.generate(**data, **how)[1, 6:].tolist() == alone[0, 4:].tolist()


@pytest.mark.parametrize(("arch", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("llama", "SEQ_CLS")])
def test_trains_as_peft(arch: str, task: str) -> None:
    losses = []
    for model in both(arch, task, {}, open_up=False):
        best = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model.train()
        seen = []
        for _ in range(20):
            best.zero_grad()
            loss = model(**batch(task)).loss
            loss.backward()
            best.step()
            seen.append(loss.detach())
        losses.append(torch.stack(seen))
    torch.testing.assert_close(losses[0], losses[1], atol=0, rtol=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_several_adapters_and_none(tmp_path: Any) -> None:
    data = batch("CAUSAL_LM")
    plain = make("llama", "CAUSAL_LM")(**data)
    model = get_peft_model(make("llama", "CAUSAL_LM"), veneer.ShadowConfig(task_type="CAUSAL_LM", r=4)).eval()
    assert torch.equal(model(**data).logits, plain.logits)  # identity at init
    model.add_adapter("b", veneer.ShadowConfig(task_type="CAUSAL_LM", **{**OWN, "r": 2}))
    nudge(model)
    seen: dict[str, torch.Tensor] = {}
    for names in ("default", "b", ["default", "b"]):
        model.set_adapter(names)
        seen[str(names)] = model(**data).logits
        on = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all((".b." in n) == (names == "b") for n in on) or isinstance(names, list)
        cached = model.generate(**batch("CAUSAL_LM", None, False), max_new_tokens=5, do_sample=False)
        assert cached.equal(
            model.generate(**batch("CAUSAL_LM", None, False), max_new_tokens=5, do_sample=False, use_cache=False)
        )
    assert len({round(float(v.sum()), 4) for v in (plain.logits, *seen.values())}) == 4
    with model.disable_adapter():
        off = model(**data)
    assert torch.equal(off.logits, plain.logits)
    assert torch.equal(off.loss, plain.loss)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**data).logits, seen["['default', 'b']"])
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(make("llama", "CAUSAL_LM"), str(tmp_path / "b"), adapter_name="b")
    torch.testing.assert_close(again(**data).logits, seen["b"], **CLOSE)
    again.load_adapter(str(tmp_path), "first")
    again.set_adapter("first")
    torch.testing.assert_close(again(**data).logits, seen["default"], **CLOSE)
    with pytest.raises(NotImplementedError, match="SHADOW"):
        model.merge_and_unload()
    model.delete_adapter("b")
    assert not [n for n, _ in model.named_parameters() if ".b." in n]
    model.set_adapter("default")
    assert torch.equal(model(**data).logits, seen["default"])
    base = model.unload()
    assert torch.equal(base(**data).loss, plain.loss)
    assert torch.equal(twin(**data).logits, seen["['default', 'b']"])


def test_gradient_checkpointing_and_embeddings_change_nothing() -> None:
    grads, losses = [], []
    for on in (False, True):
        model = both("llama", "CAUSAL_LM", {})[0].train()
        data = batch("CAUSAL_LM")
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            data["inputs_embeds"] = model.get_input_embeddings()(data.pop("input_ids")).detach()
        loss = model(**data).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], **CLOSE)
    torch.testing.assert_close(grads[0], grads[1], **CLOSE)


def test_gradient_equals_finite_differences() -> None:
    model = both("gpt2", "CAUSAL_LM", {})[0].double()
    names = ["shadow_backbone.default.h.0.mlp.c_fc", "h.0.shadow_update_gate.default.0", "h.1.shadow_down"]
    weights = [p for n, p in model.named_parameters() if any(x in n for x in names) and n.endswith("weight")]
    assert len(weights) == 3

    def value() -> torch.Tensor:
        return model(**batch("CAUSAL_LM", labels=False)).logits.square().mean()

    for weight, grad in zip(weights, torch.autograd.grad(value(), weights), strict=True):
        way, sides = torch.randn_like(weight), []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                weight.add_(way * step)
                sides.append(value())
            weight.add_(way * 1e-5)
        torch.testing.assert_close((grad * way).sum(), (sides[0] - sides[1]) / 2e-5, atol=1e-9, rtol=1e-5)


def test_a_pretrained_shadow(tmp_path: Any) -> None:
    small = make("llama", "CAUSAL_LM", seed=4, hidden_size=16, head_dim=8, num_attention_heads=2, num_hidden_layers=1)
    small.save_pretrained(str(tmp_path / "small"))
    ours, theirs = both("llama", "CAUSAL_LM", {"shadow_model": str(tmp_path / "small")})
    torch.testing.assert_close(ours(**batch("CAUSAL_LM")).loss, theirs(**batch("CAUSAL_LM")).loss, **CLOSE)
    kept = ours.base_model.shadow_backbone["default"].layers[0].mlp.up_proj.weight
    assert torch.equal(kept, small.model.layers[0].mlp.up_proj.weight)


def test_half_precision() -> None:
    base = make("llama", "CAUSAL_LM").bfloat16()
    model = get_peft_model(base, veneer.ShadowConfig(task_type="CAUSAL_LM")).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    nudge(model)
    assert model(**batch("CAUSAL_LM")).logits.dtype == torch.bfloat16
    assert model.generate(**batch("CAUSAL_LM", "left", False), max_new_tokens=3).shape[0] == 2


def test_what_does_not_fit() -> None:
    for settings, said in [
        ({"r": 0}, "`r` should be a positive"),
        ({"shadow_dropout": 1.5}, "between 0 and 1"),
        ({"shadow_hidden_size": 0}, "shadow_hidden_size=0"),
    ]:
        with pytest.raises(ValueError, match=said):
            veneer.ShadowConfig(**settings)
    with pytest.raises(AttributeError, match="set `target_modules`"):
        get_peft_model(make("bert", "SEQ_CLS"), veneer.ShadowConfig(task_type="SEQ_CLS"))
    model = both("llama", "CAUSAL_LM", OWN)[0]
    ids = batch("CAUSAL_LM")["input_ids"]
    with pytest.raises(AdapterError, match="needs input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    assert model(ids).logits.shape == (2, 6, 60)  # a call that failed leaves nothing behind
    with pytest.raises(AdapterError, match="no room for the shadow"):
        model.generate(ids, cache_implementation="static", max_new_tokens=3)
    with model.disable_adapter():
        past = model(ids, use_cache=True).past_key_values
    with pytest.raises(AdapterError, match="filled without the shadow"):
        model(ids, past_key_values=past)


@pytest.mark.parametrize(("arch", "settings"), [("llama", {}), ("llama", OWN), ("gpt2", NARROW)])
def test_loaded_before_the_base(arch: str, settings: dict, tmp_path: Any) -> None:
    """Onto a base without weights yet, as large ones are loaded: the shadow's own buffers are in no file."""
    whole, _ = both(arch, "CAUSAL_LM", settings)
    whole.save_pretrained(str(tmp_path))
    empty = make(arch, "CAUSAL_LM")
    for module in empty.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(p.to("meta"), requires_grad=False))
    model = PeftModel.from_pretrained(empty, str(tmp_path), low_cpu_mem_usage=True).eval()
    own = model.base_model.shadow_backbone
    assert not any(t.is_meta for t in (*own.parameters(), *own.buffers()))
    inside, weights = model.get_base_model(), make(arch, "CAUSAL_LM").state_dict()
    named = {
        k: weights[k.replace(".base_layer", "")] for k in inside.state_dict() if k.replace(".base_layer", "") in weights
    }
    assert len(named) == len(weights)
    inside.load_state_dict(named, strict=False, assign=True)
    data = batch("CAUSAL_LM", "left")
    with torch.no_grad():
        torch.testing.assert_close(model(**data).logits, whole(**data).logits, **CLOSE)
