"""Drawn images of circles, triangles and squares.

A scene is a pure function of (seed, index) in unit coordinates; it can be drawn at any size. Its main figure is of the
kind `index % kinds`, and clearly the one with the most visible pixels.
"""

import colorsys
import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("circle", "triangle", "square")
COLOURS = ("red", "orange", "lime", "green", "cyan", "blue", "purple", "pink")  # eight hues, 45 degrees apart
PATTERNS = ("plain", "gradient", "stripes", "blotches")  # of the background
SMOOTH = 4  # every pixel of a figure's border is drawn from SMOOTH × SMOOTH points
DOMINANCE = 1.5  # the main figure shows at least this many times the pixels of any other
REACH = {"circle": 1.0, "triangle": 1.4, "square": 1.2}  # corner distance: figures of one radius look equally large
CORNERS = {"triangle": 3, "square": 4}


class Figure(NamedTuple):
    """One circle, triangle or square. Lengths are shares of the image's side."""

    kind: str
    x: float
    y: float
    reach: float  # radius of a circle, distance from centre to corner otherwise
    angle: float  # of the first corner, radians
    hue: int  # index into COLOURS
    rgb: tuple  # three floats from 0 to 1

    def corners(self):
        """The outline's corners in unit coordinates: k×2, k = 3 or 4 (none for a circle)."""
        turns = self.angle + 2 * np.pi * np.arange(CORNERS[self.kind]) / CORNERS[self.kind]
        return np.stack([self.x + self.reach * np.cos(turns), self.y + self.reach * np.sin(turns)], axis=1)

    def coverage(self, size, smooth=SMOOTH):
        """The share of every pixel that lies inside: size×size uint8, 0 to 255."""
        scale = size * smooth
        canvas = Image.new("L", (scale, scale))
        if self.kind == "circle":
            box = [scale * (centre + side * self.reach) for side in (-1, 1) for centre in (self.x, self.y)]
            ImageDraw.Draw(canvas).ellipse(box, fill=255)
        else:
            ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in self.corners() * scale], fill=255)
        return np.asarray(canvas.reduce(smooth))


class Scene(NamedTuple):
    """Figures from the lowest to the topmost, over a background of two colours mixed by a pattern."""

    figures: tuple
    background: tuple  # two colours of three floats
    pattern: str
    pattern_seed: int

    def draw(self, size):
        """The picture: a PIL RGB image of size×size."""
        mix = _pattern(self.pattern, size, np.random.default_rng(self.pattern_seed))[..., None]  # H×W×1
        pixels = np.array(self.background[0]) * (1 - mix) + np.array(self.background[1]) * mix  # H×W×3
        for figure in self.figures:
            alpha = figure.coverage(size)[..., None] / 255
            pixels = pixels * (1 - alpha) + np.array(figure.rgb) * alpha
        return Image.fromarray(np.round(pixels * 255).astype(np.uint8))

    def draw_binary(self, size):
        """The figures in white on black: a PIL grey image of size×size."""
        return Image.fromarray(255 * (self.owner(size) > 0).astype(np.uint8))

    def owner(self, size, smooth=SMOOTH):
        """Which figure each pixel shows: size×size uint8, 0 for the ground, 1, 2, … in the order of `figures`."""
        owner = np.zeros((size, size), np.uint8)
        for number, figure in enumerate(self.figures, start=1):
            owner[figure.coverage(size, smooth) >= 128] = number
        return owner


def scene(seed, index, kinds=KINDS, overlap=True):
    """Scene number `index` of the endless sequence `seed`, with figures of `kinds`; `overlap`: they may overlap."""
    generator = np.random.default_rng([seed, index])
    while True:
        figures = _figures(generator, kinds[index % len(kinds)], kinds)
        shades = [(generator.random(), generator.uniform(0, 0.35), generator.random()) for _ in range(2)]
        background = tuple(colorsys.hsv_to_rgb(*shade) for shade in shades)  # pale or dark, never like a figure
        pattern = str(generator.choice(PATTERNS)), int(generator.integers(2**31))
        if_above = figures[1:] + figures[:1]  # the main figure: above the others, or below them
        drawn = Scene(figures if generator.random() < 0.5 else if_above, background, *pattern)
        if _acceptable(drawn, figures[0], overlap):
            return drawn


def _figures(generator, main, kinds):
    """One to three figures, the main one first, of different hues."""
    radius, hues = generator.uniform(0.2, 0.3), generator.permutation(len(COLOURS))
    figures = [_figure(generator, main, radius, hues[0])]
    for hue in hues[1 : generator.integers(1, 4)]:
        figures.append(_figure(generator, str(generator.choice(kinds)), generator.uniform(0.07, 0.6 * radius), hue))
    return tuple(figures)


def _figure(generator, kind, radius, hue):
    reach = radius * REACH[kind]
    x, y = generator.uniform(reach, 1 - reach, size=2).tolist()
    shade = (hue + generator.uniform(-0.25, 0.25)) / len(COLOURS) % 1
    rgb = colorsys.hsv_to_rgb(shade, generator.uniform(0.6, 1), generator.uniform(0.6, 1))
    return Figure(kind, x, y, reach, generator.uniform(0, 2 * np.pi), int(hue), rgb)


def _acceptable(drawn, main, overlap):
    """Every figure stands out from the background; the main one dominates; nothing touches where it must not."""
    for figure, colour in itertools.product(drawn.figures, drawn.background):
        if np.linalg.norm(np.subtract(figure.rgb, colour)) < 0.4:
            return False
    for a, b in itertools.combinations(drawn.figures, 2):  # white on white would hide outlines
        if not overlap and np.hypot(a.x - b.x, a.y - b.y) < a.reach + b.reach + 0.06:
            return False
    visible = np.bincount(drawn.owner(64, smooth=1).ravel(), minlength=len(drawn.figures) + 1)[1:].tolist()
    return visible.pop(drawn.figures.index(main)) >= DOMINANCE * max(visible, default=0)


def _pattern(name, size, generator):
    """How much of the second background colour each pixel takes: size×size floats from 0 to 1."""
    if name == "plain":
        return np.zeros((size, size))
    if name == "blotches":
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4), np.uint8))
        return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255
    centres = (np.arange(size) + 0.5) / size - 0.5
    angle = generator.uniform(0, 2 * np.pi)
    along = centres[None, :] * np.cos(angle) + centres[:, None] * np.sin(angle)  # H×W, -0.71 to 0.71
    if name == "gradient":
        return along / 1.42 + 0.5
    return 0.5 + 0.5 * np.sin(2 * np.pi * generator.uniform(2, 5) * along)
