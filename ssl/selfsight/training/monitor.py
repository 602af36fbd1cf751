"""Signs that training learns nothing, told in words that say what to try.

In: the numbers of logged steps. Out: sentences, each when its sign has lasted for several records in a row, and again
only after it had gone. RankMe: Garrido et al. 2023, arXiv:2210.02885.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

PATIENCE = 5  # records in a row
LOSS_BAND = 1e-3  # of a collapse value: what is this close to it is that of a constant output
SPREAD_FLOOR = 0.01  # of 1, the spread of features that are all over the sphere
RANK_FLOOR = 1.5  # RankMe of features that lie on one line is 1
ENTROPY_BAND = 0.01  # of ln K, from either end
DEAD = 0.9  # of the prototypes
WINDOW = 20  # records that say what losses are usual; fewer say nothing
SPIKE = 8.0  # standard deviations above their median; and at least
SPIKE_LEAST = 0.05  # of the median
TRY = "try a smaller optimizer.base_lr, a longer warm-up, a larger batch"


@dataclass(frozen=True)
class Sign:
    name: str
    present: Callable[[dict[str, float]], bool]
    sentence: str


class Monitor:
    """Looks at records. `collapse` are an objective's `collapse_values`; `warmup_steps` are not judged."""

    def __init__(self, collapse: dict[str, float], *, warmup_steps: int = 0) -> None:
        self.warmup_steps = warmup_steps
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._dead: dict[str, float] = {}  # as last told: it is not in every record
        self.signs = _signs(collapse)
        self._seen = dict.fromkeys((s.name for s in self.signs), 0)

    def look(self, record: dict[str, float]) -> list[str]:
        """Sentences about this record, which has "step", "loss", "feature_spread", "rankme" and the objective's own."""
        told = []
        self._dead = {key: record[key] for key in ("dead_prototypes",) if key in record} or self._dead
        record = {**self._dead, **record, "usual_loss": self._usual(), "loss_band": self._band()}
        self._losses.append(record["loss"])
        for sign in self.signs:
            seen = self._seen[sign.name] + 1 if sign.present(record) else 0
            self._seen[sign.name] = 0 if record["step"] <= self.warmup_steps else seen
            if self._seen[sign.name] == PATIENCE:
                told.append(f"step {record['step']}: {sign.sentence.format(**record)}")
        return told

    @property
    def spiking(self) -> int:
        """For how many records in a row the loss has been far above what it was."""
        return self._seen["spike"]

    def _usual(self) -> float:
        return median(self._losses) if len(self._losses) == WINDOW else math.inf

    def _band(self) -> float:
        """Of the loss: what is above it is no fluctuation."""
        usual = self._usual()
        if not math.isfinite(usual):
            return math.inf
        # Of the noise alone: from one record to the next a trend does little.
        deviation = 1.4826 * median(abs(b - a) for a, b in pairwise(self._losses)) / math.sqrt(2)
        return usual + max(SPIKE * deviation, SPIKE_LEAST * abs(usual))


def _signs(collapse: dict[str, float]) -> list[Sign]:
    signs = [
        Sign(
            "spike",
            lambda r: r["loss"] > r["loss_band"],
            "the loss {loss:.4f} stays far above the {usual_loss:.4f} of the records before: if it does not come back, "
            "try a smaller optimizer.base_lr, optimizer.clip, a longer warm-up, or training.return_on_spike=true",
        ),
        Sign(
            "spread",
            lambda r: r["feature_spread"] < SPREAD_FLOOR,
            "features hardly differ between images (spread {feature_spread:.4f}): the encoder has collapsed; " + TRY,
        ),
        Sign(
            "rank",
            lambda r: r["rankme"] < RANK_FLOOR,
            "features vary along one direction only (RankMe {rankme:.2f}): the encoder has collapsed; " + TRY,
        ),
    ]
    signs.append(
        Sign(
            "dead",
            lambda r: r.get("dead_prototypes", 0.0) > DEAD,
            "{dead_prototypes:.0%} of the prototypes are chosen by no image: try fewer of them, a higher teacher "
            "temperature or a longer temperature warm-up, and look whether the corpus is as varied as it should be",
        )
    )
    terms = {name: value for name, value in collapse.items() if name != "teacher_entropy"}
    ln_k = collapse.get("teacher_entropy")
    signs += [_stays(name, value, teacher=ln_k is not None) for name, value in terms.items()]
    if ln_k is not None:
        signs += [
            Sign(
                "sharp",
                # That each image has one of its own is no harm: MSN sharpens its targets until they have.
                lambda r: r.get("teacher_entropy", ln_k) < ENTROPY_BAND * ln_k and r.get("dead_prototypes", 1.0) > DEAD,
                "the teacher puts every image on a single prototype (entropy {teacher_entropy:.4f}): "
                "try a higher teacher temperature or a longer temperature warm-up",
            ),
            Sign(
                "flat",
                lambda r: r.get("teacher_entropy", 0.0) > (1 - LOSS_BAND) * ln_k,
                "the teacher sees no difference between prototypes (entropy {teacher_entropy:.4f}, at most "
                f"{ln_k:.4f}): try a lower teacher temperature",
            ),
        ]
    return signs


def _stays(name: str, value: float, *, teacher: bool) -> Sign:
    """That the loss or a term of it stays at its collapse value, unless that is 0, where every good loss goes."""
    return Sign(
        name,
        lambda r: abs(r.get(name, math.nan) - value) < LOSS_BAND * abs(value),
        f"the {'loss' if name == 'loss' else f'term {name}'} {{{name}:.4f}} stays at {value:.4f}, that of an output "
        f"which tells nothing: {TRY}{', a lower teacher temperature' if teacher else ''}",
    )
