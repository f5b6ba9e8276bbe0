"""LoRA's variants: what the laws cannot see. Everything is compared with peft, which runs as an oracle, or with a
formula."""

from __future__ import annotations

import copy
import json
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import GPTQLoraLinear
from peft.tuners.lora.monteclora import MontecloraSampler
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer import backends
from veneer.helpers import DoraCaching, MontecloraTrainerMixin
from veneer.methods import alora, monteclora
from veneer.site import LinearSite

IDS = torch.tensor([[3, 9, 5, 6, 10, 11, 12], [5, 6, 9, 10, 5, 6, 7], [9] * 7, [9, 5, 7, 6, 9, 9, 5], [9] * 5 + [5, 6]])
ONES = torch.ones_like(IDS)


def llama(layers: int = 2) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=layers, **sizes, **special)).eval()


def lora(package: Any, **options: Any) -> Any:
    return package.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False, **options})


class Net(nn.Module):
    def __init__(self, inp: int = 32, out: int = 16):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(inp, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def both(tmp_path: Path, inp: int = 32, **options: Any) -> tuple[Any, Any]:
    """peft's model over Net with random factors, and veneer's of its file; both can train."""
    theirs = peft.get_peft_model(Net(inp), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["first"], **options))
    for n, p in theirs.named_parameters():
        if "lora_A" in n or "lora_B" in n:
            p.data.normal_()
    theirs.save_pretrained(tmp_path)
    return theirs, veneer.PeftModel.from_pretrained(Net(inp), tmp_path, is_trainable=True)


def parts(model: Any) -> Any:
    return model.base_model.model.first


# -- aLoRA -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def invoked(tmp_path: Path) -> tuple[Any, Any]:
    """peft's and veneer's model with two aLoRA adapters and a plain one, equal tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(llama(), lora(peft, alora_invocation_tokens=[5, 6])).eval()
        theirs.add_adapter("plain", lora(peft))
        theirs.add_adapter("other", lora(peft, alora_invocation_tokens=[9]))
        theirs.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(llama(), tmp_path)
    for name in ("plain", "other"):
        ours.load_adapter(tmp_path / name, name)
    return theirs.eval(), ours.eval()


def generate(model: Any, ids: Tensor = IDS, **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(input_ids=ids, **options).tolist()


def ended(tokens: list[int]) -> list[int]:
    """Without the end token and the padding after it."""
    while tokens and tokens[-1] in (0, 2):
        tokens = tokens[:-1]
    return tokens


def test_where_the_invocation_starts() -> None:
    first = alora.starts(IDS, [5, 6])
    assert first.tolist() == [2, 4, alora.NEVER, alora.NEVER, 5]
    assert alora.starts(IDS, [5, 6], end=4).tolist() == [2, 0, alora.NEVER, alora.NEVER, alora.NEVER]
    assert alora.starts(IDS[:, :1], [5, 6]).tolist() == [alora.NEVER] * 5


@torch.no_grad()
def test_alora_is_pefts(invoked: tuple[Any, Any]) -> None:
    theirs, ours = invoked
    y = ours(input_ids=IDS).logits
    assert torch.allclose(y, theirs(input_ids=IDS).logits, atol=1e-5)
    changed = (y - llama()(input_ids=IDS).logits).abs().amax(-1) > 1e-6
    assert torch.equal(changed, torch.arange(7) >= alora.starts(IDS, [5, 6])[:, None])
    offsets = [3, 3, None, 1, 2]
    given = ours(input_ids=IDS, alora_offsets=offsets).logits
    assert torch.allclose(given, theirs(input_ids=IDS, alora_offsets=offsets).logits, atol=1e-5)
    assert generate(ours) == generate(theirs)


def test_alora_trains_on_the_tokens_gathered_as_on_all(
    invoked: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = invoked
    for name, p in ours.named_parameters():
        p.requires_grad_("lora_" in name and ".default." in name)

    def gradients(ids: Tensor) -> list[Tensor]:
        ours.zero_grad(set_to_none=True)
        ours(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in ours.parameters() if p.requires_grad]

    gathered, never = gradients(IDS), gradients(torch.full_like(IDS, 3))
    monkeypatch.setattr(alora, "plain_autograd", lambda x: False)
    for mine, wanted in zip(gathered, gradients(IDS), strict=True):
        assert torch.allclose(mine, wanted, atol=1e-6)
        assert mine.abs().sum() > 0
    assert all(g is not None and not g.any() for g in never)  # none is missing where no row invokes the adapter


@torch.no_grad()
def test_alora_in_mixed_batches(invoked: tuple[Any, Any]) -> None:
    theirs, ours = invoked
    names = ["default", "other", "__base__", "plain", "default"]
    y = ours(input_ids=IDS, adapter_names=names).logits
    assert torch.allclose(y, theirs(input_ids=IDS, adapter_names=names).logits, atol=1e-5)
    assert generate(ours, adapter_names=names) == generate(theirs, adapter_names=names)
    wide = generate(ours, adapter_names=names, num_beams=2)
    for i, name in enumerate(names):
        alone = generate(ours, IDS[i : i + 1], adapter_names=[name], num_beams=2)[0]
        assert ended(wide[i]) == ended(alone)


@torch.no_grad()
def test_alora_with_caches(invoked: tuple[Any, Any]) -> None:
    """Generation is the same with and without a cache, in beams too; a cache of the base alone may be gone on from."""
    _, ours = invoked
    assert generate(ours) == generate(ours, use_cache=False)
    assert generate(ours, num_beams=3) == generate(ours, num_beams=3, use_cache=False)
    y = ours(input_ids=IDS[:2]).logits
    first = ours(input_ids=IDS[:2, :6], use_cache=True)
    second = ours(input_ids=IDS[:2, 6:], past_key_values=first.past_key_values).logits
    assert torch.allclose(second, y[:, 6:], atol=1e-5)
    with ours.disable_adapter():
        first = ours(input_ids=IDS[:1, :2], use_cache=True)
    second = ours(input_ids=IDS[:1, 2:], past_key_values=first.past_key_values).logits
    assert torch.allclose(second, y[:1, 2:], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("way", [{"prefill_chunk_size": 2}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=str)
def test_alora_generates_the_same_however_the_prompt_is_read(
    invoked: tuple[Any, Any], way: dict[str, Any], search: dict[str, Any]
) -> None:
    """A prompt in pieces cuts an invocation in two, or has a later one that a first piece cannot know of."""
    _, ours = invoked
    assert generate(ours, **way, **search) == generate(ours, **search)


@torch.no_grad()
def test_alora_with_left_padding_and_without_ids(invoked: tuple[Any, Any]) -> None:
    _, ours = invoked
    ids = torch.cat([torch.zeros(5, 3, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(5, 3, dtype=torch.long), ONES], 1)
    at = (mask.cumsum(1) - 1).clamp(min=0)
    padded = ours(input_ids=ids, attention_mask=mask, position_ids=at).logits[:, 3:]
    assert torch.allclose(padded, ours(input_ids=IDS).logits, atol=1e-5)
    embeds = ours.get_base_model().get_input_embeddings()(IDS)
    with pytest.warns(UserWarning, match="only inputs_embeds are provided"):
        y = ours(inputs_embeds=embeds).logits
    assert torch.allclose(y, llama()(input_ids=IDS).logits, atol=1e-6)


def test_alora_trains_as_pefts_and_under_checkpointing(invoked: tuple[Any, Any]) -> None:
    theirs, ours = (m.train() for m in invoked)
    for m in (theirs, ours):
        m.set_adapter("default")
        m(input_ids=IDS, labels=IDS).loss.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    actual = {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    assert all(torch.allclose(actual[k], expected[k], atol=1e-6) for k in expected)
    base = ours.get_base_model()
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    ours.zero_grad()
    ours(input_ids=IDS, labels=IDS).loss.backward()
    again = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert all(torch.allclose(again[k], actual[k], atol=1e-6) for k in actual)
    assert not base._forward_pre_hooks


def test_alora_does_not_merge(invoked: tuple[Any, Any]) -> None:
    for model in invoked:
        with pytest.raises(NotImplementedError):
            model.merge_adapter()
    with pytest.raises(ValueError, match="alora_invocation_tokens is empty"):
        veneer.get_peft_model(llama(), lora(veneer, alora_invocation_tokens=[]))


# -- QALoRA, BdLoRA, MiCA ----------------------------------------------------------------------------------------------


class Grouped(nn.Linear):
    """Stands for a layer quantised in groups."""


@pytest.fixture
def grouped_backend() -> Any:
    site = type("GroupedSite", (LinearSite,), {"grouped": True})
    backends.register(lambda m, name: site(m, name) if isinstance(m, Grouped) else None)
    yield
    backends.MAKERS.pop()


def test_qalora_on_a_grouped_base_is_pefts(grouped_backend: None) -> None:
    base = Grouped(32, 16)
    options = {"r": 4, "lora_alpha": 8, "use_qalora": True, "qalora_group_size": 8, "target_modules": ["0"]}
    theirs = GPTQLoraLinear(base, "default", config=peft.LoraConfig(**options), r=4, lora_alpha=8)
    cfg = veneer.LoraConfig(**options)
    ours = veneer.get_peft_model(nn.Sequential(copy.deepcopy(base)), cfg).eval()
    layer = ours.base_model.model[0]
    for a, b in ((theirs.lora_A, layer.lora_A), (theirs.lora_B, layer.lora_B)):
        a["default"].weight.data.normal_()
        b["default"].weight.data.copy_(a["default"].weight)  # the shapes agree
    x = torch.randn(3, 5, 32)
    y = ours(x)
    assert torch.allclose(y, theirs.eval()(x), atol=1e-5)
    ours.merge_adapter()
    assert torch.allclose(ours(x), y, atol=1e-5)
    bad = veneer.LoraConfig(r=4, use_qalora=True, qalora_group_size=5, target_modules=["0"])
    with pytest.raises(ValueError, match="divisible by 'qalora_group_size'"):
        veneer.get_peft_model(nn.Sequential(copy.deepcopy(base)), bad)


@pytest.mark.parametrize(
    "options",
    [
        {"nblocks": 2},
        {"nblocks": 3, "target_modules_bd_a": ["first"]},
        {"nblocks": 3, "target_modules_bd_b": ["first"]},
        {"nblocks": 2, "target_modules_bd_a": ["first"], "target_modules_bd_b": ["first"]},
    ],
    ids=str,
)
def test_bdlora_refuses_what_peft_refuses(options: dict[str, Any]) -> None:
    def make(package: Any) -> Any:
        cfg = package.LoraConfig(r=4, target_modules=["first"], use_bdlora=package.BdLoraConfig(**options))
        return package.get_peft_model(Net(), cfg)

    for package in (peft, veneer):
        with pytest.raises(ValueError, match=r"neither A nor B|divisible|overlapping"):
            make(package)


@pytest.mark.parametrize("pattern", ["up_proj", "mlp", "p.up", "up.*"])
def test_bdlora_patterns_are_parts_of_names(pattern: str) -> None:
    shapes = []
    for package in (peft, veneer):
        net = nn.ModuleDict({"mlp": nn.ModuleDict({n: nn.Linear(8, 8) for n in ("up_proj", "xup_proj", "up_projx")})})
        bd = package.BdLoraConfig(target_modules_bd_a=[pattern], nblocks=2, match_strict=False)
        cfg = package.LoraConfig(r=4, target_modules=["up_proj", "xup_proj", "up_projx"], use_bdlora=bd)
        model = package.inject_adapter_in_model(cfg, net)
        shapes.append({n: tuple(p.shape) for n, p in model.named_parameters() if "lora_A" in n})
    assert shapes[0] == shapes[1]


def test_mica_starts_as_pefts() -> None:
    options = {"r": 4, "target_modules": ["first"], "init_lora_weights": "mica"}
    made = [package.get_peft_model(Net(), package.LoraConfig(**options)) for package in (peft, veneer)]
    for key in ("lora_A", "lora_B"):
        a, b = (getattr(parts(m), key)["default"].weight for m in made)
        assert torch.allclose(a, b, atol=1e-6)
        assert a.requires_grad == b.requires_grad == (key == "lora_A")
    for package in (peft, veneer):
        with pytest.raises(ValueError, match="max usable r is 16"):
            package.get_peft_model(Net(), package.LoraConfig(r=17, target_modules=["first"], init_lora_weights="mica"))


# -- KaSA --------------------------------------------------------------------------------------------------------------


def test_kasa_cuts_the_base_and_penalises_as_peft(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, kasa_config=peft.KasaConfig(beta=0.3, gamma=0.7))
    W = parts(ours).base_layer.weight
    assert torch.linalg.matrix_rank(W) == 12
    assert torch.allclose(W, parts(theirs).base_layer.weight, atol=1e-6)
    assert torch.allclose(ours.train().base_model.extra_loss(), theirs.base_model._get_kasa_loss(), rtol=1e-5)
    assert ours.eval().base_model.extra_loss() == 0.0
    assert torch.equal(ours._get_kasa_loss(), ours.train().base_model.extra_loss())  # what trainers of one's own add
    assert torch.equal(ours._get_kasa_loss("default"), ours._get_kasa_loss())
    assert ours._get_kasa_loss([]) == ours._get_monteclora_loss() == 0.0
    before = W.clone()
    ours.add_adapter("second", veneer.LoraConfig(r=4, target_modules=["first"], kasa_config={}))
    assert torch.equal(W, before)


def test_kasa_stands_alone() -> None:
    kasa, plain = {"kasa_config": {"beta": 0.1}}, {}
    for first, second in ((kasa, plain), (plain, kasa)):
        for package in (peft, veneer):
            model = package.get_peft_model(Net(), package.LoraConfig(r=4, target_modules=["first"], **first))
            with pytest.raises(ValueError, match="cannot be combined with adapters that don't use"):
                model.add_adapter("b", package.LoraConfig(r=4, target_modules=["first"], **second))
    for package in (peft, veneer):
        with pytest.raises(ValueError, match="to be smaller than min"):
            package.get_peft_model(Net(), package.LoraConfig(r=16, target_modules=["first"], **kasa))


# -- VeLoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["batch_average", "batch_average_once", "random"])
@pytest.mark.parametrize("groups", [8, 5, 64])
def test_velora_gradients_are_pefts(kind: str, groups: int, tmp_path: Path) -> None:
    options = peft.VeloraConfig(num_groups=groups, init_type=kind, scale=1.5)
    theirs, ours = (m.train() for m in both(tmp_path, velora_config=options))
    for step in range(2):
        torch.manual_seed(step)
        x = torch.randn(2, 3, 32)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for m, v in zip((theirs, ours), inputs, strict=True):
            m.zero_grad()
            m(v).square().sum().backward()
        assert torch.allclose(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
        for key in ("lora_A", "lora_B"):
            a, b = (getattr(parts(m), key)["default"].weight.grad for m in (theirs, ours))
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))
        a, b = (parts(m).lora_velora_embed["default"] for m in (theirs, ours))
        assert torch.allclose(a, b, atol=1e-6)


def kept_bytes(model: Any, x: Tensor) -> int:
    """Bytes of activations that autograd keeps: what is as long as the batch."""
    kept = {}

    def pack(t: Tensor) -> Tensor:
        if len(t) >= len(x):
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(kept.values())


def test_velora_does_not_keep_its_input() -> None:
    sizes = {}
    x = torch.randn(4096, 512)
    for name, options in (("lora", {}), ("velora", {"velora_config": {"num_groups": 16}})):
        cfg = veneer.LoraConfig(r=4, target_modules=["first"], **options)
        sizes[name] = kept_bytes(veneer.get_peft_model(Net(512, 16), cfg).train(), x)
    assert sizes["lora"] >= x.numel() * 4
    assert sizes["velora"] == 4096 * (16 + 4) * 4  # 16 numbers of the sketch and 4 of A x a token


# -- MonteCLoRA --------------------------------------------------------------------------------------------------------


def test_monteclora_noise_has_the_size_of_pefts(tmp_path: Path) -> None:
    options = peft.MontecloraConfig(num_samples=3, sample_scaler=1.0, buffer_size=4)
    theirs, ours = (m.train() for m in both(tmp_path, monteclora_config=options))
    sampler = parts(theirs).lora_monteclora_sampler["default"]
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = [sampler() for _ in range(1500)]
        expected = torch.stack([torch.einsum("k,kir->ri", w, s) for s, w in drawn]).square().mean((0, 2)).sqrt()
        view = parts(ours).view("default")
        made = torch.stack([monteclora.MonteCLoRA().noise(view, view.lora_A) for _ in range(4000)])
    assert torch.allclose(made.square().mean((0, 2)).sqrt(), expected, rtol=0.15)
    x = torch.randn(5, 32)
    assert not torch.equal(ours(x), ours(x))
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-5)


def test_monteclora_divergences() -> None:
    """Each is that of its distributions; peft's between Dirichlets is negative for some."""
    std, e = torch.tensor([0.2, -0.3, 0.5]), torch.tensor([0.5, -1.0, 0.3, 0.0])
    sampler = MontecloraSampler(6, 3, 4, dirichlet_prior=0.3)
    assert torch.allclose(monteclora.wishart_kl(std), sampler.wishart_kl(torch.diag(std.exp())), rtol=1e-5)
    right = kl_divergence(Dirichlet(e.exp()), Dirichlet(torch.full((4,), 0.3)))
    assert torch.allclose(monteclora.dirichlet_kl(e, 0.3), right, rtol=1e-4)
    assert sampler.dirichlet_kl(torch.ones(4)) < 0 < monteclora.dirichlet_kl(torch.zeros(4), 0.3)
    torch.manual_seed(0)
    chi2 = torch.distributions.Chi2(3.0).sample((40000, 3))
    sampled = torch.stack([sampler.multivariate_kl(torch.diag(v)) for v in (2 * std).exp() * chi2[:8000]]).mean()
    assert torch.allclose(monteclora.gaussian_kl(std, 4), sampled, rtol=0.05)
    z = torch.tensor([0.3, -0.4, 1.0, 0.2])
    w = torch.softmax(sampler.dirichlet_reparameterization(e.exp(), z), -1)
    assert torch.allclose(monteclora.weights(e, z), w, atol=1e-6)


def test_noise_in_half_precision() -> None:
    """Over a bf16 base the sampler trains in float32 and every tensor of the adapter gets a gradient."""
    cfg = veneer.LoraConfig(r=4, target_modules=["first"], monteclora_config={"sample_scaler": 0.1})
    model = veneer.get_peft_model(Net().bfloat16(), cfg).train()
    parts(model).lora_B["default"].weight.data.normal_()
    y = model(torch.randn(6, 32, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    (y.float().square().sum() + model.base_model.extra_loss()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_a_trainer_adds_what_methods_put_on_the_loss() -> None:
    class Parent:
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
            return (torch.tensor(2.0), "out") if return_outputs else torch.tensor(2.0)

    trainer = type("Both", (MontecloraTrainerMixin, Parent), {})()
    options = {"kl_loss_weight": 0.5, "use_entropy": True}
    cfg = veneer.LoraConfig(r=4, target_modules=["first"], monteclora_config=options)
    model = veneer.get_peft_model(Net(), cfg).train()
    torch.manual_seed(0)
    loss = trainer.compute_loss(model, {})
    torch.manual_seed(0)
    assert loss == 2.0 + model.base_model.extra_loss() > 2.0
    assert trainer.compute_loss(model.eval(), {}, return_outputs=True) == (2.0, "out")


# -- options -----------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "alora": {"alora_invocation_tokens": [1]},
    "bdlora": {"use_bdlora": {"target_modules_bd_a": ["first"], "nblocks": 2, "match_strict": True}},
    "dora": {"use_dora": True},
    "kasa": {"kasa_config": {"beta": 0.5}},
    "mica": {"init_lora_weights": "mica"},
    "monteclora": {"monteclora_config": {"num_samples": 3, "use_entropy": True}},
    "qalora": {"use_qalora": True, "qalora_group_size": 4},
    "velora": {"velora_config": {"num_groups": 4, "init_type": "random"}},
}


@pytest.mark.parametrize(("a", "b"), combinations(VARIANTS, 2))
def test_two_variants_at_once(a: str, b: str) -> None:
    """peft and veneer refuse the same pairs: all but those with QALoRA, which is plain on such a layer."""
    for package in (peft, veneer):
        options = {"r": 4, "target_modules": ["first"], **VARIANTS[a], **VARIANTS[b]}
        if "qalora" in (a, b):
            package.inject_adapter_in_model(package.LoraConfig(**options), Net())
            continue
        with pytest.raises(ValueError, match="Invalid or unsupported variant combination"):
            package.inject_adapter_in_model(package.LoraConfig(**options), Net())


@pytest.mark.parametrize("name", VARIANTS)
def test_options_in_files(name: str, tmp_path: Path) -> None:
    """Either package writes the same options and reads the other's."""
    files = []
    for package, reader in ((peft, veneer), (veneer, peft)):
        folder = tmp_path / package.__name__
        package.LoraConfig(r=4, target_modules=["first"], **VARIANTS[name]).save_pretrained(str(folder))
        files.append(json.loads((folder / "adapter_config.json").read_text()))
        back = reader.PeftConfig.from_pretrained(str(folder))
        for key in VARIANTS[name]:
            value = getattr(back, key)
            assert files[-1][key] == (vars(value) if hasattr(value, "__dataclass_fields__") else value)
    assert all(files[0][key] == files[1][key] for key in VARIANTS[name])


@pytest.mark.parametrize("option", ["use_bdlora", "kasa_config", "velora_config", "monteclora_config"])
def test_a_part_of_the_wrong_type(option: str) -> None:
    with pytest.raises(TypeError, match="a dict, or None"):
        veneer.LoraConfig(**{option: True})
    with pytest.raises(ValueError, match=f"{option} has no 'nonsense'"):
        veneer.LoraConfig(**{option: {"nonsense": 1}})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("KasaConfig", {"beta": -1.0}), ("VeloraConfig", {"num_groups": 0}), ("VeloraConfig", {"scale": 0.0}),
        ("VeloraConfig", {"init_type": "x"}), ("MontecloraConfig", {"num_samples": 0}),
        ("MontecloraConfig", {"dirichlet_prior": 0.0}), ("MontecloraConfig", {"buffer_size": 0}),
    ],
)  # fmt: skip
def test_settings_that_peft_refuses(name: str, options: dict[str, Any]) -> None:
    for package in (peft, veneer):
        with pytest.raises(ValueError, match=next(iter(options))):
            getattr(package, name)(**options)


# -- layer_replication, DoraCaching ------------------------------------------------------------------------------------


@torch.no_grad()
def test_layer_replication_is_pefts_and_merges(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(4), lora(peft, layer_replication=[[0, 2], [1, 4]])).eval()
    theirs.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(llama(4), tmp_path).eval()
    y = theirs(input_ids=IDS).logits
    assert torch.allclose(ours(input_ids=IDS).logits, y, atol=1e-5)
    assert generate(ours) == generate(theirs) == generate(ours, use_cache=False)
    layers = ours.base_model.model.model.layers
    assert len(layers) == ours.base_model.model.config.num_hidden_layers == 5
    assert layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(llama(4), tmp_path / "ours")
    assert torch.allclose(again(input_ids=IDS).logits, y, atol=1e-5)
    ours.merge_adapter()
    assert torch.allclose(ours(input_ids=IDS).logits, y, atol=1e-5)
    theirs.merge_adapter()  # adds both adapters to the one weight that two layers share
    assert not torch.allclose(theirs(input_ids=IDS).logits, y, atol=1e-2)


@pytest.mark.parametrize("ranges", [[[0, 5]], [[2, 1]], [[-1, 2]], [0, 1], "x", [[0, 1, 2]]], ids=str)
def test_layer_replication_out_of_range(ranges: Any) -> None:
    with pytest.raises(ValueError, match="is not a range"):
        veneer.get_peft_model(llama(4), lora(veneer, layer_replication=ranges))


def test_layer_replication_once() -> None:
    model = veneer.get_peft_model(llama(4), lora(veneer, layer_replication=[[0, 2], [1, 4]]))
    model.add_adapter("same", lora(veneer, layer_replication=[[0, 2], [1, 4]]))
    model.add_adapter("none", lora(veneer))
    assert len(model.base_model.model.model.layers) == 5
    with pytest.raises(ValueError, match="replicated as"):
        model.add_adapter("other", lora(veneer, layer_replication=[[0, 4], [0, 4]]))
    with pytest.raises(ValueError, match="first adapter"):
        veneer.get_peft_model(llama(4), lora(veneer)).add_adapter("b", lora(veneer, layer_replication=[[0, 4]]))


@torch.no_grad()
def test_dora_caching() -> None:
    model = veneer.get_peft_model(Net(), lora(veneer, target_modules=["first"], use_dora=True, task_type=None)).eval()
    x = torch.randn(3, 32)
    y = model(x)

    def shrunk() -> Tensor:
        parts(model).lora_magnitude_vector["default"].weight.mul_(0.5)
        return model(x)

    with DoraCaching():
        assert torch.allclose(model(x), y)
        assert torch.allclose(shrunk(), y)  # the ratio is the first call's
    fresh = model(x)
    assert not torch.allclose(fresh, y, atol=1e-3)
    DoraCaching(True)
    kept = model(x)
    assert torch.allclose(shrunk(), kept)
    DoraCaching(False)
    assert not torch.allclose(model(x), kept, atol=1e-3)
    model.train()
    with DoraCaching():
        y = model(x)
        assert not torch.allclose(shrunk(), y, atol=1e-3)  # training sees every change
    model.eval()
    cached = DoraCaching()(shrunk)
    assert not DoraCaching.on
    cached()
    assert not DoraCaching.on


def test_dora_forms_no_matrix_of_the_weights_size() -> None:
    """Nothing that autograd keeps is as large as the weight, save the weight."""
    model = veneer.get_peft_model(Net(64, 48), lora(veneer, target_modules=["first"], use_dora=True, task_type=None))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.train()(torch.randn(3, 64, requires_grad=True))
    weight = parts(model).base_layer.weight
    assert kept
    assert not [t.shape for t in kept if t.numel() >= weight.numel() and t.data_ptr() != weight.data_ptr()]
