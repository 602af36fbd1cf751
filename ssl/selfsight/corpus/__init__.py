"""Image files → a verified corpus: `build` from folders, archives, tables, or `adopt` shards; `verify` bytes; `stats`."""

from selfsight.corpus.adopt import adopt
from selfsight.corpus.audit import Fault, verify
from selfsight.corpus.ingest import BuildReport, build
from selfsight.corpus.summary import stats

__all__ = ["BuildReport", "Fault", "adopt", "build", "stats", "verify"]
