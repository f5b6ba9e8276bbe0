"""What `veneer plan` says that training will hold in memory, against what it then holds.

    python benchmarks/plan_memory.py [--only NAME] [--json FILE]

For each shape a model with random weights is written to a temporary folder; one process asks for the estimate, another
trains three steps and reports its peak resident set less what it held before the model was loaded. Scoring of test rows
is no part of either.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

#: name -> (model, task, rows a batch, words a row, the recipe's adapter section, more of its train section)
SHAPES: dict[str, tuple[str, str, int, int, dict[str, Any], dict[str, Any]]] = {
    "llama 576x12, 4x256, all-linear": ("small", "causal-lm", 4, 256, {"r": 16, "target_modules": "all-linear"}, {}),
    "llama 576x12, 8x512, q and v": (
        "small", "causal-lm", 8, 512, {"r": 8, "target_modules": ["q_proj", "v_proj"]}, {}),
    "llama 1024x4, 2x384, dropout": (
        "wide", "causal-lm", 2, 384, {"r": 32, "target_modules": "all-linear", "lora_dropout": 0.1}, {}),
    "bert 384x6, 32x128, classes": ("bert", "seq-cls", 32, 126, {"r": 8, "target_modules": "all-linear"}, {}),
}  # fmt: skip
WORDS = 400


def make_model(kind: str, folder: Path) -> None:
    """A model with random weights and a tokenizer that knows WORDS words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    if kind == "bert":
        config = BertConfig(vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                            intermediate_size=1536)  # fmt: skip
        BertModel(config).save_pretrained(folder)
        return
    wide = kind == "wide"
    llama = LlamaConfig(
        vocab_size=49152, hidden_size=1024 if wide else 576, intermediate_size=2816 if wide else 1536,
        num_hidden_layers=4 if wide else 12, num_attention_heads=16 if wide else 9,
        num_key_value_heads=4 if wide else 3, tie_word_embeddings=True, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(folder)


def recipe_of(name: str, folder: Path) -> dict[str, Any]:
    """The recipe of a shape, its rows and its model written into ``folder``."""
    kind, task, size, length, adapter, train = SHAPES[name]
    make_model(kind, folder / "model")
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number in range(size * 3):
        row: dict[str, Any] = {"text": " ".join(f"w{draw.randrange(WORDS)}" for _ in range(length - 1))}
        rows.append(row | ({"label": f"c{number % 3}"} if task == "seq-cls" else {}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    steps = {"max_steps": 3, "per_device_train_batch_size": size, "use_cpu": True, "save_strategy": "no", **train}
    return {"task": task, "base": str(folder / "model"), "data": {"train": str(folder / "rows.jsonl")},
            "adapter": adapter, "train": steps, "out": str(folder / "out")}  # fmt: skip


def worker(what: str, recipe: dict[str, Any]) -> None:
    import resource

    import transformers

    from veneer.train import load_recipe
    from veneer.train.allocator import large_pages
    from veneer.train.loop import run
    from veneer.train.outlook import outlook
    from veneer.train.progress import memory_in_use_mb

    large_pages()
    transformers.logging.set_verbosity_error()
    loaded = load_recipe(None, **recipe)
    found = outlook(loaded)  # before training too: all libraries are then in memory
    if what == "estimate":
        parts = {"weights": found.estimate.weights, "states": found.estimate.states, "step": found.estimate.step}
        print(json.dumps({key: value / 2**20 for key, value in parts.items()} | {"base": found.base / 2**20}))
        return
    before = memory_in_use_mb()
    run(loaded)
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, "before": before}))


def ask(what: str, recipe: dict[str, Any]) -> dict[str, float]:
    """Run this script as a worker; its last line."""
    line = [sys.executable, __file__, "--worker", what, "--recipe", json.dumps(recipe)]
    out = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(out.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="Shapes whose names hold this.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker")
    parser.add_argument("--recipe")
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, json.loads(args.recipe))
        return
    table = {}
    print(f"{'shape':38} {'estimate':>9} {'used':>9}  ratio  with the process (MB)")
    for name in SHAPES:
        if args.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            recipe = recipe_of(name, Path(folder))
            said, was = ask("estimate", recipe), ask("train", recipe)
        process = said.pop("base")
        total, used = sum(said.values()), was["peak"] - was["before"]
        whole = (total + process) / was["peak"]
        table[name] = {**said, "estimate": total, "used": used, "ratio": total / used, "ratio with process": whole}
        print(f"{name:38} {total:9.0f} {used:9.0f}  {total / used:5.2f}  {whole:5.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
