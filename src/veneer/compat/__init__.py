"""veneer under the name `peft`, for libraries that ask for adapters by that name.

    import veneer.compat
    veneer.compat.install()      # before transformers is imported

`import peft` then gives veneer's public names, so transformers' Trainer knows a veneer model as an adapter: checkpoints
hold the adapter alone, resume and load_best_model_at_end work. Only the top-level names are there so far; modules
inside peft (`peft.tuners...`) are not.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType

import veneer

from ..config import PEFT_FORMAT
from ..errors import AdapterError

NAME = "peft"


class _Alias(ModuleType):
    """The module that stands in `sys.modules`; its names are veneer's."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return getattr(veneer, name)
        except AttributeError:
            raise AttributeError(f"veneer, standing in for peft, has no {name!r}") from None

    def __dir__(self) -> list[str]:
        return dir(veneer)


def install() -> None:
    """Answer to `import peft` in this process. Calling it again does nothing.

    Raises AdapterError where peft itself is imported already, or where transformers has looked for it.
    """
    held = sys.modules.get(NAME)
    if isinstance(held, _Alias):
        return
    if held is not None:
        raise AdapterError("peft is imported already; call veneer.compat.install() before anything imports it")
    if "transformers.trainer_utils" in sys.modules:
        raise AdapterError("transformers' Trainer is imported already; call veneer.compat.install() before it")
    alias = _Alias(NAME, __doc__)
    alias.__dict__["__version__"] = PEFT_FORMAT
    alias.__spec__ = importlib.machinery.ModuleSpec(NAME, None)
    sys.modules[NAME] = alias


def uninstall() -> None:
    """Forget the alias. Libraries that imported names through it keep them."""
    if isinstance(sys.modules.get(NAME), _Alias):
        del sys.modules[NAME]
