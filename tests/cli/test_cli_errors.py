"""What a person sees when something they gave cannot work."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from veneer.cli.app import app
from veneer.cli.errors import UserError
from veneer.cli.generate import conversation, read_prompts
from veneer.cli.options import FLAGS
from veneer.cli.quickstart import free_folder
from veneer.train.errors import RecipeError
from veneer.version import __version__


def run(*words: object) -> tuple[int, str]:
    """Exit code and everything printed, line breaks of the panel taken out."""
    result = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200"})
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


def test_version() -> None:
    assert run("--version") == (0, f"veneer {__version__}")


def test_train_without_anything_shows_an_example() -> None:
    code, text = run("train")
    assert code == 2
    assert "nothing to train on" in text
    assert "veneer train --base" in text


def test_a_missing_recipe_names_the_file(tmp_path: Path) -> None:
    code, text = run("train", tmp_path / "none.yaml")
    assert code == 2
    assert "no such file" in text
    assert "none.yaml" in text
    assert "Traceback" not in text


def test_an_unknown_key_has_its_line_and_the_nearest_name(tmp_path: Path, tiny_lm: Path, chat_rows: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"task: causal-lm\nbase: {tiny_lm}\ndata: {chat_rows}\nadapter:\n  method: lora\n  lora_alhpa: 8\n"
    )
    code, text = run("train", recipe, "--out", tmp_path / "out")
    assert code == 2
    assert "r.yaml:6" in text
    assert "adapter.lora_alhpa" in text
    assert "Did you mean lora_alpha?" in text
    assert not (tmp_path / "out").exists()


def test_a_bad_flag_is_named_as_it_was_typed(tmp_path: Path, tiny_lm: Path, chat_rows: Path) -> None:
    words = ["--base", tiny_lm, "--task", "causal-lm", "--data", chat_rows, "--out", tmp_path / "out"]
    code, text = run("train", *words, "--method", "lorra")
    assert code == 2
    assert "--method · adapter.method" in text
    assert "Did you mean lora?" in text
    code, text = run("train", *words, "--max-length", 1)
    assert code == 2
    assert "--max-length · data.max_length" in text


def test_every_flag_has_its_own_recipe_key() -> None:
    from veneer.train.recipe import Recipe

    assert len({flag.key for flag in FLAGS}) == len({flag.name for flag in FLAGS}) == len(FLAGS)
    ends = [flag.key.rpartition("__")[2] for flag in FLAGS]
    assert len(set(ends)) == len(ends)  # or a typed flag could not be told from its place
    for flag in FLAGS:
        section = flag.key.split("__")[0]
        assert section in Recipe.model_fields, flag


def test_debug_lets_the_error_through(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", str(tmp_path / "none.yaml"), "--debug"])
    assert isinstance(result.exception, RecipeError)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["chat", "smolm2-135m-instruct", "-p", "x"], "Did you mean smollm2-135m-instruct?"),
        (["generate", "no/such/folder/at/all", "-p", "x"], "no such model"),
        (["generate", "anything"], "no prompt"),
        (["merge", "no-such-folder", "--out", "x"], "no adapter_config.json here"),
        (["merge", "x", "--out", "y", "--dtype", "int4"], "--dtype int4 is not one of"),
        (["chat", "x", "--answer-with", "neither"], "none of adapter, base, both"),
    ],
)
def test_bad_requests(words: list[str], says: str) -> None:
    code, text = run(*words)
    assert code == 2
    assert says in text


def test_merge_never_overwrites(tmp_path: Path) -> None:
    code, text = run("merge", "adapter", "--out", tmp_path)
    assert code == 2
    assert "already exists" in text


def test_an_adapter_without_a_base_asks_for_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "task_type": "CAUSAL_LM"}')
    code, text = run("chat", tmp_path, "-p", "x")
    assert code == 2
    assert "does not name its base model" in text
    assert "--base" in text
    (tmp_path / "adapter_config.json").write_text("{")
    code, text = run("chat", tmp_path, "-p", "x")
    assert code == 2
    assert "not valid JSON" in text


def test_prompt_files(tmp_path: Path) -> None:
    plain = tmp_path / "lines.txt"
    plain.write_text("one\n\ntwo\n")
    assert read_prompts(plain) == [{"prompt": "one"}, {"prompt": "two"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}\n{"answer": 1}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:2: no prompt"):
        read_prompts(rows)
    rows.write_text('{"prompt": "a"\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: not valid JSON"):
        read_prompts(rows)
    rows.write_text(json.dumps({"messages": ["hello"]}))
    with pytest.raises(UserError, match="role, content"):
        read_prompts(rows)
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "none.jsonl")


def test_a_row_becomes_a_conversation_that_ends_with_the_user() -> None:
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert conversation({"messages": [user, answer]}) == [user]
    assert conversation({"text": "q"}, "be short") == [{"role": "system", "content": "be short"}, user]


def test_free_folder(tmp_path: Path) -> None:
    name = str(tmp_path / "run")
    assert free_folder(name) == name
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert free_folder(name) == f"{name}-3"


def test_the_engines_own_errors_are_shown_as_panels(tiny_lm: Path, tmp_path: Path) -> None:
    """An adapter file that does not fit its config stops at one panel, not a traceback."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from veneer import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny_lm)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = str(tiny_lm)
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].repeat(2, 1)
    save_file(tensors, file)
    code, text = run("chat", tmp_path, "-p", "x")
    assert code == 2
    assert "q_proj" in text
    assert "Traceback" not in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_a_panel(tiny_lm: Path) -> None:
    words = [sys.executable, "-m", "veneer", "generate", str(tiny_lm), "-p", "x", "--max-new-tokens", "1"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode != 0
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("code", "says"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "not allowed"), (0, None)])
def test_what_a_disk_refuses(
    code: int, says: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_lm: Path
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, "refused", str(tmp_path / "x.jsonl"))

    monkeypatch.setattr(os, "replace", refuse)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "send red"}\n')
    out = tmp_path / "x.jsonl"
    words = ["predict", str(tiny_lm), "--file", str(rows), "--out", str(out), "--max-new-tokens", "1"]
    done = CliRunner().invoke(app, words)
    assert not list(tmp_path.glob("x.jsonl*"))
    if says is None:
        assert isinstance(done.exception, OSError)  # what nobody can name keeps its traceback
        return
    assert done.exit_code == 2
    assert says in done.output
    assert "x.jsonl" in re.sub(r"[│\s]", "", done.output)  # a long path is broken at the frame
