"""Trained embedding rows and tied weights, against peft and against the merged weight."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import veneer
from veneer.storage import BufferDict

IDS = torch.tensor([[1, 2, 3, 7], [7, 5, 9, 2]])
ROWS = [7, 2, 3]


def llama(tied=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def logits(model, ids=IDS):
    return model(ids).logits


def lora(**options):
    return ("LoraConfig", {"target_modules": ["q_proj"], **options})


CASES = {
    "tokens, tied": (
        True,
        ("TrainableTokensConfig", {"target_modules": ["embed_tokens"], "token_indices": ROWS}),
    ),
    "tokens, default target": (False, ("TrainableTokensConfig", {"token_indices": ROWS})),
    "tokens, head": (
        False,
        ("TrainableTokensConfig", {"target_modules": ["lm_head"], "token_indices": ROWS}),
    ),
    "list, tied": (True, lora(trainable_token_indices=ROWS)),
    "list": (False, lora(trainable_token_indices=ROWS)),
    "both": (False, lora(trainable_token_indices={"embed_tokens": [2, 7], "lm_head": [1]})),
    "both, tied, other rows": (True, lora(trainable_token_indices={"embed_tokens": [2, 7], "lm_head": [1]})),
    "both, tied": (
        True,
        lora(trainable_token_indices={"embed_tokens": [2, 7], "lm_head": [2, 7]}, ensure_weight_tying=True),
    ),
    "head, tied": (True, lora(trainable_token_indices={"lm_head": [2, 7]})),
    "saved whole, tied": (True, lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "saved whole, head of tied": (True, lora(modules_to_save=["lm_head"], ensure_weight_tying=True)),
    "saved whole, untied": (True, lora(modules_to_save=["embed_tokens"])),
    "lora on both, each its own": (True, lora(target_modules=["embed_tokens", "lm_head"])),
}


def make(package, case):
    tied, (kind, options) = CASES[case]
    config = getattr(package, kind)(**copy.deepcopy(options))
    return package.get_peft_model(llama(tied), config).eval()


def random_tensors(model):
    """Random values under file keys; keys that share a tensor get the same."""
    torch.manual_seed(1)
    found = veneer.get_peft_model_state_dict(model, save_embedding_layers=False)
    seen: dict[int, torch.Tensor] = {}
    return {k: seen.setdefault(found[k].data_ptr(), torch.randn_like(found[k]) * 0.3) for k in sorted(found)}


def adapted(case):
    model = make(veneer, case)
    assert veneer.set_peft_model_state_dict(model, random_tensors(model)).ok
    return model


@pytest.mark.parametrize("case", CASES)
def test_equals_peft_in_names_outputs_and_gradients(case):
    ours, theirs = adapted(case), make(peft, case)
    names = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert set(names) == set(veneer.get_peft_model_state_dict(ours, save_embedding_layers=False))
    assert set(theirs.state_dict()) == set(ours.state_dict())
    peft.set_peft_model_state_dict(theirs, random_tensors(ours))
    expected, got = logits(theirs), logits(ours)
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(got, logits(llama(CASES[case][0])), atol=1e-2)
    expected.square().sum().backward()
    got.square().sum().backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    mine = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert grads.keys() == mine.keys()
    for n, g in grads.items():
        assert torch.allclose(mine[n], g, rtol=1e-3, atol=1e-5 * g.abs().max().item()), n


@pytest.mark.parametrize("case", CASES)
def test_merging_keeps_tied_weights_right(case, tmp_path):
    ours = adapted(case)
    before, y = {n: t.clone() for n, t in ours.state_dict().items()}, logits(ours).detach()
    ours.merge_adapter()
    assert torch.allclose(logits(ours), y, atol=1e-5)
    ours.unmerge_adapter()
    assert all(torch.equal(t, before[n]) for n, t in ours.state_dict().items())
    with ours.disable_adapter():
        assert torch.equal(logits(ours), logits(llama(CASES[case][0])))
    plain = ours.merge_and_unload()
    assert torch.allclose(logits(plain), y, atol=1e-5)
    assert set(plain.state_dict()) == set(llama().state_dict())
    equal = torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)
    assert plain.config.tie_word_embeddings == equal == (plain.lm_head.weight is plain.model.embed_tokens.weight)
    plain.save_pretrained(tmp_path)
    assert torch.allclose(logits(LlamaForCausalLM.from_pretrained(tmp_path).eval()), y, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_save_and_load_either_way(case, tmp_path):
    ours = adapted(case)
    y = logits(ours)
    ours.save_pretrained(tmp_path)
    tied = CASES[case][0]
    for options in ({}, {"low_cpu_mem_usage": True}):
        again = veneer.PeftModel.from_pretrained(llama(tied), tmp_path, **options).eval()
        assert torch.allclose(logits(again), y, atol=1e-6)
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(llama(tied), tmp_path).eval()), y, atol=1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith(("saved", "lora"))])
def test_a_fresh_adapter_changes_nothing(case):
    assert torch.allclose(logits(make(veneer, case)), logits(llama(CASES[case][0])), atol=1e-6)


class Scaled(nn.Embedding):
    """As some models look up: times a constant."""

    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


@pytest.mark.parametrize("make_table", [lambda: nn.Embedding(20, 6, padding_idx=0), lambda: Scaled(20, 6)])
def test_rows_are_the_files_rows_and_the_table_is_not_copied(make_table):
    net = nn.Sequential()
    net.add_module("emb", make_table())
    table = net.emb.weight
    ours = veneer.get_peft_model(net, veneer.TrainableTokensConfig(target_modules=["emb"], token_indices=[5, 0, 2]))
    layer = ours.base_model.model.emb
    rows = layer.trainable_tokens_delta["default"]
    assert torch.equal(rows, table[[5, 0, 2]])
    with torch.no_grad():
        rows.normal_()
    ids = torch.randint(0, 20, (4, 9))
    wanted = table.detach().clone()
    wanted[[5, 0, 2]] = rows.detach()
    y = ours(ids)
    assert torch.equal(y, wanted[ids] * getattr(layer.get_base_layer(), "embed_scale", 1.0))
    assert layer.get_base_layer().weight is table
    y.sum().backward()
    count = torch.stack([(ids == i).sum() for i in (5, 0, 2)]).float()
    scale = getattr(layer.get_base_layer(), "embed_scale", 1.0)
    assert torch.allclose(rows.grad, scale * count.unsqueeze(1).expand(3, 6))
    ours.merge_adapter()
    assert torch.equal(layer.get_base_layer().weight, wanted)
    assert torch.equal(ours(ids), y)


def test_gradients_agree_with_finite_differences():
    net = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 5)).double()
    ours = veneer.get_peft_model(net, veneer.TrainableTokensConfig(target_modules=["0", "1"], token_indices=[4, 1]))
    boxes = [ours.base_model.model[i].trainable_tokens_delta for i in (0, 1)]
    ids = torch.tensor([0, 1, 4, 4])

    def run(*rows):
        names = [f"base_model.model.{i}.trainable_tokens_delta.default" for i in (0, 1)]
        return torch.func.functional_call(ours, dict(zip(names, rows, strict=True)), (ids,))

    rows = [box["default"].detach().clone().requires_grad_() for box in boxes]
    assert torch.autograd.gradcheck(run, rows)


def test_a_mixed_batch_equals_each_row_alone():
    ours = adapted("list, tied")
    ours.add_adapter("b", veneer.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5], r=4))
    ours.add_adapter("c", veneer.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False))
    with torch.no_grad():
        for n, p in ours.named_parameters():
            if n.endswith("delta.b"):
                p.normal_()
    ids = IDS.repeat(2, 1)
    names = ["default", "b", "c", "__base__"]
    mixed = ours(ids, adapter_names=names).logits
    for i, name in enumerate(names[:3]):
        ours.set_adapter(name)
        assert torch.allclose(mixed[i], logits(ours, ids)[i], atol=1e-5), name
    with ours.disable_adapter():
        assert torch.allclose(mixed[3], logits(ours, ids)[3], atol=1e-5)


def test_adapters_with_disjoint_rows_act_together_and_shared_rows_are_refused():
    ours = adapted("list, tied")
    for name, rows in (("b", [5, 9]), ("c", [2, 4])):
        ours.add_adapter(name, veneer.LoraConfig(target_modules=["q_proj"], trainable_token_indices=rows))
    ours.base_model.set_adapter(["default", "b"])
    y = logits(ours)
    ours.merge_adapter()
    assert torch.allclose(logits(ours), y, atol=1e-5)
    ours.unmerge_adapter()
    ours.base_model.set_adapter(["default", "c"])
    with pytest.raises(ValueError, match=r"row 2 .* also trained by adapter default"):
        logits(ours)


def test_deleting_and_unloading_leave_the_base():
    ours = adapted("list, tied")
    y = logits(ours)
    ours.add_adapter("b", veneer.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5]))
    ours.delete_adapter("b")
    assert torch.equal(logits(ours), y)
    twin = copy.deepcopy(ours)
    assert torch.equal(logits(twin), y)
    plain = ours.unload()
    assert torch.equal(logits(plain), logits(llama()))
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.equal(logits(twin), y)


def test_every_module_of_an_encoder_decoder_that_holds_the_table_uses_the_rows():
    def t5():
        torch.manual_seed(0)
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=50,
                d_model=16,
                d_kv=4,
                d_ff=32,
                num_layers=1,
                num_heads=4,
                decoder_start_token_id=0,
            )
        ).eval()

    options = {"target_modules": ["q"], "trainable_token_indices": ROWS}
    ours = veneer.get_peft_model(t5(), veneer.LoraConfig(**options)).eval()
    theirs = peft.get_peft_model(t5(), peft.LoraConfig(**options)).eval()
    assert set(ours.state_dict()) == set(theirs.state_dict())
    values = random_tensors(ours)
    assert set(values) == set(peft.get_peft_model_state_dict(theirs, save_embedding_layers=False))
    peft.set_peft_model_state_dict(theirs, values)
    veneer.set_peft_model_state_dict(ours, values)
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    expected, got = theirs(**batch).logits, ours(**batch).logits
    assert torch.allclose(got, expected, atol=1e-4)
    plain = ours.merge_and_unload()
    assert torch.allclose(plain(**batch).logits, expected, atol=1e-4)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_lora_on_tied_weights_is_one_pair_of_factors(targets):
    options = {"target_modules": targets, "r": 3, "ensure_weight_tying": True}
    ours = veneer.get_peft_model(llama(), veneer.LoraConfig(**options)).eval()
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**copy.deepcopy(options))).eval()
    names = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    mine = veneer.get_peft_model_state_dict(ours, save_embedding_layers=False)
    assert {k: t.shape for k, t in names.items()} == {k: t.shape for k, t in mine.items()}
    trained = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert len(trained) == 2
    assert all("embed_tokens.lora_embedding" in n for n in trained)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    y = logits(ours)
    values = {k: t.clone() for k, t in veneer.get_peft_model_state_dict(ours, save_embedding_layers=False).items()}
    peft.set_peft_model_state_dict(theirs, values)
    assert torch.allclose(logits(theirs), y, atol=1e-5)
    again = veneer.get_peft_model(llama(), veneer.LoraConfig(**options)).eval()
    assert veneer.set_peft_model_state_dict(again, values).ok
    assert torch.equal(logits(again), y)
    ours.merge_adapter()
    assert torch.allclose(logits(ours), y, atol=1e-5)
    embedding, head = (m.get_base_layer().weight for m in (ours.get_input_embeddings(), ours.get_output_embeddings()))
    assert torch.allclose(embedding, head, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (("TrainableTokensConfig", {"token_indices": [50]}), IndexError, "50 rows"),
        (("TrainableTokensConfig", {"token_indices": [-1]}), IndexError, "out of range"),
        (("TrainableTokensConfig", {"token_indices": [4, 4]}), ValueError, "more than once"),
        (lora(trainable_token_indices={"embed_token": [4]}), ValueError, "embed_tokens"),
        (lora(target_modules=["embed_tokens"], trainable_token_indices=[4]), TypeError, "take it out"),
        (
            lora(trainable_token_indices={"embed_tokens": [2], "lm_head": [1]}, ensure_weight_tying=True),
            ValueError,
            "Conflicting layers",
        ),
    ],
)
def test_what_cannot_be_is_said(config, error, words):
    kind, options = config
    with pytest.raises(error, match=words):
        veneer.get_peft_model(llama(), getattr(veneer, kind)(**options))


def test_ties_that_are_not_there_are_announced():
    with pytest.warns(veneer.PeftWarning, match="ensure_weight_tying"):
        veneer.get_peft_model(
            llama(False), veneer.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
        )


def test_no_rows_at_all():
    ours = veneer.get_peft_model(llama(), veneer.TrainableTokensConfig(token_indices=[]))
    assert torch.equal(logits(ours), logits(llama()))


def test_where_the_rows_are_is_kept_out_of_state_dicts():
    ours = adapted("list, tied")
    assert not [n for n in ours.state_dict() if "sorted" in n or "slot" in n]
    assert any(isinstance(m, BufferDict) for m in ours.modules())
