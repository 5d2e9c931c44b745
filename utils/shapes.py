"""Drawn images of circles, triangles and squares, with the exact truth about every pixel.

A scene is a pure function of (seed, index) in unit coordinates; it can be drawn at any size. One figure is
the main one: of kind `index % kinds`, and by construction clearly the one with the most visible pixels.
"""

import colorsys
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("circle", "triangle", "square")
COLOURS = ("red", "orange", "lime", "green", "cyan", "blue", "purple", "pink")  # eight hues, 45 degrees apart
ORIENTATIONS = 8
GEOMETRY = ("ground", "interior", *(f"edge {22.5 * k:g} deg" for k in range(ORIENTATIONS)), "corner", "arc")
GROUND, INTERIOR, EDGE, CORNER, ARC = 0, 1, 2, 2 + ORIENTATIONS, 3 + ORIENTATIONS

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
        canvas = Image.new("L", (size * smooth, size * smooth))
        pen, scale = ImageDraw.Draw(canvas), size * smooth
        if self.kind == "circle":
            box = [scale * (centre + side * self.reach) for side in (-1, 1) for centre in (self.x, self.y)]
            pen.ellipse(box, fill=255)
        else:
            pen.polygon([tuple(corner) for corner in self.corners() * scale], fill=255)
        return np.asarray(canvas.reduce(smooth) if smooth > 1 else canvas)


class Scene(NamedTuple):
    """Figures from the lowest to the topmost, over a background of two colours mixed by a pattern."""

    figures: tuple
    background: tuple  # two colours of three floats
    pattern: str
    pattern_seed: int

    def draw(self, size):
        """The picture: a PIL RGB image of size×size."""
        mix = _pattern(self.pattern, size, np.random.default_rng(self.pattern_seed))[..., None]  # H×W×1
        first, second = (np.array(colour) for colour in self.background)
        pixels = first * (1 - mix) + second * mix  # H×W×3
        for figure in self.figures:
            alpha = figure.coverage(size)[..., None] / 255
            pixels = pixels * (1 - alpha) + np.array(figure.rgb) * alpha
        return Image.fromarray(np.round(pixels * 255).astype(np.uint8))

    def draw_binary(self, size):
        """The figures in white on black: a PIL grey image of size×size."""
        return Image.fromarray(np.where(self.owner(size) > 0, 255, 0).astype(np.uint8))

    def owner(self, size, smooth=SMOOTH):
        """Which figure each pixel shows: size×size uint8, 0 for the ground, 1, 2, … in the order of `figures`."""
        owner = np.zeros((size, size), np.uint8)
        for number, figure in enumerate(self.figures, start=1):
            owner[figure.coverage(size, smooth) >= 128] = number
        return owner

    def labels(self, size):
        """The truth about each pixel: a dict of size×size uint8 arrays.

        `instance`: 0 ground, then 1, 2, 3; `kind`: 0 ground, then 1 + index into KINDS; `colour`: 0 ground, then
        1 + index into COLOURS; `geometry`: index into GEOMETRY, what a small neighbourhood can know.
        """
        instance = self.owner(size)
        kind = np.array([0] + [1 + KINDS.index(figure.kind) for figure in self.figures], np.uint8)
        colour = np.array([0] + [1 + figure.hue for figure in self.figures], np.uint8)
        geometry = self._geometry(size)
        return {"instance": instance, "kind": kind[instance], "colour": colour[instance], "geometry": geometry}

    def _geometry(self, size, width=1 / 32):
        """Ground, interior, and, within `width` (a share of the side) of a visible outline, the kind of outline."""
        centres = (np.arange(size) + 0.5) / size
        points = np.stack(np.meshgrid(centres, centres), axis=-1)  # H×W×(x, y)
        geometry = np.full((size, size), GROUND, np.uint8)
        for figure in self.figures:  # a higher figure hides the outlines below it
            geometry[figure.coverage(size) >= 128] = INTERIOR
            distance, outline = _outline(figure, points, corner_radius=1.5 * width)
            geometry = np.where(distance <= width, outline, geometry)
        return geometry


def scene(seed, index, kinds=KINDS, overlap=True):
    """Scene number `index` of the endless sequence `seed`, with figures of `kinds`; `overlap`: they may overlap."""
    generator = np.random.default_rng([seed, index])
    main = kinds[index % len(kinds)]
    while True:
        figures = _figures(generator, main, kinds)
        background = tuple(_background_colour(generator) for _ in range(2))
        drawn = Scene(figures[1:] + figures[:1], background, generator.choice(PATTERNS), int(generator.integers(2**31)))
        if generator.random() < 0.5:  # below the others instead of above them
            drawn = drawn._replace(figures=figures)
        if _acceptable(drawn, figures[0], overlap):
            return drawn


def _figures(generator, main, kinds):
    """One to three figures, the main one first, of different hues."""
    radius = generator.uniform(0.2, 0.3)
    hues = generator.permutation(len(COLOURS))
    figures = [_figure(generator, main, radius, hues[0])]
    for hue in hues[1 : generator.integers(1, 4)]:
        figures.append(_figure(generator, str(generator.choice(kinds)), generator.uniform(0.07, 0.6 * radius), hue))
    return tuple(figures)


def _figure(generator, kind, radius, hue):
    reach = radius * REACH[kind]
    x, y = generator.uniform(reach, 1 - reach, size=2)
    shade = (hue + generator.uniform(-0.25, 0.25)) / len(COLOURS)
    rgb = colorsys.hsv_to_rgb(shade % 1, generator.uniform(0.6, 1), generator.uniform(0.6, 1))
    return Figure(kind, float(x), float(y), float(reach), float(generator.uniform(0, 2 * np.pi)), int(hue), rgb)


def _background_colour(generator):
    """Pale or dark, never as saturated as a figure."""
    return colorsys.hsv_to_rgb(generator.random(), generator.uniform(0, 0.35), generator.random())


def _acceptable(drawn, main, overlap):
    """Every figure stands out from the background; the main one dominates; nothing touches where it must not."""
    for figure in drawn.figures:
        if min(np.linalg.norm(np.subtract(figure.rgb, colour)) for colour in drawn.background) < 0.4:
            return False
    others = [figure for figure in drawn.figures if figure is not main]
    if not overlap:  # white on white would hide outlines that the labels name
        for a in drawn.figures:
            for b in drawn.figures:
                if a is not b and np.hypot(a.x - b.x, a.y - b.y) < a.reach + b.reach + 0.06:
                    return False
    if not others:
        return True
    visible = np.bincount(drawn.owner(64, smooth=1).ravel(), minlength=len(drawn.figures) + 1)[1:]
    place = drawn.figures.index(main)
    return visible[place] >= DOMINANCE * max(np.delete(visible, place))


PATTERNS = ("plain", "gradient", "stripes", "blotches")


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


def _outline(figure, points, corner_radius):
    """Distance of every point to the figure's outline, and what the outline is there: H×W floats, H×W labels."""
    if figure.kind == "circle":
        distance = np.abs(np.hypot(points[..., 0] - figure.x, points[..., 1] - figure.y) - figure.reach)
        return distance, np.full(distance.shape, ARC, np.uint8)
    corners = figure.corners()
    ends = np.roll(corners, -1, axis=0)
    distances = np.stack([_distance_to_segment(points, a, b) for a, b in zip(corners, ends)])  # sides×H×W
    direction = ends - corners
    turned = np.degrees(np.arctan2(direction[:, 1], direction[:, 0])) % 180
    sides = (EDGE + np.round(turned / (180 / ORIENTATIONS)).astype(int) % ORIENTATIONS).astype(np.uint8)
    outline = sides[distances.argmin(axis=0)]
    to_corner = np.min([np.hypot(points[..., 0] - x, points[..., 1] - y) for x, y in corners], axis=0)
    return distances.min(axis=0), np.where(to_corner <= corner_radius, CORNER, outline).astype(np.uint8)


def _distance_to_segment(points, a, b):
    along = np.clip(((points - a) @ (b - a)) / ((b - a) @ (b - a)), 0, 1)  # H×W, 0 at a, 1 at b
    nearest = a + along[..., None] * (b - a)
    return np.linalg.norm(points - nearest, axis=-1)
