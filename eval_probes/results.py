"""Scores and where they are kept: one SQLite row per score, appended and never changed, by any number of writers."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval_probes.features import Features
from eval_probes.intervals import wilson
from eval_probes.protocol import Protocol
from selfsight.errors import UserError

SCHEMA = 1
WAIT = 60.0  # seconds a writer waits for others


@dataclass(frozen=True)
class Score:
    """One figure, how sure it is, and what it was measured on and how."""

    metric: str  # knn, linear
    value: float  # top-1 accuracy, 0–1
    n: int  # test images
    low: float  # 95 % interval of `value`
    high: float
    protocol: str
    protocol_digest: str
    weights: str  # path, or "pixels"
    weights_digest: str
    train_corpus: str  # corpus ids
    test_corpus: str
    details: dict[str, Any] = field(default_factory=dict)  # JSON-able: k, chosen lr, top-5, step of the weights, …

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def accuracy_score(
    metric: str, correct: int, train: Features, test: Features, protocol: Protocol, details: dict[str, Any]
) -> Score:
    """The Score of `correct` right answers on `test`."""
    low, high = wilson(correct, test.n)
    return Score(
        metric=metric,
        value=correct / test.n,
        n=test.n,
        low=low,
        high=high,
        protocol=protocol.name,
        protocol_digest=protocol.digest,
        weights=test.weights,
        weights_digest=test.weights_digest,
        train_corpus=train.corpus_id,
        test_corpus=test.corpus_id,
        details={**details, "features": test.describe()},
    )


class ResultsStore:
    """A file of scores. Made when the first one is added; readers of a file that is not there see none."""

    COLUMNS = tuple(Score.__dataclass_fields__)

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def add(self, score: Score) -> int:
        """Appends `score` and returns its row number. Raises UserError when the file is not a results store."""
        values = {**score.to_dict(), "details": json.dumps(score.details, sort_keys=True)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as db, db:
            db.execute("BEGIN IMMEDIATE")
            _create(db, self.path)
            row = db.execute(
                f"INSERT INTO scores (created, {', '.join(self.COLUMNS)}) "
                f"VALUES (?, {', '.join('?' * len(self.COLUMNS))})",
                (datetime.now(UTC).isoformat(timespec="seconds"), *(values[c] for c in self.COLUMNS)),
            )
        assert row.lastrowid is not None
        return row.lastrowid

    def rows(self) -> list[Score]:
        """Every score, oldest first."""
        if not self.path.is_file():
            return []
        with self._open("ro") as db:
            _version(db, self.path)
            found = db.execute(f"SELECT {', '.join(self.COLUMNS)} FROM scores ORDER BY id").fetchall()
        return [Score(**{**dict(zip(self.COLUMNS, row, strict=True)), "details": json.loads(row[-1])}) for row in found]

    @contextmanager
    def _open(self, mode: str = "rwc") -> Iterator[sqlite3.Connection]:
        uri = f"{self.path.absolute().as_uri()}?mode={mode}"
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=WAIT, isolation_level=None)) as db:
                yield db
        except sqlite3.DatabaseError as e:
            raise UserError(f"{self.path} cannot be used as a results store ({e}): choose another file") from e


def _version(db: sqlite3.Connection, path: Path) -> int:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA:
        raise UserError(f"{path} was written by a newer selfsight (schema {version}): update selfsight")
    return version


def _create(db: sqlite3.Connection, path: Path) -> None:
    if _version(db, path) == SCHEMA:
        return
    db.execute(
        "CREATE TABLE scores (id INTEGER PRIMARY KEY AUTOINCREMENT, created TEXT NOT NULL, metric TEXT NOT NULL, "
        "value REAL NOT NULL, n INTEGER NOT NULL, low REAL NOT NULL, high REAL NOT NULL, protocol TEXT NOT NULL, "
        "protocol_digest TEXT NOT NULL, weights TEXT NOT NULL, weights_digest TEXT NOT NULL, "
        "train_corpus TEXT NOT NULL, test_corpus TEXT NOT NULL, details TEXT NOT NULL)"
    )
    for verb in ("UPDATE", "DELETE"):
        db.execute(
            f"CREATE TRIGGER no_{verb.lower()} BEFORE {verb} ON scores "
            "BEGIN SELECT RAISE(ABORT, 'scores are never changed'); END"
        )
    db.execute(f"PRAGMA user_version = {SCHEMA}")
