"""A suite: named protocols, some with other numbers, run on one encoder in as few passes over the images as they allow.

In: a YAML list of protocol names or of mappings {protocol: NAME, key: value, …}. Out: scores. What was measured before
is not measured again, and a protocol that cannot be run says why and does not stop the others.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import yaml

from eval_probes.bench import Bench
from eval_probes.protocol import Protocol, find
from eval_probes.results import ResultsStore, Score
from selfsight.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """What became of one protocol: its scores, or why there are none."""

    protocol: Protocol
    scores: list[Score]
    fault: str = ""
    known: bool = False  # whether the scores were there already


def load(source: str) -> list[Protocol]:
    """The protocols of a suite: a YAML file, or one that comes with selfsight. Raises UserError for anything else."""
    shipped = {p.name.removesuffix(".yaml"): p for p in resources.files("eval_probes").joinpath("suites").iterdir()}
    path = Path(source)
    if not path.is_file() and source not in shipped:
        raise UserError(f"there is no suite {source!r}: give a YAML file or one of {', '.join(sorted(shipped))}")
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else shipped[source].read_text(encoding="utf-8")
        entries = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{source} is not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{source} is no suite: it should be a list of protocols")
    return [_protocol(entry, source) for entry in entries]


def _protocol(entry: object, source: str) -> Protocol:
    if isinstance(entry, str):
        return find(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("protocol"), str):
        raise UserError(f"{source}: {entry!r} should be a protocol's name, or {{protocol: NAME, key: value}}")
    given = {key: value for key, value in entry.items() if key != "protocol"}
    return find(entry["protocol"]).override([f"{key}={yaml.safe_dump(value).strip()}" for key, value in given.items()])


def run(bench: Bench, protocols: Sequence[Protocol], store: ResultsStore | None = None) -> Iterator[Outcome]:
    """Runs `protocols` one after the other; what `store` has of them is taken from there, the rest is added to it."""
    ids = [None if c is None else c.id for c in (bench.train, bench.test)]
    known = {} if store is None else {p.digest: store.find(p, bench.subject, *ids) for p in protocols}
    missing = [p for p in protocols if not known.get(p.digest)]
    with suppress(UserError):  # each protocol that it concerns will say it
        bench.prepare(missing)
    for protocol in protocols:
        if scores := known.get(protocol.digest):
            yield Outcome(protocol, scores, known=True)
            continue
        try:
            scores = protocol.run(bench)
        except UserError as e:
            yield Outcome(protocol, [], str(e))
            continue
        if store is not None:
            store.add(*scores)
        yield Outcome(protocol, scores)
