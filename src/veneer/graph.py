"""What the module graph tells about a model: its linear layers, output head, attention, feed-forward, norms.

Only names, classes and shapes are read; nothing is run.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import nn

from veneer.backends.refused import why_not
from veneer.words import find_stacks, place_of

Shape = tuple[int, int]  # (in, out)

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NORM = re.compile(r"(layer|rms)_?norm", re.IGNORECASE)
_HEAD_NORM = re.compile(r"(^|\.)(q|k|query|key)_?(layer)?_?norm$", re.IGNORECASE)
_SUFFIX = r"(?:_?(?:proj|projection|lin|linear|layer|attn|dense|states?)|_b_proj|_up_proj)?"
_ROLES = {
    role: re.compile(rf"(?:to_?|w_?|linear_|lin_|proj_|self_|c_)?(?:{words}){_SUFFIX}(?:_with_mqa)?", re.IGNORECASE)
    for role, words in (
        ("qkv", "qkv|query_key_value|c_attn|attn|in_proj|packed"),
        ("kv", "kv|key_value"),
        ("q", "q|query|queries"),
        ("k", "k|key|keys"),
        ("v", "v|value|values"),
    )
}


def name_tails(name: str) -> Iterator[str]:
    """``a.b.c`` -> ``a.b.c``, ``b.c``, ``c``."""
    while name:
        yield name
        name = name.partition(".")[2]


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and its subclasses, transformers' Conv1D, HQQ's linear layer, and packed ones that will be refused."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")  # not loaded: no such layer can exist
    if isinstance(module, nn.Linear) or (pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)):
        return True
    hqq = sys.modules.get("hqq.core.quantize")
    return (hqq is not None and isinstance(module, hqq.HQQLinear)) or why_not(module) is not None


def is_transformers_model(model: nn.Module) -> bool:
    """Whether ``model`` is a transformers PreTrainedModel, without loading transformers to find out."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits over the vocabulary, where transformers knows it."""
    if not is_transformers_model(model):
        return None
    return cast("Any", model).get_output_embeddings()


def linear_names(model: nn.Module) -> list[str]:
    """Every linear layer but the output head."""
    return list(_linears(model))


def _linears(model: nn.Module) -> dict[str, Shape]:
    head = output_head(model)
    return {
        name: _shape(module)
        for name, module in model.named_modules()
        if name and module is not head and is_linear(module)
    }


def _shape(module: nn.Module) -> Shape:
    if type(module).__name__ != "Conv1D":
        return module.in_features, module.out_features  # type: ignore[return-value]
    rows, columns = module.get_parameter("weight").shape  # Conv1D keeps (in, out)
    return rows, columns


def derive_targets(model: nn.Module, kind: str = "lora") -> list[str]:
    """Targets for a model of unknown architecture, as name suffixes; empty if nothing was recognised.

    "ln_tuning": every layer norm or RMS norm with a weight, but those of queries and keys. "ia3": keys,
    values and the feed-forward's last projection; "ia3_feedforward": the latter alone. Any other kind:
    queries and values. Where one layer makes queries, keys and values it stands for them.
    """
    if kind == "ln_tuning":
        norms = {name: _HEAD_NORM.search(name) for name, m in model.named_modules() if name and _is_norm(m)}
        within = [name for name, inside in norms.items() if inside]
        return compact_names([name for name, inside in norms.items() if not inside], within)
    linears = _linears(model)
    attention = _attention_layers(model, linears)
    last = _last_projections(model, linears, attention) if kind.startswith("ia3") else []
    if kind == "ia3_feedforward":
        return _short_names(last, linears)
    wanted = ("k", "v", "kv", "qkv") if kind == "ia3" else ("q", "v", "kv", "qkv")
    chosen = [n for wish in (*wanted, "any") for n, role in attention.items() if role == wish]
    return _short_names(chosen, linears) + (_short_names(last, linears) if chosen else [])


def _is_norm(module: nn.Module) -> bool:
    if not isinstance(module, nn.LayerNorm) and not _NORM.search(type(module).__name__):
        return False
    return any(name == "weight" and p.ndim == 1 for name, p in module.named_parameters(recurse=False))


def _attention_layers(model: nn.Module, linears: dict[str, Shape]) -> dict[str, str]:
    """The layers that read an attention's input -> their role: q, k, v, kv, qkv; "any" if names are mute."""
    siblings: dict[str, dict[str, Shape]] = defaultdict(dict)
    for name, shape in linears.items():
        parent, _, leaf = name.rpartition(".")
        siblings[parent][leaf] = shape
    found: dict[str, str] = {}
    for parent, leaves in siblings.items():
        module = model.get_submodule(parent)
        named = bool(_ATTENTION.search(parent.rpartition(".")[2]) or _ATTENTION.search(type(module).__name__))
        for leaf, role in _roles(leaves, named).items():
            found[f"{parent}.{leaf}" if parent else leaf] = role
    return found


def _roles(leaves: dict[str, Shape], is_attention: bool) -> dict[str, str]:
    """Roles among the linear layers of one module; empty if it is no attention."""
    roles = {leaf: role for leaf in leaves for role, rule in _ROLES.items() if rule.fullmatch(leaf)}
    given = set(roles.values())
    if {"q", "k", "v"} <= given or (is_attention and {"q", "kv"} <= given):
        return roles
    if not is_attention:
        return {}
    if "qkv" in given:
        return {leaf: role for leaf, role in roles.items() if role == "qkv"}
    # by shape: what reads the input is wider than it, and one layer leads back from the heads
    wide = [leaf for leaf, (n_in, n_out) in leaves.items() if n_out > n_in]
    if len(leaves) == 2 and len(wide) == 1:
        return {wide[0]: "qkv"}
    if len(leaves) >= 3:
        return dict.fromkeys(list(leaves)[:3], "any")
    return {}


def _last_projections(model: nn.Module, linears: dict[str, Shape], attention: dict[str, str]) -> list[str]:
    """In each block, the feed-forward layer that leads back to the width that attention reads."""
    stacks = find_stacks(model)
    widths: dict[tuple[str, int], int] = {}
    for name in attention:
        if (place := place_of(name, stacks)) is not None:
            widths[place] = linears[name][0]
    blocks: dict[tuple[str, int], list[str]] = defaultdict(list)
    crowd = Counter(name.rpartition(".")[0] for name in linears)
    attending = {name.rpartition(".")[0] for name in attention}
    for name in linears:
        place = place_of(name, stacks)
        parent = name.rpartition(".")[0]
        own = parent in attending and crowd[parent] <= 4  # more than q, k, v, o: a block in one module
        if place in widths and not own and not _ATTENTION.search(parent[len(place[0]) :]):
            blocks[place].append(name)
    last = []
    for place, names in blocks.items():
        back = [name for name in names if linears[name][1] == widths[place] != linears[name][0]]
        last += back or names[-1:]  # a square feed-forward: the last in order
    return last


def _short_names(chosen: list[str], linears: Iterable[str]) -> list[str]:
    picked = set(chosen)
    return compact_names(chosen, [name for name in linears if name not in picked], exact=False)


def compact_names(names: Iterable[str], others: Iterable[str], exact: bool = True) -> list[str]:
    """The shortest name suffixes that match every one of ``names`` and none of ``others``.

    A suffix grows by one component at a time and never begins with a number. Where that cannot tell a name
    from the others, it is given in full (``exact``) or by the longest suffix without a number. (A name
    that is itself the tail of another, ``lin`` beside ``x.lin``, has no suffix of its own.)
    """
    taken = {tail for other in others for tail in name_tails(other)}
    short: dict[str, None] = {}
    for name in names:
        tail = ""
        for tail in reversed(list(name_tails(name))):
            parts = tail.split(".")
            if tail not in taken and not parts[0].isdecimal():
                break
            if not exact and parts[0].isdecimal() and len(parts) > 1:
                tail = ".".join(parts[1:])
                break
        else:
            tail = name
        short[tail] = None
    return list(short)
