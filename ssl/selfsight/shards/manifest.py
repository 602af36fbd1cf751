"""The manifest of a corpus: which shards, of what digests and counts, made how. It is published last, so its presence
means that the corpus is complete; its id is the Merkle root over the shards and is what checkpoints and scores cite.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

from selfsight.errors import UserError
from selfsight.files import publish
from selfsight.shards.store import Store, open_store

NAME = "manifest.json"
KIND = "selfsight-corpus"
SCHEMA = 2
COUNTS = ("seen", "kept", "rejected", "skipped", "outside", "duplicates")


@dataclass(frozen=True)
class Shard:
    """One shard and its index file, by number: index/NNNNNN.parquet, and shards/NNNNNN.tar if it is not elsewhere."""

    number: int
    first: int  # global ordinal of its first sample
    count: int
    bytes: int
    sha256: str
    index_sha256: str
    url: str | None = None  # of a shard that was adopted where it lies

    @property
    def tar(self) -> str:
        return self.url or f"shards/{self.number:06d}.tar"

    @property
    def index(self) -> str:
        return f"index/{self.number:06d}.parquet"


@dataclass(frozen=True)
class Manifest:
    id: str
    n: int
    image_bytes: int
    shards: list[Shard]
    chunks: int
    chunks_sha256: str
    rejected_sha256: str
    classes: list[str] | None  # index = label
    counts: dict[str, int]  # of COUNTS
    rejected_reasons: dict[str, int]
    recipe: dict[str, Any]
    recipe_digest: str
    parent: str | None = None
    kind: str = KIND
    schema: int = SCHEMA
    notes: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        with publish(folder / NAME) as f:
            f.write((json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode())

    @staticmethod
    def load(folder: str | Path, store: Store | None = None) -> "Manifest":
        """Of the corpus at a path or URL. Raises UserError where there is none, or one that contradicts itself."""
        store = store or open_store(folder)
        path = store.locate(NAME)
        try:
            text = store.read(NAME)
        except (FileNotFoundError, NotADirectoryError):
            if os.path.isdir(store.locate(".build")):
                raise UserError(
                    f"{folder} is an unfinished corpus: run the same `selfsight corpus build` or `adopt` again"
                ) from None
            raise UserError(f"{folder} is no corpus (no {NAME}): make one with `selfsight corpus build`") from None
        except OSError as e:
            raise UserError(f"{path} cannot be read ({e.strerror}): mend that, or name another place") from None
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError):
            raise _malformed(path, "not JSON") from None
        if not isinstance(raw, dict) or raw.get("kind") != KIND:
            raise UserError(f"{path} is not the manifest of a selfsight corpus: name another folder")
        if raw.get("schema") != SCHEMA:
            raise UserError(
                f"{path} has schema {raw.get('schema')!r}, this version reads {SCHEMA}: use a matching selfsight"
            )
        try:
            manifest = Manifest(**{**raw, "shards": [Shard(**s) for s in raw["shards"]]})
        except (TypeError, KeyError):
            raise _malformed(path, "keys are missing or unknown") from None
        manifest._check(path)
        return manifest

    def _check(self, path: str) -> None:
        for owner in (self, *self.shards):
            for f in fields(owner):
                value = getattr(owner, f.name)
                kind = get_origin(f.type) or f.type
                wrong = kind in (int, str, list, dict) and type(value) is not kind
                if wrong or (isinstance(value, int) and value < 0):
                    raise _malformed(path, f"{f.name} is {value!r}")
        if any(type(self.counts.get(name)) is not int for name in COUNTS):
            raise _malformed(path, f"counts is {self.counts!r}")
        first = 0
        for number, shard in enumerate(self.shards):
            if (shard.number, shard.first) != (number, first) or shard.count < 1:
                raise _malformed(path, f"shard {number} does not follow its neighbour")
            first += shard.count
        if first != self.n:
            raise _malformed(path, f"the shards hold {first} samples, not {self.n}")
        for names in (self.classes or [], self.notes):
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise _malformed(path, "classes or notes are not lists of text")
        try:
            root = merkle_root(self.shards)
        except ValueError:
            raise _malformed(path, "a digest is not hexadecimal") from None
        if root != self.id:
            raise _malformed(path, "the id is not that of the shards listed")


def is_corpus(folder: Path) -> bool:
    """Whether there is a manifest of a corpus, sound or not."""
    try:
        return json.loads((folder / NAME).read_bytes())["kind"] == KIND
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def merkle_root(shards: list[Shard]) -> str:
    """SHA-256 Merkle root over (shard digest, count), in shard order; leaves and nodes have domains of their own."""
    level = [hashlib.sha256(b"\0" + bytes.fromhex(s.sha256) + s.count.to_bytes(8, "big")).digest() for s in shards]
    if not level:
        return hashlib.sha256(b"").hexdigest()
    while len(level) > 1:
        pairs = [hashlib.sha256(b"\1" + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(pairs) * 2 :]
    return level[0].hex()


def _malformed(path: str, what: str) -> UserError:
    return UserError(f"{path} is malformed ({what}): restore it from a copy, or build the corpus again")
