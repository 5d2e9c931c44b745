"""Scores of several rows over several seeds as statistics, a Markdown table and a plot. Plain values in, PIL out.

Scores are dicts row -> column -> seed -> top-1. A column is called after where the encoder is frozen and who judges:
"conv1-head", "all-knn"; "none-head" is a network of which nothing is frozen.
"""

import math
import statistics

from utils.canvas import Canvas
from utils.grids import INK, PAPER, spelt

JUDGES = {"head": "head", "linear": "linear", "knn": "kNN"}
FROZEN = [f"all-{judge}" for judge in JUDGES]  # the columns of encoders that are frozen as a whole
FADED, GRID = (110, 110, 110), (225, 225, 225)
COLOURS = {"β-VAE": (40, 95, 185), "PatchVAE": (215, 95, 20)}  # by how a row's words begin
LABELS, PANEL, NUMBERS, LINE, TOP, BOTTOM, DOT = 190, 230, 62, 26, 76, 70, 3.5  # pixels of the plot


# ---------------------------------------------------------------------------------------------------- statistics


def spread(values):
    """Mean, standard deviation (n - 1; None of a single one) and number of a dict seed -> value, and its values."""
    numbers = list(values.values())
    return {
        "mean": statistics.fmean(numbers) if numbers else None,
        "sd": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "n": len(numbers),
        "seeds": {str(seed): value for seed, value in values.items()},
    }


def paired(first, second):
    """spread() of the differences of two dicts seed -> value, over the seeds that both have."""
    return spread({seed: first[seed] - second[seed] for seed in first if seed in second})


def summarise(rows, scores, contrasts, floor):
    """All statistics: a dict of plain values that markdown() and plot() read.

    `rows`: a list of objects with `name`, `group` and `words`; `contrasts`: (words, row, row) each, of which the
    second is subtracted; `floor`: dict row -> the row whose encoder is the same with random weights, or None.
    """
    found = []
    for row in rows:
        own = {column: spread(values) for column, values in scores[row.name].items()}
        line = {"name": row.name, "group": row.group, "words": row.words, "scores": own}
        if floor.get(row.name):
            random = scores[floor[row.name]]
            line["floor"] = floor[row.name]
            line["above_random"] = paired(scores[row.name].get("all-head", {}), random.get("all-head", {}))
        found.append(line)
    differences = [
        {"words": words, **{c: paired(scores[one].get(c, {}), scores[two].get(c, {})) for c in FROZEN}}
        for words, one, two in contrasts
    ]
    return {"rows": found, "differences": [line for line in differences if any(line[c]["n"] for c in FROZEN)]}


# ---------------------------------------------------------------------------------------------------- table


def in_words(found, seeds, sign=""):
    """"57.61 ± 0.12" of a spread, with its n where that is not `seeds`; a single value has no spread."""
    if not found or not found["n"]:
        return "–"
    few = f" (n = {found['n']})" if found["n"] != seeds else ""
    deviation = "" if found["sd"] is None else f" ± {found['sd']:.2f}"
    return f"{found['mean']:{sign}.2f}{deviation}{few}"


def markdown(content):
    """The report of summarise() with `title`, `seeds`, `columns` (dict column -> heading) and `notes`: str."""
    seeds, columns = len(content["seeds"]), content["columns"]
    lines = [["setting", "model", *columns.values(), "head, all frozen: above random initialisation"]]
    for row in content["rows"]:
        shown = [in_words(row["scores"].get(column), seeds) for column in columns]
        lines.append([row["group"], row["words"], *shown, in_words(row.get("above_random"), seeds, "+")])
    text = [f"# {content['title']}", "", *_table(lines)]
    if content["differences"]:
        lines = [["difference in points, all frozen, paired over seeds", *JUDGES.values()]]
        for line in content["differences"]:
            lines.append([line["words"], *(in_words(line[column], seeds, "+") for column in FROZEN)])
        text += ["", *_table(lines)]
    return "\n".join([*text, "", *(f"- {note}" for note in content["notes"])]) + "\n"


def _table(lines):
    """Lists of str, the first of them headings, as the lines of a Markdown table."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]]]


# ---------------------------------------------------------------------------------------------------- plot


class Axis:
    """Where values from `low` to `high`, or a little beyond, lie between two pixels."""

    def __init__(self, values, left, right):
        low, high = (min(values), max(values)) if values else (0.0, 100.0)
        room = 0.08 * (high - low) or 1.0
        self.low, self.high, self.left, self.right = low - room, high + room, left, right

    def __call__(self, value):
        return self.left + (value - self.low) / (self.high - self.low) * (self.right - self.left)

    def ticks(self):
        """About four round numbers within, ascending."""
        rough = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda step: abs(step - rough))
        first = math.ceil(self.low / step)
        return [round(step * number, 6) for number in range(first, math.floor(self.high / step) + 1)]


def plot(content):
    """Top-1 of encoders that are frozen as a whole, every seed as a dot, a panel for each judge: PIL image.

    `content`: as for markdown(). A network of which nothing is frozen is far off, and so is named below.
    """
    shown = [row for row in content["rows"] if "none-head" not in row["scores"]]
    headings, lines, bottom = layout(shown)
    sheet = Canvas(LABELS + len(FROZEN) * (PANEL + NUMBERS), bottom + BOTTOM, PAPER)
    sheet.text(12, 20, content["title"], 17, INK, anchor=0)
    for number, (column, judge) in enumerate(zip(FROZEN, JUDGES.values())):
        left = LABELS + number * (PANEL + NUMBERS)
        sheet.text(left, TOP - 18, f"{judge}, {content['frozen']}: top-1 in %", 12, INK, anchor=0)
        _panel(sheet, column, lines, left, bottom)
    for words, y in headings:
        sheet.text(12, y, words, 11.5, FADED, anchor=0)
    for row, y in lines:
        sheet.text(24, y, spelt(row["words"]), 12.5, INK, anchor=0)
    below = ["dot: one seed    bar: mean    line: ± standard deviation    dashed: the same encoder with random weights"]
    for row in content["rows"]:
        if row not in shown:
            found = in_words(row["scores"]["none-head"], len(content["seeds"]))
            below.append(f"beyond the axes, {row['group']}: {row['words']}: {found}")
    for number, words in enumerate(below):
        sheet.text(12, bottom + 38 + 17 * number, words, 11.5, FADED, anchor=0)
    return sheet.finished()


def layout(rows):
    """Where everything stands: headings and rows, (words or row, y) each, and the bottom of the panels."""
    headings, lines, y = [], [], TOP
    for row in rows:
        if not lines or row["group"] != lines[-1][0]["group"]:
            headings.append((row["group"], y + LINE / 2))
            y += LINE
        lines.append((row, y + LINE / 2))
        y += LINE
    return headings, lines, y


def _panel(sheet, column, lines, left, bottom):
    found = [(row, y, row["scores"].get(column)) for row, y in lines]
    found = [(row, y, score) for row, y, score in found if score and score["n"]]
    reach = [score["mean"] + side * (score["sd"] or 0) for _, _, score in found for side in (-1, 1)]
    axis = Axis([*reach, *(value for _, _, score in found for value in score["seeds"].values())], left, left + PANEL)
    for tick in axis.ticks():
        sheet.line([(axis(tick), TOP), (axis(tick), bottom)], GRID, 1)
        sheet.text(axis(tick), bottom + 12, f"{tick:g}", 11.5, FADED)
    floors = {row["name"]: score["mean"] for row, _, score in found if row["name"].startswith("random")}
    for row, y, _ in found:
        floor = row.get("floor", row["name"])
        if floor in floors:
            x = axis(floors[floor])
            sheet.line([(x, y - LINE / 2), (x, y + LINE / 2)], FADED, 1.2, dashed=True)
    for row, y, score in found:
        _score(sheet, axis, y, score, colour_of(row))
        sheet.text(left + PANEL + 8, y, f"{score['mean']:.1f}", 12, colour_of(row), anchor=0)


def _score(sheet, axis, y, score, colour):
    """One row of a panel: line, bar and dots."""
    if score["sd"] is not None:
        sheet.line([(axis(score["mean"] + side * score["sd"]), y) for side in (-1, 1)], colour, 2)
        sheet.line([(axis(score["mean"]), y + side * LINE / 3) for side in (-1, 1)], colour, 2.4)
    for value in score["seeds"].values():
        x, ring = axis(value), [(math.cos(turn / 12 * math.pi), math.sin(turn / 12 * math.pi)) for turn in range(24)]
        for radius, fill in ((DOT + 1, PAPER), (DOT, colour)):  # a white rim tells dots from what they lie on
            sheet.area([(x + radius * across, y + radius * down) for across, down in ring], fill)


def colour_of(row):
    """Grey of random weights, else the colour of the model that the row's words begin with, or PatchVAE's."""
    if row["name"].startswith("random"):
        return FADED
    return next((colour for words, colour in COLOURS.items() if row["words"].startswith(words)), COLOURS["PatchVAE"])
