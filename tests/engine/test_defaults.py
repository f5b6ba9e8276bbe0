"""Default targets: the table against peft's own, and the graph's answer against the table."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
from target_zoo import ZOO, build
from torch import nn

from veneer.defaults import default_targets, target_table
from veneer.graph import compact_names, derive_targets, linear_names
from veneer.targets import NoMatchingPeftModuleError, match_targets

theirs = importlib.import_module("peft.utils.constants")
KINDS = {
    "ia3": "IA3_TARGET",
    "ia3_feedforward": "IA3_FEEDFORWARD",
    "ln_tuning": "LNTUNING_TARGET",
}
LIKE_LORA = [
    "lora",
    "loha",
    "lokr",
    "adalora",
    "vblora",
    "vera",
    "pvera",
    "shira",
    "frod",
    "adamss",
    "c3a",
    "fourierft",
    "waveft",
    "beft",
    "osf",
    "oft",
    "boft",
    "hra",
    "miss",
    "randlora",
    "road",
    "poly",
    "delora",
    "gralora",
    "unilora",
    "tinylora",
]
KINDS |= {kind: f"{kind.upper()}_TARGET" for kind in LIKE_LORA}


@pytest.mark.parametrize("kind", KINDS)
def test_table_is_peft_s(kind: str) -> None:
    known = getattr(theirs, f"TRANSFORMERS_MODELS_TO_{KINDS[kind]}_MODULES_MAPPING")
    ours = target_table(kind)
    assert known.keys() <= ours.keys()
    for arch, names in known.items():
        mine = ours[arch]
        assert mine == names if isinstance(names, str) else sorted(mine) == sorted(names), arch
    if kind == "lora":
        assert known.keys() == ours.keys()


def test_unknown_kind_uses_the_lora_table() -> None:
    assert target_table("something-new") == target_table("lora")


# Where the graph's answer is not the table's, which wins: kind, architecture -> the table's reason.
DIFFERS = {
    ("lora", "phi"): "adapts the feed-forward, too",
    ("lora", "rwkv"): "adapts channel mixing, too; there is no query",
    ("ia3", "qwen2"): "queries in place of keys",
    ("ia3", "qwen3"): "queries in place of keys",
    ("ia3", "gemma"): "queries in place of keys",
    ("ia3", "gemma2"): "queries in place of keys",
    ("ia3", "gemma3_text"): "queries in place of keys",
    ("ia3", "phi"): "queries in place of keys",
    ("ia3", "gptj"): "queries in place of keys",
    ("ia3", "gpt_neo"): "queries in place of keys",
    ("ia3", "bart"): "queries in place of keys",
    ("ia3", "opt"): "queries in place of values",
    ("ia3", "mt5"): "the output of the gate's second factor",
    ("ia3_feedforward", "mt5"): "none: see above",
    ("ln_tuning", "qwen2"): "only the norm before the feed-forward",
    ("ln_tuning", "qwen3"): "only the norm before the feed-forward",
    ("ln_tuning", "bloom"): "leaves the embedding's norm out",
    ("ln_tuning", "bart"): "leaves the embedding's norm out",
}


def matched(model: nn.Module, targets: Any) -> set[str]:
    try:
        return {m.name for m in match_targets(model, SimpleNamespace(target_modules=targets, allow_unmatched=True))}
    except NoMatchingPeftModuleError:
        return set()


@pytest.mark.parametrize("kind", ["lora", "ia3", "ia3_feedforward", "ln_tuning"])
@pytest.mark.parametrize("arch", ZOO)
def test_graph_agrees_with_the_table(arch: str, kind: str) -> None:
    model = build(arch)
    derived = derive_targets(model, kind)
    table = target_table(kind).get(arch)
    if table is None:
        assert default_targets(model, arch, kind) == derived
        return
    if (kind, arch) == ("ia3_feedforward", "mixtral"):
        assert default_targets(model, arch, kind) == derived == []  # its experts are no modules any more
        return
    assert default_targets(model, arch, kind) == table
    same = matched(model, derived) == matched(model, table)
    assert same != ((kind, arch) in DIFFERS), (derived, table)


@pytest.mark.parametrize(
    ("arch", "lora", "ia3"),
    [
        ("vit", ["q_proj", "v_proj"], ["k_proj", "v_proj", "fc2"]),
        ("whisper", ["q_proj", "v_proj"], ["k_proj", "v_proj", "fc2"]),
        ("phi3", ["qkv_proj"], ["qkv_proj", "down_proj"]),
        ("distilbert", ["q_lin", "v_lin"], ["k_lin", "v_lin", "lin2"]),
        ("albert", ["query", "value"], ["key", "value", "ffn_output"]),
        ("modernbert", ["Wqkv"], ["Wqkv", "mlp.Wo"]),
        ("dinov2", ["q_proj", "v_proj"], ["k_proj", "v_proj", "fc2"]),
    ],
)
def test_architectures_outside_the_table(arch: str, lora: list[str], ia3: list[str]) -> None:
    model = build(arch)
    assert default_targets(model, arch) == lora
    assert default_targets(model, None, "ia3") == ia3
    assert default_targets(model, None, "ia3_feedforward") == ia3[-1:][: len(ia3) - 1]


class Odd(nn.Module):
    """Attention without telling names: a fused layer, or three alike, and a way back."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.attention = nn.Module()
        if fused:
            self.attention.wide, self.attention.back = nn.Linear(8, 24), nn.Linear(8, 8)
        else:
            self.attention.a, self.attention.b, self.attention.c = (nn.Linear(8, 8) for _ in range(3))
            self.attention.back = nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)


def test_shapes_decide_where_names_do_not() -> None:
    assert default_targets(Odd(fused=True), None) == ["wide"]
    assert default_targets(Odd(fused=False), None) == ["a", "b", "c"]
    assert default_targets(Odd(fused=True), None, "ln_tuning") == ["norm"]


@pytest.mark.parametrize(("inner", "last"), [(12, ["down"]), (8, ["down"])])
def test_feed_forward_leads_back_to_the_width(inner: int, last: list[str]) -> None:
    block = Odd(fused=True)
    block.up, block.down = nn.Linear(8, inner), nn.Linear(inner, 8)  # beside `other`, which is square
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    assert default_targets(model, None, "ia3_feedforward") == last
    assert default_targets(model, None, "ia3") == ["wide", *last]


def test_same_name_elsewhere_is_told_apart() -> None:
    model = Odd(fused=False)
    model.mixer = nn.Module()
    model.mixer.a = nn.Linear(8, 8)
    assert default_targets(model, None) == ["attention.a", "b", "c"]


def test_no_attention_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no default targets for Sequential .*specify `target_modules`.*: 0, 1"):
        default_targets(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), None)
    with pytest.raises(ValueError, match="no layer norms"):
        default_targets(nn.Sequential(nn.Linear(2, 2)), None, "ln_tuning")


def test_table_gives_way_when_a_release_renames_modules() -> None:
    assert default_targets(build("phi3"), "bert") == ["qkv_proj"]


@pytest.mark.parametrize("arch", ["llama", "bert", "t5", "gpt2"])
def test_compact_names_match_exactly(arch: str) -> None:
    model = build(arch)
    names = [name for name, _ in model.named_modules() if name]
    linears = linear_names(model)
    for chosen in (linears, linears[::2], linears[:3], linears[5:]):
        rest = [name for name in names if name not in set(chosen)]
        short = compact_names(chosen, rest)
        assert matched(model, short) == set(chosen)
        assert len(short) <= len(chosen)
    if arch == "llama":
        assert sorted(compact_names(linears, [n for n in names if n not in set(linears)])) == sorted(
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        )
