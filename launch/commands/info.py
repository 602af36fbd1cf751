"""`selfsight info PATH`: says what a folder is (corpus, run or weights) and what is in it; or a corpus at a URL."""

import argparse
import json
from pathlib import Path
from typing import Any

TAIL = 1 << 16  # bytes of metrics.jsonl that are sure to hold the last records


def add(subparsers) -> None:
    parser = subparsers.add_parser("info", help="say what a corpus, run or weights folder is")
    parser.add_argument("path", metavar="PATH", help="a folder, or the URL of a corpus")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    found = describe(args.path)
    print(json.dumps(found) if args.json else _text(found))
    return 0


def describe(path: str | Path) -> dict[str, Any]:
    """JSON-able; "kind" is corpus, run or weights. At a URL it is a corpus. Raises UserError for anything else."""
    from selfsight.errors import UserError
    from selfsight.shards.manifest import NAME as MANIFEST
    from selfsight.shards.store import is_url

    if is_url(path):
        return {"kind": "corpus", "path": str(path), **_corpus(path)}
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no {path}: give a corpus, run or weights folder")
    if (path / MANIFEST).is_file():
        return {"kind": "corpus", "path": str(path), **_corpus(path)}
    from selfsight.weights.run import is_run  # with all of torch

    if is_run(path):
        return {"kind": "run", "path": str(path), **_run(path)}
    if (path / "model.safetensors").is_file() or (path / "selfsight.json").is_file():
        return {"kind": "weights", "path": str(path), **_weights(path)}
    raise UserError(
        f"{path} is no corpus, run or weights folder: it has no manifest.json, recipe.yaml or selfsight.json"
    )


def _corpus(path: str | Path) -> dict[str, Any]:
    from selfsight.shards.corpus import Corpus

    corpus = Corpus.open(path)
    return {
        "id": corpus.id,
        "images": corpus.n,
        "image_bytes": corpus.manifest.image_bytes,
        "shards": len(corpus.manifest.shards),
        "classes": corpus.classes,
    }


def _weights(path: Path) -> dict[str, Any]:
    from selfsight.weights.folder import Export

    export = Export.open(path)
    weights = export.origin["weights"]
    return {
        "architecture": export.config["architecture"],
        "model_args": export.config["model_args"],
        "parameters": weights.get("parameters"),
        "dimension": export.config.get("num_features"),
        "image_size": export.encoder.img_size,
        "digest": export.digest,
        "origin": export.origin["meta"],
    }


def _run(path: Path) -> dict[str, Any]:
    from eval_probes.readings import RESULTS, grouped, of_store
    from selfsight.stream.quarantine import read_quarantine
    from selfsight.weights.run import checkpoints, exports, read_recipe

    recipe = read_recipe(path)
    metrics = _last_metrics(path / "metrics.jsonl")
    steps = list(checkpoints(path))
    state = _state(checkpoints(path)[steps[-1]]) if steps else {}
    readings = of_store(path / RESULTS)
    groups = grouped(readings)
    return {
        "objective": recipe["objective"].get("name"),
        "encoder": recipe["encoder"].get("name"),
        "corpus": recipe.get("corpus"),
        "corpus_id": state.get("corpus_id"),
        "step": max([metrics.get("step", 0), *steps]),
        "total_steps": state.get("total_steps"),
        "metrics": metrics,
        "quarantined": sum(1 for _ in read_quarantine(path / "quarantine")),
        "checkpoints": steps,
        "exports": list(exports(path)),
        "scores": [_score(reading) for reading in readings],
        # What stands for each protocol, at the newest checkpoint that was measured.
        "newest": [_score(max(g.metrics[g.headline], key=lambda r: -1 if r.step is None else r.step)) for g in groups],
    }


def _score(reading) -> dict[str, Any]:
    s = reading.score
    return {
        "protocol": s.protocol,
        "metric": s.metric,
        "value": s.value,
        "low": s.low,
        "high": s.high,
        "n": s.n,
        "unit": s.unit,
        "step": reading.step,
        "weights_digest": s.weights_digest,
        "said": s.said(),
    }


def _state(checkpoint: Path) -> dict[str, Any]:
    from selfsight.errors import UserError
    from selfsight.weights.run import read_state

    try:
        return read_state(checkpoint)
    except UserError:
        return {}  # a run that is being written is no reason to say nothing


def _last_metrics(path: Path) -> dict[str, Any]:
    """The newest whole line with a loss; a training process may be in the middle of writing the next."""
    if not path.is_file():
        return {}
    with path.open("rb") as f:
        f.seek(max(0, path.stat().st_size - TAIL))
        lines = f.read().decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "loss" in record:
            return record
    return {}


def _text(found: dict[str, Any]) -> str:
    return {"corpus": _corpus_text, "run": _run_text, "weights": _weights_text}[found["kind"]](found)


def _table(title: str, rows: dict[str, Any]) -> str:
    shown = {k: v for k, v in rows.items() if v not in (None, "", [], {})}
    width = max(map(len, shown), default=0)
    return "\n".join([title, *(f"  {k:<{width}}  {v}" for k, v in shown.items())])


def _corpus_text(found: dict[str, Any]) -> str:
    classes = found["classes"]
    named = f"{len(classes)}: {', '.join(classes[:12])}{' …' if len(classes) > 12 else ''}" if classes else "unlabelled"
    rows = {
        "images": f"{found['images']:,}",
        "size": f"{found['image_bytes'] / 1e6:,.1f} MB in {found['shards']} shards",
        "classes": named,
        "id": found["id"],
    }
    return _table(f"{found['path']}: a corpus", rows)


def _weights_text(found: dict[str, Any]) -> str:
    origin = found["origin"]
    rows = {
        "architecture": f"{found['architecture']} {found['model_args']}",
        "parameters": f"{found['parameters']:,}",
        "features": f"{found['dimension']}, of images of {found['image_size']} pixels",
        "origin": f"{origin.get('which', 'encoder')} of {origin.get('objective', '?')}, step {origin.get('step', '?')}",
        "corpus id": origin.get("corpus_id"),
        "recipe": origin.get("recipe_digest"),
        "sha256": found["digest"],
    }
    return _table(f"{found['path']}: weights", rows)


def _run_text(found: dict[str, Any]) -> str:
    numbers = {k: v for k, v in found["metrics"].items() if isinstance(v, (int, float)) and k != "step"}
    of = f" of {found['total_steps']}" if found["total_steps"] else ""
    rows = {
        "objective": f"{found['objective']} with {found['encoder']}",
        "step": f"{found['step']}{of}",
        "corpus": found["corpus"],
        "images replaced": str(found["quarantined"]) if found["quarantined"] else "",
        "last metrics": "  ".join(f"{k} {v:.4g}" for k, v in numbers.items()),
        "checkpoints": ", ".join(map(str, found["checkpoints"])),
        "exports": ", ".join(map(str, found["exports"])),
    }

    def at(step: int | None) -> str:
        return "" if step is None else f" at step {step}"

    scores = [f"  {s['protocol']} {s['metric']}{at(s['step'])}: {s['said']}" for s in found["newest"]]
    more = len(found["scores"]) - len(scores)
    further = [f"  and {more} more: selfsight results {found['path']}"] if more else []
    return "\n".join([_table(f"{found['path']}: a run", rows), *scores, *further])
