"""The working state of a build: one SQLite file that survives a kill, so that a rerun goes on where it was.

It holds what pass 1 found, ordered on disk by the build's hash so that memory stays bounded, and which shards are done.
"""

import fcntl
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfsight.corpus.scan import Image, Scan
from selfsight.errors import UserError

NAME = "ledger.sqlite"
KEY = "order_, name, source, unit, row"
TABLES = f"""
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS units (source INT, unit INT, seen INT, outside INT, PRIMARY KEY (source, unit));
CREATE TABLE IF NOT EXISTS images (
    {", ".join(f"{f}_" if f == "order" else f for f in Image._fields)}, PRIMARY KEY ({KEY})) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refused (source INT, name BLOB, kind TEXT, reason TEXT);
CREATE TABLE IF NOT EXISTS labels (source INT, folder BLOB, tag TEXT, n INT);
CREATE TABLE IF NOT EXISTS shards (number INT PRIMARY KEY, record TEXT, chunks BLOB);
"""


class Ledger:
    """Opened by one build at a time; a second one is refused."""

    def __init__(self, folder: Path, recipe_digest: str) -> None:
        """Raises UserError when another build is running here or an unfinished one was of something else."""
        self._lock = open(folder / "lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another build is writing {folder.parent}: wait for it, or choose another --out") from None
        try:
            self._db = sqlite3.connect(folder / NAME, isolation_level=None)
            self._db.executescript(
                "PRAGMA locking_mode=EXCLUSIVE; PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + TABLES
            )
        except sqlite3.DatabaseError as e:
            raise sqlite_error(e, folder) from None
        self._folder = folder
        self._insert("INSERT OR IGNORE INTO meta VALUES ('recipe', ?)", [(recipe_digest,)])
        if self._rows("SELECT value FROM meta WHERE key='recipe'") != [(recipe_digest,)]:
            raise UserError(
                f"{folder.parent} holds an unfinished build of other images or options:"
                " finish that one, or remove it first"
            )

    def close(self) -> None:
        self._db.close()
        self._lock.close()

    def units(self) -> set[tuple[int, int]]:
        return set(self._rows("SELECT source, unit FROM units"))

    def add(self, scan: Scan) -> None:
        refused = [(scan.source, *r, kind) for kind in ("rejected", "skipped") for r in getattr(scan, kind)]
        with self._transaction():
            self._insert(f"INSERT INTO images VALUES ({', '.join('?' * len(Image._fields))})", scan.images)
            self._insert("INSERT INTO refused (source, name, reason, kind) VALUES (?, ?, ?, ?)", refused)
            self._insert("INSERT INTO labels VALUES (?, ?, ?, ?)", [(*k, n) for k, n in scan.labels.items()])
            self._insert("INSERT INTO units VALUES (?, ?, ?, ?)", [(scan.source, scan.number, scan.seen, scan.outside)])

    def counts(self) -> dict[str, int]:
        """seen = kept + rejected + skipped + outside; duplicates are the kept ones whose bytes were there before."""
        ((seen, outside),) = self._rows("SELECT COALESCE(SUM(seen), 0), COALESCE(SUM(outside), 0) FROM units")
        ((kept, distinct),) = self._rows("SELECT COUNT(*), COUNT(DISTINCT sha256) FROM images")
        refused = dict(self._rows("SELECT kind, COUNT(*) FROM refused GROUP BY kind"))
        return {
            "seen": seen,
            "kept": kept,
            "rejected": refused.get("rejected", 0),
            "skipped": refused.get("skipped", 0),
            "outside": outside,
            "duplicates": kept - distinct,
        }

    def image_bytes(self) -> int:
        return self._rows("SELECT COALESCE(SUM(size), 0) FROM images")[0][0]

    def labels(self) -> Counter:
        """(source, folder, tag) → how many images."""
        return Counter(
            {tuple(k): n for *k, n in self._rows("SELECT source, folder, tag, SUM(n) FROM labels GROUP BY 1, 2, 3")}
        )

    def images(self) -> Iterator[Image]:
        """In the order of the corpus."""
        return map(Image._make, self._select(f"SELECT * FROM images ORDER BY {KEY}"))

    def refused(self) -> Iterator[tuple[int, bytes, str, str]]:
        """(source, name, kind, reason) of what is not in the corpus."""
        return self._select("SELECT source, name, kind, reason FROM refused ORDER BY kind, source, name, reason")

    def reasons(self) -> dict[str, int]:
        return dict(
            self._rows("SELECT reason, COUNT(*) FROM refused WHERE kind='rejected' GROUP BY 1 ORDER BY 2 DESC, 1")
        )

    def shards(self) -> dict[int, tuple[str, bytes]]:
        return {n: (record, chunks) for n, record, chunks in self._rows("SELECT * FROM shards")}

    def add_shard(self, number: int, record: str, chunks: bytes) -> None:
        self._insert("INSERT OR REPLACE INTO shards VALUES (?, ?, ?)", [(number, record, chunks)])

    def _rows(self, sql: str) -> list[Any]:
        return list(self._select(sql))

    def _select(self, sql: str) -> Iterator[Any]:
        try:
            for row in self._db.execute(sql):  # noqa: UP028 - `yield from` would close the cursor after its connection
                yield row
        except sqlite3.DatabaseError as e:  # sorting takes room on the disk, too
            raise sqlite_error(e, self._folder) from None

    def _insert(self, sql: str, rows: Any) -> None:
        try:
            self._db.executemany(sql, rows)
        except sqlite3.DatabaseError as e:
            raise sqlite_error(e, self._folder) from None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN")
            yield
            self._db.execute("COMMIT")
        except sqlite3.DatabaseError as e:
            raise sqlite_error(e, self._folder) from None
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")


def sqlite_error(error: sqlite3.DatabaseError, folder: Path) -> OSError:
    """SQLite does not say which file; whoever has to free space wants to know."""
    return OSError(f"{os.fspath(folder / NAME)}: {error}")
