"""`veneer merge` on a checkpoint larger than the memory that it may take.

    python benchmarks/big_merge.py [--gb 20] [--limit-gb 4] [--folder DIR] [--json FILE]

Makes a Llama of random bfloat16 weights in shards of 1 GB and a LoRA (r = 8, every linear layer) in a folder of its own
(twice the size is needed, and given back at the end), merges them, kills the merge with SIGKILL in the middle of a
shard, merges again, and compares sampled tensors of the result with the formula.

Memory is read from /proc every 10 ms: RssAnon is what the process holds itself, RssFile are pages of mapped files,
which the system drops when something else needs the memory. The merge is ended where RssAnon passes the limit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common import commit, machine, write

WIDTH, INNER, HEADS, VOCABULARY, R, ALPHA = 4096, 11008, 32, 49152, 8, 16
LINEAR = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, WIDTH), "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}  # fmt: skip
SHARD = 2**30
SAMPLE = "Dear Ms Novak, we shall send the three parcels to Brno on Monday.\n"


# -- what is merged ----------------------------------------------------------------------------------------
def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for i in range(layers):
        at = f"model.layers.{i}."
        out |= {f"{at}{name}.weight": shape for name, shape in LINEAR.items()}
        out |= {f"{at}{n}.weight": (WIDTH,) for n in ("input_layernorm", "post_attention_layernorm")}
    return {**out, "model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def values(names: list[str], held: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Small random numbers, cut from one block at a place of each tensor's own; norms are ones."""
    block = torch.randn(VOCABULARY * WIDTH // 4, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for number, name in enumerate(names):
        size = math.prod(held[name])
        begin = (number * 7919 + len(name)) % 4096
        part = block[begin:].repeat(size // (len(block) - begin) + 1)[:size]
        yield name, torch.ones(held[name], dtype=torch.bfloat16) if "norm" in name else part.view(held[name])


def make_base(folder: Path, gb: float) -> int:
    """Write a model folder of about this size; returns the bytes of its weights."""
    from transformers import LlamaConfig

    from veneer.export.shard_file import write_shard
    from veneer.train.bases import load_tokenizer, resolve_base

    ends, layer = (2 * VOCABULARY * WIDTH * 2, sum(a * b * 2 for a, b in LINEAR.values()))
    layers = max(round((gb * 2**30 - ends) / layer), 1)
    held = shapes(layers)
    files: list[list[str]] = [[]]
    for name, shape in held.items():
        if files[-1] and sum(math.prod(held[n]) * 2 for n in files[-1]) + math.prod(shape) * 2 > SHARD:
            files.append([])
        files[-1].append(name)
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_shard(folder / file, {n: (torch.bfloat16, held[n]) for n in names}, values(names, held))
        weight_map |= dict.fromkeys(names, file)
    total = sum(math.prod(s) * 2 for s in held.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, dtype="bfloat16", tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    load_tokenizer(resolve_base("smollm2-135m-instruct")).save_pretrained(folder)
    return total


def make_adapter(folder: Path, base: Path) -> None:
    from safetensors.torch import save_file

    from veneer import LoraConfig

    config = json.loads((base / "config.json").read_text())
    generator, tensors = torch.Generator().manual_seed(1), {}
    for i in range(config["num_hidden_layers"]):
        for name, (rows, columns) in LINEAR.items():
            at = f"base_model.model.model.layers.{i}.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(R, columns, generator=generator) * 0.02
            tensors[f"{at}.lora_B.weight"] = torch.randn(rows, R, generator=generator) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=sorted(n.rpartition(".")[2] for n in LINEAR), task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    ).save_pretrained(str(folder))  # fmt: skip


# -- the merge in a process of its own, watched ------------------------------------------------------------
@dataclass
class Watched:
    """Peaks in MB. lines: (seconds since the start, what the command said)."""

    limit_mb: float
    peaks: dict[str, float] = field(default_factory=dict)
    lines: list[tuple[float, str]] = field(default_factory=list)
    seconds: float = 0.0
    over: bool = False

    def look(self, process: subprocess.Popen[str]) -> None:
        path = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                held = dict(line.split(":", 1) for line in path.read_text().splitlines())
            except OSError:
                return
            for key in ("RssAnon", "RssFile", "VmRSS"):
                now = int(held.get(key, "0 kB").split()[0]) / 1024
                self.peaks[key] = max(self.peaks.get(key, 0.0), now)
            if self.peaks["RssAnon"] > self.limit_mb:
                self.over = True
                process.kill()
            time.sleep(0.01)


def merge(adapter: Path, out: Path, sample: Path, limit_mb: float, kill_in: int | None = None) -> Watched:
    """kill_in: SIGKILL while this shard is being written."""
    words = [sys.executable, "-m", "veneer", "merge", str(adapter), "--out", str(out), "--progress"]
    process = subprocess.Popen([*words, "--sample", str(sample)], stdout=subprocess.PIPE, text=True)
    found, began = Watched(limit_mb), time.perf_counter()
    watching = threading.Thread(target=found.look, args=(process,))
    watching.start()
    assert process.stdout is not None
    for line in process.stdout:
        found.lines.append((time.perf_counter() - began, line.rstrip()))
        if kill_in is not None and len(found.lines) == kill_in - 1:
            while process.poll() is None and not list(out.with_name(f"{out.name}.partial").glob("*.writing")):
                time.sleep(0.01)
            time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
    status = process.wait()
    watching.join()
    found.seconds = time.perf_counter() - began
    if found.over:
        raise RuntimeError(f"the merge held more than {limit_mb:.0f} MB of its own")
    if status != (0 if kill_in is None else -signal.SIGKILL):
        raise RuntimeError(f"the merge ended with {status}; its error is above")
    return found


# -- the result --------------------------------------------------------------------------------------------
def largest_gap(base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """Tensor -> largest difference to the formula, of the first, a middle and the last layer, and of what is not
    adapted (0: bit for bit)."""
    from safetensors import safe_open

    layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    maps = {f: json.loads((f / "model.safetensors.index.json").read_text())["weight_map"] for f in (base, out)}

    def read(folder: Path, name: str) -> torch.Tensor:
        with safe_open(str(folder / maps[folder][name]), "pt") as file:
            return file.get_tensor(name)

    found = {}
    with safe_open(str(adapter / "adapter_model.safetensors"), "pt") as factors:
        for i in sorted({0, layers // 2, layers - 1}):
            for name in LINEAR:
                path = f"model.layers.{i}.{name}"
                A, B = (factors.get_tensor(f"base_model.model.{path}.lora_{x}.weight") for x in "AB")
                want = (read(base, f"{path}.weight").float() + ALPHA / R * (B @ A)).bfloat16()
                found[path] = float((read(out, f"{path}.weight").float() - want.float()).abs().max())
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        found[name] = float((read(out, name).float() - read(base, name).float()).abs().max())
    return found


def run(root: Path, gb: float, limit_gb: float) -> dict[str, Any]:
    base, adapter, out, sample = (root / n for n in ("base", "adapter", "merged", "sample.txt"))
    base.mkdir()
    adapter.mkdir()
    sample.write_text(SAMPLE)
    total = make_base(base, gb)
    make_adapter(adapter, base)
    shards = len(list(base.glob("*.safetensors")))
    first = merge(adapter, out, sample, limit_gb * 1024, kill_in=shards // 2 + 1)
    if out.exists():
        raise RuntimeError("a merge that was killed left its result")
    again = merge(adapter, out, sample, limit_gb * 1024)
    kept = sum(line.endswith("already there") for _, line in again.lines)
    written = [at for at, line in again.lines if line.endswith(": written")]
    gaps = largest_gap(base, adapter, out)
    return {
        "gb": total / 2**30, "shards": shards, "limit_gb": limit_gb, "killed_in_shard": shards // 2 + 1,
        "kept_shards": kept, "peak_mb": {k: max(first.peaks[k], again.peaks[k]) for k in first.peaks},
        "seconds": {"first": first.seconds, "again": again.seconds, "again_written": written[-1] if written else 0.0},
        "largest_gap": max(gaps.values()), "tensors_compared": len(gaps), "machine": machine(), "commit": commit(),
        "certificate": json.loads((out / "merge_certificate.json").read_text()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=20.0)
    parser.add_argument("--limit-gb", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "big_merge.json")
    o = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(dir=o.folder) as root:
        found = run(Path(root), o.gb, o.limit_gb)
    write(o.json, found)
    print(json.dumps(found, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
