"""A labelled corpus drawn from a seed: ten kinds of thing, each known by its outline and its coat, in a varied world.

Colours, place, size, turn, background, clutter, light, shadow and noise say nothing about the class, so raw pixels do
poorly, while what makes the class has to be seen across them. In: a seed. Out: `train/CLASS/*.png`, `test/CLASS/*.png`.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from selfsight.corpus.pool import each

Array = np.ndarray
BLOCK = 100  # images drawn together from one generator
OVERSAMPLING = 2  # per axis, averaged away at the end: smooth edges


@dataclass(frozen=True)
class World:
    """How much everything varies. Lengths are in half images: the picture spans [-1, 1] in both directions."""

    size: int = 32  # pixels, square
    radius: tuple[float, float] = (1.0, 1.35)  # of the thing
    offset: float = 0.4  # of its centre, at most
    squeeze: float = 0.8  # of one of its axes, at most: things seen aslant
    pitch: tuple[float, float] = (0.36, 0.42)  # of its coat: length of one period
    bend: float = 0.06  # how far it is bent out of shape, as a standard deviation
    backdrop: float = 0.1  # strength of the background's own texture
    clutter: int = 2  # bars and pebbles behind the thing, at most
    in_front: float = 0.3  # probability of one more before it
    shadow: float = 0.3
    light: float = 0.6  # slope of the illumination, at most
    noise: float = 0.04  # standard deviation, at most; the image's range is [0, 1]


# Outlines: signed distance (negative inside), roughly, of points (u, v) in units of the thing's radius.


def disc(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - 0.85


def square(u: Array, v: Array) -> Array:
    return np.maximum(abs(u), abs(v)) - 0.72


def triangle(u: Array, v: Array) -> Array:
    third = 2 * np.pi / 3
    sides = [u * np.cos(a) + v * np.sin(a) for a in (np.pi / 2, np.pi / 2 + third, np.pi / 2 - third)]
    return np.maximum.reduce(sides) - 0.5


def star(u: Array, v: Array) -> Array:
    r, fifth = np.hypot(u, v), 2 * np.pi / 5
    a = abs((np.arctan2(u, v) + fifth / 2) % fifth - fifth / 2)  # folded onto half a point of the star
    x, y = r * np.cos(a), r * np.sin(a)
    tip, notch = np.array([1.08, 0.0]), 0.5 * np.array([np.cos(fifth / 2), np.sin(fifth / 2)])
    edge = (notch - tip) / np.hypot(*(notch - tip))
    return (y - tip[1]) * -edge[0] + (x - tip[0]) * edge[1]


def ring(u: Array, v: Array) -> Array:
    return abs(np.hypot(u, v) - 0.62) - 0.27


def cross(u: Array, v: Array) -> Array:
    a, b = abs(u), abs(v)
    return np.maximum(np.minimum(a, b) - 0.32, np.maximum(a, b) - 0.9)


def crescent(u: Array, v: Array) -> Array:
    return np.maximum(np.hypot(u, v) - 0.92, 0.66 - np.hypot(u - 0.46, v))


def heart(u: Array, v: Array) -> Array:
    x, y = abs(u), 0.35 - v
    lobe = np.hypot(x - 0.4, y - 0.3) - 0.47
    body = np.maximum((x - y) / np.sqrt(2) - 0.552, np.maximum((x + y) / np.sqrt(2) - 0.96, y - 0.3))
    return np.minimum(lobe, np.maximum(body, (x - y * 0.9) / 1.35 - 0.58))


def flower(u: Array, v: Array) -> Array:
    return np.hypot(u, v) - (0.68 + 0.24 * np.cos(5 * np.arctan2(u, v)))


def hourglass(u: Array, v: Array) -> Array:
    return np.maximum((abs(u) - 0.85 * abs(v)) / 1.3 - 0.13, abs(v) - 0.82)


# Coats: a pattern in about [-1, 1] of points (p, q) in periods; positive is paint, negative ground.


def plain(p: Array, q: Array) -> Array:
    return np.ones_like(p)


def marble(p: Array, q: Array) -> Array:
    drift = 0.9 * np.sin(1.3 * q + 0.8 * p) + 0.7 * np.sin(0.7 * p - 1.9 * q)
    return np.sin(2 * np.pi * (0.4 * p + 0.5 * drift))


def stripes(p: Array, q: Array) -> Array:
    return np.sin(2 * np.pi * p)


def checks(p: Array, q: Array) -> Array:
    return 2 * np.sin(np.pi * p) * np.sin(np.pi * q)


def dots(p: Array, q: Array) -> Array:
    return 4 * (0.32 - np.hypot(p % 1 - 0.5, q % 1 - 0.5))


def waves(p: Array, q: Array) -> Array:
    return np.sin(2 * np.pi * (p + 0.3 * np.sin(np.pi * q)))


def bricks(p: Array, q: Array) -> Array:
    row, along = np.floor(q), 0.5 * p
    a, b = (along + 0.5 * (row % 2)) % 1, q % 1
    return 9 * (np.minimum(2 * np.minimum(a, 1 - a), np.minimum(b, 1 - b)) - 0.13)


def hoops(p: Array, q: Array) -> Array:
    return np.sin(2 * np.pi * np.hypot(p, q))


def lattice(p: Array, q: Array) -> Array:
    return 6 * (np.minimum(abs(p % 1 - 0.5), abs(q % 1 - 0.5)) - 0.14)


def zigzag(p: Array, q: Array) -> Array:
    return np.sin(2 * np.pi * (p + 0.9 * abs(0.5 * q % 1 - 0.5)))


Pattern = Callable[[Array, Array], Array]

# Class name → its outline, its coat, and how coarse that is: lengths of a period relative to `World.pitch`. Sorted by
# name, as folders are, so that the index here is the label there.
KINDS: dict[str, tuple[Pattern, Pattern, float]] = {
    "bricked_cross": (cross, bricks, 1.15),
    "checked_square": (square, checks, 1.0),
    "dotted_heart": (heart, dots, 0.95),
    "hooped_disc": (disc, hoops, 1.1),
    "latticed_triangle": (triangle, lattice, 0.85),
    "marbled_ring": (ring, marble, 1.4),
    "plain_crescent": (crescent, plain, 1.0),
    "striped_star": (star, stripes, 1.0),
    "wavy_flower": (flower, waves, 0.8),
    "zigzag_hourglass": (hourglass, zigzag, 1.25),
}

HOOPED = [coat for _, coat, _ in KINDS.values()].index(hoops)


def draw(rng: np.random.Generator, labels: Array, world: World) -> Array:
    """Pictures of things of the kinds `labels` (n,): uint8 (n, size, size, 3)."""
    n, side = len(labels), world.size * OVERSAMPLING
    axis = ((np.arange(side) + 0.5) / side * 2 - 1).astype(np.float32)
    x, y = axis[None, None, :], axis[None, :, None]

    def between(low: float, high: float) -> Array:
        return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)

    outline, coat = _thing(rng, labels, x, y, between, world)
    pixel = 2 / side

    image = _background(rng, n, x, y, between, world)
    for _ in range(world.clutter):
        _lay(image, _colour(rng, n, 0.3, 0.75), _pebble(x, y, between, 0.6))
    step = side // 16
    shade = _cover(np.roll(outline, (step, step), axis=(1, 2)), 8 * pixel)
    image *= 1 - world.shadow * shade[..., None]

    # Paint and ground differ in brightness, whichever is the brighter: without that a coat could not be seen.
    brighter = rng.random((n, 1)) < 0.5
    bright, dark = _colour(rng, n, 0.85, 1.0), _colour(rng, n, 0.0, 0.2)
    paint, ground = np.where(brighter, bright, dark), np.where(brighter, dark, bright)
    mix = np.clip(0.5 + 2.0 * coat, 0, 1)[..., None]
    thing = ground[:, None, None] * (1 - mix) + paint[:, None, None] * mix
    thing *= (1.05 - 0.3 * np.clip(1 + outline / 0.4, 0, 1) ** 2)[..., None]  # rounded towards its rim
    _blend(image, thing, _cover(outline, pixel))
    _lay(image, _colour(rng, n, 0.3, 0.75), _pebble(x, y, between, world.in_front))

    angle = between(-np.pi, np.pi)
    light = between(0.85, 1.1) * (1 + between(0, world.light) * (x * np.cos(angle) + y * np.sin(angle)))
    image *= light[..., None]
    k = OVERSAMPLING
    image = image.reshape(n, world.size, k, world.size, k, 3).mean(axis=(2, 4))
    image += rng.standard_normal(image.shape, dtype=np.float32) * between(0, world.noise)[..., None]
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _thing(
    rng: np.random.Generator, labels: Array, x: Array, y: Array, between: Callable, world: World
) -> tuple[Array, Array]:
    """Outlines, as distances in half images, and coats of the things: both float32 (n, side, side)."""
    n, side = len(labels), x.shape[-1]
    dx = x - between(-world.offset, world.offset) + world.bend * _clouds(rng, n, side, 4)
    dy = y - between(-world.offset, world.offset) + world.bend * _clouds(rng, n, side, 4)
    dx, dy = _turned(dx, dy, between(-np.pi, np.pi))
    dy = dy / between(world.squeeze, 1)
    coarse = np.array([c for *_, c in KINDS.values()], np.float32)[labels, None, None]
    radius, pitch = between(*world.radius), between(*world.pitch) * coarse
    u, v = _turned(dx / radius, dy / radius, between(-np.pi, np.pi))
    p, q = _turned(dx / pitch, dy / pitch, between(-np.pi, np.pi))
    # Round coats have their middle on the thing, the others begin anywhere.
    reach = np.where((labels == HOOPED)[:, None, None], 0.6, 7.0).astype(np.float32)
    p, q = p + reach * between(-1, 1), q + reach * between(-1, 1)
    outline, coat = np.empty_like(u), np.empty_like(u)
    for label, (outline_of, coat_of, _) in enumerate(KINDS.values()):
        rows = labels == label
        outline[rows] = outline_of(u[rows], v[rows]) * radius[rows]
        coat[rows] = coat_of(p[rows], q[rows])
    return outline, coat


def _background(rng: np.random.Generator, n: int, x: Array, y: Array, between: Callable, world: World) -> Array:
    """Two colours that run into each other along a bent front, with a faint texture: float32 (n, side, side, 3)."""
    side, angle = x.shape[-1], between(-np.pi, np.pi)
    front = 0.5 + 0.45 * (x * np.cos(angle) + y * np.sin(angle)) + 0.3 * _clouds(rng, n, side, 3)
    one, other = (_colour(rng, n, 0.35, 0.65)[:, None, None] for _ in range(2))
    front = np.clip(front, 0, 1)[..., None]
    texture = _clouds(rng, n, side, 10) * between(0, world.backdrop)
    return one * (1 - front) + other * front + texture[..., None]


def _pebble(x: Array, y: Array, between: Callable, probability: float) -> Array:
    """How far a bar or a pebble somewhere covers each point, 0–1; none at all in 1 − `probability` of the images."""
    a, b = _turned(x - between(-1, 1), y - between(-1, 1), between(-np.pi, np.pi))
    distance = np.hypot(np.maximum(abs(a) - between(0.03, 0.4), 0), b) - between(0.05, 0.14)
    return _cover(distance, 2 / x.shape[-1]) * (between(0, 1) < probability)


def _clouds(rng: np.random.Generator, n: int, side: int, cells: int) -> Array:
    """Smooth value noise of unit variance at its nodes, `cells` of them across: float32 (n, side, side)."""
    nodes = rng.standard_normal((n, cells + 1, cells + 1), dtype=np.float32)
    t = np.linspace(0, cells, side, endpoint=False, dtype=np.float32)
    i = t.astype(int)
    f = t - i
    weights = np.zeros((side, cells + 1), np.float32)
    weights[np.arange(side), i], weights[np.arange(side), i + 1] = 1 - f * f * (3 - 2 * f), f * f * (3 - 2 * f)
    return weights @ nodes @ weights.T


def _colour(rng: np.random.Generator, n: int, dark: float, bright: float) -> Array:
    """Random hues and saturations with a value between `dark` and `bright`: RGB float32 (n, 3)."""
    hue, saturation, value = rng.random((n, 1)), rng.uniform(0.1, 0.7, (n, 1)), rng.uniform(dark, bright, (n, 1))
    k = (np.array([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return (value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)).astype(np.float32)


def _turned(x: Array, y: Array, angle: Array) -> tuple[Array, Array]:
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _cover(distance: Array, softness: float) -> Array:
    """1 inside, 0 outside, a ramp of width `softness` across the edge."""
    return np.clip(0.5 - distance / softness, 0, 1)


def _blend(image: Array, top: Array, cover: Array) -> None:
    image += (top - image) * cover[..., None]


def _lay(image: Array, colour: Array, cover: Array) -> None:
    _blend(image, colour[:, None, None], cover)


@dataclass(frozen=True)
class _Block:
    folder: Path
    split: int
    index: int
    count: int
    seed: int
    world: World


def _write(block: _Block) -> int:
    first = block.index * BLOCK
    # Classes in turn: every split has the same number of each, give or take one.
    labels = (first + np.arange(block.count)) % len(KINDS)
    rng = np.random.default_rng((block.seed, block.split, block.index))
    names = list(KINDS)
    for i, (label, picture) in enumerate(zip(labels, draw(rng, labels, block.world), strict=True)):
        Image.fromarray(picture).save(block.folder / names[label] / f"{first + i:06d}.png", compress_level=1)
    return block.count


def make(
    out: Path, *, n_train: int = 8000, n_test: int = 2000, seed: int = 0, world: World | None = None, workers: int = 1
) -> Path:
    """Writes the corpus to `out/train/CLASS/NNNNNN.png` and `out/test/…` and returns `out`.

    The same seed and counts give the same pictures whatever `workers` is. Appears whole; an `out` that is there is left
    as it is. Raises OSError when it cannot be written.
    """
    out, world = Path(out), world or World()
    if out.exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        blocks = []
        for split, (name, n) in enumerate({"train": n_train, "test": n_test}.items()):
            for kind in KINDS:
                (temporary / name / kind).mkdir(parents=True)
            blocks += [
                _Block(temporary / name, split, i, min(BLOCK, n - i * BLOCK), seed, world)
                for i in range(-(-n // BLOCK))
            ]
        for _ in each(_write, blocks, workers):
            pass
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out
