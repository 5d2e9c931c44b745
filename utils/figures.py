"""Pictures that several scripts draw: maps over tiles, arrays H×W×3 uint8, and sheets of tiles, PIL images."""

import argparse
import functools
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from utils import runtime

GAP, LINE = 4, 16  # pixels between tiles, and from one line of words to the next
INK, FRAME = (34, 34, 34), (255, 210, 0)  # of words, and of lines around what matters
SMALLEST = 64  # pixels across; smaller tiles are magnified


def to_rgb(x, mean, std):
    """Normalised pixels, a tensor B×C×H×W (C = 1 or 3) -> B×H×W×3 uint8 array; `mean`, `std`: C numbers each."""
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (mean, std))
    unit = x.detach().float().cpu().numpy() * std + mean  # B×C×H×W in [0, 1]
    pixels = np.round(np.clip(unit, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels


def resized(tile, side):
    """A tile or PIL image as side×side×3: smooth, but one that is much smaller keeps its pixels."""
    picture = Image.fromarray(np.asarray(tile))
    method = Image.Resampling.NEAREST if side >= 3 * picture.width else Image.Resampling.LANCZOS
    return np.asarray(picture.resize((side, side), method))


def stretched(values, tile):
    """A map of cells, h×w, as large as the tile, H×W×1: every cell keeps its borders."""
    rows, columns = (np.arange(side) * cells // side for side, cells in zip(tile.shape, values.shape))
    return values[rows][:, columns, None]


def lay_over(tile, values):
    """A map h×w, from 0 to 1, as heat over the grey version of the tile: a tile."""
    strength = np.clip(stretched(values, tile), 0, 1)
    heat = np.concatenate([np.minimum(1, 2 * strength), np.maximum(0, 2 * strength - 1), 0 * strength], axis=2)
    grey = tile.mean(axis=2, keepdims=True) / 255 * 0.7
    return np.round((grey * (1 - strength) + heat * strength) * 255).astype(np.uint8)


def highlight(tile, occurrence, strongest=1.0):
    """The tile in its colours where a part occurs, dull grey where it does not, with probabilities h×w: a tile.

    Colours are full where the probability reaches `strongest`. A line encloses what lies above one half.
    """
    probability = stretched(occurrence, tile)
    strength = np.clip(probability / strongest, 0, 1)
    dull = 70 + 0.4 * tile.mean(axis=2, keepdims=True)
    picture = np.round(tile * strength + dull * (1 - strength)).astype(np.uint8)
    inside = Image.fromarray((255 * (probability[..., 0] > 0.5)).astype(np.uint8))
    inner = inside.filter(ImageFilter.MinFilter(2 * max(1, len(tile) // 64) + 1))  # without its border
    picture[np.asarray(inside) != np.asarray(inner)] = FRAME
    return picture


@functools.cache
def font(size=11, bold=False):
    """matplotlib's font: it has more letters than Pillow's."""
    import matplotlib  # here, so that a training that starts does not wait for it

    name = "DejaVuSans-Bold" if bold else "DejaVuSans"
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf", size)


def paper(width, height, lines=()):
    """A white PIL image, at least as wide as the `lines` of words at its top, and a pen to write on it."""
    width = max([width, *(2 * GAP + round(font(12).getlength(line)) for line in lines)])
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        pen.text((GAP, LINE * number), line, INK, font(12))
    return sheet, pen


def grid(rows, captions=None, title=()):
    """Rows of equally large tiles; small ones are magnified, pixel by pixel. PIL image.

    `captions`: a few letters over each column; `title`: lines of words over everything.
    """
    magnify = max(1, -(-SMALLEST // rows[0][0].shape[1]))
    height, width = (side * magnify for side in rows[0][0].shape[:2])
    top = LINE * (len(title) + bool(captions)) + GAP
    sheet, pen = paper(GAP + max(map(len, rows)) * (width + GAP), top + len(rows) * (height + GAP), title)
    for column, text in enumerate(captions or ()):
        pen.text((GAP + column * (width + GAP), LINE * len(title)), text, INK, font())
    for line, row in enumerate(rows):
        for column, tile in enumerate(row):
            picture = Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (GAP + column * (width + GAP), top + line * (height + GAP)))
    return sheet


def occurrence_grid(originals, copies, occurrence, most=16):
    """One row per image: the image, its reconstruction, and where each part occurs, see highlight(). PIL image.

    `originals`, `copies`: B tiles; `occurrence`: B×N×h×w in [0, 1]. Over each column stands the part's highest
    probability; a part that is sure of nothing is shown up to one half. Of more than `most` parts, those are shown
    whose maps vary most.
    """
    shown = sorted(np.argsort(-occurrence.var(axis=(0, 2, 3)), kind="stable")[:most].tolist())
    highest = occurrence.max(axis=(0, 2, 3))
    side, rows = max(SMALLEST, len(originals[0])), []
    for original, copy, maps in zip(originals, copies, occurrence):
        tile = resized(original, side)
        occurs = [highlight(tile, maps[part], max(highest[part], 0.5)) for part in shown]
        rows.append([tile, resized(copy, side), *occurs])
    return grid(rows, ["image", "copy", *(f"{part}: {highest[part]:.2f}" for part in shown)])


def save(picture, path):
    """Write the PIL image `picture` as the PNG file `path`, whole or not at all, making its folder if need be."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    runtime.write(path, lambda file: picture.save(file, "PNG"))


def png(path):
    """An argparse type: the path of a PNG file that can be written."""
    if not path.lower().endswith(".png") or os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"'{path}' ends in another way than .png, or is a folder; name a PNG file")
    return path
