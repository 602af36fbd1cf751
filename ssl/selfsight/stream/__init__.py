"""Shards → device batches: the order (pure arithmetic), the views (pixels), the loader (processes)."""
