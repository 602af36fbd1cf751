"""The quarantine list: every sample that could not be had, why, and what stood in for it; and when it is too many.

One line of JSON each, written at once. Every rank has a file of its own: a shared one would need locks that network
file systems do not keep.
"""

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from selfsight.errors import UserError

LIMIT = 0.001  # of the samples read, above which training stops
ALWAYS_BORNE = 8  # bad samples that are no rate yet, unless none at all may be bad


@dataclass(frozen=True)
class Finding:
    step: int
    sample: int  # ordinal in the corpus
    where: str  # sample and shard
    what: str
    stand_in: int | None  # the ordinal that took its place


class Quarantine:
    """Findings of one rank, each bad sample once; in memory alone without a `path`. Threads may share one."""

    def __init__(self, path: Path | None = None, *, limit: float = LIMIT) -> None:
        self.path, self.limit = path, limit
        self._lock = threading.Lock()
        self._known: set[tuple[str, int]] = set()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, finding: Finding, read: int) -> None:
        """Takes a finding up, after `read` different samples. Raises UserError above the limit."""
        with self._lock:
            if (finding.where, finding.sample) in self._known:
                return
            self._known.add((finding.where, finding.sample))
            if self.path:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as f:
                    f.write(json.dumps(asdict(finding), ensure_ascii=False) + "\n")
            bad = len(self._known)
        if bad > (ALWAYS_BORNE if self.limit else 0) and bad > self.limit * read:
            raise UserError(
                f"{bad} of {max(read, bad)} images cannot be read, more than stream.max_damaged={self.limit:g} allows "
                f"(last: {finding.where}: {finding.what}): run selfsight corpus verify"
            )


def read_quarantine(folder: Path) -> Iterator[Finding]:
    """The findings of all ranks of a run, from the files in `folder`: each bad sample once, whichever ranks met it."""
    known = set()
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                finding = Finding(**json.loads(line))
            except (ValueError, TypeError):  # the last line of a process that was killed
                continue
            if (finding.where, finding.sample) not in known:
                known.add((finding.where, finding.sample))
                yield finding
