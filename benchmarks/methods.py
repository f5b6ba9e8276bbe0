"""Every registered method on one transformer: veneer against peft, and against the frozen base.

    python benchmarks/methods.py [--methods LORA VERA] [--missing] [--rounds 4] [--threads 1] [--json FILE]

The base has 8 layers of SmolLM2-135M's width (hidden 576); each method adapts all its linear layers where it can. Each
contestant is a process of its own. They take turns, --steps training steps each a round, and go first in turn, so
that a change in the machine's speed hits all alike; ratios are taken round by round. With one thread they are ratios
of the processor's time, which other programs on the machine hardly change; with more, of wall time. Both packages
start from the same tensors, which peft's process writes, and must have the same losses. "frozen" is the base's forward
and the gradient of its input, nothing trained.

--json takes in the results that the file already holds for other methods, if they are of the same case, so that the
registry can be measured in slices; --missing leaves out those that it holds. `make docs` turns
benchmarks/methods.json into the tables of docs/methods/README.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import commit, forget_peak, machine, resident_mb, take_turns, write

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
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
CASE = ("batch", "seq", "steps", "threads")
PACKAGES = ("peft", "veneer")
BY_TASK = ("POLY", "MULTITASK_PROMPT_TUNING")  # they want a task number a row
PRELOADED = ["torch", "transformers.models.llama.modeling_llama", "peft", "veneer.docs.facts"]
CLOSE = 1e-3  # of the losses of all steps together; tests/laws/test_parity.py holds single methods to 1e-4


# -- a contestant's process ------------------------------------------------------------------------------
def base_model(torch: Any, **smaller: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SHAPE | smaller)))


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


class Contestant:
    """A forked process that serves laps; the packages are imported once, in the process that it is forked from."""

    def __init__(self, name: str, args: argparse.Namespace, method: str = "", folder: str = ""):
        self.name: str = name
        self.laps: list[dict[str, Any]] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=worker, args=(theirs, name, args, method, folder), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = self.read()

    def read(self) -> dict[str, Any]:
        try:
            got: dict[str, Any] = self.pipe.recv()
            return got
        except EOFError:
            self.process.join()
            raise RuntimeError(f"{self.name} stopped with {self.process.exitcode}; its error is above") from None

    def lap(self) -> None:
        self.pipe.send("go")
        self.laps.append(self.read())

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


def worker(pipe: Any, who: str, args: argparse.Namespace, method: str, folder: str) -> None:
    """Build one contestant, then `steps` training steps for every word that comes."""
    import torch

    torch.set_num_threads(args.threads)
    ids = torch.randint(1, SHAPE["vocab_size"], (args.batch, args.seq), generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids, "labels": ids}
    if method in BY_TASK:
        call["task_ids"] = torch.zeros(args.batch, dtype=torch.long)
    before = resident_mb()
    told: dict[str, Any] = {}
    optimizer = None
    if who == "frozen":
        model = base_model(torch).requires_grad_(False).train()
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        call = {"inputs_embeds": embeds, "labels": ids}
    else:
        began = time.perf_counter()
        model = build(torch, who, method, Path(folder)).train()
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
    pipe.send(told)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        gc.collect()
        began, cpu = time.perf_counter(), time.process_time()
        losses = [step() for _ in range(args.steps)]
        seconds, cpu = ((time.perf_counter() - began) / args.steps, (time.process_time() - cpu) / args.steps)
        peak = resident_mb(peak=True) - before - weights
        pipe.send({"seconds": seconds, "cpu": cpu, "losses": losses, "peak_mb": peak})


# -- the race --------------------------------------------------------------------------------------------
def race(method: str, frozen: Contestant, args: argparse.Namespace) -> dict[str, Any]:
    """One method's row: medians, and medians of ratios taken round by round."""
    frozen.laps = []
    with tempfile.TemporaryDirectory() as folder:
        entrants: list[Contestant] = []
        try:
            for name in PACKAGES:  # peft first: it writes the tensors
                entrants.append(Contestant(name, args, method, folder))
            take_turns([*entrants, frozen], args.rounds)
        finally:
            for c in entrants:
                c.close()
    return row(*entrants, frozen, clock="cpu" if args.threads == 1 else "seconds") | {"rounds": args.rounds}


def row(peft: Contestant, veneer: Contestant, frozen: Contestant, clock: str) -> dict[str, Any]:
    """clock: what ratios are of, "cpu" or "seconds"."""
    took = {k: {c.name: [lap[k] for lap in c.laps] for c in (peft, veneer, frozen)} for k in ("cpu", "seconds")}
    memory = {c.name: max(lap["peak_mb"] for lap in c.laps) for c in (peft, veneer, frozen)}
    losses = {c.name: [x for lap in c.laps for x in lap["losses"]] for c in (peft, veneer)}
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(took[clock][a], took[clock][b], strict=True))
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses["veneer"], losses["peft"], strict=True))
    return {
        "time_ratio": ratio("veneer", "peft"),
        "time_to_frozen": ratio("veneer", "frozen"),
        "peft_time_to_frozen": ratio("peft", "frozen"),
        "memory_ratio": memory["veneer"] / memory["peft"],
        "peak_mb": memory,
        **{k: {name: statistics.median(values) for name, values in by.items()} for k, by in took.items()},
        "spread": {name: [min(values), max(values)] for name, values in took[clock].items()},
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


def capabilities(method: str, held: dict[str, Any]) -> dict[str, bool | None]:
    """held: the method's earlier row, whose word on quantised bases stays where bitsandbytes is not installed."""
    from veneer.docs.facts import facts

    f, found = facts(method), quantised(method)
    trains = held.get("quantised") if found is None else found
    return {"mergeable": bool(f.merges), "mixed_batches": f.mixed, "quantised": trains}


def quantised(method: str) -> bool | None:
    """Whether it trains on a small base in NF4; None: bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    import bitsandbytes as bnb
    import torch

    import veneer
    from veneer import registry
    from veneer.docs.facts import settings

    base = base_model(torch, hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=128, **HEADS)
    for path, layer in list(base.model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
            new.load_state_dict(layer.state_dict())
            base.model.set_submodule(path, new.to("cpu"))
    call: dict[str, Any] = {"input_ids": torch.ones(2, 5, dtype=torch.long), "use_cache": False}
    if method in BY_TASK:
        call["task_ids"] = torch.zeros(2, dtype=torch.long)
    chosen = registry.method(method)
    try:
        model = veneer.get_peft_model(base, chosen.Config(task_type="CAUSAL_LM", **settings(chosen)))
        model(**call, labels=call["input_ids"]).loss.backward()
    except (ValueError, NotImplementedError):
        return False
    grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    return bool(grads) and all(g.isfinite().all() for g in grads)


def kept(path: str | None, case: dict[str, Any]) -> dict[str, Any]:
    """The rows of an earlier run of the same case."""
    if path is None or not os.path.exists(path):
        return {}
    held = json.loads(Path(path).read_text(encoding="utf-8"))
    return held["methods"] if held["case"] == case else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", type=str.upper, help="names of the registry (default: all)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1, help="training steps a contestant's turn has")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--missing", action="store_true", help="leave out methods that the file of --json holds")
    parser.add_argument("--json", help="write the result here, beside what it holds of other methods")
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    from veneer import registry
    from veneer.docs.facts import needs_others

    names = args.methods or [n for n in registry.METHODS if not needs_others(registry.method(n))]
    if unknown := [n for n in names if n not in registry.METHODS]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(registry.METHODS)}")
    case = {k: getattr(args, k) for k in CASE} | {"shape": SHAPE}
    held = kept(args.json, case)
    names = [n for n in names if not (args.missing and n in held)]
    result = {"case": case, "machine": machine(), "methods": held}
    frozen = Contestant("frozen", args)
    print("time, memory: veneer's over peft's; /frozen: step time over the frozen base's\n" + HEAD, flush=True)
    failed = []
    for name in names:
        try:
            found = race(name, frozen, args) | {"commit": commit()}
            result["methods"][name] = found | capabilities(name, held.get(name, {}))
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
