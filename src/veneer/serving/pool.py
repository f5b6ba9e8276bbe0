"""The adapters that a server knows by name, and those of them that are in memory: loaded when asked for, the least
recently used out beyond a limit. Folders given while the server runs must lie inside an allow-list."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from torch import nn

from .. import registry, state
from ..config import PeftConfig, PromptLearningConfig
from ..errors import AdapterError
from ..model import PeftModel

__all__ = ["Forbidden", "Pool"]


class Forbidden(AdapterError):
    """A folder outside the allow-list."""


class Pool:
    """known: name -> folder. loaded: those in memory, the least recently used first. limit: how many may be loaded
    at once, None for all. folders: where adapters that are named while the server runs may lie.

    `known` may be read and changed from any thread; `bring` and `drop` belong to the thread that runs the model.
    """

    def __init__(
        self,
        model: nn.Module,
        known: Mapping[str, str | Path] | None = None,
        *,
        folders: Sequence[str | Path] = (),
        limit: int | None = None,
    ):
        if limit is not None and limit < 1:
            raise AdapterError(f"a limit of {limit} adapters serves none; give at least 1")
        self.model: Any = model
        self.known: dict[str, Path] = {}
        self.loaded: OrderedDict[str, None] = OrderedDict()
        self.labels: dict[str, list[str]] = {}
        self.folders = [Path(f).resolve() for f in folders]
        self.limit = limit
        self.counts: Counter[str] = Counter()
        for name, folder in (known or {}).items():
            self.add(name, Path(folder))

    @property
    def mixes(self) -> bool:
        """Whether the model takes adapter_names."""
        return isinstance(self.model, PeftModel)

    # -- any thread ---------------------------------------------------------------------------------------------
    def allowed(self, path: str) -> Path:
        """The folder that a request names, absolute or inside an allowed one. Raises Forbidden outside of them,
        AdapterError where it holds no adapter."""
        if not self.folders:
            raise Forbidden("this server loads no adapters while it runs; start it with --adapter-folder DIR")
        tried = [(root / path).resolve() for root in self.folders]  # follows links, so that none leads out
        inside = [p for p in tried if any(p.is_relative_to(root) for root in self.folders)]
        if not inside:
            raise Forbidden(f"{path!r} is not inside a folder that this server may read (--adapter-folder)")
        found = next((p for p in inside if (p / "adapter_config.json").is_file()), None)
        if found is None:
            raise AdapterError(f"{path!r}: there is no adapter_config.json in this folder")
        if not (found / "adapter_config.json").resolve().is_relative_to(found):
            raise Forbidden(f"{path!r}: its adapter_config.json is a link that leads out of the folder")
        return found

    def add(self, name: str, folder: Path) -> None:
        """Know an adapter by a name, without loading it. Raises AdapterError for a name that cannot be one."""
        if not name or "." in name:
            raise AdapterError(f"adapter name {name!r}: use a non-empty name without dots")
        if name in self.known:
            raise AdapterError(f"there is an adapter {name!r} already; unload it first")
        self.known[name] = folder

    # -- the engine's thread --------------------------------------------------------------------------------------
    def bring(self, name: str, busy: Set[str]) -> bool:
        """Have an adapter in memory; others that are not busy make room. False where all of them are busy.

        Raises what loading raises; the adapter is then as if it had not been asked for.
        """
        if name in self.loaded:
            self.loaded.move_to_end(name)
            return True
        if name not in self.known:
            raise AdapterError(f"no adapter {name!r}; there are: {', '.join(self.known) or 'none'}")
        while self.limit is not None and len(self.loaded) >= self.limit:
            idle = next((n for n in self.loaded if n not in busy), None)
            if idle is None:
                return False
            self.drop(idle)
            self.counts["evictions"] += 1
        self._load(name, self.known[name])
        self.loaded[name] = None
        self.counts["loads"] += 1
        return True

    def drop(self, name: str) -> None:
        """Take an adapter out of memory, where it is there."""
        if name in self.loaded:
            self.model.delete_adapter(name)
            del self.loaded[name]

    def _load(self, name: str, folder: Path) -> None:
        from ..mixed import PeftMixedModel

        config: Any = PeftConfig.from_pretrained(str(folder))
        check_served(name, folder, config, self.model)
        if isinstance(self.model, PeftMixedModel):
            self.model.load_adapter(str(folder), name)
        else:
            self.model = PeftMixedModel.from_pretrained(self.model, str(folder), name, config=config).eval()
        labels = folder / "labels.json"
        if labels.is_file():
            from ..train.use import label_names

            self.labels[name] = label_names(folder)


def check_served(name: str, folder: Path, config: Any, model: Any) -> None:
    """Raise AdapterError for an adapter that cannot share a batch with others and with the plain base."""
    what = f"{name} ({folder})"
    if isinstance(config, PromptLearningConfig):
        raise AdapterError(
            f"{what}: {config.peft_type} puts tokens before the input, and rows of one batch cannot "
            "differ in that; serve it alone, merged or in a server of its own"
        )
    alone = "; serve it merged (veneer merge), or as a plain LoRA (veneer convert)"
    if registry.method_of(config).changes_base(config):
        raise AdapterError(f"{what}: it rewrites the base's weights when it is loaded, for every other adapter{alone}")
    if getattr(config, "bias", "none") not in (None, "none"):
        raise AdapterError(f"{what}: it trains the base's biases (bias={config.bias!r}), which all rows share{alone}")
    saved = getattr(config, "modules_to_save", None) or ()
    own = {saved} if isinstance(saved, str) else set(saved)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    parameters = dict(base.named_parameters())
    for key in state.read(str(folder))[0]:
        path = key.removeprefix("base_model.model.")
        if path in parameters and not own & set(path.split(".")):
            raise AdapterError(f"{what}: its file holds the base's own tensor {path}, which all rows share{alone}")
