"""One LoRA training step on the SmolLM2-135M shape: veneer, peft and the frozen base's own forward and backward.

    python benchmarks/lora_step.py [--rounds 7] [--batch 4] [--seq 256] [--dropout 0.0] [--dtype float32]
                                   [--labels 1.0] [--json FILE]

Each contestant is a process of its own, so that peak memory is its own; they take turns, one step each a round, so that
a change in the machine's speed hits all alike. "frozen" is the limit: the base's forward and the gradient of its
input, nothing trained. "veneer" is the import changed and nothing else; "switches" has what `veneer train` turns on
besides: base_kernels, the head's loss in chunks and at the labels alone, freed memory kept. --labels is the share of
tokens that carry a label. Losses must agree between them and peft, or the run fails. Printed: medians, and ratios taken
round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # as veneer.train.allocator sets it before torch is imported
CONTESTANTS = ("frozen", "peft", "veneer", "switches")


def memory_mb(torch: Any, device: str) -> float:
    """Peak memory of this process: allocated on the GPU, resident on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform != "darwin" else 2**20)


def worker(args: argparse.Namespace) -> None:
    """Build one contestant, then one step for every line on stdin; a JSON line out for each."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(device, getattr(torch, args.dtype)).train()
    weights_mb = memory_mb(torch, device)
    ids = torch.randint(0, SHAPE["vocab_size"], (args.batch, args.seq), device=device)
    labels = ids.masked_fill(torch.rand(args.batch, args.seq, device=device) >= args.labels, -100)
    optimizer = None
    if args.worker == "frozen":
        for p in model.parameters():
            p.requires_grad_(False)
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        inputs = {"inputs_embeds": embeds, "labels": labels}
    else:
        if args.worker == "peft":
            import peft as package
        else:
            import veneer as package  # type: ignore[no-redef]
        config = package.LoraConfig(
            task_type="CAUSAL_LM",
            r=args.r,
            lora_alpha=2 * args.r,
            target_modules="all-linear",
            lora_dropout=args.dropout,
        )
        model = package.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(1)
        for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        inputs = {"input_ids": ids, "labels": labels}
    if args.worker == "switches":
        from veneer.train.allocator import keep_blocks
        from veneer.train.loss import labelled_loss

        package.base_kernels(model).on()
        keep_blocks()
    print(json.dumps({"ready": args.worker, "weights_mb": weights_mb, "device": device}), flush=True)
    for _ in sys.stdin:
        torch.manual_seed(2)
        began = time.perf_counter()
        if args.worker == "switches":
            loss = labelled_loss(model, {**inputs, "use_cache": False}, None)  # type: ignore[dict-item]
        else:
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        else:
            embeds.grad = None
        value = loss.item()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "loss": value, "peak_mb": memory_mb(torch, device)}), flush=True)


class Contestant:
    def __init__(self, name: str, argv: list[str]):
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", name, *argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **({LARGE_PAGES: "1"} if name == "switches" else {})},
        )
        self.ready = self.read()
        self.steps: list[dict[str, float]] = []

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} stopped (exit status {self.process.wait()}); its error is above")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def machine() -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    if not torch.cuda.is_available() and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            models = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
        name = models[0] if models else name
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    here = os.path.dirname(os.path.abspath(__file__))
    out = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return out.stdout.strip() or None


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--labels", type=float, default=1.0, help="share of the tokens that carry a label")
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    argv = [f"--{k}={getattr(args, k)}" for k in ("batch", "seq", "r", "dropout", "dtype", "labels")]
    field = [Contestant(name, argv) for name in CONTESTANTS]
    for c in field:
        c.step()  # warm-up
    for i in range(args.rounds):
        for c in field[i % len(field) :] + field[: i % len(field)]:
            c.steps.append(c.step())
    for c in field:
        c.close()
    report(args, {c.name: c for c in field})


def report(args: argparse.Namespace, by: dict[str, Contestant]) -> None:
    losses = {n: [s["loss"] for s in c.steps] for n, c in by.items()}
    seconds = {n: [s["seconds"] for s in c.steps] for n, c in by.items()}
    above = {n: c.steps[-1]["peak_mb"] - c.ready["weights_mb"] for n, c in by.items()}
    info = machine()
    print(
        f"LoRA r={args.r} on every linear layer, {args.batch} x {args.seq} tokens, {args.dtype}, "
        f"dropout {args.dropout}, {args.labels:.0%} labelled, {args.rounds} rounds"
    )
    print(f"{info['device']}, {info['threads']} threads, torch {info['torch']}")
    for name in CONTESTANTS:
        print(f"  {name:8} step {spread(seconds[name])} s   peak above weights {above[name]:.0f} MB")
    ratios = {
        f"{a}/{b}": [x / y for x, y in zip(seconds[a], seconds[b], strict=True)]
        for a, b in (
            ("veneer", "peft"),
            ("switches", "peft"),
            ("veneer", "frozen"),
            ("switches", "frozen"),
            ("peft", "frozen"),
        )
    }
    for name, values in ratios.items():
        a, b = name.split("/")
        print(f"  {name:15} time {spread(values)}   memory above weights {above[a] / above[b]:.3f}")
    if args.json:
        result = {
            "case": vars(args),
            "machine": info,
            "commit": commit(),
            "seconds": seconds,
            "losses": losses,
            "peak_above_weights_mb": above,
            "time_ratios": {k: statistics.median(v) for k, v in ratios.items()},
        }
        temporary = args.json + ".part"
        with open(temporary, "w") as f:
            json.dump(result, f, indent=1)
        os.replace(temporary, args.json)
    tolerance = 1e-4 if args.dtype == "float32" else 2e-2
    if args.dropout == 0:
        for name in ("veneer", "switches"):
            worst = max(abs(a - b) / abs(b) for a, b in zip(losses[name], losses["peft"], strict=True))
            print(f"  losses of {name} and peft agree to {worst:.1e}")
            if worst > tolerance:
                raise SystemExit(
                    f"losses differ by {worst:.1e}, more than {tolerance:.0e}: {name} and peft do not compute the same"
                )


if __name__ == "__main__":
    main()
