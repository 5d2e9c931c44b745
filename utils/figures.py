"""Pictures of images side by side, with captions, and of maps laid over images. Numpy in, PIL out."""

import argparse
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils import runtime

GAP, CAPTION, PAPER, INK = 2, 14, (255, 255, 255), (30, 30, 30)


def to_rgb(x, mean, std):
    """Normalised pixels, a tensor B×C×H×W (C = 1 or 3) -> B×H×W×3 uint8 array; `mean`, `std`: C numbers each."""
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (mean, std))
    unit = x.detach().float().cpu().numpy() * std + mean  # B×C×H×W in [0, 1]
    pixels = np.round(np.clip(unit, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels


def lay_over(image, values):
    """`values`, h×w from 0 to 1, as heat over the grey version of `image`, H×W×3 uint8 -> H×W×3 uint8."""
    rows, columns = (np.arange(side) * cells // side for side, cells in zip(image.shape, values.shape))
    strength = np.clip(values, 0, 1)[rows][:, columns, None]  # H×W×1: every cell keeps its borders
    heat = np.concatenate([np.minimum(1, 2 * strength), np.maximum(0, 2 * strength - 1), 0 * strength], axis=2)
    grey = np.repeat(image.mean(axis=2, keepdims=True) / 255 * 0.7, 3, axis=2)
    return np.round((grey * (1 - strength) + heat * strength) * 255).astype(np.uint8)


def grid(rows, captions=None):
    """Rows of equally large H×W×3 uint8 arrays -> one PIL image; `captions`: a line of text over each column.

    Small images are magnified, without smoothing, to be looked at.
    """
    height, width = rows[0][0].shape[:2]
    magnify = max(1, -(-64 // width))
    height, width = height * magnify, width * magnify
    top = CAPTION if captions else 0
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, top + len(rows) * (height + GAP) + GAP), PAPER)
    for line, row in enumerate(rows):
        for column, tile in enumerate(row):
            tile = Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (GAP + column * (width + GAP), top + GAP + line * (height + GAP)))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for column, text in enumerate(captions or []):
        pen.text((GAP + column * (width + GAP), 1), text, INK, font)
    return sheet


def occurrence_grid(originals, reconstructions, occurrence, parts=16):
    """One row per image: the image, its reconstruction, and where each part occurs.

    `occurrence`: B×N×h×w in [0, 1]. Every part's map is drawn from 0 to its largest value, which stands above its
    column, or to one half, so that a part that is sure of nowhere looks like it.
    Of more than `parts` parts, those are shown whose maps vary most.
    """
    varying = np.argsort(-occurrence.var(axis=(0, 2, 3)), kind="stable")[:parts]
    shown = sorted(varying.tolist())
    largest = occurrence.max(axis=(0, 2, 3))
    scale = np.maximum(largest, 0.5)
    rows = [
        [image, copy] + [lay_over(image, occurrence[number, part] / scale[part]) for part in shown]
        for number, (image, copy) in enumerate(zip(originals, reconstructions))
    ]
    return grid(rows, ["image", "reconstr."] + [f"{part}: {largest[part]:.2f}" for part in shown])


def matrix(values):
    """A square matrix of numbers from 0 to 1 as heat, at least 400 pixels wide where it has few rows: PIL image."""
    cell = max(1, 400 // len(values))
    ink = 255 - np.array([120, 0, 0])  # from white to dark red
    shades = np.round(255 - np.clip(values, 0, 1)[..., None] * ink).astype(np.uint8)
    return Image.fromarray(shades).resize((cell * len(values),) * 2, Image.Resampling.NEAREST)


def stacked(pictures):
    """PIL images one below the other, from the left border: PIL image."""
    sheet = Image.new("RGB", (max(one.width for one in pictures), sum(one.height for one in pictures)), PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def spelt(text):
    """`text` in letters that Pillow's font has."""
    return text.replace("β", "beta")


def titled(picture, lines):
    """The PIL image `picture` below `lines` of text, and wide enough for them: PIL image."""
    font = ImageFont.load_default(size=12)
    width = max(picture.width, 2 * GAP + max(round(font.getlength(line)) for line in lines))
    sheet = Image.new("RGB", (width, picture.height + 16 * len(lines)), PAPER)
    for number, line in enumerate(lines):
        ImageDraw.Draw(sheet).text((GAP, 16 * number + 1), line, INK, font)
    sheet.paste(picture, (0, 16 * len(lines)))
    return sheet


def save(picture, path):
    """Write the PIL image `picture` as the PNG file `path`, whole or not at all, making its folder if need be."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    runtime.write(path, lambda file: picture.save(file, "PNG", optimize=True))


def png(path):
    """An argparse type: the path of a PNG file that can be written."""
    if not path.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"'{path}' does not end in .png, the kind of picture that is written")
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"'{path}' is a folder; give the name of a file")
    return path


def confusion_picture(values, classes):
    return matrix(values)
