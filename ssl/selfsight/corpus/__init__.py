"""Image files → a verified corpus: `build` it or `adopt` shards of others; `verify` every byte; `stats` of it all."""

from selfsight.corpus.adoption import adopt
from selfsight.corpus.audit import Fault, verify
from selfsight.corpus.ingest import BuildReport, build
from selfsight.corpus.summary import stats

__all__ = ["BuildReport", "Fault", "adopt", "build", "stats", "verify"]
