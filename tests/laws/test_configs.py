"""Every config is peft's: the same fields and defaults, and a file of either package, of any version, reads in both."""

from __future__ import annotations

import dataclasses
import json
import warnings
from enum import Enum
from pathlib import Path
from typing import Any

import law_cases
import model_cases
import peft
import pytest
from law_cases import CASES
from lawlib import LAYERS
from old_files import OLD

import veneer
from veneer import registry
from veneer.kinds import Prompt

TYPES = registry.types()


def theirs(name: str) -> Any:
    return getattr(peft, registry.METHODS[name].config)


def plain(value: Any) -> Any:
    """A value without the enum, set or dataclass that either package keeps it in."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=repr)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def public_fields(cls: Any) -> dict[str, Any]:
    """Field -> default of what goes into a file; veneer's own fields are left out."""
    out = {}
    for f in dataclasses.fields(cls):
        if not f.metadata.get("veneer"):
            made = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            out[f.name] = "required" if made is dataclasses.MISSING else plain(made)
    return out


@pytest.mark.parametrize("name", TYPES)
def test_fields_and_defaults_are_pefts(name: str) -> None:
    assert public_fields(registry.config_class(name)) == public_fields(theirs(name))


def settings(name: str) -> dict[str, dict[str, Any]]:
    """The law settings of a type and of the variants that its config selects, by variant."""
    config = registry.METHODS[name].config
    out = {}
    for method, entry in registry.METHODS.items():
        if entry.config != config or (entry.public and method != name) or model_cases.needs_others(method):
            continue
        for variant, kwargs in law_cases.SETTINGS.get(method, model_cases.SETTINGS.get(method, {"": {}})).items():
            out[f"{method} {variant}".strip()] = kwargs
    return out


FILES = [pytest.param(name, kwargs, id=i) for name in TYPES for i, kwargs in settings(name).items()]


def extra(name: str) -> dict[str, Any]:
    """Targets, where the type has them."""
    has = {f.name for f in dataclasses.fields(theirs(name))}
    if isinstance(registry.method(name), Prompt):
        return {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
    return {"target_modules": LAYERS} if "target_modules" in has and name in {c.method_name for c in CASES} else {}


def values(config: Any) -> dict[str, Any]:
    held = {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config) if not f.metadata.get("veneer")}
    return held | {"peft_type": plain(held["peft_type"])}


def agree(ours: Any, theirs: Any) -> None:
    """Fields that both have are equal; that both have all is a test of its own."""
    a, b = values(ours), values(theirs)
    assert {k: v for k, v in a.items() if k in b} == {k: v for k, v in b.items() if k in a}


def read(package: Any, folder: Path) -> Any:
    """The config in a folder; a key that does not fit is an error. Advice about settings is let pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Unexpected keyword")
        return package.PeftConfig.from_pretrained(folder)


@pytest.mark.parametrize(("name", "kwargs"), FILES)
def test_either_package_reads_the_others_config(name: str, kwargs: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = theirs(name)(**{**extra(name), **kwargs})
    written.save_pretrained(tmp_path / "peft")
    ours = read(veneer, tmp_path / "peft")
    assert type(ours).__name__ == type(written).__name__
    again = read(peft, tmp_path / "peft")
    agree(ours, again)
    ours.save_pretrained(tmp_path / "veneer")
    agree(ours, read(peft, tmp_path / "veneer"))
    assert values(read(veneer, tmp_path / "veneer")) == values(ours)


@pytest.mark.parametrize("name", TYPES)
def test_unknown_keys_give_one_clear_warning(name: str) -> None:
    given = {**extra(name), **next(iter(settings(name).values()), {}), "peft_type": name}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = veneer.PeftConfig.from_peft_type(**given, brand_new=3, empty_news=None)
    said = [str(w.message) for w in caught if "Unexpected keyword" in str(w.message)]
    assert len(said) == 1, [str(w.message) for w in caught]
    assert "brand_new (set to a value" in said[0]
    assert "empty_news (empty, so nothing is lost)" in said[0]
    assert type(config) is registry.config_class(name)


@pytest.mark.parametrize("case", [k for k in OLD if k.split()[0] in TYPES])
def test_files_of_older_versions(case: str, tmp_path: Path) -> None:
    """peft 0.21.2 is the judge: the same values, or both refuse the file."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(OLD[case]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = peft.PeftConfig.from_pretrained(tmp_path)
    except ValueError:
        with pytest.raises(ValueError):
            veneer.PeftConfig.from_pretrained(tmp_path)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = veneer.PeftConfig.from_pretrained(tmp_path)
    assert len([w for w in caught if issubclass(w.category, veneer.PeftWarning)]) == 0, [str(w.message) for w in caught]
    if "peft_version" not in OLD[case]:
        expected.peft_version = ours.peft_version  # each package fills in its own
    agree(ours, expected)
    for key, value in OLD[case].items():
        if key not in values(ours):
            continue
        assert sorted(value) == values(ours)[key] if isinstance(value, list) else value == values(ours)[key], key
