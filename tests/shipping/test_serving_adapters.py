"""Adapters that come and go while the server answers: from allowed folders only, the least recently used out."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from serve_zoo import KEY, Running
from ship_zoo import save_adapter

from veneer import LoraConfig, PromptTuningConfig
from veneer.errors import AdapterError
from veneer.serving.api import Limits
from veneer.serving.engine import Engine
from veneer.serving.load import load_pool
from veneer.serving.pool import Forbidden, Pool

LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 32, "task_type": "CAUSAL_LM"}
NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters, and some that cannot be served."""
    root = tmp_path_factory.mktemp("store")
    for seed, name in enumerate(NAMES):
        save_adapter(llama, LoraConfig(**LORA), root / name, seed)
    save_adapter(llama, LoraConfig(**LORA, init_lora_weights="pissa"), root / "pissa")
    save_adapter(llama, LoraConfig(**LORA, bias="lora_only"), root / "bias")
    save_adapter(llama, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), root / "prompt")
    save_adapter(llama, LoraConfig(**{**LORA, "target_modules": ["q_proj"]}), root / "broken")
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"not a safetensors file")
    return root


def server(llama: Path, folder: Path | None, names: tuple[str, ...] = (), limit: int | None = None) -> Running:
    served = load_pool(
        str(llama), {n: str(folder / n) for n in names if folder}, folders=[folder] if folder else [], limit=limit
    )
    engine = Engine(served.pool, served.tokenizer, max_batch=4).start()
    return Running(engine, Limits(tokens=400, answer=300, seconds=60, body=20_000))


@pytest.fixture
def running(llama: Path, folder: Path) -> Iterator[Running]:
    made = server(llama, folder, limit=2)
    yield made
    made.stop()


def say(running: Running, model: str, n: int = 8) -> str:
    ask: dict[str, Any] = {"model": model, "prompt": "send two apples", "max_tokens": n, "temperature": 0}
    return running.client().completions.create(**ask).choices[0].text


@pytest.fixture(scope="module")
def alone(llama: Path, folder: Path) -> dict[str, str]:
    """What each adapter says in a server that has had nothing else."""
    out = {}
    for names in ((), *((n,) for n in NAMES)):
        made = server(llama, folder, names)
        out |= {n: say(made, n) for n in ("base", *names)}
        made.stop()
    assert len(set(out.values())) == 4
    return out


def test_load_ask_unload(running: Running, folder: Path, alone: dict[str, str]) -> None:
    assert [m.id for m in running.client().models.list()] == ["base"]
    assert say(running, "base") == alone["base"]
    assert running.load("one", folder / "one") == (200, "adapter 'one' is loaded")
    assert running.load("zwei", "two")[0] == 200  # inside the allowed folder, another name
    models = {m.id: m for m in running.client().models.list()}
    assert list(models) == ["base", "one", "zwei"]
    assert models["zwei"].parent == "base"  # type: ignore[attr-defined]
    assert [say(running, m) for m in models] == [alone["base"], alone["one"], alone["two"]]
    assert running.unload("one") == (200, "adapter 'one' is unloaded")
    assert running.unload("zwei")[0] == 200
    with pytest.raises(openai.NotFoundError, match="'one' does not exist here; there are: base"):
        say(running, "one")
    assert say(running, "base") == alone["base"]
    assert not any(".one" in n for n, _ in running.engine.model.named_parameters())  # nothing of it is left
    assert running.load("one", "one")[0] == 200
    assert say(running, "one") == alone["one"]


def test_the_least_recently_used_makes_room_and_comes_back(llama: Path, folder: Path, alone: dict[str, str]) -> None:
    running = server(llama, folder, NAMES, limit=2)
    pool = running.engine.pool
    assert list(pool.loaded) == ["two", "three"]
    for name, want in (("two", ["three", "two"]), ("one", ["two", "one"]), ("three", ["one", "three"])):
        assert say(running, name) == alone[name]
        assert list(pool.loaded) == want
    assert len(running.client().models.list().data) == 4  # all of them can be asked for
    assert "veneer_loaded_adapters 2" in running.read("/metrics")[1]
    assert pool.counts["evictions"] == 2
    running.stop()


def test_more_adapters_at_once_than_fit(llama: Path, folder: Path, alone: dict[str, str]) -> None:
    running = server(llama, folder, NAMES, limit=1)
    with ThreadPoolExecutor(8) as pool:
        names = [*NAMES, "base"] * 4
        assert list(pool.map(lambda n: say(running, n), names)) == [alone[n] for n in names]
    assert len(running.engine.pool.loaded) == 1
    running.stop()


def test_unloading_waits_for_answers_and_refuses_new_ones(
    running: Running, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.load("one", folder / "one")
    step, gate = running.engine._step, threading.Event()

    def slow() -> None:
        gate.wait(10)
        step()

    monkeypatch.setattr(running.engine, "_step", slow)
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(say, running, "one", 20)
        while not running.engine.active:
            time.sleep(0.01)
        gone = pool.submit(running.unload, "one")
        while "one" in running.engine.pool.known:
            time.sleep(0.01)
        with pytest.raises(openai.NotFoundError):
            say(running, "one")
        assert "one" in running.engine.pool.loaded
        gate.set()
        assert len(answer.result(30)) > 0
        assert gone.result(30)[0] == 200
    assert "one" not in running.engine.pool.loaded


# -- refusals --------------------------------------------------------------------------------------------------------
def test_only_allowed_folders(running: Running, folder: Path, make_adapter: Any, llama: Path) -> None:
    outside = make_adapter(LoraConfig(**LORA), "outside")
    (folder / "link").symlink_to(outside)
    try:
        for path in (outside, "../outside", folder / ".." / outside.parent.name / "outside", "/nowhere", "link"):
            status, body = running.load("x", path)
            assert status == 403, (path, body)
            assert "not inside a folder" in body["error"]["message"]
    finally:
        (folder / "link").unlink()
    assert running.load("x", "nothing")[1]["error"]["message"].endswith("no adapter_config.json in this folder")
    closed = server(llama, None)
    status, body = closed.load("one", folder / "one")
    assert status == 403
    assert "--adapter-folder" in body["error"]["message"]
    closed.stop()


def test_names_keys_and_bodies(running: Running) -> None:
    assert running.load("one", "one", key="wrong")[0] == 401
    assert running.unload("one", key="wrong")[0] == 401
    assert running.load("one", "one")[0] == 200
    for name, says in (("one", "already"), ("a.b", "without dots"), ("base", "base's name")):
        status, body = running.load(name, "one")
        assert status == 400
        assert says in body["error"]["message"]
    assert running.unload("other")[0] == 404
    assert running.post("/v1/load_lora_adapter", {"lora_name": "x"})[0] == 400


def test_what_cannot_share_a_batch_is_refused_and_changes_nothing(
    running: Running, folder: Path, alone: dict[str, str]
) -> None:
    assert running.load("one", "one")[0] == 200
    says = {
        "pissa": "rewrites the base's weights",
        "bias": "trains the base's biases",
        "prompt": "puts tokens before the input",
        "broken": "adapter_model.safetensors",
    }
    for name, why in says.items():
        status, body = running.load(name, name)
        assert status == 400, name
        assert why in body["error"]["message"]
    assert [m.id for m in running.client().models.list()] == ["base", "one"]
    assert [say(running, n) for n in ("base", "one")] == [alone["base"], alone["one"]]


def test_a_file_with_the_bases_own_tensors_is_refused(llama: Path, make_adapter: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_adapter(LoraConfig(**LORA))
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"] = torch.zeros(300, 32)
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=r"the base's own tensor lm_head\.weight"):
        load_pool(str(llama), {"x": str(folder)})


def test_a_pool_says_what_it_cannot_do(folder: Path) -> None:
    with pytest.raises(AdapterError, match="give at least 1"):
        Pool(torch.nn.Linear(1, 1), limit=0)
    with pytest.raises(Forbidden, match="--adapter-folder"):
        Pool(torch.nn.Linear(1, 1)).allowed(str(folder / "one"))


def test_a_large_body_is_refused_whatever_its_header_says(running: Running) -> None:
    assert running.post("/v1/completions", b"x" * 20_001)[0] == 413
    line = http.client.HTTPConnection("127.0.0.1", running.port)
    head = {"authorization": f"Bearer {KEY}"}
    line.request("POST", "/v1/completions", (b"y" * 5000 for _ in range(6)), head, encode_chunked=True)  # no length
    assert line.getresponse().status == 413
    line.close()
    assert running.read("/health") == (200, "ok")


@pytest.mark.slow
def test_the_command_serves_and_stops_gracefully(llama: Path, folder: Path) -> None:
    import os
    import signal
    import socket
    import subprocess
    import sys

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = ["serve", llama, "--name", "base", "--adapter-folder", folder, "--port", port, "--max-adapters", 1]
    line = [sys.executable, "-m", "veneer", *map(str, words)]
    process = subprocess.Popen(line, env={**os.environ, "VENEER_API_KEY": "k"}, stdout=subprocess.PIPE, text=True)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=30)
    assert [m.id for m in client.models.list()] == ["base"]
    client.post("/load_lora_adapter", body={"lora_name": "one", "lora_path": "one"}, cast_to=str)
    ask: dict[str, Any] = {"model": "one", "prompt": "Bob", "max_tokens": 300, "temperature": 1.5, "seed": 1}
    want = client.completions.create(**ask).choices[0].text
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: client.completions.create(**ask).choices[0].text)
        while "veneer_running_requests 1" not in _metrics(port):
            assert not answer.done(), "it was answered before the server was told to stop"
        process.send_signal(signal.SIGTERM)
        assert answer.result(60) == want  # what was begun is finished
    assert process.wait(60) in (0, -signal.SIGTERM)
    with pytest.raises(openai.APIConnectionError):
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0).models.list()


def _metrics(port: int) -> str:
    import urllib.request

    return urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
