"""The crops of one image on a CPU: from uint8 pixels and rows of parameters (`selfsight.stream.draw`) to uint8 crops.

One compiled call makes all crops of an entry: antialiased bicubic resampling as PIL and torchvision define it, then
torchvision's colour functions, its Gaussian blur and solarisation on float32 planes in levels of 0–255, rounded once
at the end. No PIL, no GIL, no object per crop. `selfsight.stream.device` does the same in batches on an accelerator.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from selfsight.stream.compiled import compiled
from selfsight.stream.draw import (
    BRIGHTNESS,
    COLUMNS,
    CONTRAST,
    FACTORS,
    FLIP,
    GRAYSCALE,
    HEIGHT,
    HUE,
    LEFT,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARIZE,
    TOP,
    WIDTH,
)

_TILE = 1024  # pixels whose three channels stay in the first cache while the operations pass over them
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # torchvision's rgb_to_grayscale
_NOTHING = 1e-6  # a tap of the blur that weighs less is left out: 0.0003 levels


@compiled
def render(image, params, taps, bilinear, out, at) -> None:
    """Writes the crops of an image to place `at` of a batch of them.

    `image` uint8 (H, W, 3), `params` float32 (count, COLUMNS), `taps` of the blur, `bilinear` or else bicubic, `out`
    uint8 (count, B, 3, size, size), all contiguous. A box must lie inside the image.
    """
    size = out.shape[-1]
    planes = np.empty((3, size * size), np.float32)
    scratch = np.empty(size * size, np.float32)
    for crop in range(out.shape[0]):
        row = params[crop]
        _resample(image, row, bilinear, planes, size, size)
        _jitter(planes, row)
        channels = 3
        if row[GRAYSCALE] > 0:
            _to_gray(planes)
            channels = 1
        if row[SIGMA] > 0:
            kernel, reach = _gaussian(row[SIGMA], taps)
            for c in range(channels):
                _blur(planes[c].reshape(size, size), scratch.reshape(size, size), kernel, reach)
        for c in range(3):
            _to_bytes(planes[min(c, channels - 1)], row[SOLARIZE] > 0, out[crop, at, c].reshape(-1))


@compiled
def shrink(image, out) -> None:
    """Resizes `image` uint8 (H, W, 3) to `out` uint8 (h, w, 3), antialiased bicubic."""
    height, width = out.shape[:2]
    planes = np.empty((3, height * width), np.float32)
    whole = np.zeros(COLUMNS, np.float32)
    whole[WIDTH], whole[HEIGHT] = image.shape[1], image.shape[0]
    _resample(image, whole, False, planes, height, width)
    for c in range(3):
        for y in range(height):
            for x in range(width):
                out[y, x, c] = np.uint8(planes[c, y * width + x] + np.float32(0.5))


@compiled
def _level(x):
    return min(max(x, np.float32(0)), np.float32(255))


@compiled
def _filter(n_in, n_out, bilinear):
    """PIL's antialiased bilinear or bicubic (a = −0.5): (weights float32 (n_out, taps + 2), the first input of each
    output, taps).

    All outputs have the same number of taps, which is even; those beyond the support or the input weigh 0.
    """
    scale = n_in / n_out
    wide = max(scale, 1.0)
    support = wide if bilinear else 2.0 * wide
    taps = (int(2 * support) + 2) // 2 * 2
    weights = np.zeros((n_out, taps + 2), np.float32)
    first = np.empty(n_out, np.int64)
    for i in range(n_out):
        center = (i + 0.5) * scale
        start = max(int(center - support + 0.5), 0)
        stop = min(int(center + support + 0.5), n_in)
        row, total = weights[i], np.float32(0)
        offset, step = np.float32((start - center + 0.5) / wide), np.float32(1 / wide)
        for k in range(stop - start):
            x = abs(offset + np.float32(k) * step)
            near = (np.float32(1.5) * x - np.float32(2.5)) * x * x + np.float32(1)
            far = ((np.float32(-0.5) * x + np.float32(2.5)) * x - np.float32(4)) * x + np.float32(2)
            if bilinear:
                row[k] = max(np.float32(1) - x, np.float32(0))
            else:
                row[k] = near if x < 1 else (far if x < 2 else np.float32(0))
        for k in range(stop - start):
            total += row[k]
        total = np.float32(1) / total
        for k in range(taps):
            row[k] *= total
        first[i] = start
    return weights, first, taps


@intrinsic
def _mix_rgb(typingctx, line, at, weights, taps):
    """Σ_k weights[k] · line[at + 3k : at + 3k + 3] as three numbers, for an even number of taps.

    Written in LLVM's terms because its vectoriser looks along loops and not across channels: a vector of eight lanes
    holds two pixels and two numbers of the next, which are thrown away; `line` must reach that far.
    """
    signature = types.UniTuple(types.float32, 3)(line, types.intp, weights, types.intp)

    def generate(context, builder, signature, arguments):
        number, index = ir.FloatType(), ir.IntType(32)
        pair, eight = ir.VectorType(number, 2), ir.VectorType(number, 8)

        def shuffled(vector, lanes):
            places = ir.Constant(ir.VectorType(index, len(lanes)), lanes)
            return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), places)

        def loaded(array, offset, kind):
            place = builder.gep(array, [offset])
            return builder.load(builder.bitcast(place, kind.as_pointer()), align=4)

        source, weight = (context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 2))
        at, taps = arguments[1], arguments[3]
        total = cgutils.alloca_once_value(builder, ir.Constant(eight, [0.0] * 8))
        with cgutils.for_range_slice(builder, taps.type(0), taps, taps.type(2), taps.type) as (k, _):
            pixels = loaded(source, builder.add(at, builder.mul(k, taps.type(3))), eight)
            both = shuffled(loaded(weight, k, pair), [0, 0, 0, 1, 1, 1, 1, 1])
            product = builder.fmul(pixels, both, flags=("contract",))
            builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)
        total = builder.load(total)
        total = builder.fadd(shuffled(total, [0, 1, 2, 3]), shuffled(total, [3, 4, 5, 6]))
        parts = [builder.extract_element(total, index(c)) for c in range(3)]
        return context.make_tuple(builder, signature.return_type, parts)

    return signature, generate


@compiled
def _resample(image, row, bilinear, planes, rows, columns) -> None:
    """The box and flip of a row of parameters, at rows × columns pixels: `planes` float32 (3, rows · columns), 0–255.

    Pixels outside the box have no part in it. First down the columns, all bytes of a line side by side, then along it.
    """
    left, top, width, height = int(row[LEFT]), int(row[TOP]), int(row[WIDTH]), int(row[HEIGHT])
    flip = row[FLIP] > 0
    down, above, taps_down = _filter(height, rows, bilinear)
    along, before, taps_along = _filter(width, columns, bilinear)
    n = 3 * width
    line = np.zeros(n + 3 * taps_along + 2, np.float32)  # the taps that weigh nothing may lie beyond its end
    lines = image.reshape(image.shape[0], image.shape[1] * 3)[top : top + height, 3 * left : 3 * left + n]
    for y in range(rows):
        start, w = above[y], down[y]
        for k in range(0, taps_down, 4):
            if k > 0 and w[k] == 0 and w[k + 1] == 0 and w[k + 2] == 0 and w[k + 3] == 0:
                break
            a, b = lines[min(start + k, height - 1)], lines[min(start + k + 1, height - 1)]
            c, d = lines[min(start + k + 2, height - 1)], lines[min(start + k + 3, height - 1)]
            wa, wb, wc, wd = w[k], w[k + 1], w[k + 2], w[k + 3]
            if k == 0:
                for j in range(n):
                    line[j] = wa * np.float32(a[j]) + wb * np.float32(b[j])
                    line[j] += wc * np.float32(c[j]) + wd * np.float32(d[j])
            else:
                for j in range(n):
                    line[j] += wa * np.float32(a[j]) + wb * np.float32(b[j])
                    line[j] += wc * np.float32(c[j]) + wd * np.float32(d[j])
        for x in range(columns):
            red, green, blue = _mix_rgb(line, 3 * before[x], along[x], taps_along)  # pyright: ignore[reportCallIssue]
            i = y * columns + (columns - 1 - x if flip else x)
            planes[0, i] = red
            planes[1, i] = green
            planes[2, i] = blue
    for c in range(3):
        plane = planes[c]
        for i in range(plane.size):
            plane[i] = _level(plane[i])


@compiled
def _jitter(planes, row) -> None:
    """Colour jitter in place, in its order, in as few passes as contrast, which needs the mean of all, allows."""
    n = planes.shape[1]
    at = 0
    while at < 4:
        mean = np.float32(0)
        if row[ORDER + at] == CONTRAST:
            mean = _mean_gray(planes)
        stop = at + 1
        while stop < 4 and row[ORDER + stop] != CONTRAST:
            stop += 1
        for start in range(0, n, _TILE):
            end = min(start + _TILE, n)
            r, g, b = planes[0, start:end], planes[1, start:end], planes[2, start:end]
            for k in range(at, stop):
                op = int(row[ORDER + k])
                factor = row[FACTORS + op]
                if op == BRIGHTNESS:
                    _affine(r, g, b, factor, np.float32(0))
                elif op == CONTRAST:
                    _affine(r, g, b, factor, (np.float32(1) - factor) * mean)
                elif op == SATURATION:
                    _saturation(r, g, b, factor)
                elif op == HUE:
                    _hue(r, g, b, factor)
        at = stop


@compiled
def _mean_gray(planes) -> np.float32:
    """Of all pixels; lane by lane, so that the sum is the same on every machine and as fast as it gets."""
    n = planes.shape[1]
    r, g, b = planes[0], planes[1], planes[2]
    sums = np.zeros(256, np.float32)
    for start in range(0, n - n % 256, 256):
        rr, gg, bb = r[start : start + 256], g[start : start + 256], b[start : start + 256]
        for j in range(256):
            sums[j] += _RED * rr[j] + _GREEN * gg[j] + _BLUE * bb[j]
    total = 0.0
    for j in range(n - n % 256, n):
        total += _RED * r[j] + _GREEN * g[j] + _BLUE * b[j]
    for j in range(256):
        total += sums[j]
    return np.float32(total / n)


@compiled
def _affine(r, g, b, factor, offset) -> None:
    for i in range(r.size):
        r[i] = _level(factor * r[i] + offset)
        g[i] = _level(factor * g[i] + offset)
        b[i] = _level(factor * b[i] + offset)


@compiled
def _saturation(r, g, b, factor) -> None:
    rest = np.float32(1) - factor
    for i in range(r.size):
        gray = rest * (_RED * r[i] + _GREEN * g[i] + _BLUE * b[i])
        r[i] = _level(factor * r[i] + gray)
        g[i] = _level(factor * g[i] + gray)
        b[i] = _level(factor * b[i] + gray)


@compiled
def _hue(r, g, b, factor) -> None:
    """Turns the hue by `factor` of a circle: HSV and back, without a branch, in sixths of the circle."""
    zero, one, two, four, six = np.float32(0), np.float32(1), np.float32(2), np.float32(4), np.float32(6)
    turn = np.float32(6) * (factor + np.float32(1) if factor < 0 else factor)
    for i in range(r.size):
        red, green, blue = r[i], g[i], b[i]
        value = max(max(red, green), blue)
        chroma = value - min(min(red, green), blue)
        inverse = one / (chroma if chroma > zero else one)
        hue = (green - blue) * inverse
        hue = four + (red - green) * inverse if value == blue else hue
        hue = two + (blue - red) * inverse if value == green else hue
        hue = (green - blue) * inverse if value == red else hue
        hue += turn  # −1 to 11
        k5, k3, k1 = hue + np.float32(5), hue + np.float32(3), hue + one
        k5 -= six * np.floor(k5 * np.float32(1 / 6))
        k3 -= six * np.floor(k3 * np.float32(1 / 6))
        k1 -= six * np.floor(k1 * np.float32(1 / 6))
        r[i] = value - chroma * max(zero, min(min(k5, four - k5), one))
        g[i] = value - chroma * max(zero, min(min(k3, four - k3), one))
        b[i] = value - chroma * max(zero, min(min(k1, four - k1), one))


@compiled
def _to_gray(planes) -> None:
    """Into the first plane."""
    r, g, b = planes[0], planes[1], planes[2]
    for i in range(r.size):
        r[i] = _RED * r[i] + _GREEN * g[i] + _BLUE * b[i]


@compiled
def _gaussian(sigma, taps):
    """(weights float32 at distances 0, 1, 2, …, the distance of the last that matters)."""
    radius = taps // 2
    kernel = np.empty(radius + 1, np.float32)
    total = 0.0
    for d in range(radius + 1):
        w = math.exp(-0.5 * (d / sigma) ** 2)
        kernel[d] = w
        total += w if d == 0 else 2 * w
    reach = 0
    for d in range(radius + 1):
        kernel[d] /= total
        if kernel[d] >= _NOTHING:
            reach = d
    return kernel, reach


@compiled
def _mirrored(i, n):
    """`i` reflected into 0 … n − 1 without repeating the edge."""
    i = abs(i)
    return i if i < n else 2 * (n - 1) - i


@compiled
def _blur(plane, scratch, kernel, reach) -> None:
    """torchvision's gaussian_blur of `plane` (size, size) in place: down the columns, then along the rows."""
    size = plane.shape[0]
    for y in range(size):
        row, total = plane[y], scratch[y]
        w0 = kernel[0]
        for x in range(size):
            total[x] = w0 * row[x]
        for d in range(1, reach + 1, 2):
            a, b = plane[_mirrored(y - d, size)], plane[_mirrored(y + d, size)]
            far = min(d + 1, size - 1)
            c, e = plane[_mirrored(y - far, size)], plane[_mirrored(y + far, size)]
            w1, w2 = kernel[d], kernel[d + 1] if d < reach else np.float32(0)
            for x in range(size):
                total[x] += w1 * (a[x] + b[x]) + w2 * (c[x] + e[x])
    line = np.empty(size + 2 * reach + 2, np.float32)
    for y in range(size):
        row, total = scratch[y], plane[y]
        for x in range(-reach, 0):
            line[x + reach] = row[-x]
        for x in range(size):
            line[x + reach] = row[x]
        for x in range(size, size + reach):
            line[x + reach] = row[2 * (size - 1) - x]
        w0, centre = kernel[0], line[reach : reach + size]
        for x in range(size):
            total[x] = w0 * centre[x]
        for d in range(1, reach + 1, 2):
            far = min(d + 1, reach)
            a, b = line[reach - d : reach - d + size], line[reach + d : reach + d + size]
            c, e = line[reach - far : reach - far + size], line[reach + far : reach + far + size]
            w1, w2 = kernel[d], kernel[d + 1] if d < reach else np.float32(0)
            for x in range(size):
                total[x] += w1 * (a[x] + b[x]) + w2 * (c[x] + e[x])


@compiled
def _to_bytes(plane, solarize, out) -> None:
    """Rounds; solarising inverts the levels from 128 on."""
    half, threshold = np.float32(0.5), np.uint8(128)
    if solarize:
        for i in range(plane.size):
            level = np.uint8(plane[i] + half)
            out[i] = np.uint8(255) - level if level >= threshold else level
    else:
        for i in range(plane.size):
            out[i] = np.uint8(plane[i] + half)
