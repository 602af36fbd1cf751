"""What the report says of a run in words, numbers and curves. In: a run folder. Out: values for the template.

Its scores are in `scores`, everything with images in it is in `gallery`.
"""

import math
from dataclasses import dataclass

from eval_probes.report import charts
from eval_probes.report.charts import Curve, number
from eval_probes.report.runfolder import RunFolder
from eval_probes.report.scores import count

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
    "noise_scale": ("Gradient noise scale", "images"),
    "dead_prototypes": ("Prototypes that no image chooses", "of all"),
    "peak_memory": ("Memory, at most", "GiB"),
}
NOT_CURVES = {"step", "epoch", "grad_signal", "grad_noise"}  # the last two: what the noise scale is made of
ALARMS = 6  # said in words at the head of the page; all are marked on the curves


@dataclass(frozen=True)
class Fact:
    name: str
    value: str
    note: str = ""


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
