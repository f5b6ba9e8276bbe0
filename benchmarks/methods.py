"""Every registered method on one transformer: veneer against peft, and against the frozen base.

    python benchmarks/methods.py [--methods LORA VERA] [--rounds 5] [--steps 1] [--batch 4] [--seq 64] [--json FILE]

The base has 8 layers of SmolLM2-135M's width (hidden 576); each method adapts all its linear layers where it can. Each
contestant is a process of its own. They take turns, --steps training steps each a round, and go first in turn, so
that a change in the machine's speed hits all alike; ratios are taken round by round. Both packages start from the same
tensors, which peft's process writes, and must have the same losses. "frozen" is the base's forward and the gradient of
its input, nothing trained.

--json takes in the results that the file already holds for other methods, if they are of the same case. `make docs`
turns benchmarks/methods.json into the tables of docs/methods/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Contestant, commit, forget_peak, machine, resident_mb, take_turns, write

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
PACKAGES = ("peft", "veneer")
SCRIPT = os.path.abspath(__file__)
CLOSE = 1e-3  # of the losses of all steps together; tests/laws/test_parity.py holds single methods to 1e-4


# -- a contestant's process ------------------------------------------------------------------------------
def base_model(torch: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def build(torch: Any, package_name: str, method: str, folder: Path) -> Any:
    """peft: a fresh adapter, its trained tensors moved off their initial values, saved. veneer: the same tensors."""
    import importlib

    from veneer import registry
    from veneer.docs.facts import settings
    from veneer.kinds import Prompt

    package: Any = importlib.import_module(package_name)
    config = getattr(package, registry.METHODS[method].config)
    base, by_name = base_model(torch), folder / "trained.pt"
    on_layers = not isinstance(registry.method(method), Prompt)
    torch.manual_seed(1)
    if package_name == "veneer" and on_layers:
        return package.PeftModel.from_pretrained(base, folder, is_trainable=True)
    model = package.get_peft_model(base, config(task_type="CAUSAL_LM", **settings(registry.method(method))))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        if package_name == "veneer":  # a prompt's file holds what its encoder gives, not the encoder
            for n, value in torch.load(by_name, weights_only=True).items():
                trained[n].copy_(value)
            return model
        for p in trained.values():
            p.add_(torch.randn_like(p) * 0.01)
    model.save_pretrained(folder)
    torch.save({n: p.detach() for n, p in trained.items()}, by_name)
    return model


def size_on_disk(model: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors"))


def worker(args: argparse.Namespace) -> None:
    """Build one contestant, then `steps` training steps for every line on stdin; a JSON line out for each."""
    import torch

    ids = torch.randint(1, SHAPE["vocab_size"], (args.batch, args.seq), generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids, "labels": ids}
    before = resident_mb()
    told: dict[str, Any] = {}
    optimizer = None
    if args.worker == "frozen":
        model = base_model(torch).requires_grad_(False).train()
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        call = {"inputs_embeds": embeds, "labels": ids}
    else:
        began = time.perf_counter()
        model = build(torch, args.worker, args.methods[0], Path(args.folder)).train()
        told["build_seconds"] = time.perf_counter() - began
        told["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        told["file_bytes"] = size_on_disk(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    by_hand = getattr(getattr(model, "base_model", None), "update_and_allocate", None)
    with torch.device("meta"):
        weights = sum(p.numel() * p.element_size() for p in base_model(torch).parameters()) / 2**20
    done = 0

    def step() -> float:
        nonlocal done
        torch.manual_seed(done)
        loss = model(**call, use_cache=False).loss
        loss.backward()
        if optimizer is None:
            embeds.grad = None
        else:
            optimizer.step()
            if by_hand is not None:
                by_hand(done)
            optimizer.zero_grad(set_to_none=True)
        done += 1
        return loss.item()

    step()  # warm-up
    forget_peak()
    print(json.dumps({"ready": args.worker, **told}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        losses = [step() for _ in range(args.steps)]
        seconds = (time.perf_counter() - began) / args.steps
        peak = resident_mb(peak=True) - before - weights
        print(json.dumps({"seconds": seconds, "losses": losses, "peak_mb": peak}), flush=True)


# -- the race --------------------------------------------------------------------------------------------
def race(method: str, frozen: Contestant, args: argparse.Namespace) -> dict[str, Any]:
    """One method's row: medians, and medians of ratios taken round by round."""
    frozen.laps = []
    with tempfile.TemporaryDirectory() as folder:
        argv = [f"--{k}={getattr(args, k)}" for k in ("batch", "seq", "steps")]
        argv += ["--methods", method, "--folder", folder]
        entrants: list[Contestant] = []
        try:
            for name in PACKAGES:  # peft first: it writes the tensors
                entrants.append(Contestant(name, SCRIPT, argv))
            take_turns([*entrants, frozen], args.rounds)
        finally:
            for c in entrants:
                c.close()
    return row(*entrants, frozen)


def row(peft: Contestant, veneer: Contestant, frozen: Contestant) -> dict[str, Any]:
    seconds = {c.name: [lap["seconds"] for lap in c.laps] for c in (peft, veneer, frozen)}
    memory = {c.name: max(lap["peak_mb"] for lap in c.laps) for c in (peft, veneer, frozen)}
    losses = {c.name: [x for lap in c.laps for x in lap["losses"]] for c in (peft, veneer)}
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses["veneer"], losses["peft"], strict=True))
    return {
        "time_ratio": ratio("veneer", "peft"),
        "time_to_frozen": ratio("veneer", "frozen"),
        "peft_time_to_frozen": ratio("peft", "frozen"),
        "memory_ratio": memory["veneer"] / memory["peft"],
        "peak_mb": memory,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "spread": {name: [min(values), max(values)] for name, values in seconds.items()},
        "loss_difference": worst,
        "trained": veneer.ready["trained"],
        "peft_trained": peft.ready["trained"],
        "file_bytes": veneer.ready["file_bytes"],
        "peft_file_bytes": peft.ready["file_bytes"],
        "build_seconds": {c.name: c.ready["build_seconds"] for c in (peft, veneer)},
    }


# -- the table -------------------------------------------------------------------------------------------
HEAD = (
    f"{'method':24} {'time':>6} {'memory':>6} {'/frozen':>7} {'peft/frozen':>11} {'trained':>9} {'file':>9} "
    f"{'losses':>8}"
)


def line(method: str, r: dict[str, Any]) -> str:
    return (
        f"{method:24} {r['time_ratio']:6.2f} {r['memory_ratio']:6.2f} {r['time_to_frozen']:7.2f} "
        f"{r['peft_time_to_frozen']:11.2f} {r['trained']:9,} {r['file_bytes'] / 1024:8.0f}K {r['loss_difference']:8.1e}"
    )


def capabilities(method: str) -> dict[str, bool]:
    from veneer.docs.facts import facts

    f = facts(method)
    return {"mergeable": bool(f.merges), "mixed_batches": f.mixed}


def kept(path: str | None, case: dict[str, Any]) -> dict[str, Any]:
    """The rows of an earlier run of the same case."""
    if path is None or not os.path.exists(path):
        return {}
    held = json.loads(Path(path).read_text(encoding="utf-8"))
    return held["methods"] if held["case"] == case else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", type=str.upper, help="names of the registry (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="training steps a contestant's turn has")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--json", help="write the result here, beside what it holds of other methods")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    from veneer import registry

    names = args.methods or list(registry.METHODS)
    if unknown := [n for n in names if n not in registry.METHODS]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(registry.METHODS)}")
    case = {k: getattr(args, k) for k in ("batch", "seq", "rounds", "steps")} | {"shape": SHAPE}
    result = {"case": case, "machine": machine(), "commit": commit(), "methods": kept(args.json, case)}
    frozen = Contestant("frozen", SCRIPT, [f"--{k}={getattr(args, k)}" for k in ("batch", "seq", "steps")])
    print("time, memory: veneer's over peft's; /frozen: step time over the frozen base's\n" + HEAD, flush=True)
    failed = []
    for name in names:
        try:
            result["methods"][name] = race(name, frozen, args) | capabilities(name)
        except RuntimeError as e:
            failed.append(f"{name}: {e}")
            continue
        print(line(name, result["methods"][name]), flush=True)
        if result["methods"][name]["loss_difference"] > CLOSE:
            failed.append(f"{name}: losses differ by {result['methods'][name]['loss_difference']:.1e}")
        if args.json:
            write(args.json, result)
    frozen.close()
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
