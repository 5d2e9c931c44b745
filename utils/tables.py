"""Tables of labelled tiles, for pictures that explain themselves. Numpy in, PIL out."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.grids import CAPTION, GAP, INK, PAPER

WARNING, NEUTRAL, BREAK = (180, 0, 0), 128, 12  # ink of a remark, grey beyond an image's border, width of a gap
SMALLEST, LARGEST = 66, 128  # sides of the tiles of a table, pixels


class Row(NamedTuple):
    """One line of a table: some lines of text, then tiles with a caption below each."""

    label: list  # of str, one a line
    tiles: list  # square, H×H×3 uint8; None leaves a gap
    captions: list | tuple = ()  # of str, one for each tile
    remarks: list | tuple = ()  # of str: more lines of the label, in red


def cut(image, centre, size):
    """The size×size patch of `image`, H×W×3 uint8, around `centre` (row, column); neutral grey beyond the border.

    Whole numbers are the middles of pixels. Where no patch of this size has that centre, it lies half a pixel after it.
    """
    patch = np.full((size, size, 3), NEUTRAL, np.uint8)
    starts = [_first(middle, size) for middle in centre]
    inside = tuple(slice(max(0, start), max(0, start + size)) for start in starts)
    piece = image[inside]
    top, left = (max(0, -start) for start in starts)
    patch[top : top + piece.shape[0], left : left + piece.shape[1]] = piece
    return patch


def _first(middle, size):
    return int(np.ceil(middle - (size - 1) / 2))


def framed(image, centre, size, smallest=SMALLEST):
    """`image` as a table shows it, with a frame around what cut() takes out of it: H×W×3 uint8."""
    picture = _as_tile(image, smallest)
    scale = picture.width / len(image)
    top, left = (_first(middle, size) * scale for middle in centre)
    reach = max(1, size * scale - 1)  # of a large image's pixel nothing would be left
    box = [left, top, left + reach, top + reach]
    pen = ImageDraw.Draw(picture)
    pen.rectangle(box, outline=PAPER, width=2)
    pen.rectangle([box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1], outline=INK)  # seen on white, too
    return np.asarray(picture)


def _as_tile(image, smallest):
    """H×H×3 uint8 -> the PIL image that a table shows: magnified without smoothing, or shrunk."""
    picture, side = Image.fromarray(image), _side(image, smallest)
    return picture.resize((side, side), Image.Resampling.BOX if side < len(image) else Image.Resampling.NEAREST)


def _side(image, smallest):
    return min(LARGEST, -(-smallest // len(image)) * len(image))


def table(rows, heading=(), smallest=SMALLEST):
    """Rows of labelled tiles, `smallest` pixels wide or more -> one PIL image, below the lines of text `heading`."""
    font = ImageFont.load_default(size=11)
    margin = 18 + max((_width(line, font) for row in rows for line in [*row.label, *row.remarks]), default=0)
    tallest = [max(_side(tile, smallest) for tile in row.tiles if tile is not None) for row in rows]
    heights = [_height(row, tall) for row, tall in zip(rows, tallest)]
    top = GAP + CAPTION * len(heading) + (BREAK if heading else 0)
    side = max(tallest)
    width = margin + max(_lefts(row, side)[-1] for row in rows)
    width = max([width] + [12 + _width(line, font) for line in heading])
    sheet = Image.new("RGB", (width, top + sum(heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(heading):
        pen.text((6, GAP + CAPTION * number), line, INK, font)
    for row, height in zip(rows, heights):
        _draw_row(sheet, pen, font, row, (margin, top), side, smallest)
        top += height
    return sheet


def _draw_row(sheet, pen, font, row, corner, side, smallest):
    left, top = corner
    for number, line in enumerate([*row.label, *row.remarks]):
        pen.text((6, top + CAPTION * number), line, INK if number < len(row.label) else WARNING, font)
    captions = [*row.captions, *[""] * (len(row.tiles) - len(row.captions))]
    for tile, caption, start in zip(row.tiles, captions, _lefts(row, side)):
        if tile is not None:
            drawn = _as_tile(tile, smallest)
            sheet.paste(drawn, (left + start, top))
            pen.text((left + start, top + drawn.height), shortened(caption, side, font), INK, font)


def _lefts(row, side):
    """Where the tiles of a row begin, from the margin on, and where the last ends: one number more than tiles."""
    return np.cumsum([0] + [BREAK if tile is None else side + GAP for tile in row.tiles]).tolist()


def _height(row, side):
    below = CAPTION + GAP if any(row.captions) else 0
    return max(GAP + side + below, CAPTION * (len(row.label) + len(row.remarks)) + BREAK)


def _width(line, font):
    return int(np.ceil(font.getlength(line)))


def shortened(text, width, font):
    """`text`, cut to what fits into `width` pixels."""
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
