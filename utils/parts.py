"""Show what the parts of a trained PatchVAE are: where they occur, what they look like, what each contributes.

    python utils/parts.py --pretrained scratch/model.pt

    python utils/parts.py --pretrained scratch/model.pt --part 7 --patches 20 --output-folder part_7

Look at parts.html first: the places where each part is surest, cut out of the photographs, which open at a click.
Beside it: parts.png, the same as a picture; illustration.png, where one part occurs in some images, and the same part
in others; swap.png, that part's appearance in images B put into images A; traversal.png, the appearance of each part
moved along its strongest directions; parts.csv, how surely each image has each part; parts.json, all figures, and file,
cell and box of every patch; logs_parts/, the pictures for TensorBoard. The same command gives the same files.
"""

import base64
import csv
import io
import itertools
import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import modules
from datasets import SPLITS, normalisation, open_split, printable
from run import ACTIVE
from utils import batches, figures, options, runtime, trained, training
from utils.figures import FRAME, GAP, INK, LINE
from utils.runtime import RunError, UsageError

SURE, ABSENT = 0.5, 0.01  # above it a part occurs surely; one that is placed nowhere with more than this never occurs
CORRELATED, SHARED, UPPER = 0.9, 0.5, 0.25  # see near_duplicates, and shared_places for the last
CELLS = 3  # width of a patch in cells, where the encoder sees more than the image
DECODED = 16_000_000  # pixels decoded to see what the parts contribute: a minute or less on a CPU core
MOST, COLUMNS, LARGE, WHOLE = 50, 8, 128, 400  # patches of a part, images in swap.png, pixels of these, of photographs
BREAK, FAINT = 12, (120, 120, 120)  # pixels between groups of tiles; colour of all words but the first
ORDER = "Shown are {} of {} parts, those first whose absence costs most."
STEPS, DIRECTIONS = (-3.0, -1.5, 0.0, 1.5, 3.0), 2  # of traversal.png, in standard deviations
CONTENTS = ("parts.json", "parts.html", "parts.csv", "parts.png", "illustration.png", "swap.png", "traversal.png")


def build_parser():
    parser = options.Parser(description=__doc__)
    trained.add_options(parser, cache="none")  # every image is looked at once
    parser.section("what to look at")
    parser.option("--split", SPLITS, "test", None, "test; unlabelled: what run.py trained on; train: what "
                  "classifier.py trains on; all: the images of a folder without splits")
    parser.option("--images", options.whole(1), None, "K",
                  "only so many images, spread evenly over the split; for a quick look (default: all)")
    parser.option("--batch-size", options.whole(1), 128, "K", "images encoded at once; fewer need less memory")
    parser.section("pictures")
    parser.option("--patches", options.whole(1, MOST), 12, "K", "patches of each part, each from another image")
    parser.option("--shown", options.whole(1), 16, "K",
                  "parts in parts.png and traversal.png, those whose absence costs most; parts.html has all")
    parser.option("--part", options.whole(0), None, "N", "the part of illustration.png and swap.png (default: the one "
                  "whose absence costs most, of those that occur somewhere with a probability above one half)")
    parser.option("--output-folder", options.path, None, "DIR",
                  "where the files go, over those of an earlier call (default: the folder parts beside the model)")
    return parser


def main(argv=None):
    """Look at the images, draw, write. Returns the content of parts.json."""
    settings, model, device = trained.open_model(build_parser(), argv)
    settings = complete(settings, model)
    images = open_images(settings, device)
    folder = training.prepare_folder(settings.output_folder, CONTENTS, keep=True)
    steps = -(-len(images) // settings.batch_size)
    found = survey(model, tqdm(images.in_order(settings.batch_size), "look", steps, leave=False, disable=None))
    examples = images.examples(settings.ablation_images)
    target = modules.reconstruction_target(examples, settings.target, *normalisation(len(images.mean), settings.inet))
    found["error"], found["rises"] = contributions(model, examples, target, settings.batch_size)
    galleries = [
        open_gallery(settings, model, images, found, part, settings.patches)
        for part in tqdm(range(settings.num_parts), "cut out", leave=False, disable=None)
    ]
    found["shared"] = shared_places(model, found, galleries)
    parts = [describe(found, gallery) for gallery in galleries]
    number = choose_part(parts) if settings.part is None else settings.part
    more = open_gallery(settings, model, images, found, number, COLUMNS + max(COLUMNS, settings.patches))
    findings = {
        **{name: getattr(settings, name) for name in ("pretrained", "dataset", "data_folder", "split", "size")},
        "images": len(images), "ablation_images": len(examples), "reconstruction_error": found["error"],
        "receptive_field": receptive_field(nn.Sequential(model.encoder, model.occurrence.convolution)),
        "patch_size": settings.patch_size, "parts": parts,
    }
    pairs = sorted(zip(parts, galleries), key=lambda pair: -pair[0]["error_rise_when_off"])  # what costs most first
    shown = pairs[: settings.shown]
    pictures = {
        "parts": draw_parts(findings, shown),
        "illustration": draw_illustration(more, found["strongest"][number], settings.patches),
        "swap": draw_swap(model, images, more, found["directions"][number, 0]),
        "traversal": draw_traversal(model, images, found, shown),
    }
    write(folder, pictures, findings, draw_page(findings, pairs), list_images(settings, images.source, found))
    say(findings, number, folder)
    return findings


def complete(settings, model):
    """The settings with what the model answers for. Raises UsageError or RunError where they do not fit it."""
    if settings.arch == "vae":
        raise RunError(f"{settings.pretrained} is a beta-VAE (--arch vae), which has no parts; give a PatchVAE")
    parts, size, scale = settings.num_parts, settings.size, settings.scale
    if settings.part is not None and settings.part >= parts:
        raise UsageError(f"--part {settings.part}: the model has the parts 0 to {parts - 1}")
    field = receptive_field(model.encoder)
    width = field if field <= size else max(scale, min(CELLS * scale, size // 2))
    return settings.changed(
        patch_size=width,
        ablation_images=min(500, max(20, DECODED // (parts * size**2))),
        output_folder=settings.output_folder or os.path.join(os.path.dirname(settings.pretrained), "parts"),
    )


def open_images(settings, device):
    """The batches of the split, or of --images of it."""
    source = open_split(settings.dataset, settings.data_folder, settings.split, settings.size)
    if settings.images is not None and settings.images < len(source):
        source = source.subset(np.linspace(0, len(source) - 1, settings.images).round().astype(int))
    return batches.open_batches(settings, [source], device)[0]


# ---------------------------------------------------------------------------------------------------- looking
# Letters: B images, N parts, d appearance size, h×w cells, l = h·w.


@torch.no_grad()
def survey(model, images):
    """What each part does in `images`, batches of (x: B×C×H×W, labels), B of them in all: a dict of arrays.

    Of the surest cell in each image, B×N: `odds`, `highest` (the probability), `cell`; `order`, N×at most B: the surest
    images first. Of all cells, N: `rate`, `strongest` (the highest probability), `strongest_share`, `variance` (over
    images, of the cell or latent where it is largest), `dead` (why the part is of no use, or None); `correlation`, N×N.
    Of the appearance: `deviations`, N×d, and `directions`, N×d×d, see principal().
    """
    sums, surest = Counter(), []
    for x, _ in images:
        posterior = model.encode(x)
        odds, cell = log_odds(posterior.logits, model.occurrence.categorical).flatten(2).max(dim=2)  # B×N
        maps, appearance = posterior.occurrence.flatten(2).double(), posterior.mean.double()  # B×N×l, B×N×d
        highest = maps.gather(2, cell[..., None])[..., 0].float()
        placed = model.occurrence.mode(posterior.logits).amax(dim=(2, 3))  # Q^O, or 0 and 1 under --hard
        surest.append([values.cpu().numpy() for values in (odds, highest, cell.int(), placed)])
        cells = maps.movedim(1, 0).flatten(1)  # N×(B·l)
        sums["cell"] += maps.sum(0)  # N×l
        sums["cell_square"] += maps.square().sum(0)
        sums["products"] += cells @ cells.T  # N×N
        sums["appearance"] += appearance.sum(0)  # N×d
        sums["spread"] += torch.einsum("bnd,bne->nde", appearance, appearance)
        sums["strongest"] += torch.bincount(maps.argmax(1).flatten(), minlength=len(cells))  # N
    odds, highest, cell, placed = (np.concatenate(values) for values in zip(*surest))
    mean = {name: value.double().cpu().numpy() / len(odds) for name, value in sums.items()}  # over the images
    rate, cells = mean["cell"].mean(1), mean["cell"].shape[1]
    deviations, directions = principal(mean["appearance"], mean["spread"])
    spread = np.einsum("ndd->nd", mean["spread"]) - mean["appearance"] ** 2  # N×d, each latent by itself
    variance = np.maximum((mean["cell_square"] - mean["cell"] ** 2).max(1), spread.max(1))
    unused = np.where(variance <= ACTIVE, "does not vary", None)
    return {
        "odds": odds, "highest": highest, "cell": cell,
        "order": np.argsort(-odds, axis=0, kind="stable")[: COLUMNS + MOST].T.copy(),
        "rate": rate, "strongest": highest.max(0), "strongest_share": mean["strongest"] / cells, "variance": variance,
        "dead": np.where(placed.max(0) < ABSENT, "never occurs", unused),
        "correlation": correlation(rate, mean["products"] / cells),
        "deviations": deviations, "directions": directions,
    }


def log_odds(logits, categorical):
    """log(p / (1 - p)) of every part's occurrence, B×N×h×w twice: tells apart what as probabilities rounds to 1."""
    if not categorical:
        return logits
    nothing = torch.full_like(logits[:, :1], -1e9)  # log-probability of a part that is not there
    before = torch.cat([nothing, logits[:, :-1].logcumsumexp(dim=1)], dim=1)  # of the parts before each, and after it
    after = torch.cat([nothing, logits.flip(1)[:, :-1].logcumsumexp(dim=1)], dim=1).flip(1)
    return logits - torch.logaddexp(before, after)


def principal(mean, products):
    """Standard deviations and directions (rows) of N Gaussians, the strongest first, from their raw moments.

    N×d, N×d×d -> N×d, N×d×d.
    """
    variances, vectors = np.linalg.eigh(products - mean[:, :, None] * mean[:, None])  # the weakest first, in columns
    directions = vectors[:, :, ::-1].swapaxes(1, 2)  # N×d×d
    largest = np.take_along_axis(directions, np.abs(directions).argmax(2, keepdims=True), axis=2)
    return np.sqrt(variances[:, ::-1].clip(0)), directions * np.sign(largest)  # the sign would be arbitrary


def correlation(mean, products):
    """Correlations, N×N, from means, N, and mean products, N×N; 0 where a part's occurrence is the same everywhere."""
    covariance = products - np.outer(mean, mean)
    variance = np.diag(covariance)
    deviation = np.sqrt(np.where(variance < 1e-12, np.inf, variance))  # single precision rounds to about that
    return covariance / np.outer(deviation, deviation)


@torch.no_grad()
def contributions(model, x, target, batch_size):
    """The squared error of an image, and its rise when a part's occurrence is set to 0: a float, N floats.

    Both summed over pixels, in normalised units, and averaged over x: B×C×H×W; `target`: what is to be reconstructed
    of it, of the same shape.
    """
    errors = np.zeros(model.parts + 1)
    for some, wanted in zip(x.split(batch_size), target.split(batch_size)):
        latents = model.latents(model.encode(some)).unflatten(1, (model.parts, -1))  # B×N×d×h×w
        for part in tqdm(range(len(errors)), "switch off", leave=False, disable=None):  # the last is none of them
            kept = latents.clone()
            kept[:, part : part + 1] = 0
            copy = model.decoder(kept.flatten(1, 2))  # B×C×H×W
            errors[part] += float((copy - wanted).square().sum(dtype=torch.float64)) / len(x)
    return float(errors[-1]), errors[:-1] - errors[-1]


def receptive_field(network):
    """The side, in pixels, of the square that a cell of `network` sees, along the widest branch of its blocks.

    Source: Araujo, Norris, Sim, "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019.
    """
    size, step = 1, 1
    for name, layer in network.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d)) and "downsample" not in name:  # which is the narrow branch
            kernel, stride = (np.max(getattr(layer, of)) for of in ("kernel_size", "stride"))
            size, step = size + (kernel - 1) * step, step * stride
    return int(size)


# ---------------------------------------------------------------------------------------------------- places


class Place(NamedTuple):
    """Where a part is surest in an image, and how it looks there."""

    facts: dict  # as parts.json has them
    caption: str  # its probability, and the image's class
    patch: Image.Image  # the photograph around the cell, at most LARGE pixels wide
    framed: np.ndarray  # tile, LARGE pixels wide: what the model sees of the photograph, with a frame around the patch
    occurs: np.ndarray  # the same tile, where the part occurs highlighted
    photograph: str  # data URI


class Gallery(NamedTuple):
    """A part in the images where it is surest, the surest first."""

    part: int
    posterior: modules.Posterior  # of these images
    places: list  # a Place in each


@torch.no_grad()
def open_gallery(settings, model, images, found, part, count):
    """The Gallery of a part's `count` surest images."""
    numbers = found["order"][part, :count]
    posterior = model.encode(images.chosen(numbers))
    maps = posterior.occurrence[:, part].cpu().numpy()  # B×h×w
    places = [open_place(settings, images.source, found, part, *pair) for pair in zip(numbers.tolist(), maps)]
    return Gallery(part, posterior, places)


def open_place(settings, source, found, part, number, probability):
    """The Place of a part in image `number`, in whose cells it occurs with `probability`, h×w."""
    photograph = source.image(number).convert("RGB")
    file, name = names_of(settings, source, number)
    row, column = divmod(int(found["cell"][number, part]), probability.shape[1])
    centre = (row + 0.5) * settings.scale, (column + 0.5) * settings.scale
    seen, box = boxes(photograph.size, settings.size, centre, settings.patch_size)
    highest = float(found["highest"][number, part])
    facts = {"image": number, "file": file, "class": name, "probability": highest, "cell": [row, column], "box": box,
             "of": list(photograph.size)}
    patch, tile = photograph.crop(box), figures.resized(photograph.crop(seen), LARGE)
    frame = (np.array(box) - seen[:2] * 2) * LARGE / (seen[2] - seen[0])  # the box in the tile
    occurs = figures.highlight(tile, probability, max(SURE, found["strongest"][part]))
    for picture, longest in ((patch, LARGE), (photograph, WHOLE)):
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)  # which never enlarges
    return Place(facts, f"{highest:.2f} {name or ''}", patch, framed(tile, frame.tolist()), occurs, as_uri(photograph))


def boxes(image_size, size, centre, patch):
    """Two boxes (left, top, right, bottom, the last two just outside) in a photograph of image_size (width, height).

    First what batches.resize_and_crop makes size×size pixels of. Then the square of `patch` such pixels around `centre`
    (row, column); where it would leave the photograph, it is moved inwards.
    """
    shorter = min(image_size)
    kept = [min(side, batches.LONGEST * shorter) for side in image_size]
    resized = [size if side == shorter else int(size * side / shorter) for side in kept]
    scales = [old / new for old, new in zip(kept, resized)]  # pixels of the photograph for one of the model's
    starts = [
        round((whole - old) / 2) + round((new - size) / 2) * scale
        for whole, old, new, scale in zip(image_size, kept, resized, scales)
    ]
    seen = [round(start + end * scale) for end in (0, size) for start, scale in zip(starts, scales)]
    side = max(1, round(patch * shorter / size))
    corner = [start + place * scale - side / 2 for start, scale, place in zip(starts, scales, reversed(centre))]
    left, top = (min(max(0, round(place)), whole - side) for place, whole in zip(corner, image_size))
    return seen, [left, top, left + side, top + side]


def names_of(settings, source, number):
    """An image's file as seen from the data folder, and its class; None where it has none."""
    file = printable(os.path.relpath(source.path(number), settings.data_folder)) if hasattr(source, "path") else None
    return file, None if source.labels is None else source.classes[source.labels[number]]


# ---------------------------------------------------------------------------------------------------- findings


def shared_places(model, found, galleries):
    """At how many of the places of part a's gallery part b is in its element, too: shares, N×N (a, b).

    That is: b has there, or in a cell next to it, log-odds as high as it has at best in the UPPER part of all images.
    """
    wanted, shares = np.quantile(found["odds"], 1 - UPPER, axis=0), []  # N
    for gallery in galleries:
        odds = log_odds(gallery.posterior.logits, model.occurrence.categorical)
        nearby = F.max_pool2d(odds, 3, stride=1, padding=1).cpu().numpy()  # B×N×h×w
        there = [values[:, *place.facts["cell"]] >= wanted for values, place in zip(nearby, gallery.places)]  # N
        shares.append(np.mean(there, axis=0))
    return np.array(shares)


def describe(found, gallery):
    """What parts.json says of a part."""
    part, highest = gallery.part, found["highest"][:, gallery.part].astype(float)
    places = [place.facts for place in gallery.places]
    return {
        "part": part,
        "rate": float(found["rate"][part]),
        "strongest_share": float(found["strongest_share"][part]),
        "sure_share": float((highest > SURE).mean()),
        "confidence": {"highest": float(highest.max()), "mean": float(highest.mean())},
        "error_rise_when_off": float(found["rises"][part]),
        "error_rise_percent": 100 * float(found["rises"][part]) / max(found["error"], 1e-9),
        "dead": found["dead"][part],
        "near_duplicates": near_duplicates(found, part),
        "classes_of_top_places": dict(Counter(place["class"] for place in places if place["class"]).most_common()),
        "places": places,
    }


def near_duplicates(found, part):
    """The living parts that do what `part` does, the nearest first: a list of dicts.

    Either their maps correlate, or each of the two is in its element at half of the other's surest places: then they
    show the same to whom looks at their patches, even if one of them occurs more widely.
    """
    shared, alike = np.minimum(found["shared"], found["shared"].T)[part], found["correlation"][part]
    lives = np.equal(found["dead"], None)
    is_double = ((alike >= CORRELATED) | (shared >= SHARED)) & lives & lives[part]
    is_double[part] = False
    return [
        {"part": int(other), "correlation": float(alike[other]), "shared_places": float(shared[other])}
        for other in np.argsort(-shared - alike, kind="stable") if is_double[other]
    ]


def choose_part(parts):
    """The number of the part whose absence costs most: of those that surely occur somewhere, or else of the living."""
    def rank(part):
        lives = part["dead"] is None
        return lives, lives and part["confidence"]["highest"] > SURE, part["error_rise_when_off"]

    return max(parts, key=rank)["part"]


def remarks(part):
    """What a person should know before believing in a part: a list of words."""
    if part["dead"] is not None:
        return [f"not in use: {part['dead']}"]
    alike = [f"like part {near['part']}" for near in part["near_duplicates"][:2]]
    return alike + ["sure nowhere"] * (part["confidence"]["highest"] <= SURE)


def words_for(part):
    """What stands beside a part: lines of words."""
    rise, share = part["error_rise_percent"], 100 * part["sure_share"]
    return [f"part {part['part']}", f"without it: error {rise:+.1f} %", f"sure in {share:.1f} % of images",
            *remarks(part)]


# ---------------------------------------------------------------------------------------------------- drawing


def table(rows, heading, side=96):
    """Rows of tiles, each `side` pixels wide, beside their words and below the lines `heading`: PIL image.

    A row: its lines of words, the first in bold; its tiles or PIL images, None for a gap; a caption below each tile.
    """
    words = sum((words for words, *_ in rows), [""])
    margin = 2 * BREAK + max(round(figures.font(bold=True).getlength(line)) for line in words)
    heights = [max(side + LINE * bool(captions), LINE * len(words)) + BREAK for words, _, captions in rows]
    width = max(sum(BREAK if tile is None else side + GAP for tile in tiles) for _, tiles, _ in rows)
    top, font = LINE * len(heading) + BREAK, figures.font()
    sheet, pen = figures.paper(margin + width, top + sum(heights), heading)
    for (words, tiles, captions), height in zip(rows, heights):
        for number, line in enumerate(words):
            pen.text((BREAK, top + LINE * number), line, FAINT if number else INK, figures.font(bold=not number))
        left = margin
        for tile, text in itertools.zip_longest(tiles, captions, fillvalue=""):
            while font.getlength(text) > side:
                text = text[:-2] + "…"
            if tile is not None:
                sheet.paste(Image.fromarray(figures.resized(tile, side)), (left, top))
                pen.text((left, top + side + 1), text, INK, font)
            left += BREAK if tile is None else side + GAP
        top += height
    return sheet


def framed(tile, box):
    """The tile with a frame around `box`: left, top, right, bottom in pixels, the last two just outside."""
    picture = Image.fromarray(tile)
    left, top, right, bottom = box
    pen = ImageDraw.Draw(picture)
    pen.rectangle([left - 1, top - 1, right, bottom], outline=INK)  # seen on yellow, too
    pen.rectangle([left, top, max(left, right - 1), max(top, bottom - 1)], outline=FRAME, width=2)
    return np.asarray(picture)


def draw_parts(findings, shown):
    """The patches of each part in `shown`, a list of pairs: what describe() says of it, and its Gallery."""
    rows = []
    for part, (_, _, places) in shown:
        rows.append((words_for(part), [place.patch for place in places], [place.caption for place in places]))
    where = f"{findings['images']:,} images of {findings['dataset']} ({findings['split']})"
    heading = f"Where each part is surest in {where}, one place in an image; below it the part's probability there. "
    return table(rows, [heading + ORDER.format(len(shown), len(findings["parts"]))])


def draw_illustration(gallery, strongest, patches):
    """Images, where the part occurs in them, and the same part in other images."""
    images, others = gallery.places[:COLUMNS], gallery.places[COLUMNS : COLUMNS + patches]
    where = ["where it occurs", f"in colour: {max(SURE, strongest):.2f}", "line: above one half"]
    rows = [
        ([f"part {gallery.part}", "frame: its surest place"], [place.framed for place in images], []),
        (where, [place.occurs for place in images], []),
    ]
    for first in range(0, len(others), COLUMNS):
        some = others[first : first + COLUMNS]
        words = [] if first else ["the same part", "in other images"]
        rows.append((words, [place.patch for place in some], [place.caption for place in some]))
    return table(rows, [f"Part {gallery.part} in the images where it is surest, and in others."], LARGE)


def draw_swap(model, images, gallery, direction):
    """The part's appearance in images B put into images A, both among its surest, and unlike in `direction`."""
    part, posterior = gallery.part, gallery.posterior
    appearance = posterior.mean[: 2 * COLUMNS, part]  # B×d
    order = np.argsort(appearance.cpu().numpy() @ direction, kind="stable")
    half = max(1, len(order) // 2)
    a, b = order[:half], order[-half:]
    before, after = (decoded(model, images, changed(posterior, a, part, appearance[some])) for some in (a, b))
    changes = np.abs(after.astype(float) - before).mean(axis=3) / 255  # B×H×W
    most = max(1e-9, changes.max())
    of_a, of_b = ([gallery.places[place] for place in some] for some in (a, b))
    rows = [
        (["images A", f"frame: part {part}"], [place.framed for place in of_a], []),
        (["images B", f"frame: part {part}"], [place.framed for place in of_b], []),
        (["A, reconstructed"], list(before), []),
        (["the same with the", f"appearance of part {part}", "in B"], list(after), []),
        (["the difference", f"yellow: {100 * most:.0f} % of white"],
         [figures.lay_over(tile, change / most) for tile, change in zip(before, changes)], []),
        ([f"where part {part} occurs", "in A"], [place.occurs for place in of_a], []),
    ]
    heading = f"Part {part} takes the appearance that it has in B and keeps its places in A; all other parts stay."
    return table(rows, [heading], LARGE)


def draw_traversal(model, images, found, shown):
    """For each part in `shown`: its surest image, decoded with the part's appearance moved."""
    rows, directions = [], range(min(DIRECTIONS, model.appearance_size))
    words = ["", *("as it is" if step == 0 else f"{step:+g} sd" for step in STEPS)]
    for facts, (part, posterior, (place, *_)) in shown:
        tiles = [place.framed, place.occurs]
        for direction in directions:
            deviation = found["deviations"][part, direction] * found["directions"][part, direction]  # d
            steps = torch.tensor(np.outer(STEPS, deviation)).to(posterior.mean)
            moved = changed(posterior, [0] * len(STEPS), part, posterior.mean[0, part] + steps)
            tiles += [None, *decoded(model, images, moved)]
        rows.append((words_for(facts), tiles, ["image", "where", *words * len(directions)]))
    heading = [
        "Each part in the image where it is surest; its appearance is moved along the directions in which it varies",
        "most over all images, the strongest left, in standard deviations (sd). Its places and all other parts stay.",
    ]
    return table(rows, [*heading, ORDER.format(len(shown), model.parts)])


def changed(posterior, images, part, appearance):
    """The Posterior of some of its images, B positions, where `part` has another appearance, B×d; all else stays."""
    some = modules.Posterior(*(values[images] for values in posterior))  # copies
    some.mean[:, part] = appearance
    return some


@torch.no_grad()
def decoded(model, images, posterior):
    """What a Posterior is reconstructed as: B×H×W×3 uint8."""
    mean, std = (values.flatten().tolist() for values in (images.mean, images.std))
    return figures.to_rgb(model.decoder(model.latents(posterior)), mean, std)


# ---------------------------------------------------------------------------------------------------- output


def write(folder, pictures, findings, page, listing):
    """All files; each replaces what an earlier call left."""
    for old in (folder / "logs_parts").glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(folder / "logs_parts") as board:
        for name, picture in pictures.items():
            figures.save(picture, folder / f"{name}.png")
            board.add_image(name, np.asarray(picture), dataformats="HWC")
    for name, text in (("parts.html", page), ("parts.csv", listing)):
        runtime.write(folder / name, lambda file, text=text: file.write(text.encode()))
    runtime.write_json(folder / "parts.json", findings)


def list_images(settings, source, found):
    """A line for each image, a column for each part, its highest probability in the image: CSV as str."""
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(["image", "class", *(f"part {part}" for part in range(settings.num_parts))])
    for number, values in enumerate(found["highest"]):
        file, name = names_of(settings, source, number)
        lines.writerow([file or number, name, *(f"{value:.4f}" for value in values)])
    return text.getvalue()


def draw_page(findings, pairs):
    """parts.html as str: all that it shows is in it."""
    pages = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    pages.filters["uri"] = as_uri
    rows = [(part, gallery.places, remarks(part)) for part, gallery in pairs]
    photographs = {place.facts["image"]: place.photograph for _, gallery in pairs for place in gallery.places}
    most = max(0.1, *(part["error_rise_percent"] for part, _ in pairs))
    words = {"rows": rows, "photographs": photographs, "most": most, "sees": sees(findings)}
    return pages.get_template("parts.html").render(findings, **words)


def as_uri(tile):
    """A tile or PIL image as a data URI: a small one, as of drawn scenes, exactly."""
    picture, content = Image.fromarray(np.asarray(tile)), io.BytesIO()
    kind = "png" if max(picture.size) <= 64 else "jpeg"
    picture.save(content, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def sees(findings):
    """What a patch shows, and what the model has seen to find its place, in words."""
    patch, field, size = findings["patch_size"], findings["receptive_field"], findings["size"]
    seen = f"the {field} pixels around it" if field < size else "the whole image"
    return f"a patch shows {patch} of the {size} pixels across an image; to find its place, the model looks at {seen}"


def say(findings, number, folder):
    """What was found, in words."""
    parts, place = findings["parts"], runtime.relative(folder / "parts.html")
    sure = sum(part["confidence"]["highest"] > SURE for part in parts)
    idle, double = (sum(bool(part[name]) for part in parts) for name in ("dead", "near_duplicates"))
    print(f"{findings['images']:,} images: {sure} of {len(parts)} parts are sure somewhere (probability above one "
          f"half), {idle} not in use, {double} show the same as another")
    rise = f"rises by {parts[number]['error_rise_percent']:.1f} %"
    print(f"part {number} is in illustration.png and swap.png: without it the reconstruction error {rise}")
    print(sees(findings))
    print(f"open {place} in a browser; pictures, parts.csv and parts.json are beside it")


if __name__ == "__main__":
    runtime.start(main)
