"""The indexes with which NVIDIA's loaders read our shards: DALI's text file, and Megatron-Energon's folder of metadata.

Both say where the files of each sample lie, which our own index knows, so no shard is read. The formats are those of
DALI's tools/wds2idx.py (v1.2) and of `energon prepare` (Megatron-Energon 7.4). An index of theirs is only a hint to
theirs: neither has checksums, and what they read they do not check.
"""

import json
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from selfsight.errors import UserError
from selfsight.files import publish
from selfsight.shards.corpus import LABEL_EXTENSION, Corpus
from selfsight.shards.decode import EXTENSIONS
from selfsight.shards.manifest import Shard
from selfsight.shards.tar import BLOCK, END, padded

DALI_VERSION = "v1.2"
DALI_SUFFIX, ENERGON_SUFFIX = ".idx", ".tar.idx"
ENERGON_FOLDER = ".nv-meta"
COLUMNS = ["key", "member_offset", "data_offset", "size", "end", "format", "label"]
TABLES = """
CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL UNIQUE, sample_index INTEGER NOT NULL,
    byte_offset INTEGER, byte_size INTEGER);
CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT, content_byte_offset INTEGER,
    content_byte_size INTEGER);
"""
INDEXES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full
    ON sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""


def write_dali(folder: str | Path) -> str:
    """One .idx beside each shard, for `fn.readers.webdataset(paths=…, index_paths=…)`; a sentence that says so.

    Raises UserError for an adopted corpus, and for one that lies at a URL.
    """
    corpus, root = _own(folder)
    for shard, rows in _rows(corpus):
        with publish(root / beside(shard, DALI_SUFFIX)) as f:
            f.write(dali_index(rows))
    return f"{len(corpus.manifest.shards)} index files, shards/*{DALI_SUFFIX}"


def write_energon(folder: str | Path) -> str:
    """A .tar.idx beside each shard and .nv-meta/, so that the folder is a dataset of Energon's, all of it `train`.

    Labelled, it is of ImageClassificationSample, else of ImageSample. A sentence says so. Raises UserError for an
    adopted corpus, and for one that lies at a URL.
    """
    corpus, root = _own(folder)
    meta = root / ENERGON_FOLDER
    meta.mkdir(exist_ok=True)
    extensions: set[str] = set()
    with publish(meta / "index.sqlite") as f:
        database = sqlite3.connect(f.name)
        try:
            database.executescript(TABLES)
            for shard, rows in _rows(corpus):
                offsets = energon_index(rows)
                starts, sizes = offsets.tolist(), np.diff(offsets).tolist()
                samples = ((shard.number, row["key"], at, starts[at], sizes[at]) for at, row in enumerate(rows))
                database.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", samples)
                parts = ((shard.number, at, *part) for at, row in enumerate(rows) for part in _parts(row))
                database.executemany("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", parts)
                extensions |= {EXTENSIONS[row["format"]] for row in rows}
                with publish(root / beside(shard, ENERGON_SUFFIX)) as index:
                    index.write(offsets.tobytes())
            database.executescript(INDEXES)
            database.commit()
        finally:
            database.close()
    shards = [s.tar for s in corpus.manifest.shards]
    with publish(meta / ".info.json") as f:
        f.write(json.dumps({"shard_counts": {s.tar: s.count for s in corpus.manifest.shards}}, indent=2).encode())
    with publish(meta / "index.uuid") as f:
        f.write(str(uuid.UUID(corpus.id[:32])).encode())
    every = shards[0] if len(shards) == 1 else f"shards/{{000000..{len(shards) - 1:06d}}}.tar"
    labelled = corpus.classes is not None
    texts = {
        "split.yaml": f"split_parts:\n  train:\n  - {every}\n  val: []\n  test: []\nexclude: []\n",
        "dataset.yaml": (
            "sample_type:\n  __module__: megatron.energon\n"
            f"  __class__: {'ImageClassificationSample' if labelled else 'ImageSample'}\n"
            f"field_map:\n  image: {','.join(sorted(extensions))}\n" + ("  label: cls\n" if labelled else "")
        ),
    }
    for name, text in texts.items():
        if not (meta / name).exists():  # these two are for users to edit
            with publish(meta / name) as f:
                f.write(text.encode())
    return f"{len(shards)} index files, shards/*{ENERGON_SUFFIX}, and {ENERGON_FOLDER}/"


def dali_index(rows: list[dict[str, Any]]) -> bytes:
    """wds2idx's text: version and count, then a line per sample: extension, offset, bytes and name of each file."""
    lines = [f"{DALI_VERSION} {len(rows)}"]
    for row in rows:
        files = (f"{part} {offset} {size} {row['key']}.{part}" for part, offset, size in _parts(row))
        lines.append(" ".join(files))
    return "".join(line + "\n" for line in lines).encode()


def energon_index(rows: list[dict[str, Any]]) -> np.ndarray:
    """Little-endian uint64 (samples + 1,): where each sample begins, and where the last one ends."""
    return np.array([*(row["member_offset"] for row in rows), rows[-1]["end"] - len(END)], "<u8")


def stray(corpus_folder: Path, shard: Shard, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Names of index files beside a shard of ours that are not those of its samples."""
    wanted = {DALI_SUFFIX: dali_index(rows), ENERGON_SUFFIX: energon_index(rows).tobytes()}
    for suffix, index in wanted.items():
        name = beside(shard, suffix)
        if (corpus_folder / name).exists() and (corpus_folder / name).read_bytes() != index:
            yield name


def beside(shard: Shard, suffix: str) -> str:
    """The name of a loader's index of a shard."""
    return shard.tar.removesuffix(".tar") + suffix


def _parts(row: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(extension, offset, bytes) of the files of a sample."""
    yield EXTENSIONS[row["format"]], row["data_offset"], row["size"]
    if row["label"] is not None:
        header = row["data_offset"] + padded(row["size"])
        yield LABEL_EXTENSION, header + BLOCK, len(str(row["label"]))


def _rows(corpus: Corpus) -> Iterator[tuple[Shard, list[dict[str, Any]]]]:
    for shard in corpus.manifest.shards:
        yield shard, corpus._index(shard, COLUMNS).to_pylist()


def _own(folder: str | Path) -> tuple[Corpus, Path]:
    corpus = Corpus.open(folder)
    if any(shard.url for shard in corpus.manifest.shards):
        raise UserError(
            f"the shards of {folder} were adopted and belong to others: index them with `energon prepare` or wds2idx,"
            " or copy them into a corpus of your own with `selfsight corpus build`"
        )
    if not isinstance(corpus.path, Path):
        raise UserError(f"{folder} is a URL: index the corpus in a folder, then copy the new files beside its shards")
    return corpus, corpus.path
