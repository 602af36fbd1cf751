"""Image files → a verified corpus: `build` from folders, archives, tables; `verify` every byte; `stats` of it all."""

from selfsight.corpus.audit import Fault, verify
from selfsight.corpus.ingest import BuildReport, build
from selfsight.corpus.summary import stats

__all__ = ["BuildReport", "Fault", "build", "stats", "verify"]
