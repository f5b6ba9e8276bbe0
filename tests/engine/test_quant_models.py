"""Whole models, quantised by their libraries as users do it: training, files, peft's own results on the same layers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from quant_zoo import KINDS as LAYERS
from quant_zoo import load, needs, same, stored
from torch import nn

import veneer
from veneer import PeftWarning
from veneer.backends.quantised import QuantisedSite
from veneer.inits.loftq import replace_lora_weights_loftq
from veneer.site import site_of

KINDS = ["nf4", "fp4", "int8", "torchao-int8", "torchao-int4", "hqq4", "quanto-int8"]
MARKED = [pytest.param(k, marks=pytest.mark.slow) if k in ("fp4", "torchao-int4") else k for k in KINDS]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("quant") / "llama"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=80, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(where)
    return where


def ids() -> torch.Tensor:
    return torch.randint(0, 80, (4, 12), generator=torch.Generator().manual_seed(2))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids()).logits


def randomise(model: Any) -> Any:
    generator = torch.Generator().manual_seed(4)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.05
    return model


def config(package: Any = veneer, **more: Any) -> Any:
    return package.LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **more)


@pytest.mark.parametrize("kind", MARKED)
def test_a_quantised_model_trains(kind: str, folder: Path) -> None:
    base = veneer.prepare_model_for_kbit_training(load(folder, kind))
    y = logits(base)
    model = veneer.get_peft_model(base, config())
    torch.testing.assert_close(logits(model), y)
    assert model.get_layer_status()[0].quantization_backend
    packed = {n: stored(m.base_layer) for n, m in model.named_modules() if hasattr(m, "base_layer")}
    assert len(packed) == 6
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.88 * losses[0]
    assert all(later < losses[0] for later in losses[5:])
    assert all(same(stored(m.base_layer), packed[n]) for n, m in model.named_modules() if n in packed)


@pytest.mark.parametrize("kind", MARKED)
def test_save_load_merge(kind: str, folder: Path, tmp_path: Path) -> None:
    model = randomise(veneer.get_peft_model(load(folder, kind), config()))
    y = logits(model)
    model.save_pretrained(tmp_path)
    again = veneer.PeftModel.from_pretrained(load(folder, kind), str(tmp_path))
    torch.testing.assert_close(logits(again), y)
    with pytest.warns(PeftWarning, match=r"quantising anew moved the merged weights by .* %.*--merge-into original"):
        again.merge_adapter()
    errors = again.base_model.merge_errors()
    assert len(errors) == 6
    assert max(e.weight for e in errors.values()) < LAYERS[kind][2], errors
    assert all(0.5 < e.kept < 1.5 for e in errors.values())
    assert not torch.equal(logits(again), y)
    again.unmerge_adapter()
    assert torch.equal(logits(again), logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PeftWarning)
        merged = again.merge_and_unload()
    layer = merged.model.layers[0].self_attn.q_proj
    fresh = load(folder, kind).model.layers[0].self_attn.q_proj
    assert type(layer) is type(fresh)
    assert stored(layer).keys() == stored(fresh).keys()
    assert not same(stored(layer), stored(fresh))


def _quiet(f: Any, *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f(*args, **kwargs)


OPTIONS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
IN_PEFT = [
    pytest.param(k, o, marks=[pytest.mark.slow] if o == "rslora" or k in ("fp4", "torchao-int4") else [])
    for k in KINDS
    for o in OPTIONS
    if o != "dora" or k in ("nf4", "fp4", "int8")
]


@pytest.mark.parametrize(("kind", "option"), IN_PEFT)
def test_as_peft_on_the_same_layers(kind: str, option: str, folder: Path, tmp_path: Path) -> None:
    options = OPTIONS[option]
    theirs = randomise(peft.get_peft_model(load(folder, kind), config(peft, **options)))
    theirs.save_pretrained(tmp_path / "theirs")
    y = logits(theirs)
    mine = veneer.PeftModel.from_pretrained(load(folder, kind), str(tmp_path / "theirs"))
    torch.testing.assert_close(logits(mine), y, atol=2e-5, rtol=2e-5)
    mine.save_pretrained(tmp_path / "mine")
    back = peft.PeftModel.from_pretrained(load(folder, kind), str(tmp_path / "mine"))
    torch.testing.assert_close(logits(back), y, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merged_as_peft_merges(kind: str, folder: Path, tmp_path: Path) -> None:
    theirs = randomise(peft.get_peft_model(load(folder, kind), config(peft)))
    theirs.save_pretrained(tmp_path)
    mine = veneer.PeftModel.from_pretrained(load(folder, kind), str(tmp_path))
    a, b = _quiet(mine.merge_and_unload), _quiet(theirs.merge_and_unload)
    one, two = a.model.layers[1].mlp.down_proj, b.model.layers[1].mlp.down_proj
    W, V = (site_of(m).weight() for m in (one, two))
    assert float((W - V).norm() / V.norm()) < 0.01  # a few codes at a tie


@pytest.mark.parametrize("kind", [m for m in MARKED if m != "quanto-int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_prepared_as_peft_prepares(kind: str, dtype: torch.dtype, folder: Path) -> None:
    mine = veneer.prepare_model_for_kbit_training(load(folder, kind, dtype))
    theirs = peft.prepare_model_for_kbit_training(load(folder, kind, dtype))
    want = {n: (p.dtype, p.requires_grad, type(p)) for n, p in theirs.named_parameters()}
    assert {n: (p.dtype, p.requires_grad, type(p)) for n, p in mine.named_parameters()} == want
    assert mine.is_gradient_checkpointing == theirs.is_gradient_checkpointing


def test_quanto_is_prepared_in_any_dtype(folder: Path) -> None:
    """peft casts the packed weights, which quanto refuses."""
    model = veneer.prepare_model_for_kbit_training(load(folder, "quanto-int8", torch.bfloat16))
    layer = model.model.layers[0]
    assert layer.self_attn.q_proj.weight.dtype == torch.bfloat16
    assert layer.input_layernorm.weight.dtype == torch.float32
    assert model.is_gradient_checkpointing


def test_trainer_takes_a_quantised_model(folder: Path, tmp_path: Path) -> None:
    """transformers' Trainer refuses a quantised model without adapters; it must see that these are."""
    from transformers import Trainer, TrainingArguments

    model = veneer.get_peft_model(veneer.prepare_model_for_kbit_training(load(folder, "nf4")), config())
    rows = [{"input_ids": row, "labels": row} for row in ids()]
    settings = {"max_steps": 2, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    done = Trainer(model, TrainingArguments(str(tmp_path), **settings), train_dataset=rows).train()
    assert done.global_step == 2


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_values_taken_out_of_a_packed_weight_are_refused(init: str, folder: Path) -> None:
    base = load(folder, "nf4")
    y = logits(base)
    more = {"loftq_config": veneer.LoftQConfig()} if init == "loftq" else {}
    with pytest.raises(ValueError, match=r"q_proj \(64x64\).*a quantised weight cannot give it up exactly"):
        veneer.get_peft_model(base, config(init_lora_weights=init, **more))
    torch.testing.assert_close(logits(base), y)


@pytest.fixture
def cuda_is_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's LoftQ computes on "cuda" whatever there is; here that means this machine's CPU."""
    needs("bitsandbytes")
    import bitsandbytes as bnb

    def on_cpu(to: Any) -> Any:
        def moved(self: Any, *args: Any, **kwargs: Any) -> Any:
            args = tuple("cpu" if str(a).startswith("cuda") else a for a in args)
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            return to(self, *args, **kwargs)

        return moved

    for cls in (torch.Tensor, bnb.nn.Params4bit):
        monkeypatch.setattr(cls, "to", on_cpu(cls.to))


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_as_peft(bits: int, turns: int, cuda_is_cpu: None) -> None:
    found = []
    for package in (veneer, peft):
        torch.manual_seed(0)
        options = package.LoftQConfig(loftq_bits=bits, loftq_iter=turns)
        settings = {"r": 8, "target_modules": ["0"], "init_lora_weights": "loftq", "loftq_config": options}
        model = package.get_peft_model(nn.Sequential(nn.Linear(64, 48)), package.LoraConfig(**settings))
        layer = model.base_model.model[0]
        found.append((layer.base_layer.weight.detach(), layer.get_delta_weight("default")))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_loftq_on_a_quantised_model_as_peft(folder: Path, cuda_is_cpu: None) -> None:
    # where lora_alpha is not r, peft leaves the scaling out and so overshoots
    models = [p.get_peft_model(load(folder, "nf4"), config(p, lora_alpha=4)) for p in (veneer, peft)]
    replace_lora_weights_loftq(models[0], str(folder / "model.safetensors"))
    peft.replace_lora_weights_loftq(models[1], str(folder / "model.safetensors"))
    torch.testing.assert_close(logits(models[0]), logits(models[1]), atol=1e-4, rtol=1e-4)
    plain = logits(veneer.get_peft_model(load(folder, "nf4"), config()))
    from transformers import LlamaForCausalLM

    true = logits(LlamaForCausalLM.from_pretrained(folder))
    assert (logits(models[0]) - true).norm() < (plain - true).norm()


def test_all_linear_and_dora_on_hqq_layers(folder: Path) -> None:
    needs("hqq")
    model = veneer.get_peft_model(load(folder, "hqq4"), veneer.LoraConfig(target_modules="all-linear", use_dora=True))
    sites = [m.site for m in model.modules() if hasattr(m, "site")]
    assert len(sites) == 14
    assert all(isinstance(s, QuantisedSite) and s.library == "HQQ" for s in sites)


@pytest.mark.parametrize("kind", ["nf4", "nf4-double"])
def test_a_weight_that_a_forward_has_repacked_reads_the_same(kind: str) -> None:
    """On CPUs with bfloat16 products bitsandbytes reorders a 4-bit weight at its first call in eval mode."""
    needs("bitsandbytes")
    import bitsandbytes as bnb
    from quant_zoo import make

    layer = make(kind, 128, 64)
    site = site_of(layer)
    assert site is not None
    before = site.weight()
    data, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = data, state
    got = site.weight()
    torch.testing.assert_close(got, before, atol=0, rtol=2**-8)  # its scales are bfloat16 then
    assert torch.equal(site.weight(), got)
    assert site.dtype == torch.float32
    back = site.put(got * 1.5, None)
    assert layer.weight.quant_state.nested == (kind == "nf4-double")
    assert float((site.weight() - got * 1.5).norm() / got.norm()) < 0.02
    site.put_back(back)
    assert torch.equal(site.weight(), got)


def test_a_width_that_comes_back_wrong_is_warned_of() -> None:
    needs("bitsandbytes")
    from quant_zoo import Net

    from veneer.backends.bnb import _cpu_reads_back

    assert _cpu_reads_back(128, 64, "nf4")
    if _cpu_reads_back(96, 64, "nf4"):
        pytest.skip("this version of bitsandbytes reads them right")
    with pytest.warns(PeftWarning, match=r"first \(48x96\): this version of bitsandbytes reads .* 96 inputs wrongly"):
        veneer.get_peft_model(Net("nf4", 96), veneer.LoraConfig(target_modules=["first"]))


def test_int8_inputs_are_warned_of() -> None:
    needs("torchao")
    import torchao.quantization as q

    net = nn.Sequential(nn.Linear(32, 32))
    q.quantize_(net, q.Int8DynamicActivationInt8WeightConfig())
    with pytest.warns(PeftWarning, match="quantises the input, too"):
        model = veneer.get_peft_model(net, veneer.LoraConfig(target_modules=["0"], init_lora_weights=False))
    with pytest.raises(NotImplementedError, match="Int8Tensor with quantised inputs is not known here"):
        model.merge_adapter()
    assert not any(layer.merged for _, layer in model.base_model.adapted_layers())
