"""The commands end to end on tiny models: train, report, generate, merge, chat."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from veneer.cli.app import app
from veneer.cli.session import program
from veneer.train.entities import spans

Command = Callable[..., "subprocess.CompletedProcess[str]"]
SMALL = ["--epochs", 1, "--batch-size", 4, "--r", 2, "--lr", 0.01, "--set", "eval.max_new_tokens=8"]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_lm: Path, chat_rows: Path, veneer_command: Command
) -> tuple[Path, str]:
    """A finished run of `veneer train` on the tiny language model, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "first"
    done = veneer_command(
        "train", "--base", tiny_lm, "--task", "causal-lm", "--data", chat_rows, "--test", chat_rows,
        "--out", out, "--merge", "--target-modules", "all-linear", *SMALL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return out, done.stdout


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path, conll_rows: Path) -> Path:
    """A finished token-cls run."""
    out = tmp_path_factory.mktemp("runs") / "tags"
    invoke(
        "train", "--base", tiny_encoder, "--task", "token-cls", "--data", conll_rows, "--test", conll_rows,
        "--out", out, "--target-modules", "all-linear", "--epochs", 20, "--batch-size", 4, "--r", 4,
        "--lr", 0.01,
    )  # fmt: skip
    return out


def test_train_writes_everything(trained: tuple[Path, str]) -> None:
    out, _ = trained
    names = {str(path.relative_to(out)) for path in out.rglob("*")}
    for name in (
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
        "merged/config.json",
        "report.html",
        "recipe.yaml",
    ):
        assert name in names
    assert not [name for name in names if name.endswith(".partial")]


def test_train_prints_scores_files_and_commands(trained: tuple[Path, str]) -> None:
    out, printed = trained
    for text in ("step 1/3", "step 3/3", "loss", "tok/s", "left", "Held-out examples", "Held-out scores"):
        assert text in printed, text
    assert "exact match" in printed
    assert "adapter/adapter_model.safetensors" in printed
    assert f"veneer chat {out}/adapter" in printed
    assert "\x1b" not in printed


def test_report_of_a_real_run(trained: tuple[Path, str]) -> None:
    out, _ = trained
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "model.layers.1.mlp.down_proj" in page
    assert 'class="heat"' in page
    assert page.count('class="plot"') == 4  # loss, learning rate, tokens per second, memory
    head = (out / "adapter" / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    assert yaml.safe_load(head)["library_name"] == "peft"


def test_recipe_of_a_run_trains_again(trained: tuple[Path, str], tmp_path: Path, veneer_command: Command) -> None:
    out, _ = trained
    again = tmp_path / "again"
    recipe = yaml.safe_load(invoke("train", out / "recipe.yaml", "--out", again, "--set", "adapter.r=3", "--dry-run"))
    assert recipe["adapter"]["r"] == 3
    assert recipe["out"] == str(again)
    assert not again.exists()


def test_generate_from_a_file(trained: tuple[Path, str], tmp_path: Path, chat_rows: Path) -> None:
    out, _ = trained
    answers = tmp_path / "answers.jsonl"
    words = ["generate", out, "--file", chat_rows, "--out", answers, "--max-new-tokens", 6, "--batch-size", 5]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 12
    assert all(isinstance(row["output"], str) for row in rows)
    assert rows[3]["messages"] == json.loads(chat_rows.read_text().splitlines()[3])["messages"]


def test_batches_and_streams_agree(trained: tuple[Path, str]) -> None:
    from veneer.cli.generation import Sampling, complete, stream
    from veneer.train.use import load

    loaded = load(str(trained[0]))
    prompts = [[{"role": "user", "content": text}] for text in ("send red", "please send two blue pears to Eve")]
    sampling = Sampling(max_new_tokens=8)
    pieces: list[str] = []
    alone = [stream(loaded.model, loaded.tokenizer, p, sampling, pieces.append) for p in prompts]
    assert list(complete(loaded.model, loaded.tokenizer, prompts, sampling)) == alone
    # a stream holds back half a character; what it has shown is the beginning of the answer
    shown = "".join(pieces).replace("\ufffd", "").split()
    assert "".join(shown) == "".join(" ".join(alone).replace("\ufffd", "").split())
    warm = Sampling(max_new_tokens=8, temperature=1.5, seed=1)
    assert list(complete(loaded.model, loaded.tokenizer, prompts, warm)) == list(
        complete(loaded.model, loaded.tokenizer, prompts, warm)
    )


def test_merge_equals_base_plus_adapter(trained: tuple[Path, str], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from veneer.train.use import load

    merged = tmp_path / "merged"
    result = CliRunner().invoke(app, ["merge", str(trained[0] / "adapter"), "--out", str(merged), "--safe"])
    assert result.exit_code == 0, result.output
    assert "largest logit difference" in result.output
    assert "same top token: 100.0 %" in result.output
    loaded = load(str(trained[0]))
    ids = torch.tensor([[0, 5, 9, 33, 60]])
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
        theirs = loaded.model(ids).logits
        with loaded.without_adapter():
            base = loaded.model(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - base).abs().max() > 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_merge_stores_the_dtype_asked_for(trained: tuple[Path, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    words = ["merge", str(trained[0]), "--out", str(tmp_path / "half"), "--dtype", "bfloat16"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    kinds = {str(tensor.dtype) for tensor in load_file(tmp_path / "half" / "model.safetensors").values()}
    assert kinds == {"torch.bfloat16"}


def test_merge_that_changes_the_output_is_not_kept(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.cli.merge.TOLERANCE", {"float32": -1.0})
    monkeypatch.setattr("veneer.export.merging.ROUNDING", -1.0)
    result = CliRunner().invoke(app, ["merge", str(trained[0]), "--out", str(tmp_path / "bad")])
    assert result.exit_code == 2
    assert "differ" in result.output
    assert list(tmp_path.iterdir()) == []


def invoke(*words: object, stdin: str = "") -> str:
    """Run a command in this process; what it printed."""
    result = CliRunner().invoke(app, list(map(str, words)), input=stdin)
    assert result.exit_code == 0, result.output
    return result.output


def test_chat_answers_one_prompt_or_a_pipe(trained: tuple[Path, str], veneer_command: Command) -> None:
    piped = veneer_command("chat", trained[0], "--max-new-tokens", 5, stdin="send two apples\n")
    assert piped.returncode == 0, piped.stderr
    once = invoke("chat", trained[0], "--prompt", "send two apples", "--max-new-tokens", 5)
    assert once == piped.stdout


def test_chat_obeys_its_commands(trained: tuple[Path, str]) -> None:
    lines = "/both\nsend red\n/reset\n/system be short\n/base\nsend blue\n/nonsense\n/quit\nnever said\n"
    printed = invoke("chat", trained[0], "--max-new-tokens", 3, stdin=lines)
    for text in (
        "answers: both",
        "[base] ",
        "[adapter] ",
        "conversation cleared",
        "system message set",
        "/quit",
    ):
        assert text in printed, text


def test_chat_switches_adapters(trained: tuple[Path, str], tagger: Path, tiny_lm: Path, tmp_path: Path) -> None:
    """Each answers as it does alone; what does not belong to the base is refused and the chat goes on."""
    other = tmp_path / "louder"
    shutil.copytree(trained[0] / "adapter", other / "adapter")
    weights = other / "adapter" / "adapter_model.safetensors"
    torch.manual_seed(0)
    save_file({name: torch.randn_like(t) for name, t in load_file(weights).items()}, weights)
    few = ("--max-new-tokens", 4)
    models = {"first": trained[0], "louder": other, "base": tiny_lm}
    alone = {name: invoke("chat", path, *few, "-p", "send red") for name, path in models.items()}
    assert len(set(alone.values())) == 3
    spoken = "".join(f"[{name}] {alone[name]}" for name in ("base", "first", "louder"))
    lines = "/all,send red,/adapter louder,send red,/adapters,/adapter softer,/adapter first,send red,/both,send red"
    lines = lines.replace(",", "\n") + "\n"
    printed = invoke("chat", trained[0], "--with", other, *few, stdin=lines)
    assert printed == (
        f"answers: all\n{spoken}answers: louder\n{alone['louder']}  first\n* louder\n"
        f"no adapter 'softer'; there are first, louder\nanswers: first\n{alone['first']}"
        f"answers: both\n[base] {alone['base']}[first] {alone['first']}"
    )
    assert invoke("chat", trained[0], "--with", other, "--answer-with", "all", *few, "-p", "send red") == spoken
    lines = f"/load {other}\nsend red\n/load {tagger}\n/load {tmp_path}\nsend red\n"
    printed = invoke("chat", trained[0], *few, stdin=lines)
    assert printed.startswith(f"answers: louder\n{alone['louder']}not loaded: ")
    assert "it is an adapter of" in printed
    assert f"not loaded: {tmp_path}: no adapter there" in printed
    assert printed.endswith(alone["louder"])


def test_chat_with_a_base_alone(tiny_lm: Path) -> None:
    printed = invoke("chat", tiny_lm, "--max-new-tokens", 3, stdin="/adapter\nsend red\n")
    assert "there is no adapter here" in printed


def test_the_model_is_asked_as_it_was_trained(trained: tuple[Path, str], tmp_path: Path) -> None:

    from veneer.train.asking import Asking, read_asking, write_asking

    assert read_asking(trained[0] / "adapter") == Asking(chat=True, system=None, single=True)
    copy = tmp_path / "adapter"
    shutil.copytree(trained[0] / "adapter", copy)
    words = ("generate", copy, "--prompt", "send red", "--max-new-tokens", 6)
    as_chat = invoke(*words)
    write_asking(Asking(chat=True, system="Bob"), copy)
    with_system = invoke(*words)
    assert with_system == invoke("generate", trained[0], "-p", "send red", "--max-new-tokens", 6, "--system", "Bob")
    write_asking(Asking(chat=False), copy)
    assert len({as_chat, with_system, invoke(*words)}) == 3
    (copy / "asking.json").write_text('{"chat": "yes"}')
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 2
    assert "asking.json" in result.output


def test_a_tagger_prints_entities(tagger: Path) -> None:
    result = CliRunner().invoke(app, ["generate", str(tagger), "--prompt", "send Ada to Rome", "-p", "send"])
    assert result.exit_code == 0, result.output
    first, second = (json.loads(line) for line in result.output.splitlines())
    assert [(e["text"], e["label"], e["start"], e["end"]) for e in first["entities"]] == [
        ("Ada", "PER", 5, 8),
        ("Rome", "LOC", 12, 16),
    ]
    assert second == {"entities": []}


def test_chat_with_a_tagger_says_what_to_use(tagger: Path) -> None:
    result = CliRunner().invoke(app, ["chat", str(tagger), "--prompt", "send"])
    assert result.exit_code == 2
    assert "veneer predict" in result.output


def test_spans_follow_bio() -> None:
    assert spans(["O", "B-PER", "I-PER", "B-PER", "O", "I-LOC"]) == [
        (1, 3, "PER"),
        (3, 4, "PER"),
        (5, 6, "LOC"),
    ]
    assert spans(["B-PER", "I-LOC"]) == [(0, 1, "PER"), (1, 2, "LOC")]
    assert spans([]) == []


def test_quickstart_and_every_command_it_prints(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = ["base.name=" + str(tiny_lm), "data.max_length=1000", "eval.max_new_tokens=4", "train.max_steps=2"]
    words = [word for override in tiny for word in ("--set", override)]
    printed = invoke("quickstart", "--set", "eval.limit=2", *words)
    assert "veneer-quickstart-orders" in printed
    assert len((tmp_path / "veneer-quickstart-orders/example.jsonl").read_text().splitlines()) == 20
    assert json.loads((tmp_path / "veneer-quickstart-orders/adapter/asking.json").read_text()) == {
        "chat": True,
        "system": "Order to JSON",
        "single": True,
    }
    lines = printed.split("Try next", 1)[1].splitlines()
    commands = [
        shlex.split(line) for line in lines if " veneer " in f" {line} " and "#" not in line.split("--prompt")[0]
    ]
    names = [command[command.index("veneer") + 1] for command in commands]
    assert names == ["chat", "generate", "train", "merge"]
    for command in commands:
        invoke(*command[command.index("veneer") + 1 :], stdin="two apples\n")
    made = {path.name for path in (tmp_path / "veneer-quickstart-orders-mine").iterdir()}
    assert {"adapter", "merged", "report.html"} <= made
    assert (tmp_path / "veneer-quickstart-orders/merged-bf16/config.json").is_file()


def test_printed_commands_start_the_veneer_that_ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sys.argv", [".venv/bin/veneer", "train"])
    assert program() == [".venv/bin/veneer"]
    monkeypatch.setattr("sys.argv", ["/x/veneer/__main__.py"])
    assert program() == [sys.executable, "-m", "veneer"]
    monkeypatch.setattr("shutil.which", lambda name: str(Path(sys.executable).with_name("veneer")))
    assert program() == ["veneer"]
