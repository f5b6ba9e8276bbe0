"""A tiny language model on disk and adapters for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, program
from ship_zoo import save_adapter, save_llama


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "veneer-cache"))
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama (hidden size 32) with a chat tokenizer."""
    return save_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def make_adapter(llama: Path, tmp_path: Path) -> Any:
    """make_adapter(config, name="adapter", seed=1) -> its folder; every trained tensor is random."""

    def make(config: Any, name: str = "adapter", seed: int = 1, base: Path = llama) -> Path:
        return save_adapter(base, config, tmp_path / name, seed)

    return make


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium; tests that need it are skipped where none is installed."""
    command = program()
    if command is None:
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    made = Browser(command)
    yield made
    made.close()
