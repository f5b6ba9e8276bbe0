"""Requests a second of `veneer serve`, over HTTP, against a loop over peft's set_adapter and generate.

    python benchmarks/serving.py [--requests 32] [--tokens 24] [--clients 16] [--rounds 3] [--json FILE]

The base is SmolLM2-135M; adapters are LoRA (r = 16, every linear layer) with random factors. Contestants take turns:

base        the server without adapters
veneer-1    the server, every request for one adapter
veneer-16   the server, requests for 16 adapters in turn
peft-1, -16 one request after another in a process of its own, without HTTP: set_adapter, then generate. Its rate does
            not depend on how many requests there are, so that it answers every fourth

A lap of a server is all requests, from clients that each send the next one when the last is answered; greedy. Rates
are medians over the rounds, ratios are taken round by round. "cpu" is the processor's time a token, of the server or
of the loop. "agree": the share of answers that are token for token those of the loop over peft.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import Contestant, commit, cpu_seconds, machine, spread, take_turns, write

BASE = "smollm2-135m-instruct"
ADAPTERS = 16
SERVERS = {"base": 0, "veneer-1": 1, "veneer-16": ADAPTERS}
LOOPS = {"peft-1": 1, "peft-16": ADAPTERS}
EVERY = 4
PAIRS = (
    ("veneer-1", "peft-1"), ("veneer-16", "peft-16"), ("veneer-16", "base"), ("veneer-1", "base"),
    ("veneer-16", "veneer-1"),
)  # fmt: skip


def prompts(count: int) -> list[list[int]]:
    """Token ids, 16 to 64 a prompt."""
    draw = random.Random(0)
    return [[draw.randrange(1000, 40000) for _ in range(draw.randrange(16, 65))] for _ in range(count)]


def make_adapters(folder: Path) -> None:
    import torch

    from veneer import LoraConfig, get_peft_model
    from veneer.train.bases import load_base, resolve_base

    model = get_peft_model(
        load_base(resolve_base(BASE), "causal-lm")[0],
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for number in range(ADAPTERS):
        generator = torch.Generator().manual_seed(number)
        for p in model.parameters():
            if p.requires_grad:
                p.data = torch.randn(p.shape, generator=generator) * 0.02
        model.save_pretrained(str(folder / f"a{number}"))


# -- contestants -------------------------------------------------------------------------------------------
def serve_laps(count: int, folder: Path, o: argparse.Namespace) -> None:
    """Laps against `veneer serve` with `count` adapters, in a process of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [w for i in range(count) for w in ("--adapter", f"a{i}={folder / f'a{i}'}")]
    limits = ["--max-batch", str(o.clients), "--port", str(port), "--name", "base", "--timeout", "3600"]
    server = subprocess.Popen([sys.executable, "-m", "veneer", "serve", BASE, *words, *limits], stdout=sys.stderr)
    asked = prompts(o.requests)

    def ask(number: int) -> list[str | int]:
        model = f"a{number % count}" if count else "base"
        body = {"model": model, "prompt": asked[number], "max_tokens": o.tokens, "temperature": 0}
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
        line.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = line.getresponse()
        found = json.loads(answer.read())
        line.close()
        if answer.status != 200:
            raise RuntimeError(f"the server answered {answer.status}: {found}")
        return [found["choices"][0]["text"], found["usage"]["completion_tokens"]]

    def lap(upto: int) -> list[list[str | int]]:
        with ThreadPoolExecutor(o.clients) as pool:
            return list(pool.map(ask, range(upto)))

    try:
        wait_for(port, server)
        laps(lap, o.requests, lambda: cpu_of(server.pid))
    finally:
        server.kill()  # there is nothing to finish: every request is answered, or the lap has failed
        server.wait()


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the server did not start; its error is above")


def cpu_of(pid: int) -> float:
    """Processor seconds of a running process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def loop_laps(count: int, folder: Path, o: argparse.Namespace) -> None:
    """Laps of peft: one request after another."""
    import peft
    import torch

    from veneer.train.bases import load_base, resolve_base

    model, tokenizer = load_base(resolve_base(BASE), "causal-lm")
    model = peft.PeftModel.from_pretrained(model, str(folder / "a0"), "a0").eval()
    for i in range(1, count):
        model.load_adapter(str(folder / f"a{i}"), f"a{i}")
    asked = prompts(o.requests)

    def lap(upto: int) -> list[list[str | int]]:
        out: list[list[str | int]] = []
        for number in range(0, upto, EVERY):
            model.set_adapter(f"a{number % count}")
            ids = torch.tensor([asked[number]])
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=o.tokens, do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            new = made[0, ids.shape[1] :]
            out.append([tokenizer.decode(new, skip_special_tokens=True), len(new)])
        return out

    laps(lap, o.requests, cpu_seconds)


def laps(lap: Callable[[int], list[list[str | int]]], requests: int, cpu: Callable[[], float]) -> None:
    """A few requests to warm up, then a lap for every line on stdin; a JSON line out for each."""
    lap(2)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        began, used = time.perf_counter(), cpu()
        answers = lap(requests)
        seconds, used = time.perf_counter() - began, cpu() - used
        tokens = sum(int(n) for _, n in answers)
        told = {
            "requests": len(answers) / seconds, "tokens": tokens / seconds, "cpu": used / tokens,
            "answers": [text for text, _ in answers],
        }  # fmt: skip
        print(json.dumps(told), flush=True)


# -- the race ----------------------------------------------------------------------------------------------
def result(field: list[Contestant], o: argparse.Namespace) -> dict[str, Any]:
    by = {c.name: c.laps for c in field}
    keys = ("requests", "tokens", "cpu")
    ratios = {
        f"{a}/{b}": {k: spread([x[k] / y[k] for x, y in zip(by[a], by[b], strict=True)]) for k in keys}
        for a, b in PAIRS
    }
    agree = {}
    for count in (1, ADAPTERS):
        ours, theirs = by[f"veneer-{count}"][-1]["answers"][::EVERY], by[f"peft-{count}"][-1]["answers"]
        agree[str(count)] = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(theirs)
    rates = {name: {k: spread([lap[k] for lap in held]) for k in keys} for name, held in by.items()}
    options = {k: getattr(o, k) for k in ("requests", "tokens", "clients", "rounds")}
    return {
        "rates": rates, "ratios": ratios, "agree": agree, "options": options, "machine": machine(), "commit": commit()
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    lines = ["| | requests/s | tokens/s | CPU ms a token |", "|---|---|---|---|"]
    for name, r in found["rates"].items():
        numbers = f"{r['requests']['median']:.2f} | {r['tokens']['median']:.1f} | {1000 * r['cpu']['median']:.0f}"
        lines.append(f"| {name} | {numbers} |")
    lines += ["", "| | tokens/s | CPU a token |", "|---|---|---|"]
    for pair, r in found["ratios"].items():
        cells = [f"{r[k]['median']:.2f} ({r[k]['low']:.2f} to {r[k]['high']:.2f})" for k in ("tokens", "cpu")]
        lines.append(f"| {pair} | {' | '.join(cells)} |")
    same = ", ".join(f"{n} adapters: {100 * share:.0f} %" for n, share in found["agree"].items())
    return "\n".join([*lines, "", f"answers equal to peft's: {same}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24, help="longest answer")
    parser.add_argument("--clients", type=int, default=16, help="requests at the same time, and rows of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "serving.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.worker:
        run, count = (serve_laps, SERVERS[o.worker]) if o.worker in SERVERS else (loop_laps, LOOPS[o.worker])
        run(count, o.folder, o)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_adapters(Path(folder))
        numbers = [f"--{k}={getattr(o, k)}" for k in ("requests", "tokens", "clients")]
        field: list[Contestant] = []
        try:
            for name in (*SERVERS, *LOOPS):
                field.append(Contestant(name, __file__, [*numbers, "--folder", folder]))
            take_turns(field, o.rounds)
        finally:
            for c in field:
                c.close()
        found = result(field, o)
    write(o.json, found)
    print(table(found))


if __name__ == "__main__":
    main()
