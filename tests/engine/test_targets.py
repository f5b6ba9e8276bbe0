"""Targets: the modules that peft, run as an oracle, adapts for many configs and models; then the errors."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from target_zoo import build
from torch import nn
from transformers.pytorch_utils import Conv1D

from veneer.targets import (
    NoMatchingPeftModuleError,
    TargetSpec,
    describe,
    layer_index,
    match_parameters,
    match_targets,
    resolve_pattern,
    unused_patterns,
)

PREFIX = "base_model.model."
LENIENT = {"allow_unmatched": True}


def tree(*paths: str) -> nn.Module:
    """Linear layers at these paths."""
    root = nn.Module()
    for path in paths:
        *parents, leaf = path.split(".")
        node = root
        for part in parents:
            if part not in dict(node.named_children()):
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.add_module(leaf, nn.Linear(4, 4))
    return root


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 4)
        self.lin0 = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2))
        self.mha = nn.MultiheadAttention(4, 2)
        self.score = nn.Linear(4, 2)
        self.lm_head = nn.Linear(4, 2)


def by_peft(model: nn.Module, **config: Any) -> set[str] | None:
    """The modules that peft adapts, or None where it finds nothing to adapt."""
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **config))
    except peft.utils.error.NoMatchingPeftModuleError:
        return None
    return {name.removeprefix(PREFIX) for name, m in adapted.named_modules() if isinstance(m, BaseTunerLayer)}


def by_veneer(model: nn.Module, model_type: str | None = None, **config: Any) -> set[str] | None:
    try:
        matches = match_targets(model, SimpleNamespace(**config), model_type=model_type)
    except NoMatchingPeftModuleError:
        return None
    return {match.name for match in matches}


# --- the same modules as peft ---------------------------------------------------------------------------

HARD = ["llama", "gpt2", "bert", "t5", "bart"]
# without models of fused experts: there peft rewrites the config before it looks for targets
ALL = [
    *HARD,
    "qwen3",
    "gemma2",
    "gptj",
    "gpt_neox",
    "bloom",
    "falcon",
    "opt",
    "roberta",
    "electra",
    "deberta-v2",
]
CONFIGS: list[dict[str, Any]] = [
    {"target_modules": "ALL-Linear", "exclude_modules": r".*\.(q_proj|c_attn|query|q|lm_head)"},
    {"target_modules": "all-linear", "modules_to_save": ["mlp", "output", "fc1"]},
    {"target_modules": r".*\.(q_proj|c_attn|query|q)"},
    {"target_modules": r".*\.1\.(.*\.)?(q_proj|fc1|c_attn|query|dense|q|v)"},
    {"target_modules": ["q_proj", "c_attn", "query", "q", "lm_head", "nope"]},
    {
        "target_modules": {"v_proj", "c_proj", "output.dense", "o"},
        "exclude_modules": ["1.mlp.c_proj", "nope"],
    },
    {"target_modules": ["embed_tokens", "wte", "word_embeddings", "shared"]},
]
LAYERED: list[dict[str, Any]] = [
    {"layers_to_transform": 1},
    {"layers_to_transform": [0, 2]},
    {"layers_to_transform": [1], "layers_pattern": "layer"},
    {"layers_to_transform": [1], "layers_pattern": ["layers", "h", "block", "layer"]},
    {"layers_to_transform": [1, 2], "exclude_modules": ["1.self_attn.v_proj", "value"]},
    {"layers_to_transform": []},
]
ANY_QV = {"target_modules": ["q_proj", "v_proj", "c_attn", "query", "value", "q", "v"]}


def steady(config: dict[str, Any]) -> str:
    """A test id that is the same in every process: sets sorted."""
    return str({k: sorted(v) if isinstance(v, set) else v for k, v in config.items()})


@pytest.mark.parametrize("arch", ALL)
def test_all_linear_is_peft_s(arch: str) -> None:
    theirs = by_peft(build(arch), target_modules="all-linear")
    assert theirs
    assert by_veneer(build(arch), target_modules="all-linear") == theirs


@pytest.mark.parametrize("arch", HARD)
@pytest.mark.parametrize("config", CONFIGS + [{**ANY_QV, **c} for c in LAYERED], ids=steady)
def test_selection_is_peft_s(arch: str, config: dict[str, Any]) -> None:
    assert by_veneer(build(arch), **config, **LENIENT) == by_peft(build(arch), **config)


HEADS = [
    *((arch, task) for arch in HARD for task in ("", "SequenceClassification")),
    *((arch, "TokenClassification") for arch in ("llama", "gpt2", "bert", "t5")),
    *((arch, "CausalLM") for arch in ("bert", "bart")),
    *((arch, "QuestionAnswering") for arch in HARD),
    ("bert", "MultipleChoice"),
    ("distilbert", "SequenceClassification"),
]


@pytest.mark.parametrize(("arch", "task"), HEADS)
@pytest.mark.parametrize("task_type", [None, "SEQ_CLS", "TOKEN_CLS"])
def test_all_linear_and_heads_are_peft_s(arch: str, task: str, task_type: str | None) -> None:
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type=task_type)
    injected = peft.inject_adapter_in_model(config, build(arch, task))
    theirs = {name for name, m in injected.named_modules() if isinstance(m, BaseTunerLayer)}
    assert by_veneer(build(arch, task), target_modules="all-linear", task_type=task_type) == theirs


def test_one_head_counts_where_a_model_has_two() -> None:
    def two_heads() -> nn.Module:
        model = build("bert", "SequenceClassification")
        model.score, model.more = nn.Linear(2, 2), nn.Module()
        model.more.score = nn.Linear(2, 2)
        return model

    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="SEQ_CLS")
    injected = peft.inject_adapter_in_model(config, two_heads())
    theirs = {name for name, m in injected.named_modules() if isinstance(m, BaseTunerLayer)}
    assert {"classifier", "more.score"} <= theirs
    assert by_veneer(two_heads(), target_modules="all-linear", task_type="SEQ_CLS") == theirs


@pytest.mark.parametrize("arch", ["bert", "roberta", "gpt2", "electra"])
def test_all_linear_leaves_a_saved_head_alone(arch: str) -> None:
    # peft adds the classifier to modules_to_save before it looks for targets
    theirs = by_peft(build(arch, "SequenceClassification"), target_modules="all-linear", task_type="SEQ_CLS")
    ours = by_veneer(
        build(arch, "SequenceClassification"),
        target_modules="all-linear",
        task_type="SEQ_CLS",
        modules_to_save=["classifier", "score"],
    )
    assert ours == theirs


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "exclude_modules": ["lin0", "all-linear"]},
        {"target_modules": ["lin0", "blocks.0.0", "1.2"]},
        {"target_modules": ["lin0", "emb", "conv"], "exclude_modules": "l.*"},
        {"target_modules": ["lin0", "score", "lm_head"], "modules_to_save": ["score"]},
        {"target_modules": r"blocks\.\d\.[02]|emb"},
        {"target_modules": "lin"},
        {"target_modules": ["in0", ".lin0", "lin."]},
        {"target_modules": ["lin0"], "exclude_modules": ["lin0"]},
    ],
    ids=str,
)
def test_plain_module_is_peft_s(config: dict[str, Any]) -> None:
    assert by_veneer(Toy(), **config, **LENIENT) == by_peft(Toy(), **config)


NUMBERED = [
    "a.1.b.2.lin",
    "a.2.b.1.lin",
    "lin",
    "top.lin",
    "layers.0.lin",
    "layers.1.lin",
    "layers.1.sub.0.lin",
    "enc.layers.2.lin",
    "enc.block.3.x.4.lin",
    "h.10.lin",
    "layers.0.mlp.experts.5.w1.lin",
    "x1.lin",
    "layers.0x.lin",
    "3.lin",
    "x.layers.01.lin",
    "x.layers.1.y.layers.2.lin",
    "x.layers.1.b.2.lin",
    "x.b1.2.lin",
    "x.1.2.lin",
]


@pytest.mark.parametrize(
    "pattern",
    [None, "", [], "layers", "b", ["layers", "b"], ["b", "layers"], "enc.block", "lay.*", r"b\d", "ocks"],
)
@pytest.mark.parametrize("target", ["lin", "1.lin"])
def test_layer_numbers_are_peft_s(pattern: Any, target: str) -> None:
    for number in (0, 1, 2, 3, 4, 5, 10):
        config = {"target_modules": [target], "layers_to_transform": number, "layers_pattern": pattern}
        assert by_veneer(tree(*NUMBERED), **config, **LENIENT) == by_peft(tree(*NUMBERED), **config), number


def test_layer_index() -> None:
    assert layer_index("model.layers.12.mlp.up_proj") == 12
    assert layer_index("encoder.block.2.layer.1.SelfAttention.q") == 2
    assert layer_index("layers.3.mlp") is None
    assert layer_index("layers.3.mlp", top_level=True) == 3
    assert layer_index("layers.3.mlp", "layers") == 3
    assert layer_index("x.b.2.lin", "layers|b") == 2  # an alternative needs no brackets, and may have them
    assert layer_index("x.b.2.lin", "(layers|b)") == 2
    assert layer_index("lm_head") is None


def test_layers_of_a_bare_model() -> None:
    # nothing stands before "layers.0": peft finds no number there and gives up
    config = {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}
    assert by_peft(build("llama", ""), **config) is None
    assert by_veneer(build("llama", ""), **config) == {f"layers.{i}.self_attn.q_proj" for i in (0, 2)}


RANKED = ["m.q_proj", "m.xq_proj", "q_proj", "layers.0.q_proj", "layers.1.q_proj", "enc.layers.0.q_proj"]


@pytest.mark.parametrize(
    "patterns",
    [
        {key: 7}
        for key in (
            "q_proj",
            "^q_proj",
            "layers.0.q_proj",
            "^layers.0.q_proj",
            "layers.1*",
            "q_pro",
            ".*q_proj",
            "0.q_proj",
            r"layers\.1.*",
            "m.q_proj|q_proj",
            "layers.(0|1).q_proj",
            "m.q_proj$",
            "",
            "^.*q_proj",
        )
    ]
    + [{"q_proj": 7, "layers.0.q_proj": 5}, {"layers.0.q_proj": 5, "q_proj": 7}],
    ids=str,
)
def test_rank_pattern_is_peft_s(patterns: dict[str, int]) -> None:
    config = peft.LoraConfig(target_modules=".*q_proj", r=1, rank_pattern=patterns, init_lora_weights=False)
    modules = peft.get_peft_model(tree(*RANKED), config).named_modules()
    theirs = {n.removeprefix(PREFIX): m.r["default"] for n, m in modules if isinstance(m, BaseTunerLayer)}
    assert {name: resolve_pattern(patterns, name, 1) for name in RANKED} == theirs
    matched = set(theirs.values()) != {1}
    assert (unused_patterns(patterns, RANKED) == []) == matched or len(patterns) > 1


def test_unused_patterns() -> None:
    assert unused_patterns({"q_proj": 2, "k_prj": 3}, RANKED) == ["k_prj"]
    assert unused_patterns(None, RANKED) == []
    assert resolve_pattern(None, "q_proj", 4) == 4


@pytest.mark.parametrize(
    "entries",
    [
        ["gate_up_proj"],
        ["down_proj", "mlp.experts.gate_up_proj"],
        ["model.layers.1.mlp.experts.down_proj"],
        ["q_proj.weight", "mlp.gate.weight"],
        ["embed_tokens.weight"],
    ],
)
def test_parameters_are_peft_s(entries: list[str]) -> None:
    config = peft.LoraConfig(target_parameters=entries, init_lora_weights=False)
    adapted = peft.get_peft_model(build("mixtral"), config)
    theirs = {
        (name.removeprefix(PREFIX).removesuffix(".base_layer"), m.parameter_name)
        for name, m in adapted.named_modules()
        if isinstance(m, ParamWrapper)
    }
    model = build("mixtral")
    ours = match_parameters(model, entries)
    assert {(name, parameter) for name, _, parameter in ours} == theirs
    assert all(model.get_submodule(name) is module for name, module, _ in ours)
    assert match_targets(model, SimpleNamespace(target_modules=None, target_parameters=entries)) == []


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["q_prj"]}, r"'q_prj' matches nothing; did you mean 'q_proj'"),
        ({"target_modules": ["q_proj", "v_prj"]}, r"\{'v_prj'\} not found .*did you mean 'v_proj'"),
        ({"target_modules": ["self_atn.q_proj"]}, r"did you mean 'self_attn.q_proj'"),
        ({"target_modules": r".*\.qq_proj"}, r"did you mean .*'q_proj'"),
        ({"target_modules": ["zzz"]}, r"the model has .*up_proj"),
        ({"target_modules": []}, r"No `target_modules` passed"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"No modules were targeted.* all 3 "),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 7]}, r"asks for 7, .* layers 0-2"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"\[7\] \(the .* in layers 0-2\)"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "block"},
            r"layers_pattern=\['block'\] is found in no name",
        ),
        (
            {"target_modules": ["q_proj", "lm_head"], "layers": "last:1"},
            r"'lm_head' matches .*layers='last:1'",
        ),
    ],
)
def test_nothing_matched(config: dict[str, Any], message: str) -> None:
    with pytest.raises(NoMatchingPeftModuleError, match=message):
        match_targets(build("llama"), SimpleNamespace(**config))


def test_other_errors() -> None:
    with pytest.raises(ValueError, match=r"'\*q_proj' is no regular expression.*list"):
        match_targets(build("llama"), SimpleNamespace(target_modules="*q_proj"))
    with pytest.raises(ValueError, match=r"rank_pattern.*'\(q'|'.*\(q.*' is no regular"):
        resolve_pattern({"(q": 1}, "q", 0)
    with pytest.raises(TypeError, match="target_modules takes module names, not 3"):
        TargetSpec.from_config(SimpleNamespace(target_modules=["q", 3]))
    with pytest.raises(TypeError, match="layers_to_transform takes layer numbers, not '1'"):
        TargetSpec.from_config(SimpleNamespace(layers_to_transform=["1"]))
    with pytest.raises(ValueError, match="not both"):
        TargetSpec.from_config(SimpleNamespace(layers="even", layers_to_transform=[1]))
    with pytest.raises(NoMatchingPeftModuleError, match=r"'gate_proj' matches nothing; did you mean 'gate_up_proj'"):
        match_parameters(build("mixtral"), ["down_proj", "gate_proj"])
    with pytest.raises(ValueError, match=r"model.norm.weight \(16, matched by 'model.norm.weight'\) has 1 dim"):
        match_parameters(build("mixtral"), ["model.norm.weight"])
    with pytest.raises(TypeError, match="list of names"):
        match_parameters(build("mixtral"), "down_proj")


def test_allow_unmatched_needs_one_match() -> None:
    config = SimpleNamespace(target_modules=["q_proj", "nope"], **LENIENT)
    assert {match.pattern for match in match_targets(build("llama"), config)} == {"q_proj"}
    with pytest.raises(NoMatchingPeftModuleError):
        match_targets(build("llama"), SimpleNamespace(target_modules=["no", "nope"], **LENIENT))
    assert len(match_parameters(build("mixtral"), ["down_proj", "nope"], allow_unmatched=True)) == 3


def test_unsupported_module_is_an_error() -> None:
    def is_linear(module: nn.Module) -> bool:
        return isinstance(module, (nn.Linear, Conv1D))

    config = SimpleNamespace(target_modules=["lin0", "conv"])
    with pytest.raises(ValueError, match=r"Target module conv \(Conv1d, matched by 'conv'\) is not supported"):
        match_targets(Toy(), config, is_adaptable=is_linear)
    with pytest.raises(ValueError, match=r"blocks\.0 \(Sequential"):
        match_targets(Toy(), SimpleNamespace(target_modules=["0"]), is_adaptable=is_linear)
    everything = match_targets(Toy(), SimpleNamespace(target_modules="all-linear"), is_adaptable=is_linear)
    assert {m.name for m in everything} == by_veneer(Toy(), target_modules="all-linear")


# --- the rest of the interface --------------------------------------------------------------------------


def test_candidates_and_skip() -> None:
    model = build("llama")
    config = SimpleNamespace(target_modules=["q_proj"])
    chosen = [(n, m) for n, m in model.named_modules() if ".1." in n]
    assert [m.name for m in match_targets(model, config, names=chosen)] == ["model.layers.1.self_attn.q_proj"]
    kept = match_targets(model, config, skip=lambda name, module: ".1." in name)
    assert [m.name for m in kept] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 2)]
    assert all(model.get_submodule(m.name) is m.module for m in kept)


def test_model_is_not_changed() -> None:
    model = build("t5")
    before = [(name, id(module)) for name, module in model.named_modules()]
    match_targets(model, SimpleNamespace(target_modules=None, layers="encoder"), model_type="t5")
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_most_specific_pattern_is_reported() -> None:
    config = SimpleNamespace(target_modules=["q_proj", "layers.1.self_attn.q_proj"])
    found = {m.name: m.pattern for m in match_targets(build("llama"), config)}
    assert found["model.layers.1.self_attn.q_proj"] == "layers.1.self_attn.q_proj"
    assert found["model.layers.0.self_attn.q_proj"] == "q_proj"


def test_words_apply_to_every_kind_of_pattern() -> None:
    for targets in (["q_proj"], r".*q_proj", {"layers.2.self_attn.q_proj", "q_proj"}):
        found = by_veneer(build("llama"), target_modules=targets, layers="last:1")
        assert found == {"model.layers.2.self_attn.q_proj"}
    everything = by_veneer(build("llama"), target_modules="all-linear", layers="odd") or set()
    assert len(everything) == 7
    assert all(name.startswith("model.layers.1.") for name in everything)
    assert by_veneer(build("bart"), "bart", layers="decoder&first:1") == {
        f"model.decoder.layers.0.{attention}.{p}_proj" for attention in ("self_attn", "encoder_attn") for p in "qv"
    }


def test_describe() -> None:
    matches = match_targets(build("llama"), SimpleNamespace(target_modules=["q_proj", "lm_head"]))
    text = describe(matches, unmatched=["nope"])
    assert text.splitlines()[0] == "4 modules adapted"
    assert re.search(r"model\.layers\.\*\.self_attn\.q_proj +x3  layers 0-2  by 'q_proj'", text)
    assert re.search(r"lm_head +x1  by 'lm_head'", text)
    assert "'nope' matched nothing" in text


def test_speed_on_560_linear_layers() -> None:
    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=80, num_attention_heads=4, vocab_size=48
    )
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    tail = {"exclude_modules": ["79.mlp.up_proj"]}
    for settings in (
        {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            **tail,
        },
        {"target_modules": "all-linear", **tail},
        {"target_modules": r".*\.(self_attn|mlp)\..*_proj", **tail},
        {"target_modules": "all-linear", **tail, "layers": "every:1"},
    ):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            matches = match_targets(model, SimpleNamespace(**settings))
            times.append(time.perf_counter() - start)
        assert len(matches) == 559
        assert min(times) < 0.030, f"{settings}: {min(times) * 1e3:.1f} ms"
