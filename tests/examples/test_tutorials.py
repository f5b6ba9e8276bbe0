"""The tutorials' commands run as they stand, and each leaves a run that learned what its page is about."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from veneer.train.recipe import build_recipe

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "tutorials"
#: the repository's own veneer and Python, whatever else is on the path
SHELL = 'set -euo pipefail\npython() {{ {python} "$@"; }}\nveneer() {{ {python} -m veneer "$@"; }}\nmkdir -p runs\n'


@dataclass(frozen=True)
class Lesson:
    """``metric`` of ``run`` ends ``above`` the base's, by at least ``gain``; ``data``: a folder of real files."""

    run: str
    metric: str
    gain: float
    data: str | None = None


LESSONS = {
    "ner": Lesson("ner", "f1", 0.1, "wnut17"),
    "instruction": Lesson("gsm8k", "loss", -0.005, "gsm8k"),
    "sentence_pairs": Lesson("pairs", "recall_at_1", 0.5),
    "masked_lm": Lesson("masked", "accuracy", 0.3),
    "translation": Lesson("translation", "chrf", 0.5),
    "question_answering": Lesson("answers", "f1", 0.5),
    "dpo": Lesson("short", "loss", -0.05),
}


#: pages of programs: what each prints of what it measured
PROGRAMS = {
    "speech_and_images": [
        r"accuracy: (\S+) before, (\S+) after",
        r"note errors three semitones higher: (\S+) before, (\S+) after",
        r"exact match: (\S+) before, (\S+) after",
    ]
}


def commands(page: Path) -> str:
    """Every fenced `sh` block of a page, one after the other."""
    return "".join(re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S))


def real_data(name: str) -> Path:
    """A folder of real files: in `$VENEER_TEST_DATA`, or `../shared/data` beside the repository."""
    root = Path(os.environ.get("VENEER_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not (root / name).is_dir():
        pytest.skip(f"no {name} files in {root}; set VENEER_TEST_DATA to a folder that holds {name}/")
    return root


def run_page(name: str, folder: Path) -> str:
    """What a page's commands print, run in ``folder``."""
    (folder / "examples").symlink_to(ROOT / "examples")
    script = SHELL.format(python=sys.executable) + commands(PAGES / f"{name}.md")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", LESSONS)
def test_a_tutorials_commands_run(name: str, tmp_path: Path) -> None:
    lesson = LESSONS[name]
    if lesson.data is not None:
        (tmp_path / "data").symlink_to(real_data(lesson.data))
    run_page(name, tmp_path)
    result = json.loads((tmp_path / "runs" / lesson.run / "result.json").read_text(encoding="utf-8"))
    before, after = (result[when][lesson.metric] for when in ("before", "after"))
    gained = after - before
    assert gained >= lesson.gain if lesson.gain > 0 else gained <= lesson.gain, (before, after)
    assert (tmp_path / "runs" / lesson.run / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_pages_programs_learn_and_load_back(name: str, tmp_path: Path) -> None:
    printed = run_page(name, tmp_path)
    for line in PROGRAMS[name]:
        found = re.search(line, printed)
        assert found, (line, printed)
        before, after = map(float, found.groups())
        better, worse = (before, after) if "errors" in line else (after, before)
        assert better >= worse + 0.4, found[0]
    assert printed.count("loaded back: equal") == len(PROGRAMS[name]) == commands(PAGES / f"{name}.md").count("python")


def test_every_page_is_run_and_listed() -> None:
    pages = {page.stem for page in PAGES.glob("*.md")} - {"README"}
    assert pages == set(LESSONS) | set(PROGRAMS)
    listed = set(re.findall(r"\]\((\w+)\.md\)", (PAGES / "README.md").read_text(encoding="utf-8")))
    assert listed == pages


def test_every_recipe_has_a_page_that_trains_it() -> None:
    trained = set(re.findall(r"veneer train examples/(\w+)\.yaml", "".join(map(commands, PAGES.glob("*.md")))))
    assert trained == {recipe.stem for recipe in (ROOT / "examples").glob("*.yaml")}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_well_formed_and_their_files_are_there(path: Path) -> None:
    recipe = build_recipe(yaml.safe_load(path.read_text(encoding="utf-8")), [], {})
    assert recipe.out.startswith("runs/")
    for name in (recipe.data.train, recipe.data.test):
        assert name is not None
        assert (ROOT / name).is_file() or name.startswith("data/")
