"""Methods whose change depends on the call: Poly (task ids), Lily (a router), Arrow and X-LoRA (experts)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import veneer
from veneer import AdapterError, CannotMerge, LoadError
from veneer.methods.arrow import experts

X = torch.tensor([[1, 5, 9, 3, 4], [1, 7, 8, 6, 2], [1, 3, 3, 9, 5]])
IDS = torch.tensor([2, 0, 1])


def llama(layers: int = 2) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=64, num_hidden_layers=layers, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes
    )
    return LlamaForCausalLM(config).eval()


def uncached() -> Any:
    model = llama()
    model.config.use_cache = False  # what peft's X-LoRA asks for
    return model


def moved(model: Any, seed: int = 1) -> Any:
    """The model with everything trained moved at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def losses(model: Any, batch: dict[str, Any], rate: float = 0.02) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    out = []
    for i in range(20):
        torch.manual_seed(i)
        loss = model(input_ids=X, labels=X, **batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    model.eval()
    return out


def same_course(a: list[float], b: list[float]) -> bool:
    worst = max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))
    return worst < 1e-4 and abs(a[0] - a[-1]) > 1e-3


def generated(model: Any, **kwargs: Any) -> Tensor:
    fixed = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(input_ids=X, attention_mask=torch.ones_like(X), **fixed, **kwargs)


def silent(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


# -- Poly -----------------------------------------------------------------------------------------------------
POLY = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], "r": 4, "n_tasks": 3, "n_splits": 2}


def poly(package: Any = veneer, **changes: Any) -> Any:
    torch.manual_seed(5)
    return moved(package.get_peft_model(llama(), package.PolyConfig(**{**POLY, **changes}))).eval()


def test_poly_both_ways_and_in_training(tmp_path: Path) -> None:
    theirs = poly(peft)
    theirs.save_pretrained(tmp_path / "a")
    ours = veneer.PeftModel.from_pretrained(llama(), tmp_path / "a", is_trainable=True).eval()
    y = theirs(input_ids=X, task_ids=IDS).logits
    assert apart(ours(input_ids=X, task_ids=IDS).logits, y) < 1e-5
    assert apart(ours(input_ids=X, task_ids=IDS.flip(0)).logits, y) > 3e-4
    assert torch.equal(ours(input_ids=X, task_ids=IDS[:, None]).logits, ours(input_ids=X, task_ids=IDS).logits)
    assert apart(theirs(input_ids=X, task_ids=IDS[:, None]).logits, y) < 1e-5
    assert same_course(losses(ours, {"task_ids": IDS}), losses(theirs, {"task_ids": IDS}))
    ours.save_pretrained(tmp_path / "b")
    back = peft.PeftModel.from_pretrained(llama(), tmp_path / "b").eval()
    assert apart(back(input_ids=X, task_ids=IDS).logits, ours(input_ids=X, task_ids=IDS).logits) < 1e-5


def test_poly_rows_are_of_their_own_tasks() -> None:
    m = poly()
    y = m(input_ids=X, task_ids=IDS).logits
    for i in range(3):
        assert apart(m(input_ids=X[i : i + 1], task_ids=IDS[i : i + 1]).logits, y[i : i + 1]) < 1e-5
    with m.disable_adapter():
        assert torch.equal(m(input_ids=X, task_ids=IDS).logits, llama()(input_ids=X).logits)


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_poly_generates(search: dict[str, int]) -> None:
    m = poly()
    copies = search.get("num_return_sequences", 1)
    cached = generated(m, task_ids=IDS, **search)
    assert torch.equal(cached, generated(m, task_ids=IDS, use_cache=False, **search))
    alone = m.generate(
        input_ids=X[1:2],
        task_ids=IDS[1:2],
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **search,
    )
    assert torch.equal(cached[copies : 2 * copies], alone)


def test_poly_mixed_with_another_adapter() -> None:
    m = poly()
    m.add_adapter("b", veneer.PolyConfig(**{**POLY, "n_tasks": 4}))
    moved(m)
    m.eval()
    names = ["b", "default", "__base__"]
    y = m(input_ids=X, task_ids=IDS, adapter_names=names).logits
    for i, name in enumerate(names):
        if name == "__base__":
            alone = llama()(input_ids=X[i : i + 1]).logits
        else:
            m.set_adapter(name)
            alone = m(input_ids=X[i : i + 1], task_ids=IDS[i : i + 1]).logits
        assert apart(y[i : i + 1], alone) < 1e-5


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "task_ids should not be None"),
        (torch.tensor([0, 1]), "2 entries and the batch 3 rows"),
        (torch.tensor([0, 1, 3]), "Only 3 tasks available. Found task id = 3"),
        (torch.tensor([0, -1, 1]), "Found task id = -1"),
        (torch.tensor([0.0, 1.0, 1.0]), "one integer a row"),
    ],
)
def test_poly_refuses_wrong_ids(ids: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poly()(input_ids=X, task_ids=ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "`r` should be a positive"),
        ({"n_splits": 3}, "n_splits=3 on .*must divide"),
        ({"n_skills": 0}, "n_skills=0"),
        ({"poly_type": "x"}, "Unsupported poly_type: x"),
    ],
)
def test_poly_refuses_wrong_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        poly(**change)


def test_poly_under_gradient_checkpointing() -> None:
    """What is computed again in the backward pass sees the ids of its own call."""
    m, ids = poly(), IDS

    def gradients(model: Any) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        model(input_ids=X, labels=X, task_ids=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients(m.train())
    checked = poly()
    checked.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checked.enable_input_require_grads()
    again = gradients(checked.train())
    assert len(again) == len(plain)
    assert all(apart(a, b) < 1e-6 for a, b in zip(plain, again, strict=True))
    first = checked(input_ids=X, labels=X, task_ids=ids).loss
    second = checked(input_ids=X, labels=X, task_ids=ids.flip(0)).loss
    with pytest.raises(AdapterError, match="call backward after each forward pass"):
        (first + second).backward()


def test_poly_does_not_merge() -> None:
    m = poly()
    with pytest.raises(CannotMerge, match="POLY"):
        m.merge_and_unload()


def test_poly_takes_ids_in_lists_and_one_task_needs_none() -> None:
    m = poly()
    assert torch.equal(m(input_ids=X, task_ids=[2, 0, 1]).logits, m(input_ids=X, task_ids=IDS).logits)
    one = poly(n_tasks=1)
    assert apart(one(input_ids=X).logits, one(input_ids=X, task_ids=[0, 0, 0]).logits) < 1e-6


# -- Lily -----------------------------------------------------------------------------------------------------
LILY = {
    "task_type": "CAUSAL_LM",
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "r": 4,
    "num_B": 3,
    "stride_A": 2,
}


def lily(package: Any = veneer, layers: int = 3, **changes: Any) -> Any:
    torch.manual_seed(5)
    config = silent(lambda: package.LilyConfig(**{**LILY, **changes}))
    return moved(silent(lambda: package.get_peft_model(llama(layers), config))).eval()


def tied(model: Any) -> set[frozenset[str]]:
    """Names of Lily's parameters that are one."""
    found: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if "lily_" in name:
            found.setdefault(id(p), []).append(name)
    return {frozenset(names) for names in found.values()}


@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], r".*\.(q_proj|v_proj)", "all-linear", ["layers.0.mlp.up_proj"]]
)
def test_lily_shares_as_peft_does(targets: Any) -> None:
    assert tied(lily(target_modules=targets)) == tied(lily(peft, target_modules=targets))


def test_lily_both_ways_and_in_training(tmp_path: Path) -> None:
    theirs = lily(peft)
    theirs.save_pretrained(tmp_path / "a")
    ours = veneer.PeftModel.from_pretrained(llama(3), tmp_path / "a", is_trainable=True).eval()
    assert tied(ours) == tied(theirs)
    assert apart(ours(input_ids=X).logits, theirs(input_ids=X).logits) < 1e-5
    assert same_course(losses(ours, {}), losses(theirs, {}))
    ours.save_pretrained(tmp_path / "b")
    back = silent(lambda: peft.PeftModel.from_pretrained(llama(3), tmp_path / "b")).eval()
    assert apart(back(input_ids=X).logits, ours(input_ids=X).logits) < 1e-5
    ours.save_pretrained(tmp_path / "c", compact=True)
    small, full = ((tmp_path / d / "adapter_model.safetensors").stat().st_size for d in "cb")
    assert small < 0.75 * full
    again = veneer.PeftModel.from_pretrained(llama(3), tmp_path / "c")
    assert torch.equal(again(input_ids=X).logits, ours(input_ids=X).logits)


def test_lily_on_gpt2s_layers() -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)).eval()
    y = base(input_ids=X).logits
    m = veneer.get_peft_model(base, veneer.LilyConfig(task_type="CAUSAL_LM", r=4))
    assert torch.equal(m(input_ids=X).logits, y)
    assert apart(moved(m)(input_ids=X).logits, y) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"), [({"r": 0}, "`r`"), ({"num_B": 1}, "num_B"), ({"stride_A": 0}, "stride_A")]
)
def test_lily_refuses_wrong_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lily(**change)


# -- Arrow ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five saved LoRA adapters, all different."""
    out = []
    for i in range(5):
        folder = tmp_path_factory.mktemp(f"lora{i}")
        config = veneer.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4, lora_alpha=6 + i)
        moved(veneer.get_peft_model(llama(), config), seed=10 + i).save_pretrained(str(folder))
        out.append(str(folder))
    return out


def exact(model: Any) -> Any:
    """peft's Arrow with the directions that its power iteration stops short of."""
    with torch.no_grad():
        model(input_ids=X)  # finds them, and takes general knowledge out of the task adapters in place
        for layer in model.modules():
            if getattr(layer, "lora_arrow", None):
                for i, row in enumerate(layer.lora_arrow["arrow_router"].prototypes):
                    change = layer.lora_B[f"task_{i}"].weight @ layer.lora_A[f"task_{i}"].weight
                    row.copy_(torch.linalg.svd(change)[2][0])
    return model


ARROWS = [{"top_k": 1}, {"top_k": 2, "router_temperature": 0.5}, {"top_k": 3, "use_gks": True}]


@pytest.mark.parametrize("kwargs", ARROWS, ids=str)
def test_arrow_is_pefts(kwargs: dict[str, Any], adapters: list[str]) -> None:
    general = adapters[3:] if kwargs.get("use_gks") else None
    theirs = peft.create_arrow_model(llama(), adapters[:3], peft.ArrowConfig(rng_seed=1, **kwargs), general).eval()
    ours = veneer.create_arrow_model(llama(), adapters[:3], veneer.ArrowConfig(**kwargs), general)
    expected = exact(theirs)(input_ids=X).logits
    assert apart(ours(input_ids=X).logits, expected) < 1e-5
    assert apart(ours(input_ids=X).logits, llama()(input_ids=X).logits) > 1e-3
    assert ours.active_adapters == ["arrow_router"]
    assert set(ours.peft_config) == set(theirs.peft_config)
    assert ours.get_nb_trainable_parameters()[0] == 0


def test_arrow_leaves_the_task_adapters_as_they_are(adapters: list[str], tmp_path: Path) -> None:
    m = veneer.create_arrow_model(llama(), adapters[:2], veneer.ArrowConfig(top_k=2, use_gks=True), adapters[3:])
    y = m(input_ids=X).logits
    for i in range(2):
        kept, saved = (
            veneer.get_peft_model_state_dict(m, adapter_name=f"task_{i}"),
            veneer.load_peft_weights(adapters[i]),
        )
        assert all(torch.equal(kept[k], saved[k]) for k in saved)
    m.save_pretrained(str(tmp_path))
    again = veneer.PeftModel.from_pretrained(llama(), tmp_path / "arrow_router", adapter_name="arrow_router")
    with pytest.raises(AdapterError, match="routes to adapter 'task_0'"):
        again(input_ids=X)
    for name in ("task_0", "task_1", "gks_0", "gks_1"):
        again.load_adapter(tmp_path / name, name)
    assert torch.equal(again(input_ids=X).logits, y)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "task_0").eval()
    m.set_adapter("task_0")
    assert apart(theirs(input_ids=X).logits, m(input_ids=X).logits) < 1e-5


def test_arrow_directions_follow_the_adapters(adapters: list[str]) -> None:
    m = veneer.create_arrow_model(llama(), adapters[:3], veneer.ArrowConfig(top_k=1))
    layer: Any = m.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    before = experts(layer.view("arrow_router"))
    assert experts(layer.view("arrow_router"))[2] is before[2], "nothing changed, nothing is computed again"
    with torch.no_grad():
        layer.lora_A["task_1"].weight.add_(torch.randn(4, 16))
    after = experts(layer.view("arrow_router"))[2]
    assert torch.equal(after[0], before[2][0])
    change = layer.lora_B["task_1"].weight @ layer.lora_A["task_1"].weight
    assert apart(after[1].abs(), torch.linalg.svd(change)[2][0].abs()) < 1e-4


def test_arrow_generates_mixes_and_does_not_merge(adapters: list[str]) -> None:
    m = veneer.create_arrow_model(llama(), adapters[:3], veneer.ArrowConfig(top_k=2))
    assert torch.equal(generated(m), generated(m, use_cache=False))
    y = m(input_ids=X, adapter_names=["arrow_router", "task_1", "__base__"]).logits
    assert apart(y[:1], m(input_ids=X[:1]).logits) < 1e-5
    with pytest.raises(CannotMerge):
        m.merge_adapter()
    m.set_adapter("task_1")
    assert apart(y[1:2], m(input_ids=X[1:2]).logits) < 1e-5


def test_arrow_refuses(adapters: list[str], tmp_path: Path) -> None:
    make = veneer.create_arrow_model
    with pytest.raises(ValueError, match="at least one adapter path"):
        make(llama(), [], veneer.ArrowConfig())
    with pytest.raises(ValueError, match="GenKnowSub"):
        make(llama(), adapters[:2], veneer.ArrowConfig(use_gks=True))
    with pytest.raises(ValueError, match="top_k=3 with 2 task adapters"):
        make(llama(), adapters[:2], veneer.ArrowConfig())
    for wrong in ({"top_k": 0}, {"router_temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            veneer.ArrowConfig(**wrong)
        with pytest.raises(ValueError, match=next(iter(wrong))):
            peft.ArrowConfig(**wrong)
    config = veneer.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=8)
    veneer.get_peft_model(llama(), config).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="rank mismatch: 8 != 4"):
        make(llama(), [adapters[0], str(tmp_path)], veneer.ArrowConfig(top_k=1))


# -- X-LoRA ---------------------------------------------------------------------------------------------------
XLORA = {"task_type": "CAUSAL_LM", "hidden_size": 16, "xlora_size": 6}


def xlora(package: Any, folders: list[str], n: int = 2, **changes: Any) -> Any:
    named = {str(i): path for i, path in enumerate(folders[:n])}
    config = silent(lambda: package.XLoraConfig(**{**XLORA, "adapters": named, **changes}))
    return silent(lambda: package.get_peft_model(uncached() if package is peft else llama(), config)).eval()


def classifier(model: Any) -> dict[str, Tensor]:
    """The classifier's tensors by their file keys."""
    if isinstance(model, veneer.PeftModel):
        return {k: p for k, p in veneer.get_peft_model_state_dict(model).items() if "classifier" in k}
    return {f"base_model.{n}": p for n, p in model.base_model.named_parameters() if "classifier" in n}


def twins(adapters: list[str], **changes: Any) -> tuple[Any, Any]:
    """peft's model and veneer's with one classifier."""
    theirs, ours = moved(xlora(peft, adapters, **changes)), xlora(veneer, adapters, **changes)
    source, goal = classifier(theirs), classifier(ours)
    assert {k: v.shape for k, v in source.items()} == {k: v.shape for k, v in goal.items()}
    experts_of = {
        n.replace(".lora_model.", "."): p for n, p in theirs.named_parameters() if ".lora_A." in n or ".lora_B." in n
    }
    with torch.no_grad():
        for k, v in goal.items():
            v.copy_(source[k])
        for n, p in ours.named_parameters():
            if n in experts_of:
                p.copy_(experts_of[n])
    return theirs, ours


XLORAS = [
    {},
    {"layerwise_scalings": True, "xlora_depth": 2},
    {"xlora_depth": 3, "softmax_temperature": 0.3},
    {"enable_softmax": False},
    {"enable_softmax": False, "enable_softmax_topk": True},
    {"top_k_lora": 1},
    {"top_k_lora": 2, "enable_softmax_topk": True, "layerwise_scalings": True},
    {"global_scaling_weight": 0.4, "scaling_pass_value": 0.7},
]


@pytest.mark.parametrize("kwargs", XLORAS, ids=str)
def test_xlora_is_pefts(kwargs: dict[str, Any], adapters: list[str]) -> None:
    theirs, ours = twins(adapters, n=3, **kwargs)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    y = ours(input_ids=X, attention_mask=mask).logits
    assert apart(y, theirs(input_ids=X, attention_mask=mask).logits) < 1e-5
    assert apart(ours.get_latest_scalings(), theirs.base_model.get_latest_scalings()) < 1e-5
    assert apart(y, llama()(input_ids=X, attention_mask=mask).logits) > 1e-3


@pytest.mark.parametrize("trained", [False, True], ids=["classifier", "experts too"])
def test_xlora_trains_as_peft_does(trained: bool, adapters: list[str]) -> None:
    theirs, ours = twins(adapters, xlora_depth=2, layerwise_scalings=True, use_trainable_adapters=trained)
    names = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert any(".lora_A" in n for n in names) == trained
    assert len(names) == sum(p.requires_grad for p in theirs.parameters())
    before = {n: p.clone() for n, p in ours.named_parameters() if ".lora_" in n}
    assert same_course(losses(ours, {}, 0.05), losses(theirs, {}, 0.05))
    assert before
    assert all(torch.equal(p, before[n]) != trained for n, p in ours.named_parameters() if n in before)


def test_xlora_saves_what_both_load(adapters: list[str], tmp_path: Path) -> None:
    ours = moved(xlora(veneer, adapters, n=3, xlora_depth=2))
    y = ours(input_ids=X).logits
    ours.save_pretrained(str(tmp_path))
    torch.manual_seed(99)
    theirs = silent(lambda: peft.PeftModel.from_pretrained(uncached(), tmp_path)).eval()
    assert apart(theirs(input_ids=X).logits, y) < 1e-5
    again = veneer.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(again(input_ids=X).logits, y)
    assert not any(p.requires_grad for p in again.parameters())
    alone = peft.PeftModel.from_pretrained(llama(), tmp_path / "1").eval()  # an expert's folder is an adapter
    ours.set_adapter("1")
    assert apart(alone(input_ids=X).logits, ours(input_ids=X).logits) < 1e-5


def test_xlora_experts_trained_along_are_saved_and_keep_their_order(adapters: list[str], tmp_path: Path) -> None:
    named = {name: adapters[i] for i, name in enumerate("zyx")}
    ours = moved(xlora(veneer, adapters, adapters=named, use_trainable_adapters=True))
    ours.save_pretrained(str(tmp_path))
    again = veneer.PeftModel.from_pretrained(llama(), tmp_path)
    assert list(again.peft_config["default"].adapters) == list("zyx")
    assert torch.equal(again(input_ids=X).logits, ours(input_ids=X).logits)


def test_xlora_folder_of_peft_lacks_the_first_layer(adapters: list[str], tmp_path: Path) -> None:
    """peft drops every tensor with ".0." in its name, as if it were expert "0"'s; veneer says what is missing."""
    theirs = moved(xlora(peft, adapters, xlora_depth=2))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match=r"internal_xlora_classifier\.layers\.0\.weight"):
        silent(lambda: veneer.PeftModel.from_pretrained(llama(), tmp_path))
    torch.manual_seed(99)
    again = silent(lambda: peft.PeftModel.from_pretrained(uncached(), tmp_path)).eval()
    assert apart(classifier(again)["base_model.internal_xlora_classifier.layers.0.weight"],
                 classifier(theirs)["base_model.internal_xlora_classifier.layers.0.weight"]) > 1e-3  # fmt: skip


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=str)
def test_xlora_generates_with_a_cache(search: dict[str, int], adapters: list[str]) -> None:
    """Tokens are those without a cache, which are peft's."""
    theirs, ours = twins(adapters, n=3, layerwise_scalings=True)
    cached = generated(ours, use_cache=True, **search)
    assert torch.equal(cached, generated(ours, use_cache=False, **search))
    assert torch.equal(cached, generated(theirs, use_cache=False, **search))


@torch.no_grad()
def test_xlora_cache_in_steps(adapters: list[str]) -> None:
    m = moved(xlora(veneer, adapters))
    whole = m(input_ids=X, use_cache=False).logits
    first = m(input_ids=X[:, :3], use_cache=True)
    kept = copy.deepcopy(first.past_key_values)
    for past in (first.past_key_values, kept):
        step = m(input_ids=X[:, 3:], past_key_values=past, use_cache=True).logits
        assert apart(step, whole[:, 3:]) < 1e-5
    with m.disable_adapter():
        foreign = m(input_ids=X[:, :3], use_cache=True).past_key_values
    with pytest.raises(AdapterError, match="filled without X-LoRA"):
        m(input_ids=X[:, 3:], past_key_values=foreign)


def test_xlora_logs_and_settings(adapters: list[str]) -> None:
    m = moved(xlora(veneer, adapters, n=3))
    assert m.get_latest_scalings() is None
    m.enable_scalings_logging()
    for n in (5, 3, 5):
        m(input_ids=X[:, :n])
    assert [tuple(c.shape) for c in m.get_scalings_log()] == [(3, n, 4, 3) for n in (5, 3, 5)]
    assert {n: positions for n, (positions, _) in m.get_bucketed_scalings_log().items()} == {5: [0, 2], 3: [1]}
    m.disable_scalings_logging()
    y = m(input_ids=X).logits
    assert len(m.get_scalings_log()) == 3
    m.clear_scalings_log()
    assert m.get_scalings_log() == []
    m.set_topk_lora(1)
    top = m(input_ids=X).logits
    assert apart(top, y) > 1e-3
    with pytest.raises(ValueError, match="from 1 to 3"):
        m.set_topk_lora(4)
    m.set_topk_lora(None)
    m.set_global_scaling_weight(0.0)
    assert m.get_global_scaling_weight() == 0.0
    assert apart(m(input_ids=X).logits, llama()(input_ids=X).logits) < 1e-6
    m.set_global_scaling_weight(1.0)
    m.set_scaling_pass_value(0.5)
    assert apart(m(input_ids=X).logits, y) > 1e-5
    m.set_scaling_pass_value(None)
    assert m.internal_xlora_classifier.override_scaling_pass_value == 1 / 3
    m.set_scaling_pass_value(0)
    assert torch.equal(m(input_ids=X, output_hidden_states=True).logits, y)
    m.internal_xlora_classifier.config.top_k_lora = 1
    assert torch.equal(m(input_ids=X).logits, top)


def test_xlora_rows_copies_and_unloading(adapters: list[str]) -> None:
    m = moved(xlora(veneer, adapters))
    y, base = m(input_ids=X).logits, llama()(input_ids=X).logits
    mixed = m(input_ids=X, adapter_names=["default", "1", "__base__"]).logits
    assert apart(mixed[:1], y[:1]) < 1e-5
    assert apart(mixed[2:], base[2:]) < 1e-6
    m.train()(input_ids=X, labels=X).loss.backward()
    m.zero_grad()
    assert torch.equal(copy.deepcopy(m.eval())(input_ids=X).logits, y)
    with m.disable_adapter():
        assert torch.equal(m(input_ids=X).logits, base)
    m.set_adapter("1")
    assert apart(mixed[1:2], m(input_ids=X[1:2]).logits) < 1e-5
    m.set_adapter("default")
    with pytest.raises(CannotMerge):
        m.merge_and_unload()
    with pytest.raises(ValueError, match="expert"):
        m.delete_adapter("0")
    assert torch.equal(m.unload()(input_ids=X).logits, base)


def test_xlora_under_gradient_checkpointing(adapters: list[str]) -> None:
    def gradients(m: Any) -> list[Tensor]:
        torch.manual_seed(3)
        m.train()(input_ids=X, labels=X).loss.backward()
        return [p.grad for p in m.parameters() if p.grad is not None]

    plain = gradients(moved(xlora(veneer, adapters, layerwise_scalings=True, use_trainable_adapters=True)))
    m = moved(xlora(veneer, adapters, layerwise_scalings=True, use_trainable_adapters=True))
    m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    m.enable_input_require_grads()
    again = gradients(m)
    assert len(plain) == len(again) == 18
    assert all(apart(a, b) < 1e-6 for a, b in zip(plain, again, strict=True))


def test_xlora_refuses(adapters: list[str], tmp_path: Path) -> None:
    for wrong, message in (
        ({"xlora_depth": 0}, "depth must be strictly positive"),
        ({"top_k_lora": 0}, "at least 1"),
        ({"top_k_lora": 3}, "top_k_lora=3 with 2 experts"),
        ({"adapters": {}}, "names no expert"),
        ({"adapters": {"0": str(tmp_path)}}, "Can't find 'adapter_config.json'"),
    ):
        with pytest.raises(ValueError, match=message):
            xlora(veneer, adapters, **wrong)
    with pytest.raises(AdapterError, match="hidden_size=5"):
        xlora(veneer, adapters, hidden_size=5)(input_ids=X[:1])
    lora = veneer.get_peft_model(llama(), veneer.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="get_peft_model"):
        lora.add_adapter("x", veneer.XLoraConfig(**XLORA, adapters={"0": adapters[0]}))
    base = llama()
    lily_folder = tmp_path / "lily"
    veneer.get_peft_model(llama(), veneer.LilyConfig(target_modules=["q_proj"])).save_pretrained(str(lily_folder))
    with pytest.raises(ValueError, match=r"LoRA adapters; .*LILY"):
        veneer.get_peft_model(base, veneer.XLoraConfig(**XLORA, adapters={"0": adapters[0], "1": str(lily_folder)}))
    assert torch.equal(base(input_ids=X).logits, llama()(input_ids=X).logits)
