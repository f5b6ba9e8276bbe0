"""Where veneer under the name peft does otherwise than peft, each with what it does instead."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import veneer
from veneer.compat import names
from veneer.inits.lora_ga import preprocess_loraga
from veneer.layer import Adapted
from veneer.methods.dora import DoraCaching


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 4)
        self.table, self.mix = nn.Embedding(9, 6), nn.MultiheadAttention(6, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.lin(self.table(ids))
        return self.head(self.mix(x, x, x)[0])


def net(config: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return veneer.get_peft_model(Net(), config, **options)


def lora(**options: Any) -> veneer.LoraConfig:
    return veneer.LoraConfig(**{"target_modules": ["lin"], **options})


IDS = torch.tensor([[1, 2], [3, 4]])


@pytest.mark.parametrize("name", ["LoraConfig", "LoHaConfig", "LoKrConfig", "OFTConfig", "VeraConfig", "C3AConfig"])
def test_layers_of_all_methods_are_of_one_class(name: str) -> None:
    sizes = {"OFTConfig": {"r": 0, "oft_block_size": 2}, "C3AConfig": {"block_size": 2}}.get(name, {})
    ours = net(getattr(veneer, name)(target_modules=["lin"], **sizes)).get_base_model().lin
    theirs = peft.get_peft_model(Net(), getattr(peft, name)(target_modules=["lin"], **sizes)).get_base_model().lin
    assert type(ours) is Adapted
    assert type(theirs).__module__.startswith(f"peft.tuners.{name.removesuffix('Config').lower()}")


PRIVATE = {
    "tuners.lora.variants": ("BlockDiagonalLinear", "ALoraLinearVariant", "DoraLinearVariant"),
    "tuners.lora.velora": ("VeloraFunction", "_compress_activations"),
    "tuners.lora.arrow": ("_resolve_adapter_source",),
    "optimizers.riemannian": ("_RiemannianPreconditioner", "_collect_lora_pairs"),
    "tuners.lora.monteclora": ("MontecloraSampler",),
    "tuners.lora.layer": ("_LoraParameterProxy",),
    "tuners.osf.utils": ("decompose_weight_matrix",),
    "tuners.shira.layer": ("_warn_once_about_module_hooks",),
}


@pytest.mark.parametrize("module", PRIVATE)
def test_the_insides_of_variants_have_no_counterpart(module: str) -> None:
    assert not set(PRIVATE[module]) & set(names.modules().get(module, {}))


@pytest.mark.parametrize(
    ("modules", "parameters", "words"),
    [(["lin"], ["nope.weight"], "'nope.weight' matches nothing"), (["lin", "nope"], ["head.weight"], "'nope' matches")],
)
def test_names_that_match_nothing_beside_some_that_do(modules: list[str], parameters: list[str], words: str) -> None:
    options = {"target_modules": modules, "target_parameters": parameters}
    with pytest.raises(veneer.NoMatchingPeftModuleError, match=words):
        net(lora(**options))


def test_an_adapted_embeddings_table_stays_out_of_the_file_without_a_word(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = veneer.get_peft_model(
        LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)), lora(target_modules=["embed_tokens"])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert all("lora_embedding" in k for k in veneer.get_peft_model_state_dict(model))


def test_trained_tokens_do_not_add_up() -> None:
    model = net(lora(trainable_token_indices={"table": [1]}))
    model.add_adapter("other", lora(trainable_token_indices={"table": [1]}))
    with pytest.raises(veneer.AdapterError, match=r"'default' cannot be part of a weighted sum: it trains token rows"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")


def test_an_adapted_attention_shows_its_projection_adapted() -> None:
    layer = net(lora(target_modules=["mix"])).get_base_model().mix
    assert type(layer.out_proj) is Adapted
    assert layer.out_proj.base_layer is layer.base_layer.out_proj.base_layer
    assert torch.equal(layer.out_proj.weight, layer.out_proj.base_layer.weight)


def test_a_lora_bias_merges_into_a_layer_without_a_bias() -> None:
    model = net(lora(lora_bias=True, init_lora_weights=False)).eval()
    before = model(IDS)
    model.merge_adapter()
    assert model.get_base_model().lin.bias is not None
    assert torch.allclose(model(IDS), before, atol=1e-6)
    model.unmerge_adapter()
    assert model.get_base_model().lin.bias is None


@pytest.mark.parametrize("name", ["VeraConfig", "RandLoraConfig", "PveraConfig"])
def test_a_second_key_gives_projections_of_its_own(name: str) -> None:
    config = getattr(veneer, name)
    model = net(config(target_modules=["lin"], r=2, projection_prng_key=1)).eval()
    model.add_adapter("other", config(target_modules=["lin"], r=2, projection_prng_key=2))
    held = next(b for n, b in model.base_model.named_children() if n.endswith("_A"))
    assert not torch.equal(held["default"], held["other"])


def test_mixed_models_have_a_status() -> None:
    model = net(lora(), mixed=True)
    model.add_adapter("other", veneer.LoHaConfig(target_modules=["head"]))
    assert veneer.get_model_status(model).peft_types == {"default": "LORA", "other": "LOHA"}
    assert {s.name for s in veneer.get_layer_status(model)} == {"model.lin", "model.head"}


def test_adaption_prompts_have_a_status() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = veneer.AdaptionPromptConfig(adapter_layers=1, adapter_len=2, task_type="CAUSAL_LM")
    model = veneer.get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)), config)
    assert veneer.get_model_status(model).peft_types == {"default": "ADAPTION_PROMPT"}


def test_a_row_listed_twice_is_said() -> None:
    with pytest.raises(veneer.AdapterError, match=r"token_indices names \[1\] more than once"):
        net(veneer.TrainableTokensConfig(target_modules=["table"], token_indices=[1, 2, 1]))


def test_an_uninitialised_tinylora_starts_within_its_bound() -> None:
    model = net(veneer.TinyLoraConfig(target_modules=["lin"], init_weights=False, init_v_bound=0.3))
    found = [p for n, p in model.named_parameters() if "tinylora_v" in n]
    assert found
    assert all(0 < float(p.abs().max()) <= 0.3 for p in found)


def test_ia3_on_all_linear_layers_loads_again(tmp_path: Path) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()

    theirs = peft.get_peft_model(base(), peft.IA3Config(task_type="CAUSAL_LM", target_modules="all-linear")).eval()
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "ia3_l" in n:
                p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="should be a subset"):
        peft.PeftModel.from_pretrained(base(), tmp_path)
    ours = veneer.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="should be a subset of `target_modules`; not among the targets: proj"):
        veneer.IA3Config(target_modules=["down_proj", "q"], feedforward_modules=["proj"])


@pytest.mark.parametrize(("rows", "shared"), [([2, 3], False), ([1, 2], True)], ids=["apart", "one-row"])
def test_adapters_that_train_rows_act_together_unless_they_share_one(rows: list[int], shared: bool) -> None:
    """peft takes one adapter of LoRA with trained rows at a time."""
    model = net(lora(trainable_token_indices={"table": [0, 1]}))
    model.add_adapter("second", lora(trainable_token_indices={"table": rows}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "trainable_tokens" in name:
                p.fill_(1.0 if "second" in name else 2.0)
    model.base_model.set_adapter(["default", "second"])
    if shared:
        with pytest.raises(ValueError, match=r"row 1 of table .* is also trained by adapter default"):
            model(IDS)
        return
    found = model.get_base_model().table(torch.tensor([0, 1, 2, 3]))
    assert found.mean(1).tolist() == pytest.approx([2.0, 2.0, 1.0, 1.0])


def test_dora_caching_puts_nothing_on_the_layers() -> None:
    """peft keeps the cache in each layer; here it is the context manager's, and ends with it."""
    model = net(lora(use_dora=True)).eval()
    layer = model.get_base_model().lin
    before = set(vars(layer))
    with DoraCaching():
        y = model(IDS)
        assert layer in DoraCaching.kept
        assert set(vars(layer)) == before
        torch.testing.assert_close(model(IDS), y)
    assert layer not in DoraCaching.kept


def test_ranks_of_adalora_are_no_parameters() -> None:
    model = net(veneer.AdaLoraConfig(target_modules=["lin"], total_step=10))
    assert not any("ranknum" in n for n, _ in model.named_parameters())


def test_a_long_list_of_targets_stays_as_it_was_given() -> None:
    names = [str(i) for i in range(24)]
    model = veneer.get_peft_model(nn.Sequential(*(nn.Linear(2, 2) for _ in names)), lora(target_modules=names))
    assert set(model.peft_config["default"].target_modules) == set(names)


def test_the_status_of_an_injected_model_says_what_it_holds() -> None:
    model = veneer.inject_adapter_in_model(lora(), Net())
    status = veneer.get_model_status(model)
    assert status.base_model_type == "Net"
    assert status.peft_types == {"default": "LORA"}


def test_lora_ga_has_default_settings() -> None:
    base = nn.Sequential(nn.Linear(6, 6))
    config = lora(target_modules=["0"], init_lora_weights="lora_ga", r=2)
    preprocess_loraga(base, config, lambda: base(torch.ones(1, 6)).sum().backward())
    model = veneer.get_peft_model(base, config)
    assert float(model.base_model.model[0].lora_A["default"].weight.detach().abs().max()) > 0


def test_a_frozen_vblora_of_the_top_k_runs_in_training_mode(tmp_path: Path) -> None:
    settings = {"target_modules": ["lin"], "num_vectors": 8, "vector_length": 2, "save_only_topk_weights": True}
    net(veneer.VBLoRAConfig(**settings)).save_pretrained(tmp_path)
    frozen = veneer.PeftModel.from_pretrained(Net(), tmp_path).train()
    assert bool(frozen(IDS).isfinite().all())
    trained = veneer.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True).train()
    with pytest.raises(RuntimeError, match="infinity values in VB-LoRA logits"):
        trained(IDS)


def test_lists_and_names_that_cannot_be_are_said_early() -> None:
    with pytest.raises(ValueError, match="overlapping modules in target_modules_bd"):
        lora(use_bdlora={"target_modules_bd_a": ["lin"], "target_modules_bd_b": ["lin"], "nblocks": 2})
    with pytest.raises(
        veneer.AdapterError, match=r"modules_to_save: \['heads'\] not found in Net; did you mean 'head'"
    ):
        net(lora(modules_to_save=["heads"]))


def test_two_passes_of_alora_before_a_backward_pass_that_cannot_be_told_apart() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = lora(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[2])
    model = veneer.get_peft_model(LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)), config).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    losses = [model(input_ids=torch.tensor([ids])).logits.sum() for ids in ([0, 1, 2, 3], [2, 1, 5, 3])]
    with pytest.raises(ValueError, match="came before one backward pass"):
        sum(losses).backward()


def test_a_state_dict_put_on_the_model_is_not_asked(tmp_path: Path) -> None:
    model = net(lora())
    model.state_dict = dict
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2
