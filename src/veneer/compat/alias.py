"""The import machinery: modules named `peft...` whose names are veneer's, and a distribution of that name."""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from ..config import PEFT_FORMAT
from . import names

PEFT = names.PEFT


def _inside(fullname: str) -> str | None:
    """The part below peft ("" for peft itself), or None for another package's module."""
    if fullname == PEFT:
        return ""
    return fullname[len(PEFT) + 1 :] if fullname.startswith(f"{PEFT}.") else None


def _exists(inside: str) -> bool:
    return inside in names.modules() or any(m.startswith(f"{inside}.") for m in names.modules())


class Alias(ModuleType):
    """A module that stands in `sys.modules`; a name is looked up when it is first used."""

    def __getattr__(self, name: str) -> Any:
        inside = _inside(self.__name__)
        getter = None if inside is None else names.modules().get(inside, {}).get(name)
        if getter is None and name.startswith("__"):
            raise AttributeError(name)
        if getter is not None:
            value = getter()
        elif _exists(f"{inside}.{name}".lstrip(".")):
            value = import_module(f"{self.__name__}.{name}")
        else:
            raise AttributeError(f"veneer, standing in for peft, has no {self.__name__}.{name}")
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """Patching a declared name patches veneer's."""
        source = names.source(_inside(self.__name__) or "", name)
        if source is not None:
            setattr(import_module(source[0]), source[1], value)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        found = names.modules().get(_inside(self.__name__) or "", {})
        return sorted({*self.__dict__, *found})


class AliasLoader(Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Alias(spec.name, f"{spec.name}, answered by veneer")

    def exec_module(self, module: ModuleType) -> None:
        inside = _inside(module.__name__) or ""
        found = names.modules().get(inside, {})
        module.__dict__["__all__"] = sorted(n for n in found if not n.startswith("_"))
        module.__dict__["__file__"] = names.__file__
        if not inside:
            module.__dict__["__version__"] = PEFT_FORMAT


class _Metadata(Distribution):
    """What importlib.metadata tells of the distribution `peft`."""

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: {PEFT}\nVersion: {PEFT_FORMAT}\nSummary: answered by veneer\n"
        return f"{PEFT}\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Any:
        return Path(names.__file__).parent / path  # where veneer's own files of that name would be


class AliasFinder(DistributionFinder):
    """First on sys.meta_path: `peft` and everything below it come from here, never from an installed peft."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        inside = _inside(fullname)
        if inside is None:
            return None
        if inside and not _exists(inside):
            raise ModuleNotFoundError(f"No module named {fullname!r} (veneer stands in for peft)", name=fullname)
        return importlib.machinery.ModuleSpec(fullname, AliasLoader(), origin=names.__file__, is_package=True)

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        wanted = getattr(context, "name", None)
        if wanted is None or wanted.lower() == PEFT:
            yield _Metadata()


def loaded() -> list[str]:
    """The modules of that name in sys.modules that are ours."""
    return [n for n, m in sys.modules.items() if _inside(n) is not None and isinstance(m, Alias)]
