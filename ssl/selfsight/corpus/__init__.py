"""Image files → a verified corpus: `build` from folders, archives and tables, `verify` every byte, `stats` of what is there."""

from selfsight.corpus.ingest import BuildReport, build
from selfsight.corpus.summary import stats
from selfsight.shards.verify import Fault, verify

__all__ = ["BuildReport", "Fault", "build", "stats", "verify"]
