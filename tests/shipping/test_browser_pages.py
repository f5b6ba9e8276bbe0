"""The pages in a real headless Chromium: no errors in the console, nothing asked of the network, all headings there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from serve_zoo import KEY, Running
from ship_zoo import save_adapter
from typer.testing import CliRunner

from veneer import LoraConfig
from veneer.cli.app import app as command
from veneer.serving.api import Limits
from veneer.serving.engine import Engine
from veneer.serving.load import load_pool

pytestmark = pytest.mark.slow

LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 32, "task_type": "CAUSAL_LM"}


def run(*words: Any) -> None:
    done = CliRunner().invoke(command, [str(w) for w in words])
    assert done.exit_code == 0, done.output


def clean(browser: Browser, page: Path) -> list[str]:
    """Open a file; its headings. It asks for itself alone, and logs nothing."""
    browser.open(page)
    browser.run("new Promise(done => setTimeout(done, 300))")
    assert browser.logs == []
    assert [a for a in browser.asked if not a.startswith("data:")] == [page.resolve().as_uri()]
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth + 1"), "wider than the window"
    return browser.headings()


def test_the_browser_notices_what_is_wrong(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<h1>hm</h1><img src='http://127.0.0.1:9/x.png'><script>missing()</script>")
    browser.open(page)
    assert browser.headings() == ["hm"]
    assert any("missing is not defined" in line for line in browser.logs)
    assert "http://127.0.0.1:9/x.png" in browser.asked


def test_inspect_and_diff(browser: Browser, make_adapter: Any, tmp_path: Path) -> None:
    first, second = (make_adapter(LoraConfig(**LORA), f"a{i}", i) for i in (1, 2))
    run("inspect", first, "--html", tmp_path / "inspect.html")
    run("diff", first, second, "--html", tmp_path / "diff.html")
    found = clean(browser, tmp_path / "inspect.html")
    assert found[0].startswith("a1: lora on ")
    for heading in (
        "Layers by modules",
        "How far the rank can be cut",
        "Through the blocks: relative norm",
        "All layers",
        "Settings",
    ):
        assert heading in found, found
    assert browser.run("document.querySelectorAll('svg').length") >= 2
    assert browser.run("document.body.innerText.includes('layers.0.self_attn.q_proj')")
    found = clean(browser, tmp_path / "diff.html")
    assert len(found) >= 2
    assert browser.run("document.body.innerText.includes('layers.1.self_attn.v_proj')")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "send", "completion": "two apples"}\n{"prompt": "Bob", "completion": "red plums"}\n' * 4
    )
    return path


def train(llama: Path, rows: Path, out: Path, *more: Any) -> None:
    words = ["--task", "causal-lm", "--base", llama, "--data", rows, "--test", rows, "--out", out, "--max-steps", 4]
    run("train", *words, *more)


def test_a_runs_report(browser: Browser, llama: Path, rows: Path, tmp_path: Path) -> None:
    train(llama, rows, tmp_path / "run", "--r", 2)
    found = clean(browser, tmp_path / "run" / "report.html")
    assert len(found) >= 4, found
    assert browser.run("document.querySelectorAll('svg').length") >= 1


def test_a_comparison_of_runs(browser: Browser, llama: Path, rows: Path, tmp_path: Path) -> None:
    train(llama, rows, tmp_path / "small", "--r", 2)
    evaluated = ["--set", "train.eval_strategy=steps", "--set", "train.eval_steps=2"]
    train(llama, rows, tmp_path / "large", "--r", 8, "--max-steps", 6, *evaluated)
    run("compare", tmp_path / "small", tmp_path / "large", "--html", tmp_path / "compare.html")
    found = clean(browser, tmp_path / "compare.html")
    assert found == [
        "small, large",
        "The runs",
        "Loss",
        "Scores on held-out data",
        "Settings that differ",
        "The same rows, answered by each",
    ]
    assert browser.run("document.querySelectorAll('svg.chart').length") == 2
    strokes = "[...document.querySelectorAll('svg.chart')][0].querySelectorAll('path.line')"
    colours = browser.run(f"[...{strokes}].map(line => getComputedStyle(line).stroke)")
    assert len(set(colours)) == 2, colours
    tip = """(() => {
      const plot = document.querySelector('.plot'), box = plot.getBoundingClientRect();
      const at = x => { plot.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + x * box.width}));
                        return plot.querySelector('.tip').textContent; };
      return [at(0.1), at(0.95)];
    })()"""
    first, last = browser.run(tip)
    assert "small" in first
    assert "large" in first
    assert "large" in last
    assert "small" not in last  # it had no such step


@pytest.fixture(scope="module")
def pool(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("chatting")
    names = {n: str(save_adapter(llama, LoraConfig(**LORA), root / n, s)) for s, n in enumerate(("red", "green"))}
    return load_pool(str(llama), names)


def answers(browser: Browser) -> dict[str, str]:
    """What each column's last bubble says."""
    return browser.run(
        "Object.fromEntries([...document.querySelectorAll('section')].filter(s => !s.hidden).map(s => "
        "[s.dataset.model, s.querySelector('.turn:last-child')?.textContent ?? '']))"
    )


def send(browser: Browser, text: str, models: int) -> None:
    before = browser.run("document.querySelectorAll('[data-done]').length")
    browser.run(f"document.getElementById('text').value = {text!r}")
    browser.run("document.querySelector('button.send').click()")
    browser.wait(f"document.querySelectorAll('[data-done]').length == {before + models}")


def test_the_chat_page(browser: Browser, pool: Any) -> None:
    running = Running(Engine(pool.pool, pool.tokenizer).start(), Limits(tokens=400, answer=60, seconds=60), ())
    root = f"http://127.0.0.1:{running.port}/"
    browser.open(root)
    browser.wait("document.querySelectorAll('#models input').length == 3")
    assert browser.headings() == ["base and its adapters", "base", "red", "green"]
    browser.run("document.getElementById('tokens').value = 12")
    turns: list[Any] = [{"role": "user", "content": "send two apples"}]

    def say(name: str) -> str:
        done = running.client().chat.completions.create(model=name, messages=turns, max_tokens=12, temperature=0)
        return done.choices[0].message.content or ""

    send(browser, "send two apples", 3)
    want = {name: say(name) for name in ("base", "red", "green")}
    assert answers(browser) == want
    assert len(set(want.values())) == 3
    browser.run("document.querySelector('#models input[value=green]').click()")  # one column less
    send(browser, "Bob", 2)
    turns += [{"role": "assistant", "content": want["red"]}, {"role": "user", "content": "Bob"}]
    assert answers(browser)["red"] == say("red")  # the talk goes on where it was
    assert sorted(answers(browser)) == ["base", "red"]
    assert browser.logs == []
    assert all(a.startswith((root, "data:")) for a in browser.asked), browser.asked
    assert browser.run("fetch('http://127.0.0.1:9/').then(() => 'went', () => 'blocked')") == "blocked"
    running.stop()


def test_the_chat_page_with_a_key_and_an_error(browser: Browser, pool: Any) -> None:
    running = Running(Engine(pool.pool, pool.tokenizer).start(), Limits(tokens=400, answer=60, seconds=60))
    browser.open(f"http://127.0.0.1:{running.port}/")
    browser.wait("document.getElementById('note').textContent.includes('missing or wrong API key')")
    browser.run(f"document.getElementById('key').value = {KEY!r}; document.getElementById('reload').click()")
    browser.wait("document.querySelectorAll('section').length == 3")
    browser.run("document.getElementById('tokens').value = 3")
    send(browser, "apples " * 300, 3)
    assert all("tokens; 1 to 399 are allowed" in text for text in answers(browser).values())
    send(browser, "Bob", 3)  # and the failed question is not part of the talk
    assert all("allowed" not in text for text in answers(browser).values())
    running.stop()
