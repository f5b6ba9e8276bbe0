"""Entities in tweets (WNUT-17) with MiniLM: `veneer train`, a plain script with peft, and full fine-tuning.

    python benchmarks/ner.py [--data FOLDER] [--epochs 6] [--seeds 42] [--only veneer peft full] [--json FILE]
    python benchmarks/ner.py --table FILE [FILE ...]      # of runs made one by one with --only and --json

FOLDER holds wnut17/{train,dev,test}.conll as their authors publish them (else $VENEER_TEST_DATA, else ../shared/data
beside the repository). veneer runs examples/ner.yaml; the two scripts are what a tutorial of transformers has, with the
recipe's adapter (peft) or with every weight (full), the same rows in the same batches, epochs, schedule and seeds. Each
run is a process of its own; all are scored on the whole test set by entity (seqeval). `--score-on dev` is for choosing
learning rates.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import commit, cpu_seconds, forget_peak, machine, peak_mb, write

ROOT = Path(__file__).resolve().parents[1]
WAYS = {"veneer": "`veneer train examples/ner.yaml`", "peft": "peft and Trainer, the same LoRA", "full": "every weight"}
#: of the two scripts; veneer's is the recipe's
FULL_RATE = 1e-4


def files(given: str | None) -> Path:
    """The folder of the three files. Raises SystemExit with what to do where one is missing."""
    root = Path(given or os.environ.get("VENEER_TEST_DATA") or ROOT.parent / "shared" / "data")
    folder = root / "wnut17"
    missing = [name for name in ("train", "dev", "test") if not (folder / f"{name}.conll").is_file()]
    if missing:
        names = ", ".join(f"{name}.conll" for name in missing)
        raise SystemExit(
            f"no {names} in {folder}: give the folder that holds wnut17/ with --data, or in $VENEER_TEST_DATA"
        )
    return folder


class Clock:
    """Wall time, processor time and peak memory between Trainer's first and last step."""

    def begin(self) -> None:
        forget_peak()
        self.wall, self.cpu = time.perf_counter(), cpu_seconds()

    def end(self) -> None:
        self.seconds, self.cpu_used = time.perf_counter() - self.wall, cpu_seconds() - self.cpu
        self.peak = peak_mb()

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Watch(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                clock.begin()

            def on_train_end(self, *args: Any, **kwargs: Any) -> None:
                clock.end()

        return Watch()

    def told(self, scores: dict[str, float], trained: int) -> dict[str, Any]:
        kept = {name: scores[name] for name in ("f1", "precision", "recall")}
        return {**kept, "seconds": self.seconds, "cpu": self.cpu_used, "peak_mb": self.peak, "trained": trained}


def recipe_of(o: argparse.Namespace, folder: Path, out: str) -> Any:
    """examples/ner.yaml with this run's files, epochs, rate and seed."""
    import torch

    from veneer.train import load_recipe

    train = [f"train.num_train_epochs={o.epochs}", f"train.use_cpu={str(not torch.cuda.is_available()).lower()}"]
    train += [] if o.rate is None else [f"train.learning_rate={o.rate}"]
    train += ["train.save_strategy=no"]
    data = {"data__train": str(folder / "train.conll"), "data__test": str(folder / f"{o.score_on}.conll")}
    return load_recipe(ROOT / "examples" / "ner.yaml", train, out=out, seed=o.seed, **data)


def ours(o: argparse.Namespace, folder: Path, out: str) -> dict[str, Any]:
    """What `veneer train` does."""
    from veneer.train.loop import run

    clock = Clock()
    result = run(recipe_of(o, folder, out), callbacks=[clock.callback()])
    return clock.told(result.after, result.trainable_params)


def read_conll(path: Path) -> list[tuple[list[str], list[str]]]:
    """(words, labels) of each sentence."""
    rows: list[tuple[list[str], list[str]]] = [([], [])]
    for line in path.read_text(encoding="utf-8").splitlines():
        word, _, label = line.rpartition("\t")
        if not word.strip():
            rows.append(([], []))
        else:
            rows[-1][0].append(word)
            rows[-1][1].append(label)
    return [row for row in rows if row[0]]


def to_tokens(tokenizer: Any, rows: list[tuple[list[str], list[str]]], names: list[str]) -> list[dict[str, Any]]:
    """Tokens, and a label on the first of each word."""
    made = []
    for words, labels in rows:
        out = tokenizer(words, is_split_into_words=True, truncation=True, max_length=128)
        ids, before = out.word_ids(), [None, *out.word_ids()]
        marks = [-100 if w is None or w == b else names.index(labels[w]) for w, b in zip(ids, before, strict=False)]
        made.append({"input_ids": out["input_ids"], "attention_mask": out["attention_mask"], "labels": marks})
    return made


def theirs(o: argparse.Namespace, folder: Path, out: str) -> dict[str, Any]:
    """A tutorial's script; the order of its rows alone is veneer's."""
    import transformers
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    from veneer.train.bases import resolve_base
    from veneer.train.sampler import LengthBatches

    recipe = recipe_of(o, folder, out)
    base = resolve_base(recipe.base).path
    rows, test = read_conll(folder / "train.conll"), read_conll(folder / f"{o.score_on}.conll")
    names = sorted({label for _, labels in rows for label in labels}, key=lambda name: (name != "O", name))
    tokenizer = AutoTokenizer.from_pretrained(base)
    train = to_tokens(tokenizer, rows, names)
    transformers.set_seed(o.seed)
    model: Any = AutoModelForTokenClassification.from_pretrained(base, id2label=dict(enumerate(names)))
    if o.way == "peft":
        import peft

        # its "all-linear" takes the head, which is trained whole, for one of them
        chosen = recipe.adapter.options | {"target_modules": ["query", "key", "value", "dense"]}
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="TOKEN_CLS", **chosen))
    clock = Clock()

    class Same(transformers.Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return LengthBatches([len(row["input_ids"]) for row in train], self.args.train_batch_size, self.args.seed)

    rate = o.rate or (FULL_RATE if o.way == "full" else recipe.train["learning_rate"])
    args = transformers.TrainingArguments(
        output_dir=out, num_train_epochs=o.epochs, learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=0.05,
        per_device_train_batch_size=recipe.train["per_device_train_batch_size"], seed=o.seed, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=recipe.train["use_cpu"], dataloader_pin_memory=False,
    )  # fmt: skip
    collate = transformers.DataCollatorForTokenClassification(tokenizer)
    Same(model, args, collate, train, callbacks=[clock.callback()]).train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return clock.told(score(model, tokenizer, test, names), trained)


def score(model: Any, tokenizer: Any, rows: list[tuple[list[str], list[str]]], names: list[str]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities; a word that was cut off is O."""
    import torch
    from seqeval.metrics import f1_score, precision_score, recall_score

    found = []
    model.eval()
    for words, _ in rows:
        batch = tokenizer(words, is_split_into_words=True, truncation=True, max_length=128, return_tensors="pt")
        with torch.no_grad():
            best = model(**batch.to(model.device)).logits[0].argmax(-1).tolist()
        tags = ["O"] * len(words)
        for place in reversed(range(len(best))):  # a word's first token writes last
            if (word := batch.word_ids()[place]) is not None:
                tags[word] = names[best[place]]
        found.append(tags)
    want = [labels for _, labels in rows]
    made = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    return {name: float(metric(want, found)) for name, metric in made.items()}


def measure(way: str, seed: int, o: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own."""
    argv = ["--worker", way, "--seed", str(seed), "--epochs", str(o.epochs), "--score-on", o.score_on]
    argv += ["--data", str(files(o.data).parent)] + ([] if o.rate is None else ["--rate", str(o.rate)])
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    own = {"THP_MEM_ALLOC_ENABLE": "1"} if way == "veneer" else {}  # as `veneer` sets it before torch is imported
    done = subprocess.run(
        [sys.executable, __file__, *argv], env={**os.environ, **quiet, **own}, stdout=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Means over the seeds, as Markdown."""
    lines = [
        "| | trained | F1 | precision | recall | training (s) | of it CPU (s) | peak memory (MB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, found in runs.items():
        mean = {key: statistics.mean(run[key] for run in found) for key in found[0]}
        shares = " | ".join(f"{100 * mean[name]:.1f}" for name in ("f1", "precision", "recall"))
        costs = " | ".join(f"{mean[name]:.0f}" for name in ("seconds", "cpu", "peak_mb"))
        lines.append(f"| {WAYS[way]} | {mean['trained']:,.0f} | {shares} | {costs} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the folder that holds wnut17/")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rate", type=float, help="another learning rate")
    parser.add_argument("--score-on", choices=("test", "dev"), default="test")
    parser.add_argument("--json")
    parser.add_argument("--table", nargs="+", metavar="FILE", help="print the table of earlier runs")
    parser.add_argument("--worker", dest="way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=42, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.table:
        told = [json.loads(Path(name).read_text(encoding="utf-8")) for name in o.table]
        if any(one["case"] != told[0]["case"] for one in told):
            raise SystemExit(f"these are not the same case: {[one['case'] for one in told]}")
        print(table({way: found for one in told for way, found in one["runs"].items()}))
        return
    folder = files(o.data)
    if o.way is not None:
        with tempfile.TemporaryDirectory() as out:
            found = (ours if o.way == "veneer" else theirs)(o, folder, str(Path(out) / "run"))
        print(json.dumps(found))
        return
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in o.only}
    for seed in o.seeds:
        for way in o.only:
            runs[way].append(measure(way, seed, o))
            print(f"seed {seed}, {way}: {json.dumps(runs[way][-1])}", flush=True)
    print(table(runs))
    if o.json:
        case = {"epochs": o.epochs, "seeds": o.seeds, "rate": o.rate, "score_on": o.score_on}
        write(o.json, {"case": case, "runs": runs, "machine": machine(), "commit": commit()})


if __name__ == "__main__":
    main()
