"""A white sheet for figures: boxes, arrows with round corners, and words with slanted, raised and Greek letters.

Everything is drawn FINE times as large with Pillow and reduced at the end, so that lines are smooth.
"""

import re
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FINE = 3
SLANT = 0.2  # of slanted letters: how far to the right they lean for each pixel upwards
HAT, CROSS, PHI = "\N{COMBINING CIRCUMFLEX ACCENT}", "×", "φ"  # Pillow's font has none of them: they are drawn


class Canvas:
    """The sheet. Lengths are in pixels of the result, places are centres, colours RGB."""

    def __init__(self, width, height, paper):
        self.image = Image.new("RGB", (width * FINE, height * FINE), paper)
        self.pen = ImageDraw.Draw(self.image)

    def finished(self):
        """The sheet at its own size: PIL RGB image."""
        return self.image.reduce(FINE)

    def area(self, corners, fill):
        """A polygon without an outline."""
        self.pen.polygon([(x * FINE, y * FINE) for x, y in corners], fill=fill)

    def line(self, points, colour, width=1.6, dashed=False, dash=(6, 5)):
        """A line through `points`; `dash`: the lengths of dashes and gaps."""
        for piece in dashes(points, *dash) if dashed else [points]:
            self.pen.line([(x * FINE, y * FINE) for x, y in piece], colour, round(width * FINE), joint="curve")

    def shape(self, corners, fill, line, radius=8, dashed=False):
        """A polygon with round corners and an outline."""
        outline = rounded([*corners, *corners[:2]], radius)  # around, until the first corner is round too
        outline = [*outline[1:-1], outline[1]]
        self.area(outline, fill)
        self.line(outline, line, dashed=dashed)

    def box(self, x, y, width, height, fill, line, radius=8, dashed=False):
        """A rectangle with round corners and an outline; a circle where `radius` is half its side."""
        left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        self.shape([(left, top), (right, top), (right, bottom), (left, bottom)], fill, line, radius, dashed)

    def arrow(self, points, colour, dashed=False, head=10):
        """A line along the axes through `points`, with round corners and a head at its end."""
        (x, y), (x0, y0) = points[-1], points[-2]
        right, down = np.sign(x - x0), np.sign(y - y0)
        neck = (x - right * head, y - down * head)
        self.line(rounded([*points[:-1], neck], radius=12), colour, dashed=dashed)
        wings = [(neck[0] - side * down * head / 2.4, neck[1] - side * right * head / 2.4) for side in (-1, 1)]
        self.area([(x, y), *wings], colour)

    def picture(self, x, y, image, frame):
        """A PIL image, FINE times as large as it shall look, in a thin frame of the colour `frame`."""
        left, top = round(x * FINE - image.width / 2), round(y * FINE - image.height / 2)
        self.image.paste(image, (left, top))
        self.pen.rectangle([left, top, left + image.width, top + image.height], outline=frame, width=4)

    def text(self, x, y, words, size, colour, anchor=0.5):
        """Words around the height y: *slanted*, ^{raised}, _{lowered}. `anchor`: the share of them left of x."""
        pieces = [typeset(*piece) for piece in parse(words, round(size * FINE))]
        place = x * FINE - anchor * sum(advance for _, advance, _ in pieces)
        for mask, advance, rise in pieces:
            pad = mask.height // 4
            self.image.paste(colour, (round(place) - pad, round(y * FINE + 0.35 * size * FINE - rise) - 3 * pad), mask)
            place += advance


def rounded(points, radius):
    """The line through `points` with an arc of at most `radius` instead of each inner corner: a list of points."""
    path, t = [points[0]], np.linspace(0, 1, 13)[:, None]
    for before, corner, after in zip(points, points[1:], points[2:]):
        before, corner, after = (np.array(point, float) for point in (before, corner, after))
        ways = [before - corner, after - corner]
        reach = min(radius, *(np.linalg.norm(way) / 2 for way in ways))
        start, end = (reach * way / np.linalg.norm(way) for way in ways)  # from the corner
        # The cubic Bézier curve that is nearest to a quarter of a circle: its handles reach 0.5523 of the way.
        curve = (1 - t) ** 3 * start + 3 * (1 - t) * t * 0.4477 * ((1 - t) * start + t * end) + t**3 * end
        path += [tuple(point) for point in corner + curve]
    return [*path, points[-1]]


def dashes(points, on, off):
    """The line through `points` cut into pieces of `on` pixels with gaps of `off`: a list of lists of points."""
    points = np.array(points, float)
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    count = max(1, round(lengths[-1] / (on + off)))
    starts = np.arange(count) * lengths[-1] / count
    places = [np.linspace(start, start + on * lengths[-1] / count / (on + off), 5) for start in starts]
    return [[tuple(np.interp(place, lengths, axis) for axis in points.T) for place in piece] for piece in places]


def parse(words, size):
    """Yields (text, size, rise, slanted) for each piece of the marked up `words`, sizes in pixels."""
    for slanted, raised, lowered, plain in re.findall(r"\*(.+?)\*|\^{(.+?)}|_{(.+?)}|([^*^_]+)", words):
        small = round(0.68 * size)
        yield (slanted, size, 0, True) if slanted else (raised, small, 0.38 * size, False) if raised else (
            (lowered, small, -0.2 * size, False) if lowered else (plain, size, 0, False))


@lru_cache(maxsize=None)
def font_of(size):
    return ImageFont.load_default(size=size)


def typeset(text, size, rise, slanted):
    """The mask of `text`, its baseline at three quarters of the mask's height; its width; `rise`."""
    font, pad = font_of(size), size // 2
    width = sum(font.getlength(look_alike(letter)) for letter in text) + (0.07 * size if slanted else 0)
    mask = Image.new("L", (round(width) + 2 * pad, 4 * pad))
    pen, place = ImageDraw.Draw(mask), pad
    for part in re.split(f"([{HAT}{CROSS}{PHI}])", text):
        if part != CROSS:
            pen.text((place, 3 * pad), look_alike(part), 255, font, anchor="ls")
        if part in (HAT, CROSS, PHI):
            strokes(pen, part, place, 3 * pad, size)
        place += font.getlength(look_alike(part))
    if slanted:
        shear = (1, SLANT, -SLANT * 3 * pad, 0, 1, 0)
        mask = mask.transform(mask.size, Image.Transform.AFFINE, shear, Image.Resampling.BICUBIC)
    return mask, width, rise


def look_alike(text):
    """`text` with a letter of about the same width for each that the font has not."""
    return text.replace(HAT, "").replace(CROSS, "x").replace(PHI, "o")


def strokes(pen, sign, place, base, size):
    """The strokes of a sign that the font has not, at the point (place, base): a hat over the letter before it, …"""
    width, reach = round(size / 12), font_of(size).getlength(look_alike(sign))
    if sign == HAT:
        middle, top = place - 0.25 * size, base - 0.72 * size
        foot, side = top + 0.13 * size, 0.16 * size
        pen.line([middle - side, foot, middle, top, middle + side, foot], 255, width, "curve")
    elif sign == CROSS:
        middle, height, arm = place + reach / 2, base - 0.3 * size, 0.17 * size
        pen.line([middle - arm, height - arm, middle + arm, height + arm], 255, width)
        pen.line([middle - arm, height + arm, middle + arm, height - arm], 255, width)
    else:
        pen.line([place + reach / 2, base - 0.72 * size, place + reach / 2, base + 0.2 * size], 255, width)
