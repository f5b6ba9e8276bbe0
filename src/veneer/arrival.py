"""An adapter loaded before its base's weights: the base is on the meta device then and gets them afterwards.

What follows from the base's weight (OSF's and PSOFT's directions, the part that KaSA and PiSSA take out) is made up
for at the first use after they have come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .view import View

if TYPE_CHECKING:
    from .layer import Adapted


def catch_up(layer: Adapted) -> None:
    """Finish the adapters that wait, if the base's weight is here."""
    if layer.site.stored.is_meta:
        return
    waiting = [n for n in layer.entries if n in layer.waiting]
    layer.waiting = set()
    with torch.no_grad():
        for name in waiting:
            _finish(layer, name)


def _finish(layer: Adapted, name: str) -> None:
    from .inject import fill_in

    view, entry = View(layer, name), layer.entries[name]
    device = layer.site.device
    for holder, leaf in entry.where.values():
        t = getattr(holder, leaf)
        if t.device == device:
            continue
        now = torch.empty_like(t, device=device) if t.is_meta else t.to(device)
        setattr(holder, leaf, nn.Parameter(now, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else now)
    if entry.method.changes_base(entry.cfg):
        loaded = {key: getattr(view, key).detach().clone() for key in entry.where}
        fill_in(entry.method, view, entry.cfg, layer)
        for key, value in loaded.items():
            view.fill(key, value)
    entry.method.restore(view, entry.cfg, layer.site.weight)
