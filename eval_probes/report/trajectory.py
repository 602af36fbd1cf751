"""How scores went over checkpoints: a line per run inside the band of its 95 % intervals, as inline SVG.

In: readings of one metric of one protocol. Out: a `Curve`. A run with one checkpoint is a dot with a whisker, the
baseline of raw pixels a dashed line.
"""

from collections.abc import Sequence

from markupsafe import Markup, escape

from eval_probes.readings import Reading
from eval_probes.report.charts import BOTTOM, HEIGHT, TOP, Axes, Curve, number
from eval_probes.results import Score
from eval_probes.subject import PIXELS


def trajectory(title: str, readings: Sequence[Reading], colours: dict[str, str]) -> Curve | None:
    """`readings` of one metric by run, then step; None if no run has a step. `colours` gives each run its CSS class."""
    stepped = [(r.step, r) for r in readings if r.step is not None and r.run in colours]
    if not stepped:
        return None
    pixels = [r.score for r in readings if r.run == PIXELS][-1:]
    scores = [r.score for _, r in stepped] + pixels
    low = min(s.value if s.low is None else s.low for s in scores)
    high = max(s.value if s.high is None else s.high for s in scores)
    unit = scores[0].unit
    steps = [step for step, _ in stepped]
    axes = Axes((min(steps), max(steps)), (low, high), scale=100 if unit == "%" else 1)
    parts = axes.drawn()
    for score in pixels:
        parts.append(axes.reference(score.value, "raw pixels"))
    for run, colour in colours.items():
        own = [(step, r.score) for step, r in stepped if r.run == run]
        if own:
            parts.append(f'<g class="{escape(colour)}">{_line(own, axes)}</g>')
    runs = {r.run for _, r in stepped}
    last = stepped[-1][1].score
    shown = _said(last) if len(runs) == 1 else ""
    label = escape(f"{title} from step {number(min(steps))} to {number(max(steps))}")
    svg = f'<svg class="curve" viewBox="0 0 320 {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return Curve(title, unit, shown, Markup(svg))  # every text above went through escape()


def _line(points: list[tuple[int, Score]], axes: Axes) -> str:
    def at(step: int, value: float) -> str:
        # A line may end beyond the ticks only by rounding.
        return f"{axes.x(step):.1f} {min(max(axes.y(value), TOP), HEIGHT - BOTTOM):.1f}"

    parts = []
    sure = [(step, s.low, s.high) for step, s in points if s.low is not None and s.high is not None]
    if len(sure) > 1:
        upper = [at(step, high) for step, _, high in sure]
        lower = [at(step, low) for step, low, _ in sure]
        parts.append(f'<path class="band" d="M{" L".join(upper + lower[::-1])} Z"/>')
    elif sure:
        ((step, low, high),) = sure
        parts.append(f'<path class="line" d="M{at(step, low)} L{at(step, high)}"/>')
    if len(points) > 1:
        parts.append(f'<path class="line" d="M{" L".join(at(step, s.value) for step, s in points)}"/>')
    for step, s in points:
        x, y = at(step, s.value).split()
        words = escape(f"step {number(step)}: {s.said()}")
        parts.append(f'<circle class="last" cx="{x}" cy="{y}" r="2.5"><title>{words}</title></circle>')
    return "".join(parts)


def _said(score: Score) -> str:
    return number(100 * score.value if score.unit == "%" else score.value, 3)
