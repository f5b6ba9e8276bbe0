"""The server through the real openai client: equal to generate, mixed batches, streaming, keys, limits."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from serve_zoo import Running
from ship_zoo import save_adapter
from typer.testing import CliRunner

from veneer import IA3Config, LoraConfig, PromptTuningConfig
from veneer.cli.app import app as command
from veneer.errors import AdapterError
from veneer.serving.api import Limits
from veneer.serving.batch import groups
from veneer.serving.engine import Busy, Engine
from veneer.serving.jobs import Event, Job, sample
from veneer.serving.load import load_served

LORA = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 32, "task_type": "CAUSAL_LM"}
PROMPTS = ["send two apples", "please send me three blue plums to the shop of Ada", "Bob", "Eve in Rome"]


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("served")
    configs = {
        "red": LoraConfig(**LORA),
        "green": LoraConfig(**{**LORA, "r": 2}),
        "gates": IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
        ),
    }  # fmt: skip
    return {n: str(save_adapter(llama, c, root / n, seed)) for seed, (n, c) in enumerate(configs.items())}


@pytest.fixture(scope="module")
def served(llama: Path, adapters: dict[str, str]) -> tuple[Any, Any]:
    return load_served(str(llama), adapters)


@pytest.fixture(scope="module")
def running(served: tuple[Any, Any]) -> Iterator[Running]:
    made = Running(Engine(*served, max_batch=5).start(), Limits(tokens=200, answer=40, seconds=60))
    yield made
    made.stop()


def alone(served: tuple[Any, Any], name: str, prompt: str, n: int) -> str:
    """What generate says with this adapter active and nothing else in the batch."""
    model, tokenizer = served
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    names = ["__base__" if name == "base" else name]
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, max_new_tokens=n, do_sample=False,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_models(running: Running, adapters: dict[str, str]) -> None:
    assert [m.id for m in running.client().models.list()] == ["base", *adapters]


def test_a_mixed_batch_says_what_each_adapter_says_alone(running: Running, served: tuple[Any, Any]) -> None:
    names = ["base", "red", "green", "gates"]
    cases = [(n, p, 4 + 5 * (i + j) % 23) for i, n in enumerate(names) for j, p in enumerate(PROMPTS)]
    client = running.client()

    def ask(case: tuple[str, str, int]) -> str:
        name, prompt, n = case
        done = client.completions.create(model=name, prompt=prompt, max_tokens=n, temperature=0)
        return done.choices[0].text

    before = running.engine.steps
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, cases))
    calls = running.engine.steps - before
    want = [alone(served, *case) for case in cases]
    assert answers == want
    assert len({alone(served, n, PROMPTS[0], 12) for n in names}) == 4  # the adapters do differ
    assert calls < sum(n for *_, n in cases) / 2  # requests shared calls of the model


def test_chat_and_usage(running: Running, served: tuple[Any, Any]) -> None:
    turns = [{"role": "system", "content": "be short"}, {"role": "user", "content": "send two apples"}]
    done = running.client().chat.completions.create(model="red", messages=turns, max_tokens=9, temperature=0)  # type: ignore[arg-type]
    tokenizer = served[1]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert done.choices[0].message.content == alone(served, "red", text, 9)
    assert done.usage is not None
    assert done.usage.prompt_tokens == len(tokenizer(text)["input_ids"])
    assert done.usage.completion_tokens <= 9
    parts = [{"role": "user", "content": [{"type": "text", "text": "send two apples"}]}]
    running.client().chat.completions.create(model="red", messages=parts, max_tokens=2)  # type: ignore[arg-type]


def test_streaming_is_the_same_text_in_pieces(running: Running) -> None:
    client = running.client()
    ask: dict[str, Any] = {"model": "green", "messages": [{"role": "user", "content": PROMPTS[1]}], "max_tokens": 20}
    whole = client.chat.completions.create(**ask, temperature=0)
    chunks = list(
        client.chat.completions.create(**ask, temperature=0, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    pieces = list(client.completions.create(model="base", prompt="Bob", max_tokens=5, temperature=0, stream=True))
    one = client.completions.create(model="base", prompt="Bob", max_tokens=5, temperature=0)
    assert "".join(p.choices[0].text for p in pieces) == one.choices[0].text


def test_stop_texts(running: Running) -> None:
    client = running.client()
    ask: dict[str, Any] = {"model": "base", "prompt": PROMPTS[0], "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[6:9]
    cut = client.completions.create(**ask, stop=[stop]).choices[0]
    assert cut.text == whole[: whole.find(stop)]
    assert cut.finish_reason == "stop"
    streamed = client.completions.create(**ask, stop=stop, stream=True)
    assert "".join(p.choices[0].text for p in streamed) == cut.text


def test_seeds_repeat(running: Running) -> None:
    ask: dict[str, Any] = {"model": "red", "prompt": PROMPTS[0], "max_tokens": 20, "temperature": 1.5, "top_p": 0.9}
    texts = [running.client().completions.create(**ask, seed=s).choices[0].text for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    job = Job([1], None, lambda e: None, temperature=1.0, top_p=0.6, seed=0)
    seen = {sample(logits, job) for _ in range(200)}
    assert seen == {0, 1}


def test_prompts_of_like_lengths_are_read_together() -> None:
    assert groups([60, 10, 62, 11], call=5) == [[1, 3], [0, 2]]
    assert groups([60, 10, 62, 11], call=500) == [[1, 3, 0, 2]]
    assert groups([]) == []

    def cost(cut: list[list[int]], lengths: list[int]) -> int:
        return sum(len(g) * max(lengths[i] for i in g) + 20 for g in cut)

    draw = torch.Generator().manual_seed(0)
    for size in range(1, 8):
        lengths = torch.randint(1, 90, (size,), generator=draw).tolist()
        found = groups(lengths, call=20)
        assert sorted(i for g in found for i in g) == list(range(size))
        order = sorted(range(size), key=lambda i: lengths[i])
        every = []
        for marks in range(2 ** (size - 1)):
            cuts = [0, *(i + 1 for i in range(size - 1) if marks >> i & 1), size]
            every.append([order[a:b] for a, b in itertools.pairwise(cuts)])
        assert cost(found, lengths) == min(cost(cut, lengths) for cut in every)


def test_a_prompt_costs_one_row_of_logits(served: tuple[Any, Any], running: Running) -> None:
    shapes = []
    head = served[0].get_output_embeddings()
    hook = head.register_forward_hook(lambda _, inputs, out: shapes.append(tuple(out.shape[:2])))
    running.client().completions.create(model="red", prompt=PROMPTS[1], max_tokens=2)
    hook.remove()
    assert shapes[0] == (1, 1)


# -- refusals ------------------------------------------------------------------------------------------------------
def test_keys(running: Running) -> None:
    with pytest.raises(openai.AuthenticationError):
        running.client("wrong").models.list()
    with pytest.raises(openai.AuthenticationError):
        running.client("wrong").completions.create(model="base", prompt="Bob")
    assert running.read("/health") == (200, "ok")


def test_unknown_models_and_bad_requests(running: Running) -> None:
    client = running.client()
    with pytest.raises(openai.NotFoundError, match="'blue' does not exist here; there are: base, red"):
        client.completions.create(model="blue", prompt="Bob")
    for more in ({"temperature": -1}, {"n": 2}, {"max_tokens": 0}, {"prompt": [999999]}, {"prompt": "apples " * 300}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**{"model": "base", "prompt": "Bob", **more})  # type: ignore[arg-type]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(openai.BadRequestError, match="image_url"):
        client.chat.completions.create(model="base", messages=image)  # type: ignore[arg-type]


def test_answers_are_cut_at_the_limit(running: Running) -> None:
    done = running.client().completions.create(model="base", prompt="Bob", max_tokens=5000, temperature=0)
    assert done.usage is not None
    assert done.usage.completion_tokens <= 40
    assert done.choices[0].finish_reason in ("length", "stop")


def test_metrics(running: Running) -> None:
    running.client().completions.create(model="gates", prompt="Bob", max_tokens=3, temperature=0)
    status, text = running.read("/metrics")
    assert status == 200
    count = next(line for line in text.splitlines() if line.startswith('veneer_tokens_total{model="gates"}'))
    assert int(count.split()[-1]) == running.engine.counts["tokens", "gates"] >= 1
    until = time.monotonic() + 10  # the last token is sent just before its row leaves
    while "veneer_running_requests 0" not in running.read("/metrics")[1]:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_full_queue_and_a_time_limit(served: tuple[Any, Any]) -> None:
    engine = Engine(*served, max_batch=1, max_queue=1)  # not started: nothing leaves the queue
    engine.submit(Job([5], None, lambda e: None))
    with pytest.raises(Busy, match="1 requests are waiting"):
        engine.submit(Job([5], None, lambda e: None))
    with pytest.raises(AdapterError, match="no adapter 'x'"):
        engine.submit(Job([5], "x", lambda e: None))
    idle = Running(Engine(*served, max_queue=1), Limits(seconds=0.3), ())
    with pytest.raises(openai.InternalServerError, match=r"more than 0\.3 s"):
        idle.client().completions.create(model="base", prompt="Bob")
    with pytest.raises(openai.RateLimitError):
        idle.client().completions.create(model="base", prompt="Bob")
    assert idle.read("/health") == (503, "stopped")
    idle.server.should_exit = True


def test_a_failing_call_ends_its_requests_only(served: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(*served)
    call = engine._call
    broken = iter([True])

    def once(*args: Any, **kwargs: Any) -> Any:
        if next(broken, False):
            raise RuntimeError("out of memory")
        return call(*args, **kwargs)

    monkeypatch.setattr(engine, "_call", once)
    first: list[Event] = []
    second: list[Event] = []
    engine.start()
    engine.submit(Job([5, 6], None, first.append, max_tokens=2))
    while not first:
        time.sleep(0.01)
    assert first[0].reason == "error"
    assert "out of memory" in first[0].text
    engine.submit(Job([5, 6], "red", second.append, max_tokens=2))
    engine.stop(30)  # what was accepted is finished
    assert second[-1].reason in ("length", "stop")


def test_prompt_methods_are_refused(llama: Path, tmp_path: Path) -> None:
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    folder = save_adapter(llama, config, tmp_path / "p")
    with pytest.raises(AdapterError, match="puts tokens before the input"):
        load_served(str(llama), {"p": str(folder)})


def test_the_command_checks_its_words(llama: Path) -> None:
    for words, says in (
        (["--adapter", "red"], "is not NAME=PATH"),
        (["--adapter", "a=x", "--adapter", "a=y"], "given twice"),
        (["--adapter", "llama=x"], "names the base and an adapter"),
    ):
        done = CliRunner().invoke(command, ["serve", str(llama), *words])
        assert done.exit_code == 2, done.output
        assert says in done.output
