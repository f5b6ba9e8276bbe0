"""Whether other servers can load an adapter, and would answer with it as it was trained.

vLLM reads r, lora_alpha, use_rslora, use_dora, bias and modules_to_save of adapter_config.json and ignores what else
stands there; its --max-lora-rank is one of RANKS, and adapters of a smaller rank are padded. SGLang scales by
lora_alpha / r whatever else the config says, and adapts the layers in SGLANG_LAYERS. Looked up in November 2026.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from .. import registry, state
from ..config import PeftConfig, PromptLearningConfig
from ..errors import AdapterError

__all__ = ["RANKS", "SERVERS", "Checked", "Finding", "check_adapter", "plain_copy"]

SERVERS = ("vllm", "sglang")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
SGLANG_LAYERS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
    "embed_tokens", "lm_head",
)  # fmt: skip
HEADS = {"classifier", "score"}


@dataclass(frozen=True)
class Finding:
    """level: "error" (it will not load), "wrong" (it loads, and answers differ), "note". remedy: what to do; plain:
    plain_copy mends it."""

    level: Literal["error", "wrong", "note"]
    problem: str
    remedy: str
    plain: bool = False


@dataclass(frozen=True)
class Checked:
    """rank: the largest of any layer. flags: for the server's command line."""

    findings: list[Finding]
    rank: int
    flags: str

    @property
    def good(self) -> bool:
        return all(f.level == "note" for f in self.findings)


def check_adapter(adapter: str, server: str) -> Checked:
    """Read an adapter's files (never its base) against a server's rules. Raises AdapterError for another server."""
    from ..opened import adapter_folder

    if server not in SERVERS:
        raise AdapterError(f"{server!r} is not one of {', '.join(SERVERS)}")
    folder = adapter_folder(adapter)
    config: Any = PeftConfig.from_pretrained(str(folder))
    tensors, _ = state.read(str(folder))
    findings = list(_method(config, adapter))
    rank = 0
    if not findings:
        ranks = {k: t.shape[0] for k, t in tensors.items() if k.endswith("lora_A.weight")}
        rank = max(ranks.values(), default=0)
        findings += [*_scaling(config, ranks, server), *_whole(config, tensors, server), *_layers(tensors, server)]
        findings += _rank(rank, server, adapter)
    return Checked(findings, rank, _flags(server, rank, folder))


def _method(config: Any, adapter: str) -> Iterator[Finding]:
    """Everything but plain LoRA is refused."""
    if isinstance(config, PromptLearningConfig):
        yield Finding("error", f"{config.peft_type} is not LoRA, and has no weights to merge", "serve it with veneer")
        return
    name = registry.method_of(config).name.lower()
    if name != "lora":
        remedy = f"veneer convert {adapter} --rank 16 --out PLAIN (its error is shown), or veneer merge {adapter}"
        yield Finding("error", f"the method is {name}; only plain LoRA is served", remedy)


def _scaling(config: Any, ranks: dict[str, int], server: str) -> Iterator[Finding]:
    remedy = "veneer check ADAPTER --for SERVER --fix PLAIN writes an equal adapter of one rank and scaling"
    other = sorted({n for n in ranks.values() if n != config.r})
    if other:
        yield Finding("wrong", f"layers have ranks {other} beside r={config.r}, which sets the scaling", remedy, True)
    elif config.alpha_pattern:
        yield Finding("wrong", f"alpha_pattern is not read ({len(config.alpha_pattern)} entries)", remedy, True)
    if server == "sglang" and config.use_rslora:
        yield Finding("wrong", "use_rslora is not read: the scaling would be lora_alpha / r", remedy, True)


def _whole(config: Any, tensors: dict[str, Tensor], server: str) -> Iterator[Finding]:
    """What is trained beside A and B."""
    merge = "merge it: veneer merge ADAPTER --out MODEL"
    saved = config.modules_to_save or ()
    names = {saved} if isinstance(saved, str) else set(saved)
    if server == "vllm" and names and names <= HEADS:
        yield Finding("note", f"the head ({', '.join(sorted(names))}) is read by recent versions only", merge)
    elif names:
        yield Finding("error", f"modules_to_save is not supported: {', '.join(sorted(names))}", merge)
    if config.bias != "none" or config.lora_bias:
        yield Finding("error", "trained biases are not supported", merge)
    if config.trainable_token_indices:
        yield Finding("error", "trained tokens (trainable_token_indices) are not supported", merge)
    own = [k for k in tensors if ".lora_" not in k and not names & set(k.split("."))]
    rows = [k for k in own if re.search(r"(embed_tokens|wte|word_embeddings|lm_head|embed_out)\.weight$", k)]
    if rows:
        size = tensors[rows[0]].shape[0]
        yield Finding("error", f"the file holds an embedding of {size} rows ({rows[0]}): a changed vocabulary", merge)


def _layers(tensors: dict[str, Tensor], server: str) -> Iterator[Finding]:
    merge = "train without them (target_modules), or merge it"
    embedded = sorted({_leaf(k) for k in tensors if "lora_embedding_" in k})
    if embedded:
        yield Finding("error", f"an embedding is adapted ({', '.join(embedded)})", merge)
    odd = sorted({_leaf(k) for k, t in tensors.items() if k.endswith("lora_A.weight") and t.dim() != 2})
    if odd:
        yield Finding("error", f"convolutions are adapted ({', '.join(odd)})", merge)
    leaves = {_leaf(k) for k, t in tensors.items() if k.endswith("lora_A.weight") and t.dim() == 2}
    unknown = sorted(leaves - set(SGLANG_LAYERS))
    if server == "sglang" and unknown:
        yield Finding("error", f"layers that SGLang does not adapt: {', '.join(unknown)}", merge)
    if not leaves and not embedded and not odd:
        yield Finding("error", "the file holds no pairs of lora_A and lora_B", "was it saved with compact=True?")


def _leaf(key: str) -> str:
    return key.split(".lora_")[0].rpartition(".")[2]


def _rank(rank: int, server: str, adapter: str) -> Iterator[Finding]:
    if server == "vllm" and rank > RANKS[-1]:
        remedy = f"veneer resize {adapter} --rank {RANKS[-1]} --out SMALLER (its error is shown)"
        yield Finding("error", f"rank {rank} is above vLLM's largest, {RANKS[-1]}", remedy)
    elif server == "vllm" and rank > 16:
        limit = next(r for r in RANKS if r >= rank)
        yield Finding("note", f"rank {rank} is above vLLM's default of 16", f"start it with --max-lora-rank {limit}")


def _flags(server: str, rank: int, folder: Path) -> str:
    name = folder.resolve().parent.name if folder.resolve().name == "adapter" else folder.resolve().name
    if server == "sglang":
        return f"python -m sglang.launch_server --model-path BASE --enable-lora --lora-paths {name}={folder}"
    limit = next((r for r in RANKS if r >= rank), RANKS[-1])
    return f"vllm serve BASE --enable-lora --max-lora-rank {max(limit, 8)} --lora-modules {name}={folder}"


def plain_copy(adapter: str, out: str | Path) -> Path:
    """An equal plain LoRA in which every layer has one rank and lora_alpha / r = 1: smaller factors are padded with
    zeros, scalings go into B. Raises AdapterError for an adapter that is more than that, and where the folder exists.
    """
    from torch.nn.functional import pad

    from ..files import SAFE_NAME, write_json, write_tensors
    from ..opened import adapter_folder
    from .onnx import new_folder
    from .onnx_adapters import factors_of

    folder, factors = adapter_folder(adapter), factors_of(adapter)
    r = max(A.shape[0] for A, _ in factors.values())
    out_tensors = {}
    for layer, (A, B) in factors.items():
        gap = r - A.shape[0]
        out_tensors[f"base_model.model.{layer}.lora_A.weight"] = pad(A, (0, 0, 0, gap)).contiguous()
        out_tensors[f"base_model.model.{layer}.lora_B.weight"] = pad(B, (0, gap)).contiguous()
    config: Any = PeftConfig.from_pretrained(str(folder))
    config = dataclasses.replace(
        config, r=r, lora_alpha=r, use_rslora=False, rank_pattern={}, alpha_pattern={}, init_lora_weights=True,
        target_modules=sorted({layer.rpartition(".")[2] for layer in factors}),
    )  # fmt: skip
    with new_folder(Path(out)) as partial:
        write_tensors(os.path.join(partial, SAFE_NAME), out_tensors, None)
        write_json(os.path.join(partial, "adapter_config.json"), config.to_file_dict(compact=False))
        for name in ("task.json", "labels.json", "asking.json", "tokenizer.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
    return Path(out)
