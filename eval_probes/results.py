"""Scores and where they are kept: one SQLite row per score, appended and never changed, by any number of writers.

A score carries what it was worth on every test item, so that it can be held against another's by a paired test.
"""

import json
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from eval_probes.intervals import bootstrap, mcnemar, sign_flips, wilson
from eval_probes.protocol import Protocol
from eval_probes.subject import Subject
from selfsight.errors import UserError

SCHEMA = 2
WAIT = 60.0  # seconds a writer waits for others
BOUNDS = ("chance", "oracle")  # in a score's details: what guessing gives, and what nothing can surpass
BITS, FLOATS = b"b", b"f"  # how the items of a score are packed


@dataclass(frozen=True)
class Score:
    """One figure, how sure it is, and what it was measured on and how."""

    metric: str  # top1, mAP, pck, rankme, …
    value: float  # proportions as 0–1
    n: int  # test items
    low: float | None  # 95 % interval of `value`; None where none can be given
    high: float | None
    protocol: str
    protocol_digest: str
    weights: str  # path, or "pixels"
    weights_digest: str
    train_corpus: str | None  # corpus ids
    test_corpus: str | None
    unit: str = "%"  # % for proportions, else px, … or nothing
    better: str = "higher"  # or lower, or none
    details: dict[str, Any] = field(default_factory=dict)  # JSON-able: k, chosen lr, top-5, step of the weights, …
    items: np.ndarray | None = field(default=None, repr=False, compare=False)  # bool or float32 (n,), by test item

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, without the items."""
        return {k: v for k, v in asdict(self).items() if k != "items"}

    def said(self, digits: int = 2) -> str:
        """The value in its unit with its interval and n: 45.50 % (95 % interval 43.34–47.67, n=2000); and what chance
        would give and the best there can be, where a protocol knows."""
        value, low, high = (None if x is None else self.number(x, digits) for x in (self.value, self.low, self.high))
        unit = f" {self.unit}" if self.unit else ""
        sure = f"95 % interval {low}–{high}, " if low is not None else ""
        bounds = [f"{who} {self.number(self.details[who], digits)}" for who in BOUNDS if who in self.details]
        return f"{value}{unit} ({sure}n={self.n}){''.join(f', {bound}' for bound in bounds)}"

    def number(self, x: float, digits: int = 2) -> str:
        """`x`, a value of this score, without its unit: proportions as per cent."""
        return f"{100 * x:.{digits}f}" if self.unit == "%" else f"{x:.{digits + 2}g}"


def score_of(
    metric: str,
    items: np.ndarray,
    protocol: Protocol,
    subject: Subject,
    *,
    train: str | None,
    test: str | None,
    details: dict[str, Any] | None = None,
    unit: str = "%",
    better: str = "higher",
) -> Score:
    """The mean of `items` (n,) with its interval: Wilson's where they are bool, else a bootstrap's. `train` and `test`
    are corpus ids."""
    items = np.asarray(items)
    kept = items if items.dtype == bool else items.astype(np.float32)
    interval = wilson(int(kept.sum()), len(kept)) if kept.dtype == bool else bootstrap(kept)
    value = float(np.mean(kept, dtype=np.float64))
    return figure(
        metric,
        value,
        len(kept),
        protocol,
        subject,
        train=train,
        test=test,
        interval=interval,
        details=details,
        unit=unit,
        better=better,
        items=kept,
    )


def figure(
    metric: str,
    value: float,
    n: int,
    protocol: Protocol,
    subject: Subject,
    *,
    train: str | None,
    test: str | None,
    interval: tuple[float, float] | None = None,
    details: dict[str, Any] | None = None,
    unit: str = "",
    better: str = "none",
    items: np.ndarray | None = None,
) -> Score:
    """A Score that is no mean over test items, or whose interval is known otherwise."""
    return Score(
        metric=metric,
        value=value,
        n=n,
        low=interval and interval[0],
        high=interval and interval[1],
        protocol=protocol.name,
        protocol_digest=protocol.digest,
        weights=subject.name,
        weights_digest=subject.digest,
        train_corpus=train,
        test_corpus=test,
        unit=unit,
        better=better,
        details={**(details or {}), "protocol": protocol.numbers(), "weights": subject.meta},
        items=items,
    )


def paired_p(a: Score, b: Score) -> float | None:
    """Two-sided p that both are worth the same on the items they share: McNemar's exact test for right and wrong,
    random sign flips for values; None where they were not measured on the same items by the same protocol."""
    same = (a.metric, a.protocol_digest, a.test_corpus, a.n) == (b.metric, b.protocol_digest, b.test_corpus, b.n)
    if not same or a.items is None or b.items is None:
        return None
    return mcnemar(a.items, b.items) if a.items.dtype == bool else sign_flips(a.items, b.items)


class ResultsStore:
    """A file of scores. Made when the first one is added; readers of a file that is not there see none."""

    COLUMNS = tuple(Score.__dataclass_fields__)

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def add(self, *scores: Score) -> None:
        """Appends `scores`, all of them or none. Raises UserError when the file is not a results store."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        insert = f"INSERT INTO scores (created, {', '.join(self.COLUMNS)}) VALUES (?{', ?' * len(self.COLUMNS)})"
        with self._open() as db, db:
            db.execute("BEGIN IMMEDIATE")
            _create(db, self.path)
            db.executemany(insert, [(now, *_packed(score)) for score in scores])

    def rows(self, **wanted: str | None) -> list[Score]:
        """Every score, oldest first, or those whose columns have the values `wanted`."""
        if not self.path.is_file():
            return []
        which = " AND ".join(f"{column} IS ?" for column in wanted) or "TRUE"
        select = f"SELECT {', '.join(self.COLUMNS)} FROM scores WHERE {which} ORDER BY id"
        with self._open("ro") as db:
            _version(db, self.path)
            found = db.execute(select, tuple(wanted.values())).fetchall()
        return [_unpacked(dict(zip(self.COLUMNS, row, strict=True))) for row in found]

    def find(self, protocol: Protocol, subject: Subject, train: str | None, test: str | None) -> list[Score]:
        """The scores that `protocol` gave `subject`, of the last time it was run; on the corpora with these ids, as far
        as it needs them."""
        found = self.rows(
            protocol_digest=protocol.digest,
            weights_digest=subject.digest,
            train_corpus=train if "train" in protocol.needs else None,
            test_corpus=test if "test" in protocol.needs else None,
        )
        return list({score.metric: score for score in found}.values())

    @contextmanager
    def _open(self, mode: str = "rwc") -> Iterator[sqlite3.Connection]:
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=WAIT, isolation_level=None)) as db:
                yield db
        except sqlite3.DatabaseError as e:
            raise UserError(f"{self.path} cannot be used as a results store ({e}): choose another file") from e


def _packed(score: Score) -> list[Any]:
    values = {**score.to_dict(), "details": json.dumps(score.details, sort_keys=True), "items": None}
    if score.items is not None:
        bits = np.packbits(score.items) if score.items.dtype == bool else score.items.astype("<f4")
        values["items"] = (BITS if score.items.dtype == bool else FLOATS) + zlib.compress(bits.tobytes())
    return [values[column] for column in ResultsStore.COLUMNS]


def _unpacked(row: dict[str, Any]) -> Score:
    row["details"] = json.loads(row["details"])
    if (blob := row["items"]) is not None:
        data = zlib.decompress(blob[1:])
        if blob[:1] == BITS:
            row["items"] = np.unpackbits(np.frombuffer(data, np.uint8), count=row["n"]).astype(bool)
        else:
            row["items"] = np.frombuffer(data, "<f4")
    return Score(**row)


def _version(db: sqlite3.Connection, path: Path) -> int:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, SCHEMA):
        which = "a newer" if version > SCHEMA else "an older"
        raise UserError(f"{path} was written by {which} selfsight (schema {version}): move it away, or use that one")
    return version


def _create(db: sqlite3.Connection, path: Path) -> None:
    if _version(db, path) == SCHEMA:
        return
    db.execute(
        "CREATE TABLE scores (id INTEGER PRIMARY KEY AUTOINCREMENT, created TEXT NOT NULL, metric TEXT NOT NULL, "
        "value REAL NOT NULL, n INTEGER NOT NULL, low REAL, high REAL, protocol TEXT NOT NULL, "
        "protocol_digest TEXT NOT NULL, weights TEXT NOT NULL, weights_digest TEXT NOT NULL, train_corpus TEXT, "
        "test_corpus TEXT, unit TEXT NOT NULL, better TEXT NOT NULL, details TEXT NOT NULL, items BLOB)"
    )
    for verb in ("UPDATE", "DELETE"):
        db.execute(
            f"CREATE TRIGGER no_{verb.lower()} BEFORE {verb} ON scores "
            "BEGIN SELECT RAISE(ABORT, 'scores are never changed'); END"
        )
    db.execute(f"PRAGMA user_version = {SCHEMA}")
