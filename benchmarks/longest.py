"""The longest sequence that a LoRA (r=16, every linear layer) trains on in a given memory, on the SmolLM2-135M shape.

    python benchmarks/longest.py [--gb 8] [--labels 1.0] [--confirm 1024 [2048 ...]] [--who NAME ...] [--json FILE]

The memory of a step is counted on tensors without data (every tensor alive, as `veneer plan` counts); what a process
holds before it has a model, the weights, the gradients and AdamW's state are added. --confirm trains for real at these
lengths, --steps of them (1 where not said), each contestant in a process of its own, and prints all that the process
then held at its fullest, Python and its libraries included; from two lengths the line through both is followed to the
given memory. Checkpointing cannot be counted without data, so it is in that alone.

"peft" is the model's own loss and what a script has that sets nothing, "veneer" what `veneer train` does as it comes
(base_kernels, the head's loss in chunks) with `return_memory: true`; "veneer, memory kept" is that without it, "+ mlp"
that with `mlp_checkpointing: true`. "+ checkpointing" computes each layer's activations again, in either package.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from common import SMOLLM2, commit, forget_peak, machine, package, peak_mb, resident_mb, write

WHO = ("peft", "veneer, memory kept", "veneer", "veneer + mlp", "peft + checkpointing", "veneer + checkpointing")
COUNTED = ("peft", "veneer", "veneer + mlp")
PAIRS = {who: "peft + checkpointing" if "checkpointing" in who else "peft" for who in WHO}  # like with like
GRAIN = 64  # lengths are tried in steps of this


def build(who: str, where: str) -> Any:
    """The adapted model, training; `where` is "meta" or "cpu"."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SMOLLM2, "max_position_embeddings": 1 << 20, "use_cache": False})
    torch.manual_seed(0)
    with torch.device(where):
        base: Any = LlamaForCausalLM(config)
    pkg = package("veneer" if who.startswith("veneer") else "peft")
    if who.startswith("veneer"):
        from veneer.train.estimate import kernels_of

        recipe: Any = SimpleNamespace(base=SimpleNamespace(kernels=True), train={"mlp_checkpointing": "mlp" in who})
        kernels_of(base, recipe).on()
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
    loss = lambda: model(input_ids=ids, labels=ids).loss
    if who.startswith("veneer"):
        entropy = vocabulary_loss(model, 1, length, labels, chunked=True)
        loss = lambda: entropy().sum()
    with whole_rows():
        return (1.0 if who.startswith("veneer") else HEAP) * count(model, loss).peak


@contextmanager
def whole_rows() -> Iterator[None]:
    """Inside, attention has no mask, as a row without padding needs none; tensors without data cannot say so."""
    from transformers.models.llama import modeling_llama

    made = modeling_llama.create_causal_mask
    modeling_llama.create_causal_mask = lambda *_, **__: None
    try:
        yield
    finally:
        modeling_llama.create_causal_mask = made


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


def train(who: str, length: int, labels: float, steps: int) -> None:
    """Real steps; a JSON line with the process's memory at its fullest in MB, and the processor's seconds of a step."""
    import time

    import torch

    from veneer.train.allocator import keep_blocks, return_blocks
    from veneer.train.loss import labelled_loss

    model: Any = build(who, "cpu")
    ids = torch.randint(0, SMOLLM2["vocab_size"], (1, length))
    targets = ids.masked_fill(torch.rand(ids.shape) >= labels, -100)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": targets}
    if who.startswith("veneer"):
        _ = keep_blocks() if "kept" in who else return_blocks()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    forget_peak()
    began = time.process_time()
    for _ in range(steps):
        loss = labelled_loss(model, call, None) if who.startswith("veneer") else model(**call).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = (time.process_time() - began) / steps
    print(json.dumps({"used": peak_mb(), "seconds": seconds, "loss": loss.item()}))


def confirm(who: str, length: int, labels: float, steps: int) -> dict[str, Any]:
    line = [sys.executable, __file__, "--worker", who, "--confirm", str(length), "--labels", str(labels)]
    line += ["--steps", str(steps)]
    pages = {"THP_MEM_ALLOC_ENABLE": "1"} if who.startswith("veneer") else {}  # as `veneer` sets it
    environment = os.environ | pages
    out = subprocess.run(line, check=True, capture_output=True, text=True, env=environment).stdout
    return json.loads(out.strip().splitlines()[-1])


def followed(real: dict[str, Any], who: str, lengths: list[int], room: float) -> int:
    """The length at which the line through what two lengths used reaches `room` MB."""
    short, long = min(lengths), max(lengths)
    a, b = (real[f"{who} {n}"]["used"] for n in (short, long))
    return int(short + (room - a) * (long - short) / (b - a))


def told(found: dict[str, int]) -> str:
    """Each contestant's length, and as a multiple of peft's with the same choice of checkpointing."""
    lines = []
    for who, length in found.items():
        ratios = [f"{length / found[other]:5.2f} of {other}" for other in dict.fromkeys(("peft", PAIRS[who]))
                  if other in found]  # fmt: skip
        lines.append(f"  {who:24} {length:7} tokens   {', '.join(ratios)}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=8.0, help="GiB of memory, the process's own included")
    parser.add_argument("--labels", type=float, default=1.0, help="the share of tokens that have a label")
    parser.add_argument("--confirm", type=int, nargs="*", default=[], help="lengths to train on for real")
    parser.add_argument("--steps", type=int, default=1, help="steps at each of them")
    parser.add_argument("--who", nargs="*", default=list(WHO), choices=WHO, help="contestants (default: all)")
    parser.add_argument("--json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        train(args.worker, args.confirm[0], args.labels, args.steps)
        return
    for name in ("transformers.models.llama", "peft", "veneer.train.trainer"):  # what a run has in memory
        __import__(name)
    process = resident_mb() * 2**20
    found = {who: longest(who, args.gb * 2**30 - process, args.labels) for who in COUNTED if who in args.who}
    print(f"longest sequence in {args.gb:g} GiB ({process / 2**20:.0f} MB of them the process's own), counted:")
    print(told(found), flush=True)
    real: dict[str, Any] = {}
    for length in args.confirm:
        for who in args.who:
            real[f"{who} {length}"] = was = confirm(who, length, args.labels, args.steps)
            print(
                f"  {who:24} {length:7} tokens: {was['used']:.0f} MB in all, {was['seconds']:.1f} s of the processor a "
                f"step, loss {was['loss']:.4f}", flush=True,
            )  # fmt: skip
    if len(args.confirm) > 1:
        measured = {who: followed(real, who, args.confirm, args.gb * 2**10) for who in args.who}
        print(f"from what was used at {min(args.confirm)} and {max(args.confirm)}:")
        print(told(measured))
        found |= {f"{who}, measured": length for who, length in measured.items()}
    if args.json:
        write(args.json, {"longest": found, "real": real, "gb": args.gb, "machine": machine(), "commit": commit()})


if __name__ == "__main__":
    main()
