"""Draw the picture of the architecture that the README shows.

    python utils/architecture.py
    python utils/architecture.py --output architecture.png

The image is a scene of utils/shapes.py; the maps of the parts are drawn from its exact masks, not computed by a model.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import console, grids, shapes, tracking  # noqa: E402
from utils.canvas import CROSS, FINE, HAT, PHI, Canvas  # noqa: E402

WIDTH, HEIGHT = 1600, 744  # pixels
SCENE = (1, 6197)  # one figure of each kind, none over another, on a plain ground
CELLS, NUMBERS = 8, 6  # of a map's side: h and w; of an appearance: d

INK, GREY, EDGE, PAPER = (31, 41, 51), (97, 110, 124), (190, 198, 208), (255, 255, 255)
NETWORK, NETWORK_EDGE, LOSS = (228, 235, 244), (122, 142, 168), (180, 83, 9)
CARD = (128, 172)  # width and height of what a tensor is drawn on
GLYPH = 78  # side of the drawing on it

UPPER, MIDDLE, LOWER, LANE = 196, 336, 476, 692  # heights of the three rows and of the reconstruction loss
IMAGE, ENCODER, FEATURES, HEADS, POSTERIORS = 94, 238, 384, 588, 752  # centres of the columns
SAMPLES, PLACE, PLACED, DECODER, RECONSTRUCTION = 974, 1102, 1220, 1362, 1506


def main(argv=None):
    """Draw the picture and save it. Returns it: PIL image."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--output", type=grids.png, default="imgs/architecture.png", metavar="FILE",
                        help="the picture; a file of that name is replaced (default: %(default)s)")
    args = parser.parse_args(argv)
    picture = draw()
    grids.save(picture.quantize(256, dither=Image.Dither.NONE), args.output)
    print(f"{picture.width} x {picture.height} pixels: {tracking.relative(args.output)}")
    return picture


def draw():
    """The whole picture: PIL RGB image."""
    canvas, scene = Canvas(WIDTH, HEIGHT, PAPER), shapes.scene(*SCENE)
    draw_arrows(canvas)
    draw_networks(canvas)
    draw_tensors(canvas, scene)
    draw_losses(canvas)
    draw_letters(canvas)
    return canvas.finished()


def draw_arrows(canvas):
    """The way of the data, from left to right."""
    half = CARD[0] / 2
    for start, end in ((IMAGE + half, ENCODER - 46), (ENCODER + 46, FEATURES - half), (PLACE + 17, PLACED - half),
                       (PLACED + half, DECODER - 46), (DECODER + 46, RECONSTRUCTION - half)):
        canvas.arrow([(start, MIDDLE), (end, MIDDLE)], INK)
    fork = (FEATURES + half + HEADS - 64) / 2
    for row in (UPPER, LOWER):
        canvas.arrow([(FEATURES + half, MIDDLE), (fork, MIDDLE), (fork, row), (HEADS - 64, row)], INK)
        canvas.arrow([(HEADS + 64, row), (POSTERIORS - half, row)], INK)
        canvas.arrow([(POSTERIORS + half, row), (SAMPLES - half, row)], INK)
        canvas.text((POSTERIORS + SAMPLES) / 2, row - 14, "sample", 15, GREY)
        canvas.arrow([(SAMPLES + half, row), (PLACE, row), (PLACE, MIDDLE + (17 if row > MIDDLE else -17))], INK)
    canvas.arrow([(POSTERIORS, UPPER + CARD[1] / 2), (POSTERIORS, LOWER - CARD[1] / 2)], INK, dashed=True)
    for line, text in enumerate(("weights of the mean", "over cells", "(no gradient)")):
        canvas.text(POSTERIORS + 12, MIDDLE + 18 * (line - 1), text, 14, GREY, anchor=0)


def draw_networks(canvas):
    """Encoder, heads, decoder, and where the samples meet."""
    for x, left, right, name, symbol in ((ENCODER, 78, 44, "encoder", f"*{PHI}*"), (DECODER, 44, 78, "decoder", "")):
        corners = [(x - 46, MIDDLE - left), (x + 46, MIDDLE - right), (x + 46, MIDDLE + right), (x - 46, MIDDLE + left)]
        canvas.shape(corners, NETWORK, NETWORK_EDGE)
        canvas.text(x, MIDDLE - (12 if symbol else 0), name, 17, INK)
        canvas.text(x, MIDDLE + 14, symbol, 24, INK)
    for row, name, plural in ((UPPER, "occurrence", ""), (LOWER, "appearance", "s")):
        canvas.box(HEADS, row, 128, 78, NETWORK, NETWORK_EDGE)
        canvas.text(HEADS, row - 21, name, 17, INK)
        canvas.text(HEADS, row, "head", 17, INK)
        canvas.text(HEADS, row + 22, f"3{CROSS}3 convolution{plural}", 13, GREY)
    canvas.box(PLACE, MIDDLE, 34, 34, PAPER, INK, radius=17)
    canvas.text(PLACE, MIDDLE, CROSS, 26, INK)
    canvas.text(PLACE - 26, MIDDLE, "place", 15, GREY, anchor=1)


def draw_tensors(canvas, scene):
    """One card for each tensor: a drawing, its name, what it is, its shape."""
    owner = scene.owner(32 * CELLS)
    order = np.argsort(-np.bincount(owner.ravel())[1:])  # the largest figure is part 1
    colours = [tuple(round(255 * value) for value in scene.figures[number].rgb) for number in order]
    shares = [(owner == number + 1).reshape(CELLS, 32, CELLS, 32).mean(axis=(1, 3)) for number in order]
    occurs = [share > 0.5 for share in shares]

    spot = card(canvas, IMAGE, MIDDLE, "*x*", "image", "B×C×H×W")
    canvas.picture(*spot, scene.draw(GLYPH * FINE), EDGE)
    spot = card(canvas, FEATURES, MIDDLE, "*f*", "features", "B×D×h×w")
    draw_sheets(canvas, *spot, [np.full((CELLS, CELLS, 3), NETWORK)] * 3, [NETWORK_EDGE] * 3)
    spot = card(canvas, POSTERIORS, UPPER, "*Q*^{O}", "probabilities", "B×N×h×w")
    draw_sheets(canvas, *spot, [tint(share, INK) for share in shares], colours)
    spot = card(canvas, SAMPLES, UPPER, "*z*_{occ}", "where", "B×N×h×w")
    draw_sheets(canvas, *spot, [tint(occur, INK) for occur in occurs], colours)
    spot = card(canvas, POSTERIORS, LOWER, "*Q*^{A}", "mean, variance", "B×N×d each")
    draw_bells(canvas, *spot, colours)
    spot = card(canvas, SAMPLES, LOWER, "*z*_{app}", "what", "B×N×d")
    draw_vectors(canvas, *spot, colours)
    spot = card(canvas, PLACED, MIDDLE, f"*z{HAT}*", "placed parts", "B×(N·d)×h×w")
    placed = sum(tint(occur, colour) - 255 for occur, colour in zip(occurs, colours)) + 255
    draw_sheets(canvas, *spot, [placed] * 3, [GREY] * 3)
    x, y = card(canvas, RECONSTRUCTION, MIDDLE, f"*x{HAT}*", "reconstruction", "B×C×H×W")
    canvas.box(x, y, GLYPH, GLYPH, (243, 245, 248), EDGE, radius=2)
    canvas.text(x, y, f"*x{HAT}*", 34, GREY)


def card(canvas, x, y, name, meaning, shape):
    """An empty card around (x, y) with its three lines of text. Returns the centre of the room for the drawing."""
    canvas.box(x, y, *CARD, PAPER, EDGE)
    canvas.text(x, y + 26, name, 20, INK)
    canvas.text(x, y + 50, meaning, 14, INK)
    canvas.text(x, y + 69, shape, 14, GREY)
    return x, y - 34


def tint(values, colour):
    """Values h×w from 0 to 1 -> h×w×3 from white to `colour`."""
    return 255 - np.asarray(values, float)[..., None] * (255 - np.array(colour))


def draw_sheets(canvas, x, y, maps, colours, shift=7):
    """Maps h×w×3, the first in front of the others, each with its cells' borders in a frame of its colour."""
    side = (GLYPH - shift * (len(maps) - 1)) // CELLS * CELLS * FINE
    for depth in reversed(range(len(maps))):
        sheet = Image.fromarray(maps[depth].round().astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
        pen = ImageDraw.Draw(sheet)
        for place in range(0, side, side // CELLS):
            pen.line([place, 0, place, side], EDGE)
            pen.line([0, place, side, place], EDGE)
        offset = shift * (depth - (len(maps) - 1) / 2)
        canvas.picture(x + offset, y - offset, sheet, colours[depth])


def draw_bells(canvas, x, y, colours):
    """A Gaussian's curve for each colour, one below the other."""
    along = np.linspace(-3, 3, 121)
    for row, (colour, mean, deviation) in enumerate(zip(colours, (-0.8, 0.9, 0.1), (0.55, 0.8, 0.65))):
        base, height = y + (row + 1 - len(colours) / 2) * GLYPH / 3, 16.5 / deviation**0.5
        curve = np.exp(-((along - mean) ** 2) / (2 * deviation**2))
        points = [(x + 15 * place, base - height * value) for place, value in zip(along, curve)]
        canvas.area(points, tuple(tint(0.25, colour).round().astype(int)))
        canvas.line(points, colour)


def draw_vectors(canvas, x, y, colours, cell=14, row_height=24):
    """For each colour a row of cells in shades of it: numbers."""
    shades = np.random.default_rng(3).uniform(0.1, 1, (len(colours), NUMBERS))
    for (row, column), shade in np.ndenumerate(shades):
        left, top = x + (column - NUMBERS / 2) * cell, y + (row + 0.5 - len(colours) / 2) * row_height - cell / 2
        square = [(left, top), (left + cell, top), (left + cell, top + cell), (left, top + cell), (left, top)]
        canvas.area(square, tuple(tint(shade, colours[row]).round().astype(int)))
        canvas.line(square, GREY, 0.7)


def draw_losses(canvas):
    """Priors with their KL terms, and the reconstruction loss."""
    half = CARD[1] / 2
    for y, prior, end in ((44, "Bernoulli(1/*N*)", UPPER - half), (LOWER + half + 66, "Normal(0, *I*)", LOWER + half)):
        side = 1 if end > y else -1
        canvas.box(POSTERIORS, y, 150, 42, PAPER, LOSS, dashed=True)
        canvas.text(POSTERIORS, y, prior, 17, INK)
        canvas.text(POSTERIORS - 86, y, "prior", 15, GREY, anchor=1)
        canvas.arrow([(POSTERIORS, y + side * 21), (POSTERIORS, end)], LOSS)
        canvas.text(POSTERIORS + 12, (y + side * 21 + end) / 2, "KL", 16, LOSS, anchor=0)
    edge = MIDDLE + half
    middle = (IMAGE + RECONSTRUCTION) / 2
    canvas.arrow([(middle, LANE), (IMAGE, LANE), (IMAGE, edge)], LOSS)
    canvas.arrow([(middle, LANE), (RECONSTRUCTION, LANE), (RECONSTRUCTION, edge)], LOSS)
    canvas.box(middle, LANE, 250, 42, PAPER, LOSS)
    canvas.text(middle, LANE, "reconstruction loss", 17, INK)


def draw_letters(canvas):
    """What the letters stand for, and what the loss adds up."""
    letters = [("*B*", "images in a batch"), ("*C*", f"colours of *H*{CROSS}*W* pixels"),
               ("*D*", f"features in each of *h*{CROSS}*w* cells, *h* = *H* / --scale"), ("*N*", "parts, --num-parts"),
               ("*d*", "numbers for a part's appearance, --hidden-size")]
    for line, (letter, meaning) in enumerate(letters):
        canvas.text(IMAGE - 64, 34 + 24 * line, letter, 15, INK, anchor=0)
        canvas.text(IMAGE - 38, 34 + 24 * line, meaning, 15, GREY, anchor=0)
    terms = ["loss =  squared reconstruction error", "+  --beta-v  times KL of the occurrence",
             "+  --beta-a  times KL of the appearance"]
    for line, term in enumerate(terms):
        canvas.text(PLACED - 64 + 52 * (line > 0), 34 + 24 * line, term, 15, LOSS, anchor=0)
    note = "The maps are drawn from the scene's own masks, not computed by a model."
    canvas.text(RECONSTRUCTION + CARD[0] / 2, LANE + 26, note, 13, GREY, anchor=1)


if __name__ == "__main__":
    console.run(main)
