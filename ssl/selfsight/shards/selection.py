"""Selections: curation as a view. Which samples of a corpus to use, and how often, without a byte rewritten.

selections/NAME.parquet has columns key (string), repeat (how often in an epoch) and reason (string, may be null).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from selfsight.errors import UserError
from selfsight.files import publish
from selfsight.shards.store import is_url, open_store

if TYPE_CHECKING:
    import pyarrow as pa

    from selfsight.shards.corpus import Corpus

FOLDER = "selections"


@dataclass(frozen=True)
class Selection:
    ordinals: np.ndarray  # int64 (m,), increasing
    repeats: np.ndarray  # int64 (m,), at least 1
    digest: str  # SHA-256 over both, whatever the file that held them


def selection_path(corpus: "Corpus", name: str) -> str:
    """Path or URL of selections/NAME.parquet of the corpus, or `name` itself where it ends in .parquet."""
    return name if name.endswith(".parquet") else open_store(corpus.path).locate(f"{FOLDER}/{name}.parquet")


def read_selection(corpus: "Corpus", name: str) -> Selection:
    """The selection `name` of a corpus, or that of a Parquet file with columns key and, if more than once, repeat.

    Raises UserError where there is none, and where it names samples that the corpus does not have.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = selection_path(corpus, name)
    try:
        file = pq.ParquetFile(pa.BufferReader(open_store("").read(path)))
        columns = [c for c in ("key", "repeat") if c in file.schema_arrow.names]
        table = file.read(columns)
    except FileNotFoundError:
        there = [] if is_url(path) else sorted(p.stem for p in Path(path).parent.glob("*.parquet"))
        known = f"one of {', '.join(there)}" if there else "a Parquet file"
        raise UserError(f"there is no {path}: give {known}") from None
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{path} cannot be read ({e}): give a Parquet file with columns key and repeat") from None
    if "key" not in columns:
        raise UserError(f"{path} has no column key: give it the keys of the corpus's samples")
    try:
        ordinals = _whole_numbers(table["key"].cast(pa.string()))
        repeats = _whole_numbers(table["repeat"]) if "repeat" in columns else np.ones_like(ordinals)
    except (ValueError, TypeError, NotImplementedError):  # as pyarrow names what it cannot convert
        raise UserError(f"{path}: a key or repeat is no whole number: keys are those of the corpus's samples") from None
    kept = repeats > 0
    ordinals, repeats = ordinals[kept], repeats[kept]
    if not len(ordinals):
        raise UserError(f"{path} selects nothing: give it rows with a key and a repeat of 1 or more")
    by_ordinal = np.argsort(ordinals, kind="stable")
    ordinals, repeats = ordinals[by_ordinal], repeats[by_ordinal]
    if ordinals[0] < 0 or ordinals[-1] >= corpus.n:
        stray = ordinals[0 if ordinals[0] < 0 else -1]
        raise UserError(f"{path} names sample {stray} of a corpus of {corpus.n}: it belongs to another corpus")
    if (np.diff(ordinals) == 0).any():
        raise UserError(f"{path} names sample {ordinals[:-1][np.diff(ordinals) == 0][0]} twice: use its repeat column")
    digest = hashlib.sha256(ordinals.astype("<i8").tobytes() + repeats.astype("<i8").tobytes()).hexdigest()
    return Selection(ordinals, repeats, digest)


def _whole_numbers(column: "pa.ChunkedArray") -> np.ndarray:
    """int64, whatever type they are written as. Raises ValueError where one is missing or no whole number."""
    import pyarrow as pa

    if column.null_count:
        raise ValueError("a value is missing")
    return column.cast(pa.int64()).to_numpy()


def write_selection(
    corpus: "Corpus",
    name: str,
    ordinals: np.ndarray,
    repeats: np.ndarray | None = None,
    reasons: list[str] | None = None,
) -> Path:
    """Publishes selections/NAME.parquet: `ordinals` int (m,), `repeats` int (m,) or None for once each.

    Raises UserError where the corpus lies at a URL.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from selfsight.shards.corpus import key_of

    table = pa.table(
        {
            "key": pa.array([key_of(int(o)) for o in ordinals], pa.string()),
            "repeat": pa.array(np.ones(len(ordinals), np.int64) if repeats is None else repeats, pa.int64()),
            "reason": pa.array([None] * len(ordinals) if reasons is None else reasons, pa.string()),
        }
    )
    if is_url(corpus.path):
        raise UserError(f"{corpus.path} is only read: write the selection to a copy in a folder of this machine")
    path = Path(corpus.path) / FOLDER / f"{name}.parquet"
    path.parent.mkdir(exist_ok=True)
    with publish(path) as f:
        pq.write_table(table, f, compression="zstd")
    return path
