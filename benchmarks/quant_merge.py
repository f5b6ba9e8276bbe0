"""What merging into a quantised base costs: LoRA on the real layers of SmolLM2-135M, by way of quantising.

    python benchmarks/quant_merge.py [--ways nf4 int8 ...] [--sizes 0.01 0.03 0.1] [--layers 0 14 29] [--json FILE]

For each way the model is loaded as `base: {quantize: WAY}` loads it, and a LoRA (r = 16) with random factors is put
on q_proj, v_proj and down_proj of a few layers, scaled so that its change is 1, 3 or 10 % of the weight's norm: about
what short, usual and long runs end with. Then it is merged. Printed, as means over the layers: how far the quantised
base is from the original weights; and for each size the error of the merged weight as a share of the change, and how
much of the change is still there. Both come from `merge_errors()`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch

TARGETS = ("q_proj", "v_proj", "down_proj")


def originals(model: Any, numbers: list[int]) -> dict[str, torch.Tensor]:
    """Layer path -> weight, of the layers that the LoRA is put on."""
    ends = tuple(f"layers.{i}.{part}.{t}" for i in numbers for part in ("self_attn", "mlp") for t in TARGETS)
    return {n: m.weight.detach().clone() for n, m in model.named_modules() if n.endswith(ends)}


def scale_to(model: Any, size: float) -> None:
    """Make every layer's change `size` times as long as its weight."""
    generator = torch.Generator().manual_seed(0)
    for _, layer in model.base_model.adapted_layers():
        view = layer.view("default")
        for key in ("lora_A", "lora_B"):
            t = getattr(view, key)
            view.fill(key, torch.randn(t.shape, generator=generator).to(t))
        weight = layer.site.weight()
        view.fill("lora_B", view.lora_B * float(size * weight.norm() / layer.delta("default").norm()))


def measure(way: str, weights: dict[str, torch.Tensor], sizes: list[float]) -> dict[str, Any]:
    from veneer import LoraConfig, get_peft_model
    from veneer.train.bases import load_base, resolve_base
    from veneer.train.recipe import BaseSpec

    model, _ = load_base(resolve_base(BaseSpec(name="smollm2-135m-instruct", quantize=way)), "causal-lm")  # type: ignore[arg-type]
    model = get_peft_model(model, LoraConfig(r=16, target_modules=list(weights)))
    sites = {n: layer.site for n, layer in model.base_model.adapted_layers()}
    base = statistics.mean(
        float((s.weight().float() - weights[n]).norm() / weights[n].norm()) for n, s in sites.items()
    )
    found: dict[str, Any] = {"base": base, "layers": len(sites)}
    for size in sizes:
        scale_to(model, size)
        model.merge_adapter()
        errors = model.base_model.merge_errors().values()
        keys = ("weight", "change", "kept")
        found[f"{size:g}"] = {k: statistics.mean(getattr(e, k) for e in errors) for k in keys}
        model.unmerge_adapter()
    return found


def table(results: dict[str, Any], sizes: list[float]) -> str:
    head = ["quantised as", "base off by", *(f"change {100 * s:g} %: error / kept" for s in sizes)]
    lines = [head, ["---"] * len(head)]
    for way, r in results.items():
        cells = [f"{r[f'{s:g}']['change']:.2f} / {100 * r[f'{s:g}']['kept']:.0f} %" for s in sizes]
        lines.append([way, f"{100 * r['base']:.2g} %", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    from veneer.backends.loading import QUANTISED
    from veneer.train.bases import load_base, resolve_base

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=list(QUANTISED), choices=list(QUANTISED))
    parser.add_argument("--sizes", nargs="+", type=float, default=[0.01, 0.03, 0.1])
    parser.add_argument("--layers", nargs="+", type=int, default=[0, 14, 29])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    weights = originals(load_base(resolve_base("smollm2-135m-instruct"), "causal-lm")[0], args.layers)
    results = {}
    for way in args.ways:
        results[way] = measure(way, weights, args.sizes)
        print(way, json.dumps(results[way]), flush=True)
    print(table(results, args.sizes))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
