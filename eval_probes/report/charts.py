"""Charts as inline SVG: small multiples of a curve over steps, and dots with whiskers for scores and their intervals.

In: numbers. Out: `Markup` whose colours come from the page's CSS variables, so that one drawing serves light, dark and
printer. No JavaScript; what a pointer may ask for is in `<title>` elements.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

# One curve's drawing, in the units of its viewBox.
WIDTH, HEIGHT = 320, 168
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 24
BUCKETS = 240  # a curve of more points is drawn as the mean of each bucket inside its minimum–maximum band

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 4) -> str:
    """`value` as a reader writes it: 12 345, 0.0312, 5 × 10⁻⁴. Non-finite values by name."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.{max(digits - 2, 0)}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        power = f"10{str(int(exponent)).translate(_SUPERSCRIPT)}"
        return f"{mantissa} × {power}".replace("-", "−")
    decimals = max(digits - 1 - math.floor(math.log10(size)), 0)
    text = f"{value:,.{decimals}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return text.replace(",", "\u202f").replace("-", "−")


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) covering [low, high]; the ends lie on or beyond the data."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


class Axes:
    """Where a step and a value lie in one drawing; `scale` is what its numbers are multiplied with: 100 for %."""

    def __init__(self, steps: tuple[float, float], values: tuple[float, float], *, scale: float = 1.0) -> None:
        self.y_ticks, self.scale = ticks(*values), scale
        self.x_low, self.x_high = steps[0], max(steps[1], steps[0] + 1)
        # A range that begins close to step 0 is read better from 0 on.
        self.x_low = 0.0 if self.x_low <= 0.1 * self.x_high else self.x_low

    def x(self, step: float) -> float:
        return LEFT + (step - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def drawn(self) -> list[str]:
        """Grid, axis and their numbers."""
        parts = []
        for t in self.y_ticks:
            at, said = self.y(t), number(t * self.scale)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{said}</text>')
        foot = HEIGHT - BOTTOM
        for t in ticks(self.x_low, self.x_high, 4):
            if self.x_low <= t <= self.x_high:
                at = self.x(t)
                parts.append(
                    f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 7}" text-anchor="middle">{number(t)}</text>'
                    f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{foot}" y2="{foot + 4}"/>'
                )
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{foot}" y2="{foot}"/>')
        return parts

    def reference(self, value: float, words: str) -> str:
        at = self.y(value)
        return (
            f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" x="{WIDTH - RIGHT}" y="{at - 4 if at > TOP + 12 else at + 12:.1f}" text-anchor="end">'
            f"{escape(words)}</text>"
        )


@dataclass(frozen=True)
class Curve:
    """One drawn curve: its last finite value, and its SVG."""

    title: str
    unit: str
    last: str
    svg: Markup


def curve(
    title: str,
    steps: Sequence[float],
    values: Sequence[float],
    *,
    unit: str = "",
    alarms: Sequence[tuple[float, str]] = (),
    reference: tuple[float, str] | None = None,
) -> Curve | None:
    """A curve over steps. None if no value is finite.

    `alarms` are (step, words), drawn as vertical marks. `reference` is a (value, words) the curve should be read
    against, such as the loss of a collapsed model; it is drawn where it lies within or near the curve's range.
    """
    points = [(float(s), float(v)) for s, v in zip(steps, values, strict=True)]
    finite = [(s, v) for s, v in points if math.isfinite(v)]
    if not finite:
        return None
    low, high = min(v for _, v in finite), max(v for _, v in finite)
    if reference is not None:
        room = high - low or abs(high) or 1.0
        if low - room <= reference[0] <= high + room:
            low, high = min(low, reference[0]), max(high, reference[0])
        else:
            reference = None
    axes = Axes((points[0][0], points[-1][0]), (low, high))
    x, y, parts = axes.x, axes.y, axes.drawn()
    if reference is not None:
        parts.append(axes.reference(*reference))
    for run in _runs(points):
        parts.append(_line(run, x, y))
    for step, words in alarms:
        if axes.x_low <= step <= axes.x_high:
            at = x(step)
            parts.append(
                f'<g class="alarm"><title>{escape(words)}</title>'
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
                f'<path d="M{at - 4:.1f} {TOP - 8} h8 l-4 8 z"/></g>'
            )
    last_step, last = finite[-1]
    parts.append(
        f'<circle class="last" cx="{x(last_step):.1f}" cy="{y(last):.1f}" r="3">'
        f"<title>step {number(last_step)}: {number(last)}</title></circle>"
    )
    label = escape(f"{title}: {number(finite[0][1])} at step {number(finite[0][0])}, {number(last)} at the end")
    svg = (
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        + "".join(parts)
        + "</svg>"
    )
    return Curve(title, unit, number(last), Markup(svg))  # every text above went through escape()


def _runs(points: list[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Stretches of finite values: a curve breaks where a value is not finite."""
    runs: list[list[tuple[float, float]]] = [[]]
    for step, value in points:
        if math.isfinite(value):
            runs[-1].append((step, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _line(run: list[tuple[float, float]], x, y) -> str:
    if len(run) > 2 * BUCKETS:
        size = math.ceil(len(run) / BUCKETS)
        buckets = [run[i : i + size] for i in range(0, len(run), size)]
        centre = [sum(s for s, _ in b) / len(b) for b in buckets]
        upper = [f"{x(s):.1f} {y(max(v for _, v in b)):.1f}" for s, b in zip(centre, buckets, strict=True)]
        lower = [f"{x(s):.1f} {y(min(v for _, v in b)):.1f}" for s, b in zip(centre, buckets, strict=True)]
        band = f'<path class="band" d="M{" L".join(upper + lower[::-1])} Z"/>'
        run = [(s, sum(v for _, v in b) / len(b)) for s, b in zip(centre, buckets, strict=True)]
    else:
        band = ""
    return band + f'<path class="line" d="M{" L".join(f"{x(s):.1f} {y(v):.1f}" for s, v in run)}"/>'


@dataclass(frozen=True)
class Interval:
    """A score between the ends of its 95 % interval; without one, all three are the same."""

    low: float
    value: float
    high: float
    kind: str  # CSS class: pixels, untrained, trained or step


class DotPlot:
    """Rows of dots with whiskers over one shared axis. Positions are percentages of the width, so text never scales.

    The axis begins at 0 where the values are `percent` or come near it, and ends at 1 at most where they are."""

    def __init__(self, intervals: Sequence[Interval], *, chance: float | None = None, percent: bool = True) -> None:
        self.chance, self.percent = chance, percent
        highest = max([i.high for i in intervals] + ([] if chance is None else [chance]))
        lowest = min(i.low for i in intervals)
        if percent or 0 <= lowest <= 0.5 * highest:
            lowest = min(lowest, 0.0)
        room = 0.02 * (highest - lowest)
        highest = min(highest + room, 1.0) if percent and highest <= 1 else highest + room
        self.ticks = ticks(lowest, highest, 5)

    def _at(self, value: float) -> str:
        # Half a dot of room at both ends.
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return f"{2 + 96 * min(max(share, 0.0), 1.0):.2f}%"

    def row(self, intervals: Sequence[Interval], words: str) -> Markup:
        """One row, 28 px high and as wide as its place; the last of `intervals` lies on top."""
        grid = "".join(f'<line class="grid" x1="{self._at(t)}" x2="{self._at(t)}" y1="0" y2="28"/>' for t in self.ticks)
        if self.chance is not None:
            at = self._at(self.chance)
            grid += f'<line class="reference" x1="{at}" x2="{at}" y1="0" y2="28"/>'
        return Markup(  # positions are ours and the words are escaped
            f'<svg class="dots" width="100%" height="28" role="img" aria-label="{escape(words)}">'
            f"<title>{escape(words)}</title>{grid}{''.join(map(self._dot, intervals))}</svg>"
        )

    def _dot(self, interval: Interval) -> str:
        low, value, high = self._at(interval.low), self._at(interval.value), self._at(interval.high)
        whisker = (
            f'<line class="whisker" x1="{low}" x2="{high}" y1="14" y2="14"/>'
            f'<line class="whisker" x1="{low}" x2="{low}" y1="9" y2="19"/>'
            f'<line class="whisker" x1="{high}" x2="{high}" y1="9" y2="19"/>'
        )
        sure = whisker if interval.low < interval.high else ""
        return f'<g class="{escape(interval.kind)}">{sure}<circle cx="{value}" cy="14" r="5"/></g>'

    def axis(self) -> Markup:
        """The ticks' numbers, below the last row."""
        scale = 100 if self.percent else 1
        texts = "".join(
            f'<text class="tick" x="{self._at(t)}" y="12" text-anchor="middle">{number(t * scale)}</text>'
            for t in self.ticks
        )
        return Markup(f'<svg class="dots" width="100%" height="18" aria-hidden="true">{texts}</svg>')
