"""The longest sequence that a LoRA (r=16, every linear layer) trains on in a given memory, on the SmolLM2-135M shape.

    python benchmarks/longest.py [--gb 8] [--labels 1.0] [--confirm 1024 [2048 ...]] [--json FILE]

The memory of a step is counted on tensors without data (every tensor alive, as `veneer plan` counts); what a process
holds before it has a model, the weights, the gradients and AdamW's state are added. --confirm trains two steps at these
lengths for real, each contestant in a process of its own, and prints what the process then held; from two lengths the
line through both is followed to the given memory. Checkpointing cannot be counted without data, so it is in that alone.

"veneer" is what `veneer train` does as it comes (base_kernels, the head's loss in chunks), "peft" the model's own loss;
"+ checkpointing" is the same with each layer's activations computed again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from common import SMOLLM2, commit, forget_peak, machine, package, peak_mb, resident_mb, write

WHO = ("peft", "veneer", "peft + checkpointing", "veneer + checkpointing")
COUNTED = WHO[:2]
GRAIN = 64  # lengths are tried in steps of this


def build(who: str, where: str) -> Any:
    """The adapted model, training; `where` is "meta" or "cpu"."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SMOLLM2, "max_position_embeddings": 1 << 20, "use_cache": False})
    torch.manual_seed(0)
    with torch.device(where):
        base: Any = LlamaForCausalLM(config)
    pkg = package(who.split()[0])
    if who.startswith("veneer"):
        from veneer.train.estimate import kernels_of

        found = kernels_of(base, SimpleNamespace(base=SimpleNamespace(kernels=True)))  # type: ignore[arg-type]
        found.on()
    if "checkpointing" in who:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    lora = pkg.LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    return pkg.get_peft_model(base, lora, low_cpu_mem_usage=where == "meta").train()


def step_bytes(who: str, model: Any, length: int, labels: float) -> float:
    """The most bytes alive at once in one forward and backward, the adapter's gradients included."""
    import torch

    from veneer.train.estimate import HEAP
    from veneer.train.meta_loss import vocabulary_loss
    from veneer.train.meta_pass import count

    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    loss = lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    if who.startswith("veneer"):
        entropy = vocabulary_loss(model, 1, length, labels, chunked=True)
        loss = lambda: entropy().sum()
    return HEAP * count(model, loss).peak


def longest(who: str, room: float, labels: float) -> int:
    """The largest length whose step fits into `room` bytes beside weights and states."""
    model = build(who, "meta")
    tensors = [*dict.fromkeys(model.parameters()), *dict.fromkeys(model.buffers())]
    states = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    room -= sum(t.numel() * t.element_size() for t in tensors) + states
    need = {n: step_bytes(who, model, n, labels) for n in (1024, 4096)}
    low, high = sorted(need)
    slope = (need[high] - need[low]) / (high - low)
    guess = int((high + (room - need[high]) / slope) // GRAIN * GRAIN)
    while step_bytes(who, model, guess, labels) > room:
        guess -= GRAIN
    while step_bytes(who, model, guess + GRAIN, labels) <= room:
        guess += GRAIN
    return guess


def estimate(who: str, length: int, labels: float) -> float | None:
    """MB beside the process's own; None where it cannot be counted."""
    if who not in COUNTED:
        return None
    model = build(who, "meta")
    tensors = [*dict.fromkeys(model.parameters()), *dict.fromkeys(model.buffers())]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(t.numel() * t.element_size() for t in tensors) + 8 * trained
    return (held + step_bytes(who, model, length, labels)) / 2**20


def train(who: str, length: int, labels: float) -> None:
    """Two real steps; a JSON line with the peak in MB over what the process held before, and the seconds of one."""
    import time

    import torch

    from veneer.train.allocator import keep_blocks
    from veneer.train.loss import labelled_loss

    empty = resident_mb()
    model: Any = build(who, "cpu")
    ids = torch.randint(0, SMOLLM2["vocab_size"], (1, length))
    targets = ids.masked_fill(torch.rand(ids.shape) >= labels, -100)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": targets}
    if who.startswith("veneer"):
        keep_blocks()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    forget_peak()
    for _ in range(2):
        began = time.perf_counter()
        loss = labelled_loss(model, call, None) if who.startswith("veneer") else model(**call).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(json.dumps({"used": peak_mb() - empty, "seconds": time.perf_counter() - began, "loss": loss.item()}))


def confirm(who: str, length: int, labels: float) -> dict[str, float]:
    line = [sys.executable, __file__, "--worker", who, "--confirm", str(length), "--labels", str(labels)]
    out = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    return json.loads(out.strip().splitlines()[-1]) | {"estimate": estimate(who, length, labels)}


def followed(real: dict[str, Any], who: str, lengths: list[int], room: float) -> int:
    """The length at which the line through what two lengths used reaches `room` MB."""
    short, long = min(lengths), max(lengths)
    a, b = (real[f"{who} {n}"]["used"] for n in (short, long))
    return int(short + (room - a) * (long - short) / (b - a))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=8.0, help="GiB of memory, the process's own included")
    parser.add_argument("--labels", type=float, default=1.0, help="the share of tokens that have a label")
    parser.add_argument("--confirm", type=int, nargs="*", default=[], help="lengths to train on for real")
    parser.add_argument("--json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        train(args.worker, args.confirm[0], args.labels)
        return
    for name in ("transformers.models.llama", "peft", "veneer.train.trainer"):  # what a run has in memory
        __import__(name)
    process = resident_mb() * 2**20
    found = {who: longest(who, args.gb * 2**30 - process, args.labels) for who in COUNTED}
    print(f"longest sequence in {args.gb:g} GiB ({process / 2**20:.0f} MB of them the process's own):")
    for who, length in found.items():
        print(f"  {who:24} {length:7} tokens   {length / found['peft']:.2f} of peft's", flush=True)
    real: dict[str, Any] = {}
    for length in args.confirm:
        for who in WHO:
            real[f"{who} {length}"] = was = confirm(who, length, args.labels)
            told = "" if was["estimate"] is None else f", {was['estimate']:.0f} estimated"
            print(
                f"  {who:24} {length:7} tokens: {was['used']:.0f} MB used{told}, {was['seconds']:.1f} s a step, "
                f"loss {was['loss']:.4f}", flush=True,
            )  # fmt: skip
    if len(args.confirm) > 1:
        room = args.gb * 2**10 - process / 2**20
        measured = {who: followed(real, who, args.confirm, room) for who in WHO}
        print("from what was used:")
        for who, length in measured.items():
            print(f"  {who:24} {length:7} tokens   {length / measured['peft']:.2f} of peft's")
        found |= {f"{who}, measured": length for who, length in measured.items()}
    if args.json:
        write(args.json, {"longest": found, "real": real, "gb": args.gb, "machine": machine(), "commit": commit()})


if __name__ == "__main__":
    main()
