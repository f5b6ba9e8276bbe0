"""The adapters that a chat can switch between: several on one base, each asked as it was trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.cli.errors import UserError

if TYPE_CHECKING:
    from veneer.train.asking import Asking
    from veneer.train.use import Loaded

__all__ = ["Voices"]


@dataclass
class Voices:
    """Adapters by the names a chat calls them, and the one that answers; none where ``loaded`` is a base model."""

    loaded: Loaded
    current: str = ""
    known: dict[str, tuple[str, Asking]] = field(default_factory=dict)  # name -> (its name in the model, asking)

    def __post_init__(self) -> None:
        if self.loaded.adapter is not None:
            self.current = self._name(self.loaded.adapter)
            self.known[self.current] = (self.loaded.model.active_adapter, self.loaded.asking)

    def _name(self, folder: Path) -> str:
        """The run's name, of `runs/small/adapter` as of `runs/small`; numbered where it is taken."""
        folder = folder.resolve()
        name = first = folder.parent.name if folder.name == "adapter" and folder.parent.name else folder.name
        number = 1
        while name in self.known:
            number += 1
            name = f"{first}-{number}"
        return name

    def add(self, given: str, base: str | None = None) -> str:
        """Load a further adapter beside the first; returns its name. ``base``: take it for the base of all.

        Raises:
            UserError: it is no adapter for texts on the same base and vocabulary.
        """
        from veneer.train.asking import read_asking
        from veneer.train.purpose import read_purpose
        from veneer.train.tasks import task_class
        from veneer.train.use import find_adapter, read_adapter_config

        folder = find_adapter(given)
        if self.loaded.adapter is None:
            raise UserError("a base model has no adapters to switch between", hint="Start the chat with an adapter.")
        if folder is None:
            raise UserError("no adapter there", where=given, hint="Name an adapter's folder or a run's.")
        own = read_adapter_config(folder).get("base_model_name_or_path")
        if base is None and own != self.loaded.base_name:
            problem = f"it is an adapter of {own}, and this chat is with {self.loaded.base_name}"
            raise UserError(problem, where=given, hint="If they are the same model, start the chat with --base.")
        purpose = read_purpose(folder)
        if purpose is not None and not task_class(purpose.task).writes:
            raise UserError(f"it was trained for {purpose.task} and does not chat", where=given)
        self._same_vocabulary(folder, given)
        name = self._name(folder)
        self.loaded.model.load_adapter(str(folder), name)
        self.loaded.model.eval()
        self.known[name] = (name, read_asking(folder))
        return name

    def _same_vocabulary(self, folder: Path, given: str) -> None:
        from veneer.train.bases import BaseRef, load_tokenizer

        if (folder / "tokenizer_config.json").is_file():
            theirs = load_tokenizer(BaseRef("folder", str(folder), folder)).get_vocab()
            if theirs != self.loaded.tokenizer.get_vocab():
                problem = "its tokenizer has other tokens than the first adapter's"
                raise UserError(problem, where=given, hint="Chat with it on its own.")

    def asking(self, name: str | None = None) -> Asking:
        """How an adapter (the current one) was asked in training."""
        return self.known[name or self.current][1] if self.known else self.loaded.asking

    @contextmanager
    def speaking(self, name: str) -> Iterator[Asking]:
        """Inside, the model is the adapter ``name``, or its base where that is `base`."""
        if name == "base" or not self.known:
            with self.loaded.without_adapter():
                yield self.asking()
            return
        inside, asking = self.known[name]
        before = self.loaded.model.active_adapter
        self.loaded.model.set_adapter(inside)
        try:
            yield asking
        finally:
            self.loaded.model.set_adapter(before)
