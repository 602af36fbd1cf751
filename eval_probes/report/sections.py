"""What the report says in words, numbers and curves. In: a run folder and its scores. Out: values for the template.

Everything drawn comes from `charts`; everything with images in it is in `gallery`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from eval_probes.pooling import Pooling
from eval_probes.report import charts
from eval_probes.report.charts import Curve, DotPlot, Interval, number
from eval_probes.report.runfolder import RunFolder
from eval_probes.results import Score

# metric key → (title, unit), in the order of the page. Further numeric metrics follow under their own names.
CURVES = {
    "loss": ("Loss", ""),
    "kl": ("KL, teacher to student", "nats"),
    "teacher_entropy": ("Teacher entropy", "nats"),
    "feature_spread": ("Feature spread", ""),
    "rankme": ("RankMe, the effective rank", ""),
    "grad_norm": ("Gradient norm", ""),
    "lr": ("Learning rate", ""),
    "weight_decay": ("Weight decay", ""),
    "momentum": ("EMA momentum", ""),
    "images_per_second": ("Throughput", "images/s"),
    "data_wait": ("Waiting for images", "of the time"),
    "peak_memory": ("Memory, at most", "GiB"),
}
NOT_CURVES = {"step", "epoch"}
ALARMS = 6  # said in words at the head of the page; all are marked on the curves
OTHERS = {"untrained": "untrained", "pixels": "raw pixels"}
PROBES = {"knn": "k-nearest neighbours", "linear": "Linear probe"}


@dataclass(frozen=True)
class Fact:
    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class ScoreRow:
    label: str
    kind: str  # pixels, untrained, trained or step: decides the colour
    value: str
    interval: str
    n: str
    dots: Markup


@dataclass(frozen=True)
class ScoreGroup:
    """The scores that may be compared: one metric, one protocol, one pair of corpora."""

    title: str
    protocol: str
    chance: str
    rows: list[ScoreRow]
    axis: Markup


def duration(seconds: float) -> str:
    """14 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    seconds = round(seconds)
    for size, unit, lesser_size, lesser in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // lesser_size
            return f"{seconds // size} {unit}" + (f" {rest} {lesser}" if rest else "")
    return f"{seconds} s"


def facts(run: RunFolder, images: int | None, classes: int | None) -> list[Fact]:
    """The head of the page. `images` and `classes` are of the corpus trained on, if it is still there."""
    recipe, encoder, meta = run.recipe, run.recipe["encoder"], {}
    export = run.trained or run.untrained
    if export is not None:
        meta = export.origin["meta"]
    patch = encoder.get("args", {}).get("patch_size")
    shape = f"{encoder.get('img_size')} px" + (f", patches of {patch} px" if patch else "")
    found = [
        Fact("Objective", str(recipe["objective"].get("name", "")).upper()),
        Fact("Encoder", str(encoder.get("name")), shape),
    ]
    corpus_id = str(meta.get("corpus_id") or "")
    if images is not None:
        note = (f"{number(classes)} classes, " if classes else "no labels, ") + f"id {corpus_id[:12]}"
        found.append(Fact("Corpus", f"{count(images)} images", note))
    elif corpus_id:
        found.append(Fact("Corpus", corpus_id[:12], "no longer where the recipe says"))
    steps = run.last_step or (int(run.metrics[-1]["step"]) if run.metrics else None)
    if steps:
        found.append(
            Fact("Trained", f"{count(steps)} steps", f"{number(recipe['epochs'])} epochs, batch {recipe['batch_size']}")
        )
    if run.metrics:
        seconds = training_seconds(run)
        speeds = [v for v in run.series("images_per_second")[1] if math.isfinite(v)]
        speed = f"{number(sorted(speeds)[len(speeds) // 2], 3)} images/s" if speeds else ""
        if seconds is not None:
            found.append(Fact("Duration", duration(seconds), speed))
        elif speed:
            found.append(Fact("Throughput", speed, "median"))
    if export is not None:
        millions = export.origin["weights"].get("parameters")
        found.append(
            Fact(
                "Weights",
                export.digest[:12],
                f"sha256; {number(millions / 1e6, 3)} M parameters" if millions else "sha256",
            )
        )
    return found


def training_seconds(run: RunFolder) -> float | None:
    """Time spent on steps and checkpoints, from the throughput of every stretch between two records."""
    steps, rates = run.series("images_per_second")
    batch = run.recipe.get("batch_size")
    if not steps or not isinstance(batch, int) or not all(r > 0 for r in rates):
        return None
    before = [0.0, *steps[:-1]]
    return sum((step - last) * batch / rate for step, last, rate in zip(steps, before, rates, strict=True))


def count(n: float) -> str:
    """12345 → 12 345."""
    return f"{int(n):,}".replace(",", "\u202f")


def curves(run: RunFolder) -> tuple[list[Curve], list[str]]:
    """(drawn, said): metrics that never change are said in words instead."""
    names = run.metric_names()
    ordered = [n for n in CURVES if n in names] + [n for n in names if n not in CURVES and n not in NOT_CURVES]
    drawn, said = [], []
    for name in ordered:
        title, unit = CURVES.get(name, (name.replace("_", " ").capitalize(), ""))
        steps, values = run.series(name)
        if len(values) > 1 and len(set(values)) == 1:
            # A momentum of 1 is that of an objective without a teacher.
            if not (name == "momentum" and values[0] == 1):
                said.append(f"{title.lower()} {number(values[0])}")
            continue
        made = charts.curve(title, steps, values, unit=unit, alarms=run.events, reference=_reference(run, name))
        if made is not None:
            drawn.append(made)
    return drawn, said


def _reference(run: RunFolder, metric: str) -> tuple[float, str] | None:
    objective = run.recipe["objective"]
    prototypes = objective.get("out_dim")  # of a method with a teacher's entropy: others call a width so
    known = metric == "teacher_entropy" or (metric == "loss" and objective.get("name") == "dino")
    if known and isinstance(prototypes, int):
        return math.log(prototypes), f"ln {prototypes}: all images alike"
    return None


def alarms(run: RunFolder) -> list[tuple[str, str]]:
    """(step, sentence) of the first events; the step is not said twice."""
    said = [(f"Step {count(step)}:", sentence.removeprefix(f"step {step}: ")) for step, sentence in run.events[:ALARMS]]
    more = len(run.events) - len(said)
    return [*said, ("", f"and {more} more")] if more else said


def score_groups(run: RunFolder, scores: Sequence[Score], chance: float | None) -> list[ScoreGroup]:
    """Scores side by side. Of equal measurements the last one holds. `chance` is the accuracy of guessing."""
    latest: dict[tuple[str, ...], dict[tuple[str, str], Score]] = {}
    for score in scores:
        if score.low is not None and score.unit == "%":
            latest.setdefault(_measured(score), {})[score.weights_digest, pooling(score)] = score
    groups = []
    for (protocol, metric, *_), by_weights in sorted(latest.items(), key=lambda item: _order(item[0])):
        named = sorted(((*_which(run, s), s) for s in by_weights.values()), key=lambda row: row[0])
        poolings = {pooling(s) for _, _, kind, s in named if kind != "pixels"}
        plot = DotPlot([_interval(s, kind) for _, _, kind, s in named], chance=chance, limit=1.0)
        rows = []
        for _, label, kind, s in named:
            name = f"{label}, {pooling(s)}" if len(poolings) > 1 and kind != "pixels" else label
            sure = _interval(s, kind)
            value, span = percent(s.value), f"{percent(sure.low)}–{percent(sure.high)}"
            words = f"{name}: {value} %, 95 % interval {span}, n = {s.n}"
            dots = plot.row(sure, words)
            rows.append(ScoreRow(name, kind, value, span, count(s.n), dots))
        note = _protocol(named[0][-1]) + (f", features: {poolings.pop()}" if len(poolings) == 1 else "")
        groups.append(
            ScoreGroup(
                title=_title(protocol, metric),
                protocol=note,
                chance="" if chance is None else percent(chance),
                rows=rows,
                axis=plot.axis(percent=True),
            )
        )
    return groups


def _interval(score: Score, kind: str) -> Interval:
    assert score.low is not None
    assert score.high is not None
    return Interval(score.low, score.value, score.high, kind)


def pooling(score: Score) -> str:
    """Which tokens were the features, in words."""
    tokens = score.details.get("features", {}).get("tokens")
    if tokens is None:
        return ""
    how = Pooling.parse(tokens)
    blocks = how.n_last_blocks
    parts = ["class token"] if blocks == 1 else [f"class tokens of the last {blocks} blocks"] if blocks else []
    return " and ".join(parts + ["mean patch token"] * how.avgpool)


def _measured(score: Score) -> tuple[str, ...]:
    """Scores that agree in this may be compared."""
    return score.protocol, score.metric, score.protocol_digest, str(score.train_corpus), str(score.test_corpus)


def _protocol(score: Score) -> str:
    details, parts = score.details, [f"Protocol {score.protocol} {score.protocol_digest[:8]}"]
    if "k" in details and "temperature" in details:
        parts.append(f"k = {details['k']}, temperature {number(details['temperature'])}")
    if "held_out" in details:
        parts.append(f"best of {len(details['held_out'])} heads on a tenth of the training images")
    if "n_train" in details:
        parts.append(f"{count(details['n_train'])} training images")
    return ", ".join(parts)


def finding(run: RunFolder, scores: Sequence[Score]) -> str:
    """What the scores say of the trained encoder in one or two sentences; empty where there is nothing to compare."""
    said, apart, ahead = [], True, True
    for protocol, subject in (("knn", "k-NN"), ("linear", "a linear probe")):
        mine = [s for s in scores if s.protocol == protocol and s.low is not None and _which(run, s)[2] == "trained"]
        # Only what was measured in the same way and on the same images may be compared; the last of each kind holds.
        by_kind = {_which(run, s)[2]: s for s in scores if mine and _measured(s) == _measured(mine[-1])}
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


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _order(measured: tuple[str, ...]) -> tuple[int, tuple[str, ...]]:
    known = list(PROBES)
    return (known.index(measured[0]) if measured[0] in known else len(known), measured)


def _title(protocol: str, metric: str) -> str:
    name = PROBES.get(protocol, protocol)
    return name if metric == "top1" else f"{name}, {metric}"


def _which(run: RunFolder, score: Score) -> tuple[int, str, str]:
    """(place, label, kind) of the weights a score belongs to."""
    if score.weights == "pixels":
        return -1, "Raw pixels", "pixels"
    steps = {export.digest: step for step, export in run.exports.items()}
    step = steps.get(score.weights_digest)
    if step is None:
        return 1 << 62, str(score.weights), "step"
    if step == 0:
        return 0, "Untrained encoder", "untrained"
    if step == run.last_step:
        return step, "Trained encoder", "trained"
    return step, f"After step {count(step)}", "step"
