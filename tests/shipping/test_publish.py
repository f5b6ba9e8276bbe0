"""veneer push and pull, through huggingface_hub, against a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_hub import FakeHub
from ship_zoo import save_llama
from typer.testing import CliRunner

from veneer import LoraConfig, PeftModel
from veneer.base_mark import read_mark
from veneer.cli.app import app
from veneer.errors import AdapterError
from veneer.publish import HubError, plan_upload, pull_adapter, push_adapter

LORA: dict[str, Any] = {"target_modules": ["q_proj"], "r": 2, "task_type": "CAUSAL_LM"}
FILE = "adapter_model.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    from huggingface_hub import constants

    made = FakeHub()
    monkeypatch.setattr(constants, "ENDPOINT", made.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "writer")
    yield made
    made.stop()


@pytest.fixture
def adapter(make_adapter: Any) -> Path:
    folder: Path = make_adapter(LoraConfig(**LORA))
    return folder


def test_there_and_back(hub: FakeHub, adapter: Path, llama: Path, tmp_path: Path) -> None:
    (adapter / "notes.bin").write_bytes(b"no part of it")
    url = push_adapter(str(adapter), "ada/fruit", base="org/tiny-llama", message="first")
    assert url.startswith(f"{hub.url}/ada/fruit/commit/")
    assert hub.commits == [{"summary": "first", "description": ""}]
    held = hub.repos["ada/fruit"]
    assert sorted(held) == ["README.md", "adapter_config.json", FILE]
    assert held[FILE] == (adapter / FILE).read_bytes()
    assert json.loads(held["adapter_config.json"])["base_model_name_or_path"] == "org/tiny-llama"
    card = held["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/tiny-llama"
    mark = read_mark(adapter / FILE)
    assert mark is not None
    assert mark["hash"] in card
    assert str(adapter) not in card  # nor any other path of this machine
    assert str(llama) not in card

    found = pull_adapter("ada/fruit", tmp_path / "got", base=str(llama))
    assert (found.commit, found.base, found.fingerprint) == (hub.sha("ada/fruit"), "org/tiny-llama", mark["hash"])
    assert found.differences == []
    assert sorted(p.name for p in (tmp_path / "got").iterdir()) == sorted(held)
    PeftModel.from_pretrained(_model(llama), str(tmp_path / "got"))


def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_another_base_is_told(hub: FakeHub, adapter: Path, tmp_path: Path) -> None:
    push_adapter(str(adapter), "ada/fruit", base="org/tiny-llama")
    other = save_llama(tmp_path / "other", width=64)
    found = pull_adapter("ada/fruit", tmp_path / "got", base=str(other))
    assert found.differences is not None
    assert any("was [" in line for line in found.differences)
    absent = pull_adapter("ada/fruit", tmp_path / "again")
    assert absent.differences is None
    assert "org/tiny-llama is not on this machine" in absent.unchecked
    assert not [line for line in hub.asked if "tiny-llama" in line]  # no base is downloaded


def test_the_commands(hub: FakeHub, adapter: Path, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"base: {llama}\ndata: {{train: [{tmp_path}/rows.jsonl]}}\nout: llama\n")
    words = ["push", str(tmp_path), "ada/fruit", "--base", "org/tiny-llama"]  # as a run's folder
    told = CliRunner().invoke(app, [*words, "--dry-run"])
    assert told.exit_code == 0, told.output
    assert hub.asked == []
    for part in ("recipe.yaml", FILE, "would go to ada/fruit", "fingerprint"):
        assert part in told.output
    sent = CliRunner().invoke(app, words)
    assert sent.exit_code == 0, sent.output
    assert f"{hub.url}/ada/fruit/commit/" in sent.output
    assert hub.repos["ada/fruit"]["recipe.yaml"] == b"base: org/tiny-llama\ndata: {train: [rows.jsonl]}\nout: llama\n"
    got = CliRunner().invoke(app, ["pull", "ada/fruit", "--out", str(tmp_path / "got"), "--base", str(llama)])
    assert got.exit_code == 0, got.output
    assert "the base here is the same" in got.output
    again = CliRunner().invoke(app, ["pull", "ada/fruit", "--out", str(tmp_path / "got")])
    assert again.exit_code == 2
    assert "already exists" in again.output


@pytest.mark.slow
def test_a_run_goes_with_its_recipe_and_card(hub: FakeHub, llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "send", "completion": "two apples"}\n' * 4)
    words = ["train", "--task", "causal-lm", "--base", llama, "--data", rows, "--out", tmp_path / "run", "--r", "2"]
    done = CliRunner().invoke(app, [*map(str, words), "--max-steps", "1"])
    assert done.exit_code == 0, done.output
    words = ["push", tmp_path / "run", "ada/fruit", "--base", "org/tiny-llama"]
    told = CliRunner().invoke(app, [*map(str, words), "--dry-run"])
    assert told.exit_code == 0, told.output
    assert hub.asked == []
    for part in ("recipe.yaml", FILE, "tokenizer.json", "sha256", "would go to ada/fruit", "veneer pull ada/fruit"):
        assert part in told.output
    push_adapter(str(tmp_path / "run"), "ada/fruit", base="org/tiny-llama")
    held = hub.repos["ada/fruit"]
    assert yaml.safe_load(held["recipe.yaml"])["task"] == "causal-lm"
    card = held["README.md"].decode()
    assert "adapter.r" in card  # the settings
    assert "rows.jsonl" in card  # the data, with its hash
    assert str(tmp_path) not in card + held["recipe.yaml"].decode()
    assert str(llama) not in card + held["recipe.yaml"].decode()


# -- refusals ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("token", "repo", "said"),
    [
        ("nobody", "ada/fruit", r"does not know this token.*hf auth login"),
        (None, "ada/fruit", r"hf auth login"),
        ("reader", "ada/fruit", r"may not write to ada/fruit.*write access to ada"),
        ("writer", "bob/fruit", r"may not write to bob/fruit"),
        ("writer", "a b", r"'a b' is no repository's name.*OWNER/NAME"),
    ],
)
def test_push_is_refused_in_words(
    token: str | None, repo: str, said: str, hub: FakeHub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=said):
        push_adapter(str(adapter), repo, base="org/tiny-llama")
    assert hub.repos == {}


def test_pull_is_refused_in_words_and_leaves_nothing(
    hub: FakeHub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_adapter(str(adapter), "ada/fruit", base="org/tiny-llama")
    hub.repos |= {"ada/text": {"README.md": b"hello"}, "ada/closed": {}}
    hub.gated.add("ada/closed")
    hub.private.add("ada/fruit")
    for repo, revision, said in (
        ("ada/none", None, r"no repository ada/none"),
        ("ada/text", None, r"holds no adapter_config.json"),
        ("ada/closed", None, r"Accept them on its page"),
        ("ada/fruit", "v9", r"no such revision"),
    ):
        with pytest.raises(AdapterError, match=said):
            pull_adapter(repo, tmp_path / "got", revision=revision)
    monkeypatch.setenv("HF_TOKEN", "reader")
    with pytest.raises(HubError, match="A private one"):
        pull_adapter("ada/fruit", tmp_path / "got")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("got")]


def test_without_a_hub(hub: FakeHub, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="switched off here by HF_HUB_OFFLINE"):
        pull_adapter("ada/fruit", tmp_path / "got")


def test_what_others_could_not_load_is_refused(adapter: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"nobody else has; give the base's hub id with --base OWNER/MODEL"):
        plan_upload(str(adapter), "ada/fruit")
    with pytest.raises(AdapterError, match=r"no adapter_config.json here"):
        plan_upload(str(tmp_path / "none"), "ada/fruit")
    upload = plan_upload(str(adapter), "ada/fruit", base="smollm2-135m-instruct")
    assert any("veneer alone knows" in note for note in upload.notes)
    (adapter / "README.md").unlink()
    bare = plan_upload(str(adapter), "ada/fruit", base="org/tiny-llama")
    assert yaml.safe_load(bare.card.split("---")[1])["base_model"] == "org/tiny-llama"
    assert "fingerprint" in bare.card
    (adapter / FILE).unlink()
    with pytest.raises(AdapterError, match="holds none of"):
        plan_upload(str(adapter), "ada/fruit", base="org/tiny-llama")


@pytest.mark.slow
def test_the_command_with_the_libraries_own_settings(hub: FakeHub, adapter: Path, tmp_path: Path) -> None:
    more = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "writer"}
    run = [sys.executable, "-m", "veneer"]
    for words in (
        ["push", str(adapter), "ada/fruit", "--base", "org/tiny-llama"],
        ["pull", "ada/fruit", "--out", str(tmp_path / "got")],
    ):
        done = subprocess.run([*run, *words], env={**os.environ, **more}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "got" / FILE).read_bytes() == (adapter / FILE).read_bytes()
