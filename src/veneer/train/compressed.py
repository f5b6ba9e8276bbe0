"""Compressed files read as if they were not."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path
from typing import Any, BinaryIO

from veneer.train.errors import DataError

__all__ = ["COMPRESSED", "ending", "opened"]

#: file name ending -> compression
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}


def ending(path: Path) -> str:
    """What a file's name ends in, in lower case and without its compression: `.jsonl` of `a.jsonl.gz`."""
    name = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed. Raises DataError where they are damaged."""
    kind = COMPRESSED.get(path.suffix.lower())
    try:
        with _decompressed(path, kind) as stream:
            yield stream
    except (EOFError, zlib.error, LZMAError, OSError) as error:
        if kind is None or isinstance(error, FileNotFoundError | PermissionError):
            raise
        hint = "Copy or download it again."
        raise DataError(f"not a whole {kind} file: {error}", file=path, hint=hint) from None


def _decompressed(path: Path, kind: str | None) -> Any:
    if kind == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    if kind is None:
        return path.open("rb")
    import bz2
    import gzip
    import lzma

    readers: dict[str, Any] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    return readers[kind](path, "rb")
