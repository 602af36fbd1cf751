"""Where extracted features are kept: one folder per key, memory-mapped, there whole or not at all.

The key is a digest of everything that decides a feature, so an entry cannot be stale: other weights, another corpus or
another preprocessing are another folder.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from selfsight.errors import UserError
from selfsight.files import sync

SCHEMA = 1
ARRAY, KEY = "features.npy", "key.json"


def default_folder() -> Path:
    """$SELFSIGHT_CACHE or ~/.cache/selfsight, and there `features`."""
    root = os.environ.get("SELFSIGHT_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "selfsight") / "features"


class FeatureStore:
    """`get` gives the features of a key, computing them the first time. Several processes may ask at once."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()

    def get(self, key: dict[str, Any], shape: tuple[int, int], fill: Callable[[np.ndarray], None]) -> np.ndarray:
        """float32 features of `shape` (N, D), memory-mapped, for the JSON-able `key`.

        `fill` writes them into the array it is given, when they are not there yet. Should two processes compute the
        same entry, the first to finish publishes it and the other takes that one.
        """
        text = json.dumps({"schema": SCHEMA, **key}, sort_keys=True, indent=1)
        entry = self.folder / hashlib.sha256(text.encode()).hexdigest()
        if (array := _read(entry, shape)) is not None:
            return array
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name[:12]}.", dir=self.folder))
        try:
            self._reserve(shape)
            array = np.lib.format.open_memmap(temporary / ARRAY, mode="w+", dtype=np.float32, shape=shape)
            fill(array)
            array.flush()
            (temporary / KEY).write_text(text + "\n", encoding="utf-8")
            for name in (ARRAY, KEY):
                with (temporary / name).open("rb") as f:
                    os.fsync(f.fileno())
            # Mapped under its own name: should others replace the entry at this moment, these bytes stay.
            own = _read(temporary, shape)
            assert own is not None
            self._publish(temporary, entry, shape)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        published = _read(entry, shape)
        return own if published is None else published

    def _publish(self, temporary: Path, entry: Path, shape: tuple[int, int]) -> None:
        try:
            os.rename(temporary, entry)
        except OSError:
            if not entry.is_dir():
                raise
            if _read(entry, shape) is None:  # damaged
                shutil.rmtree(entry, ignore_errors=True)
                with suppress(OSError):  # another process was faster
                    os.rename(temporary, entry)
        sync(self.folder)

    def _reserve(self, shape: tuple[int, int]) -> None:
        # Writing to a mapped file on a full disk kills the process instead of raising an error.
        needed, free = 4 * shape[0] * shape[1], shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder} has {free >> 20} MB free and the features need {needed >> 20}: make room, or set "
                "SELFSIGHT_CACHE to another disk"
            )


def _read(entry: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The array of an entry, or None if it is absent or damaged."""
    try:
        # Copy-on-write: torch wants arrays that it could write to, and the file stays as it is whatever anyone writes.
        array = np.load(entry / ARRAY, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError):
        return None
    return array if array.shape == shape and array.dtype == np.float32 else None
