"""veneer under the name `peft`, for scripts and libraries that know adapters by that name.

    import veneer.compat
    veneer.compat.install()      # before anything imports peft, or transformers' Trainer

`import peft` and every `peft.x.y` that others import then give veneer's own names, whether or not peft is installed,
with a version and metadata. `python -m veneer.compat script.py ...` runs an unmodified script so; `uninstall()` takes
it back. Which name stands for which is declared in `veneer.compat.names`.
"""

from __future__ import annotations

import sys

from ..errors import AdapterError
from .alias import PEFT, AliasFinder, loaded

__all__ = ["install", "installed", "uninstall"]


def installed() -> bool:
    return any(isinstance(finder, AliasFinder) for finder in sys.meta_path)


def install() -> None:
    """Answer to `import peft` in this process. Calling it again does nothing.

    Raises AdapterError where peft itself is imported already, or where transformers has looked for it.
    """
    if installed():
        return
    if PEFT in sys.modules:
        where = getattr(sys.modules[PEFT], "__file__", None)
        raise AdapterError(
            f"peft is imported already (from {where}), so libraries hold its classes; call veneer.compat.install() "
            "before anything imports it, or run the script with: python -m veneer.compat script.py"
        )
    if "transformers.trainer_utils" in sys.modules:
        raise AdapterError(
            "transformers' Trainer is imported already and has looked for peft; call veneer.compat.install() before "
            "it, or run the script with: python -m veneer.compat script.py"
        )
    sys.meta_path.insert(0, AliasFinder())


def uninstall() -> None:
    """Forget the alias. Libraries that imported names through it keep them."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, AliasFinder)]
    for name in loaded():
        del sys.modules[name]
