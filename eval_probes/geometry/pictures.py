"""A picture of matches: two views side by side, a line for each match, green where it is right and red where not."""

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

LINES = 40  # shown at most, evenly spread: more cannot be told apart
SIDE = 448  # pixels at least along the shorter side of a view, so that lines do not cover it
RIGHT, WRONG = (60, 220, 90), (235, 60, 60)
GAP = 8


def matches_picture(
    source: np.ndarray, target: np.ndarray, points: Tensor, found: Tensor, right: Tensor, *, shown: Tensor
) -> Image.Image:
    """Views uint8 (3, H, W); `points` and `found` (M, 2) belong together; `right` and `shown` are bool (M,)."""
    views = [Image.fromarray(view.transpose(1, 2, 0)) for view in (source, target)]
    zoom = max(1, -(-SIDE // min(*views[0].size, *views[1].size)))
    views = [view.resize((view.width * zoom, view.height * zoom), Image.Resampling.BICUBIC) for view in views]
    picture = Image.new("RGB", (views[0].width + GAP + views[1].width, max(v.height for v in views)), "white")
    offset = (views[0].width + GAP, 0)
    picture.paste(views[0], (0, 0))
    picture.paste(views[1], offset)
    pen = ImageDraw.Draw(picture)
    places = shown.nonzero()[:, 0].cpu().numpy()
    places = places[np.linspace(0, len(places) - 1, min(LINES, len(places))).round().astype(int)]
    starts, ends = (zoom * p.cpu().numpy()[places] for p in (points, found))
    good = right.cpu().numpy()[places]
    for start, end, is_right in sorted(zip(starts, ends + offset, good, strict=True), key=lambda row: bool(row[2])):
        colour = RIGHT if is_right else WRONG
        pen.line([*start, *end], fill=colour, width=2)
        for x, y in (start, end):
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
    return picture
