"""What loading an adapter's tensors did, and its error."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches

from .errors import LoadError


@dataclass
class LoadReport:
    """What loading did. missing and unexpected are file keys; mismatched says both shapes."""

    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[str] = field(default_factory=list)
    loaded: int = 0

    @property
    def ok(self) -> bool:
        return not (self.missing_keys or self.unexpected_keys or self.mismatched_keys)

    def text(self) -> str:
        lines = []
        for title, keys in (
            ("missing from the file", self.missing_keys),
            ("in the file but nowhere in the model", self.unexpected_keys),
            ("of another shape", self.mismatched_keys),
        ):
            if keys:
                shown = [f"    {k}" for k in keys[:20]] + [f"    ... and {len(keys) - 20} more"] * (len(keys) > 20)
                lines += [f"  {len(keys)} {title}:", *shown]
        if self.missing_keys and self.unexpected_keys:
            near = get_close_matches(self.missing_keys[0], self.unexpected_keys, n=1, cutoff=0.5)
            if near:
                lines.append(f"  nearest pair: wanted {self.missing_keys[0]}, file has {near[0]}")
        return "\n".join(lines)

    def check(self, source: str) -> None:
        """Raise LoadError unless every tensor found its place."""
        if not self.ok:
            raise LoadError(
                f"{source} does not fit this model ({self.loaded} tensors do):\n{self.text()}\n"
                "Load it into the model it was trained on, or pass strict=False to keep what fits and leave the rest "
                "at its initial value.",
                {"missing": self.missing_keys, "unexpected": self.unexpected_keys, "mismatched": self.mismatched_keys},
            )
