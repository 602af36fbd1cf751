"""The random parameters of a crop, as a row of numbers: a function of (stream key, sample ordinal, visit, crop) alone.

Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), a counter-based generator, gives
the same uniform numbers as numpy's `Generator(Philox(key, counter=[0, 0, ordinal, visit]))`. Compiled, because numpy
spends ten times as long on making a generator as on drawing from it.
"""

import math

import numpy as np

from selfsight.stream.compiled import compiled
from selfsight.viewspec import CropSpec

# The four operations of torchvision.transforms.ColorJitter in its numbering; it applies them in a random order.
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)

# The columns of a row of parameters. They are compiled into `selfsight.stream.pixels`, whose kept machine code does not
# see a change of this file: touch that file too.
LEFT, TOP, WIDTH, HEIGHT = range(4)  # the box, in pixels of the source
FLIP = 4  # 1 or 0
ORDER = 5  # to 8: the operations of colour jitter, one after the other; −1 is none
FACTORS = (
    9  # to 12: of brightness, contrast, saturation (1 changes nothing) and hue (fraction of a circle), by operation
)
GRAYSCALE = 13  # 1 or 0
SIGMA = 14  # of the Gaussian blur, in pixels; 0 is none
SOLARIZE = 15  # 1 or 0
COLUMNS = 16

_TRIES = 10  # of RandomResizedCrop, before it falls back to the centre
_BLOCKS = 16  # of four uniform numbers, set aside for each crop: one per try, 3 for the rest, the remainder for later


def rules(spec: CropSpec) -> np.ndarray:
    """`spec` as `draw_crops` wants it, float64 (count, 15): one row for each of its crops."""
    rows = np.empty((spec.count, 15))
    rows[:, :4] = *spec.scale, math.log(spec.ratio[0]), math.log(spec.ratio[1])
    rows[:, 4:11] = spec.flip, spec.jitter, spec.brightness, spec.contrast, spec.saturation, spec.hue, spec.grayscale
    rows[:, 11] = spec.blur or 0.0
    rows[:, 12] = spec.solarize or 0.0
    rows[:, 13:] = spec.blur_sigma
    return rows


@compiled
def _high(a: np.uint64, b: np.uint64) -> np.uint64:
    """The upper half of the 128-bit product."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & mask, a >> half, b & mask, b >> half
    middle = a1 * b0 + ((a0 * b0) >> half)
    return a1 * b1 + (middle >> half) + (((middle & mask) + a0 * b1) >> half)


@compiled
def _philox(key, block, ordinal, visit, out) -> None:
    """The four words of one counter (block, 0, ordinal, visit) into `out`, uint64 (4,)."""
    x0, x1, x2, x3 = np.uint64(block), np.uint64(0), np.uint64(ordinal), np.uint64(visit)
    k0, k1 = key[0], key[1]
    m0, m1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
    for _ in range(10):
        x0, x1, x2, x3 = _high(m1, x2) ^ x1 ^ k0, m1 * x2, _high(m0, x0) ^ x3 ^ k1, m0 * x0
        k0 += np.uint64(0x9E3779B97F4A7C15)
        k1 += np.uint64(0xBB67AE8584CAA73B)
    out[0], out[1], out[2], out[3] = x0, x1, x2, x3


@compiled
def _uniform(key, block, ordinal, visit, words, out) -> None:
    """The `block`-th four uniform numbers of a stream in [0, 1), 53 bits each, into `out`, float64 (4,)."""
    _philox(key, block + 1, ordinal, visit, words)  # numpy counts up before its first block
    for i in range(4):
        out[i] = (words[i] >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@compiled
def uniform(key, ordinal, visit, out) -> None:
    """Fills `out`, float32 (length,), with uniform numbers in [0, 1), as numpy's `random(dtype=float32)` does."""
    words = np.empty(4, np.uint64)
    for i in range(0, out.size, 8):
        _philox(key, i // 8 + 1, ordinal, visit, words)
        for j in range(min(8, out.size - i)):
            bits = (words[j // 2] >> np.uint64(32 * (j % 2))) & np.uint64(0xFFFFFFFF)
            out[i + j] = np.float32(bits >> np.uint64(8)) * np.float32(1.0 / 16777216.0)


@compiled
def _box(key, first, ordinal, visit, width, height, rule, words, u):
    """(left, top, width, height) by torchvision's RandomResizedCrop.get_params: a try is a block of numbers."""
    for i in range(_TRIES):
        _uniform(key, first + i, ordinal, visit, words, u)
        area = width * height * (rule[0] + (rule[1] - rule[0]) * u[0])
        aspect = math.exp(rule[2] + (rule[3] - rule[2]) * u[1])
        w, h = int(np.rint(math.sqrt(area * aspect))), int(np.rint(math.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return int(u[3] * (width - w + 1)), int(u[2] * (height - h + 1)), w, h
    w, h = width, height
    if width / height < math.exp(rule[2]):
        h = max(1, int(np.rint(width / math.exp(rule[2]))))
    elif width / height > math.exp(rule[3]):
        w = max(1, int(np.rint(height * math.exp(rule[3]))))
    return (width - w) // 2, (height - h) // 2, w, h


@compiled
def draw_crops(rules, key, ordinal, visit, width, height, out) -> None:
    """Writes the parameters of every crop of an entry, for an image of width × height pixels.

    `rules` float64 (count, 15) as the function of that name makes them, `key` uint64 (2,), `out` float32 (count,
    COLUMNS). Row k comes of its own sixteen blocks of the stream alone: a further crop changes none before it.
    """
    words, u = np.empty(4, np.uint64), np.empty(12)
    for k in range(out.shape[0]):
        rule, row, first = rules[k], out[k], _BLOCKS * k
        row[LEFT], row[TOP], row[WIDTH], row[HEIGHT] = _box(key, first, ordinal, visit, width, height, rule, words, u)
        for i in range(3):
            _uniform(key, first + _TRIES + i, ordinal, visit, words, u[4 * i : 4 * i + 4])
        row[FLIP] = u[0] < rule[4]
        left = int(u[6] * 24)  # which of the 24 orders, in lexicographic order: a digit to the base 4, 3, 2 and 1
        taken, ways = 0, 6
        for i in range(4):
            nth, left = left // ways, left % ways
            ways = ways // (3 - i) if i < 3 else 1
            op = -1
            while nth >= 0:
                op += 1
                nth -= not taken >> op & 1
            taken |= 1 << op
            row[ORDER + i] = op if u[1] < rule[5] and rule[6 + op] > 0 else -1
        for op in range(3):
            strength = rule[6 + op]
            row[FACTORS + op] = max(0.0, 1 - strength) + (1 + strength - max(0.0, 1 - strength)) * u[2 + op]
        row[FACTORS + HUE] = rule[9] * (2 * u[5] - 1)
        row[GRAYSCALE] = u[7] < rule[10]
        row[SIGMA] = rule[13] + (rule[14] - rule[13]) * u[9] if u[8] < rule[11] else 0.0
        row[SOLARIZE] = u[10] < rule[12]
