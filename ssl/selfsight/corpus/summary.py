"""What is in a corpus, in numbers: from the manifest and the index alone, without reading an image."""

from pathlib import Path
from typing import Any

import numpy as np

from selfsight.shards.corpus import Corpus

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


def stats(folder: str | Path) -> dict[str, Any]:
    """A dict that JSON can hold: id, n, bytes, shards, chunks, classes with counts, formats, modes, quantiles of sizes.

    Raises UserError where `folder` is no finished corpus.
    """
    corpus = Corpus.open(folder)
    m = corpus.manifest
    index = corpus.index(
        ["size", "width", "height", "format", "mode", "frames", "progressive", "exif_orientation", "label"]
    )
    classes = None
    if m.classes is not None:
        counts = np.bincount(index["label"].to_numpy(), minlength=len(m.classes))
        classes = {name: int(n) for name, n in zip(m.classes, counts, strict=True)}

    def tally(column: str) -> dict[str, int]:
        pairs = index[column].value_counts().to_pylist()
        return {p["values"]: p["counts"] for p in sorted(pairs, key=lambda p: (-p["counts"], p["values"]))}

    def spread(column: str) -> dict[str, int]:
        values = np.quantile(index[column].to_numpy(), QUANTILES, method="nearest")
        return {f"p{round(100 * q)}": int(v) for q, v in zip(QUANTILES, values, strict=True)}

    return {
        "path": str(folder),
        "id": m.id,
        "n": m.n,
        "image_bytes": m.image_bytes,
        "shard_bytes": sum(s.bytes for s in m.shards),
        "shards": len(m.shards),
        "chunks": m.chunks,
        "classes": classes,
        "formats": tally("format"),
        "modes": tally("mode"),
        "quantiles": {column: spread(column) for column in ("size", "width", "height")},
        "animated": int((index["frames"].to_numpy() > 1).sum()),
        "progressive": int(index["progressive"].to_numpy().sum()),
        "rotated": int((index["exif_orientation"].to_numpy() > 1).sum()),
        **{k: m.counts[k] for k in ("rejected", "skipped", "outside", "duplicates")},
        "notes": m.notes,
    }
