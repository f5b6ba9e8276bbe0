"""`veneer plan`: what it says of a run is what the run then is."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_train import bos_tokenizer, chat, write_jsonl
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from veneer.cli.app import app
from veneer.cli.plan import show_plan, tokens_as_text
from veneer.train import Recipe, RecipeError, run
from veneer.train.estimate import Speed
from veneer.train.meta_pass import Tally
from veneer.train.outlook import outlook

SPEED = Speed(1e10, 1e9)
FEW: dict[str, Any] = {"num_train_epochs": 2, "per_device_train_batch_size": 5, "use_cpu": True}
QV: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def test_the_run_is_what_was_planned(causal: Callable[..., Recipe], chats: Path, tmp_path: Path) -> None:
    recipe = causal(adapter=QV, train=FEW, data={"train": str(chats)})
    before = sorted(path.name for path in tmp_path.iterdir())
    found = outlook(recipe, SPEED)
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # nothing is written
    result = run(recipe)
    assert found.matches.trained == result.trainable_params
    assert found.matches.total == result.total_params
    assert found.matches.layers == {"q_proj": 2, "v_proj": 2}
    assert found.estimate.steps == result.history[-1]["step"]
    assert found.rows.tokens * 2 == result.train_tokens
    size = (Path(result.adapter_dir) / "adapter_model.safetensors").stat().st_size
    assert found.estimate.disk <= size < found.estimate.disk + 16384  # the header names tensors and holds metadata


def test_it_shows_which_tokens_are_learned(causal: Callable[..., Recipe]) -> None:
    found = outlook(causal(adapter=QV), SPEED)
    stream = found.examples[0]
    learned = "".join(token for token, trained in stream if trained)
    assert learned == '{"colour": "red"}<|im_end|>'
    text = tokens_as_text(stream)
    assert text.plain == "".join(token for token, _ in stream)
    green = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert green == learned
    assert found.rows.learned == pytest.approx(sum(t for _, t in stream) / len(stream), rel=0.2)


def test_histogram_and_padding(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": "red " * n} for n in (2, 2, 30, 30)])
    train = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential", "use_cpu": True}
    rows = outlook(causal(adapter=QV, data={"train": str(path)}, train=train), SPEED).rows
    assert sum(number for _, number in rows.histogram) == rows.number == 4
    assert rows.histogram[0][1] == rows.histogram[-1][1] == 2
    assert rows.padding == 0.0
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [{"text": "red " * n} for n in (2, 30, 2, 30)])
    padded = outlook(causal(adapter=QV, data={"train": str(mixed)}, train=train), SPEED).rows
    assert padded.padding == pytest.approx(1 - padded.tokens / (4 * padded.longest))


def warnings_of(causal: Callable[..., Recipe], tmp_path: Path, rows: list[Any], **flags: Any) -> str:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = {"train": str(path), **flags.pop("data", {})}
    return "\n".join(outlook(causal(adapter=QV, data=data, **flags), SPEED).warnings)


def test_repeated_and_leaked_rows(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    rows = [chat("one", "red"), chat("two", "blue"), chat("one", "red")]
    test = write_jsonl(tmp_path / "test.jsonl", [chat("four", "red"), chat("two", "blue")])
    found = warnings_of(causal, tmp_path, rows, data={"test": str(test)})
    assert "1 row repeats an earlier one: rows.jsonl:3 is rows.jsonl:1 again." in found
    assert "1 row of the test set is among the training rows" in found
    assert "test.jsonl:2 is rows.jsonl:2" in found


def test_cut_answers(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    rows = [chat("one", "red"), chat("two", "blue " * 60)]
    found = warnings_of(causal, tmp_path, rows, data={"max_length": 40})
    assert "1 row (rows.jsonl:2 first; 1 row cut to 40 tokens) ends without a token that ends an answer" in found
    assert "repeat" not in found


def test_a_start_token_written_twice(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    folder = tmp_path / "bos"
    tokenizer = bos_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=4, eos_token_id=2, bos_token_id=1, pad_token_id=None)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = [{"text": "<|im_start|><|im_start|>one two"}, {"text": "three four"}]
    assert "1 row (rows.jsonl:1 first) begins with <|im_start|> twice" in warnings_of(
        causal, tmp_path, text, base=str(folder)
    )


def test_a_pattern_that_matches_nothing(causal: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="q_prj"):
        outlook(causal(adapter={"target_modules": ["q_prj"]}), SPEED)


def test_new_tokens_are_in_the_stream(causal: Callable[..., Recipe], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "acts.jsonl", [chat("one", "<ACT>red")])
    found = outlook(causal(adapter=QV, tokens=["<ACT>"], data={"train": str(path)}), SPEED)
    assert ("<ACT>", True) in found.examples[0]
    assert not any("<ACT>" in text for text in found.warnings)
    found = outlook(causal(adapter=QV, tokens=["<ACT>", "<STOP>"], data={"train": str(path)}), SPEED)
    assert "The new token <STOP> is in no training row, so nothing is learned of it." in found.warnings


@pytest.mark.parametrize("method", [{"init_lora_weights": "pissa"}, {"method": "vera", "r": 4}, {"method": "ia3"}])
def test_other_methods_need_no_weights(causal: Callable[..., Recipe], method: dict[str, Any]) -> None:
    recipe = causal(adapter={"target_modules": ["q_proj"], **method, **({"feedforward_modules": []}
                             if method.get("method") == "ia3" else {})}, train={"max_steps": 1, "use_cpu": True},
                    data__test=None)  # fmt: skip
    found = outlook(recipe, SPEED)
    assert found.matches.trained == run(recipe).trainable_params


def test_the_tally_counts_what_is_alive() -> None:
    x = torch.empty(1000, device="meta")
    with Tally() as tally:
        y = x + 1
        z = y * 2
        del y
        z.view(10, 100)
        w = z + 1
    assert (tally.bytes, tally.peak) == (8000, 8000)
    del z, w


def test_more_tokens_need_more(causal: Callable[..., Recipe]) -> None:
    small, large = (
        outlook(causal(adapter=QV, train={"per_device_train_batch_size": n, "use_cpu": True}), SPEED).estimate
        for n in (2, 8)
    )
    assert large.step == pytest.approx(4 * small.step, rel=0.2)
    assert large.weights == small.weights
    assert small.need.flops < large.need.flops


def test_the_command(causal: Callable[..., Recipe], recipe_file: Callable[[str], Path]) -> None:
    file = recipe_file(causal(adapter=QV, train=FEW).dump())
    done = CliRunner().invoke(app, ["plan", str(file), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["matches"]["layers"] == {"q_proj": 2, "v_proj": 2}
    assert found["estimate"]["memory"] > found["estimate"]["weights"]
    console = Console(file=io.StringIO(), width=120)
    show_plan(console, outlook(causal(adapter=QV, train=FEW), SPEED))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    marked = "(what is learned is between « and »)", '«{"colour": "red"}<|im_end|>»'  # it has no colours
    for words in ("q_proj x 2, v_proj x 2", "Example 2", "padding", "GFLOP/s", *marked):
        assert words in shown
    assert "24 rows of the test set are among the training rows" in " ".join(shown.split())
