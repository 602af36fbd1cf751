"""The scores of a run for its report: the metric that stands for a protocol as dots with whiskers, its others folded
into one table, and curves where there are checkpoints enough.

In: the run and its groups of readings. Out: values for the template.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from eval_probes.pooling import Pooling
from eval_probes.protocol import MODULES
from eval_probes.readings import Group, short_names
from eval_probes.report.charts import Curve, DotPlot, Interval, number
from eval_probes.report.runfolder import RunFolder
from eval_probes.report.trajectory import trajectory
from eval_probes.results import Score

OTHERS = {"untrained": "untrained", "pixels": "raw pixels"}
TITLES = {"knn": "k-nearest neighbours", "linear": "Linear probe", "ridge": "Ridge regression"}
CURVE = 3  # checkpoints that make one
FOREIGN = 1 << 62  # the place of weights that are not of the run


@dataclass(frozen=True)
class ScoreRow:
    label: str
    kind: str  # pixels, untrained, trained or step: decides the colour
    value: str
    interval: str
    n: str
    dots: Markup


@dataclass(frozen=True)
class FoldRow:
    """A further metric: all encoders on one line."""

    metric: str
    dots: Markup
    axis: Markup | None  # below this row
    values: list[str]


@dataclass(frozen=True)
class ScoreGroup:
    """The scores that may be compared: one protocol on one pair of corpora."""

    title: str
    note: str
    unit: str
    chance: str
    rows: list[ScoreRow]
    axis: Markup
    columns: list[tuple[str, str]]  # (kind, label) of the encoders in the fold
    fold: list[FoldRow]


def score_groups(run: RunFolder, groups: Sequence[Group], chance: tuple[str, float] | None) -> list[ScoreGroup]:
    """`chance` is a test corpus's id and the accuracy of guessing there."""
    return [_group(run, group, chance[1] if chance and chance[0] == group.test else None) for group in groups]


def score_curves(run: RunFolder, groups: Sequence[Group]) -> list[Curve]:
    """How the metric that stands for each protocol went over the checkpoints of the run, where there are enough."""
    colours = {str(run.path.resolve()): "trained"}
    drawn = [
        trajectory(_title(group, group.headline), group.metrics[group.headline], colours)
        for group in groups
        if _has_curve(run, group)
    ]
    return [curve for curve in drawn if curve is not None]


def _group(run: RunFolder, group: Group, chance: float | None) -> ScoreGroup:
    chance = chance if group.headline == "top1" else None
    labels = _labels(run, group)
    found = {r.score.weights_digest: r.score for r in group.metrics[group.headline]}
    named = [(label, kind, found[digest]) for digest, (label, kind) in labels.items() if digest in found]
    plot = DotPlot([_interval(s, kind) for _, kind, s in named], chance=chance, percent=named[0][-1].unit == "%")
    rows = []
    for label, kind, s in named:
        value, span = _number(s, s.value), _span(s)
        words = f"{label}: {value} {s.unit}{', 95 % interval ' * bool(span)}{span}, n = {s.n}"
        rows.append(ScoreRow(label, kind, value, span, count(s.n), plot.row([_interval(s, kind)], words)))
    return ScoreGroup(
        title=_title(group, group.headline),
        note=_note(named[-1][-1]),
        unit="% correct" if group.headline == "top1" else named[0][-1].unit,
        chance="" if chance is None else percent(chance),
        rows=rows,
        axis=plot.axis(),
        columns=[(kind, label) for label, kind in labels.values()],
        fold=_fold(group, labels),
    )


def _fold(group: Group, labels: dict[str, tuple[str, str]]) -> list[FoldRow]:
    """A row for each further metric: proportions first, on one axis; every other one on its own."""
    rest = [group.metrics[metric] for metric in list(group.metrics)[1:]]
    rest.sort(key=lambda readings: readings[0].score.unit != "%")
    shares = [_interval(r.score, "") for readings in rest for r in readings if r.score.unit == "%"]
    last = sum(readings[0].score.unit == "%" for readings in rest) - 1
    rows = []
    for i, readings in enumerate(rest):
        found = {r.score.weights_digest: r.score for r in readings}
        shown = [(found[digest], label, kind) for digest, (label, kind) in labels.items() if digest in found]
        if not shown:
            continue
        is_share, unit = readings[0].score.unit == "%", readings[0].score.unit
        plot = DotPlot(shares if is_share else [_interval(s, kind) for s, _, kind in shown], percent=is_share)
        words = ", ".join(f"{label} {_number(s, s.value)} {_span(s)}".rstrip() for s, label, _ in shown)
        name = readings[0].score.metric
        rows.append(
            FoldRow(
                f"{name}, {unit}" if unit else name,
                plot.row([_interval(s, kind) for s, _, kind in shown], f"{name}: {words}"),
                plot.axis() if not is_share or i == last else None,
                [_number(found[digest], found[digest].value) if digest in found else "" for digest in labels],
            )
        )
    return rows


def _labels(run: RunFolder, group: Group) -> dict[str, tuple[str, str]]:
    """Weights' digest → (label, kind), in the order of the page, without the checkpoints that a curve shows already."""
    found = {r.score.weights_digest: which(run, r.score) for rs in group.metrics.values() for r in rs}
    foreign = short_names([label for place, label, _ in found.values() if place == FOREIGN])
    newest = max((place for place, *_ in found.values() if place != FOREIGN), default=FOREIGN)
    curved = _has_curve(run, group)
    return {
        digest: (foreign.get(label, label), kind)
        for digest, (place, label, kind) in sorted(found.items(), key=lambda item: item[1][0])
        if not (curved and kind == "step" and place not in (newest, FOREIGN))
    }


def _has_curve(run: RunFolder, group: Group) -> bool:
    own = str(run.path.resolve())
    return len({r.step for r in group.metrics[group.headline] if r.run == own and r.step is not None}) >= CURVE


def _interval(score: Score, kind: str) -> Interval:
    low, high = (score.value if end is None else end for end in (score.low, score.high))
    return Interval(low, score.value, high, kind)


def _number(score: Score, x: float) -> str:
    return percent(x) if score.unit == "%" else number(x)


def _span(score: Score) -> str:
    if score.low is None or score.high is None:
        return ""
    return f"{_number(score, score.low)}–{_number(score, score.high)}"


def pooling(score: Score) -> str:
    """Which tokens were the features, in words."""
    tokens = score.details.get("features", {}).get("tokens")
    if tokens is None:
        return ""
    how = Pooling.parse(tokens)
    blocks = how.n_last_blocks
    parts = ["class token"] if blocks == 1 else [f"class tokens of the last {blocks} blocks"] if blocks else []
    return " and ".join(parts + ["mean patch token"] * how.avgpool)


def _title(group: Group, metric: str) -> str:
    name = TITLES.get(group.protocol, group.protocol)
    return name if metric == "top1" else f"{name}: {metric}"


def _note(score: Score) -> str:
    details = score.details
    about = MODULES[score.protocol][1] if score.protocol in MODULES else ""
    parts = [f"Protocol {score.protocol} {score.protocol_digest[:8]}{': ' if about else ''}{about}"]
    if "k" in details and "temperature" in details:
        parts.append(f"k = {details['k']}, temperature {number(details['temperature'])}")
    if "n_train" in details:
        parts.append(f"{count(details['n_train'])} training images")
    if tokens := pooling(score):
        parts.append(f"features: {tokens}")
    return " · ".join(parts)


def finding(run: RunFolder, scores: Sequence[Score]) -> str:
    """What the scores say of the trained encoder in one or two sentences; empty where there is nothing to compare."""
    said, apart, ahead = [], True, True
    for protocol, subject in (("knn", "k-NN"), ("linear", "a linear probe")):
        mine = [s for s in scores if s.protocol == protocol and s.low is not None and which(run, s)[2] == "trained"]
        # Only what was measured in the same way and on the same images may be compared; the last of each kind holds.
        by_kind = {which(run, s)[2]: s for s in scores if mine and _measured(s) == _measured(mine[-1])}
        trained = by_kind.get("trained")
        others = [(by_kind[k], words) for k, words in OTHERS.items() if k in by_kind]
        if trained is None or not others:
            continue
        compared = ", ".join(f"{words} {percent(s.value)}\u00a0%" for s, words in others)
        of = "" if said else f" of {count(trained.n)} held-out images"
        said.append(f"{subject} recognises {percent(trained.value)}\u00a0%{of} ({compared})")
        apart = apart and all(_interval(trained, "").low > _interval(s, "").high for s, _ in others)
        ahead = ahead and all(trained.value > s.value for s, _ in others)
    if not said:
        return ""
    verdict = (
        "The intervals are apart."
        if apart
        else "The trained encoder is ahead, but within the intervals."
        if ahead
        else "The trained encoder is not ahead everywhere."
    )
    return f"On the trained encoder, {', '.join(said)}. {verdict}"


def _measured(score: Score) -> tuple[str, ...]:
    """Scores that agree in this may be compared."""
    return score.protocol, score.metric, score.protocol_digest, str(score.train_corpus), str(score.test_corpus)


def which(run: RunFolder, score: Score) -> tuple[int, str, str]:
    """(place, label, kind) of the weights a score belongs to."""
    if score.weights == "pixels":
        return -1, "Raw pixels", "pixels"
    steps = {export.digest: step for step, export in run.exports.items()}
    step = steps.get(score.weights_digest)
    if step is None:
        return FOREIGN, str(score.weights), "step"
    if step == 0:
        return 0, "Untrained encoder", "untrained"
    if step == run.last_step:
        return step, "Trained encoder", "trained"
    return step, f"After step {count(step)}", "step"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def count(n: float) -> str:
    """12345 → 12 345."""
    return f"{int(n):,}".replace(",", "\u202f")
