"""Every picture of the project: maps laid over images, sheets of tiles, plots. Arrays in, PIL images out.

A tile is an image as an array H×W×3, uint8. Pillow puts sheets of tiles together, pixel by pixel; matplotlib draws what
has axes, and is imported only there, so that a training that starts does not wait for it.
"""

import argparse
import functools
import os
import statistics
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from utils import runtime

GAP, BREAK, LINE = 4, 12, 16  # pixels: between tiles, between groups of them, from one line of words to the next
INK, FAINT, WARNING, FRAME = (34, 34, 34), (120, 120, 120), (178, 24, 43), (255, 210, 0)
SMALLEST = 64  # pixels across; smaller tiles are magnified
NAMED = 100  # class names along an axis, at most


# ---------------------------------------------------------------------------------------------------- tiles


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
    """Where a part occurs in the tile, with probabilities h×w: a tile.

    It keeps its colours where the probability reaches `strongest` and fades to a dull grey where it is 0; a line
    encloses what lies above one half.
    """
    probability = stretched(occurrence, tile)
    strength = np.clip(probability / strongest, 0, 1)
    dull = 70 + 0.4 * tile.mean(axis=2, keepdims=True)
    picture = np.round(tile * strength + dull * (1 - strength)).astype(np.uint8)
    inside = Image.fromarray((255 * (probability[..., 0] > 0.5)).astype(np.uint8))
    inner = inside.filter(ImageFilter.MinFilter(2 * max(1, len(tile) // 64) + 1))  # without its border
    picture[np.asarray(inside) != np.asarray(inner)] = FRAME
    return picture


def framed(tile, box):
    """The tile with a frame around `box`: left, top, right, bottom in pixels, the last two just outside."""
    picture = Image.fromarray(tile)
    left, top, right, bottom = box
    pen = ImageDraw.Draw(picture)
    pen.rectangle([left - 1, top - 1, right, bottom], outline=INK)  # seen on yellow, too
    pen.rectangle([left, top, max(left, right - 1), max(top, bottom - 1)], outline=FRAME, width=2)
    return np.asarray(picture)


# ---------------------------------------------------------------------------------------------------- sheets


class Row(NamedTuple):
    """A line of a table: words, the first of them in bold, then tiles with a caption below each."""

    label: list  # of str, one a line
    tiles: list  # or PIL images; None leaves a gap
    captions: list | tuple = ()  # of str, one for each tile
    remarks: list | tuple = ()  # of str: more lines of the label, in red


@functools.cache
def font(size=11, bold=False):
    """matplotlib's font: it has more letters than Pillow's."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def shortened(text, width):
    """`text`, cut to what fits into `width` pixels."""
    if font().getlength(text) <= width:
        return text
    while text and font().getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def paper(width, height, lines=()):
    """A white PIL image below `lines` of words, at least as wide as they are, and a pen to write on it."""
    width = max([width, *(2 * GAP + round(font(12).getlength(line)) for line in lines)])
    sheet = Image.new("RGB", (width, height + LINE * len(lines)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        pen.text((GAP, LINE * number), line, INK, font(12))
    return sheet, pen


def grid(rows, captions=None, title=()):
    """Rows of equally large tiles; small ones are magnified, pixel by pixel. PIL image.

    `captions`: a line of words over each column; `title`: lines over everything.
    """
    magnify = max(1, -(-SMALLEST // rows[0][0].shape[1]))
    height, width = (side * magnify for side in rows[0][0].shape[:2])
    top = LINE * (len(title) + bool(captions)) + GAP
    columns = max(map(len, rows))
    sheet, pen = paper(columns * (width + GAP) + GAP, top - LINE * len(title) + len(rows) * (height + GAP), title)
    for line, row in enumerate(rows):
        for column, tile in enumerate(row):
            picture = Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (GAP + column * (width + GAP), top + line * (height + GAP)))
    for column, text in enumerate(captions or []):
        pen.text((GAP + column * (width + GAP), LINE * len(title)), shortened(text, width), INK, font())
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
        original, copy = resized(original, side), resized(copy, side)
        rows.append([original, copy, *(highlight(original, maps[part], max(highest[part], 0.5)) for part in shown)])
    return grid(rows, ["image", "copy", *(f"{part}: {highest[part]:.2f}" for part in shown)])


def table(rows, heading=(), side=96):
    """Rows of tiles, each `side` pixels wide, beside their words and below the lines `heading`: PIL image."""
    words = [line for row in rows for line in (*row.label, *row.remarks)]
    margin = 2 * BREAK + max(round(font(bold=True).getlength(line)) for line in ["", *words])
    lefts = [np.cumsum([margin] + [BREAK if tile is None else side + GAP for tile in row.tiles]) for row in rows]
    heights = [max(side + LINE * bool(row.captions), LINE * len([*row.label, *row.remarks])) + BREAK for row in rows]
    sheet, pen = paper(max(int(places[-1]) for places in lefts), BREAK + sum(heights), heading)
    top = LINE * len(heading) + BREAK
    for row, height, places in zip(rows, heights, lefts):
        for number, line in enumerate([*row.label, *row.remarks]):
            colour = WARNING if number >= len(row.label) else FAINT if number else INK
            pen.text((BREAK, top + LINE * number), line, colour, font(bold=number == 0))
        for left, tile, caption in zip(places.tolist(), row.tiles, row.captions or [""] * len(row.tiles)):
            if tile is not None:
                sheet.paste(Image.fromarray(resized(tile, side)), (left, top))
                pen.text((left, top + side + 1), shortened(caption, side), INK, font())
        top += height
    return sheet


def stacked(pictures):
    """PIL images one below the other, each below its words: a dict words -> PIL image -> PIL image."""
    sheets = []
    for words, picture in pictures.items():
        sheets.append(paper(picture.width, picture.height, [words])[0])
        sheets[-1].paste(picture, (0, LINE))
    whole, top = paper(max(one.width for one in sheets), sum(one.height for one in sheets))[0], 0
    for one in sheets:
        whole.paste(one, (0, top))
        top += one.height
    return whole


# ---------------------------------------------------------------------------------------------------- plots


def plot(width, height, panels=1):
    """A white matplotlib Figure of so many pixels, and a list of its Axes, side by side on a common y axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width / 100, height / 100), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def drawn(figure):
    """The matplotlib Figure as a PIL image."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name may have letters that the font lacks
        figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def confusion_picture(matrix, class_names):
    """How often each true class (row) is taken for each class (column), shares from 0 to 1, N×N: PIL image."""
    count = len(matrix)
    cell, step = max(2, min(48, 1200 // count)), -(-count // NAMED)  # pixels of a cell; every so many have a name
    names = [name if len(name) <= 24 else name[:23] + "…" for name in class_names[::step]]
    side = max(300, cell * count)
    longest = 7 * max(map(len, names))
    figure, (axes,) = plot(side + longest + 180, side + longest + 80)
    image = axes.imshow(matrix, cmap="Reds", vmin=0, vmax=1, interpolation="nearest")
    style = {"fontsize": 9 if cell >= 20 else 6.5, "parse_math": False}
    axes.set_xticks(range(0, count, step), names, rotation=90, **style)
    axes.set_yticks(range(0, count, step), names, **style)
    axes.set(xlabel="class that the classifier names", ylabel="true class")
    figure.colorbar(image, label="share of the true class's images", shrink=min(1, 400 / side))
    for (row, column), share in np.ndenumerate(matrix if cell >= 32 else np.zeros((0, 0))):
        colour = "white" if share > 0.6 else "black"
        axes.text(column, row, f"{share:.2f}".removeprefix("0"), ha="center", va="center", fontsize=8, color=colour)
    return drawn(figure)


def points(rows, panels, floors=None, colours=None, title="", notes=()):
    """Scores of several seeds, a line for each of `rows`: dots, their mean, ± standard deviation. PIL image.

    `rows`: a list of (group, words); `panels`: a dict name of the x axis -> a list of numbers for each row (empty:
    nothing is drawn); `floors`: a dict name -> a number, or None, for each row, a dashed mark; `colours`: one for each
    row; `notes`: lines below everything.
    """
    heads = [number for number, (group, _) in enumerate(rows) if number == 0 or group != rows[number - 1][0]]
    heights = [number + sum(head <= number for head in heads) for number in range(len(rows))]  # heads take a line each
    lines = len(rows) + len(heads)
    figure, axes = plot(360 * len(panels) + 160, 24 * lines + 110 + LINE * len(notes), len(panels))
    for one, (name, scores) in zip(axes, panels.items()):
        one.set_xlabel(name)
        one.grid(axis="x", color="0.9")
        for row, (height, values) in enumerate(zip(heights, scores)):
            colour = colours[row] if colours else "C0"
            if values:
                mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
                one.errorbar(mean, height, xerr=deviation, fmt="|", color=colour, markersize=14, capsize=3)
                one.plot(values, [height] * len(values), "o", color=colour, markersize=5, markeredgecolor="white")
                one.annotate(f"{mean:.1f}", (1, height), (4, 0), color=colour, va="center", fontsize=9,
                             xycoords=("axes fraction", "data"), textcoords="offset points")
            if floors and floors[name][row] is not None:
                one.vlines(floors[name][row], height - 0.5, height + 0.5, color="0.4", linestyles="dashed")
    ticks = dict(zip(heights, (words for _, words in rows))) | {heights[head] - 1: rows[head][0] for head in heads}
    axes[0].set(ylim=(lines - 0.4, -0.6), yticks=list(ticks), yticklabels=list(ticks.values()))
    for tick in axes[0].get_yticklabels()[len(rows):]:
        tick.set_fontweight("bold")
    figure.suptitle(title, fontsize=12)
    figure.supxlabel("\n".join(notes), fontsize=9, color="0.4")
    return drawn(figure)


def curves(panels, y, title="", log=False):
    """Lines with bands of ± standard deviation on a common y axis called `y`: PIL image.

    `panels`: a dict name of the x axis -> dict name of a line -> list of (x, mean, deviation); `log`: both axes are
    logarithmic.
    """
    figure, axes = plot(80 + 400 * len(panels), 340, len(panels))
    for one, (name, lines) in zip(axes, panels.items()):
        for words, found in lines.items():
            x, mean, deviation = np.array(found, float).reshape(-1, 3).T
            (line,) = one.plot(x, mean, marker="o", markersize=3.5, label=words)
            one.fill_between(x, mean - deviation, mean + deviation, color=line.get_color(), alpha=0.2, linewidth=0)
        one.set_xlabel(name)
        one.grid(color="0.9")
        one.legend(frameon=False, fontsize=9)
        if log:
            one.set(xscale="log", yscale="log")
    axes[0].set_ylabel(y)
    figure.suptitle(title, fontsize=12)
    return drawn(figure)


# ---------------------------------------------------------------------------------------------------- files


def save(picture, path):
    """Write the PIL image `picture` as the PNG file `path`, whole or not at all, making its folder if need be."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    runtime.write(path, lambda file: picture.save(file, "PNG"))


def png(path):
    """An argparse type: the path of a PNG file that can be written."""
    if not path.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"'{path}' does not end in .png, the kind of picture that is written")
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"'{path}' is a folder; give the name of a file")
    return path
