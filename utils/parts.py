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
import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import modules
from datasets import SPLITS, normalisation, open_split, printable
from run import ACTIVE
from utils import batches, figures, options, runtime, trained, training
from utils.figures import Row, table
from utils.runtime import RunError, UsageError

SURE, ABSENT = 0.5, 0.01  # above it a part occurs surely; one that is placed nowhere with more than this never occurs
CORRELATED, SHARED, UPPER = 0.9, 0.5, 0.25  # see near_duplicates, and shared_places for the last
CELLS = 3  # width of a patch in cells, where the encoder sees more than the image
DECODED = 16_000_000  # pixels decoded to see what the parts contribute: a minute or less on a CPU core
MOST, COLUMNS, LARGE, WHOLE = 50, 8, 128, 400  # patches of a part, images in swap.png, pixels of these, of photographs
STEPS, DIRECTIONS = (-3.0, -1.5, 0.0, 1.5, 3.0), 2  # of traversal.png, in standard deviations
CONTENTS = ("parts.json", "parts.html", "parts.csv", "parts.png", "illustration.png", "swap.png", "traversal.png")


def build_parser():
    parser = options.Parser(description=__doc__)
    trained.add_options(parser)
    parser.defaults["cache"] = "none"  # every image is looked at once
    parser.section("what to look at")
    parser.option("--split", SPLITS, "test", None, "test; unlabelled: what run.py trained on; train: what "
                  "classifier.py trains on; all: the images of a folder without splits")
    parser.option("--images", options.whole(1), None, "K",
                  "only so many images, spread evenly over the split; for a quick look (default: all)")
    parser.option("--ablation-images", options.whole(1), None, "K", "images on which each part in turn is switched "
                  "off, to see what it contributes; each is decoded N times (default: 500; fewer, down to 20, where "
                  "the images are large or the parts many)")
    parser.option("--batch-size", options.whole(1), 128, "K", "images encoded at once; fewer need less memory")
    parser.section("pictures")
    parser.option("--patches", options.whole(1, MOST), 12, "K", "patches of each part, each from another image")
    parser.option("--patch-size", options.whole(1), None, "PIXELS", "side of a patch, in pixels of --size, which has "
                  "a cell in its middle (default: what the encoder sees; where that is more than the image, three "
                  "cells of --scale pixels, but no more than half of the image and no less than a cell)")
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
    found = survey(model, images, settings.batch_size)
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
    findings = {name: getattr(settings, name) for name in ("pretrained", "dataset", "data_folder", "split", "size")}
    sight = receptive_field(nn.Sequential(model.encoder, model.occurrence.convolution))
    findings |= {"images": len(images), "ablation_images": len(examples), "reconstruction_error": found["error"]}
    findings |= {"receptive_field": sight, "patch_size": settings.patch_size, "parts": parts}
    pairs = [(part, galleries[part["part"]]) for part in by_contribution(parts)]
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
    if settings.patch_size is not None and settings.patch_size > size:
        raise UsageError(f"--patch-size {settings.patch_size}: the images are {size} pixels wide; give less")
    field = receptive_field(model.encoder)
    width = field if field <= size else max(scale, min(CELLS * scale, size // 2))
    return settings.changed(
        patch_size=settings.patch_size or width,
        ablation_images=settings.ablation_images or min(500, max(20, DECODED // (parts * size**2))),
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
def survey(model, images, batch_size):
    """What each part does in all images, see Statistics.read."""
    statistics = Statistics()
    with tqdm(total=len(images), desc="look", unit="image", leave=False, disable=None) as bar:
        for x, _ in images.in_order(batch_size):
            posterior = model.encode(x)
            odds = log_odds(posterior.logits, model.occurrence.categorical)
            statistics.add(posterior, odds, model.occurrence.mode(posterior.logits))
            bar.update(len(x))
    return statistics.read()


def log_odds(logits, categorical):
    """log(p / (1 - p)) of every part's occurrence, B×N×h×w twice: tells apart what as probabilities rounds to 1."""
    if not categorical:
        return logits
    nothing = torch.full_like(logits[:, :1], -1e9)  # log-probability of a part that is not there
    before = torch.cat([nothing, logits[:, :-1].logcumsumexp(dim=1)], dim=1)  # of the parts before each, and after it
    after = torch.cat([nothing, logits.flip(1)[:, :-1].logcumsumexp(dim=1)], dim=1).flip(1)
    return logits - torch.logaddexp(before, after)


class Statistics:
    """Running sums over batches, and the surest cell of each part in each image."""

    def __init__(self):
        self.sums, self.surest, self.placed = {}, [], 0.0

    def add(self, posterior, odds, placed):
        """Add a batch. `odds`: see log_odds; `placed`: z_occ in evaluation: Q^O, or zeros and ones under --hard."""
        maps = posterior.occurrence.flatten(2).double()  # B×N×l
        cells = maps.movedim(1, 0).flatten(1)  # N×(B·l)
        appearance = posterior.mean.double()  # B×N×d
        sums = {
            "cell": maps.sum(0),  # N×l
            "cell_square": maps.square().sum(0),
            "products": cells @ cells.T,  # N×N
            "appearance": appearance.sum(0),  # N×d
            "spread": torch.einsum("bnd,bne->nde", appearance, appearance),
            "strongest": torch.bincount(maps.argmax(1).flatten(), minlength=len(cells)),
        }
        self.sums = {name: self.sums.get(name, 0) + value for name, value in sums.items()}
        self.placed = placed.amax(dim=(0, 2, 3)).clamp_min(self.placed)
        best, place = odds.flatten(2).max(dim=2)  # B×N
        probability = posterior.occurrence.flatten(2).gather(2, place[..., None])[..., 0]
        self.surest.append([values.cpu() for values in (best, probability, place.int())])

    def read(self):
        """The figures of the parts: a dict of arrays of N; of the surest cell in each image, B×N: odds, highest (the
        probability), cell; order, N×at most B: the surest images; correlation: N×N, deviations: N×d, directions: N×d×d.
        """
        odds, highest, cell = (torch.cat(values).numpy() for values in zip(*self.surest))
        order = np.argsort(-odds, axis=0, kind="stable")[: COLUMNS + MOST].T.copy()
        sums = {name: value.double().cpu().numpy() / len(odds) for name, value in self.sums.items()}
        rate, cells = sums["cell"].mean(1), sums["cell"].shape[1]
        spread = np.einsum("ndd->nd", sums["spread"]) - sums["appearance"] ** 2  # N×d, each latent by itself
        variance = np.maximum((sums["cell_square"] - sums["cell"] ** 2).max(1), spread.max(1))
        deviations, directions = principal(sums["appearance"], sums["spread"])
        return {
            "odds": odds, "highest": highest, "cell": cell, "order": order, "strongest": highest.max(0),
            "rate": rate, "strongest_share": sums["strongest"] / cells, "placed": self.placed.cpu().numpy(),
            "lives": (variance > ACTIVE) & (self.placed.cpu().numpy() >= ABSENT), "variance": variance,
            "correlation": correlation(rate, sums["products"] / cells),
            "deviations": deviations, "directions": directions,
        }


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
    kept = 1 - torch.eye(model.parts, device=x.device)  # a row for each part: all but this
    kept = torch.cat([torch.ones_like(kept[:1]), kept])
    errors, pairs = np.zeros(len(kept)), list(zip(x.split(batch_size), target.split(batch_size)))
    with tqdm(total=len(kept) * len(pairs), desc="switch off", leave=False, disable=None) as bar:
        for some, wanted in pairs:
            latents = model.latents(model.encode(some)).unflatten(1, (model.parts, -1))  # B×N×d×h×w
            for number, row in enumerate(kept):
                copy = model.decoder((latents * row[:, None, None, None]).flatten(1, 2))  # B×C×H×W
                errors[number] += float((copy - wanted).square().sum(dtype=torch.float64)) / len(x)
                bar.update()
    return float(errors[0]), errors[1:] - errors[0]


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


class Gallery(NamedTuple):
    """A part in the images where it is surest, the surest first."""

    part: int
    posterior: modules.Posterior  # of these images
    places: list  # of dicts, see open_gallery
    patches: list  # PIL images around the surest cells, at most LARGE pixels wide
    framed: list  # tiles of what the model sees of each photograph, LARGE pixels wide, with a frame around the patch
    maps: list  # the same tiles, where the part occurs highlighted
    photographs: list  # data URIs


@torch.no_grad()
def open_gallery(settings, model, images, found, part, count):
    """The Gallery of a part's `count` surest images. Boxes: left, top, right, bottom, the last two just outside."""
    source, size = images.source, settings.size
    numbers = found["order"][part, :count]
    gallery = Gallery(part, model.encode(images.chosen(numbers)), *([] for _ in range(5)))
    occurrence = gallery.posterior.occurrence[:, part].cpu().numpy()  # B×h×w
    for number, probability in zip(numbers.tolist(), occurrence):
        photograph = source.image(number).convert("RGB")
        cell = np.divmod(found["cell"][number, part], model.grid)  # row, column
        seen, box = boxes(photograph.size, size, (np.array(cell) + 0.5) * size / model.grid, settings.patch_size)
        crop = figures.resized(photograph.crop(seen), LARGE)
        gallery.places.append({
            "image": number, "file": file_of(settings, source, number), "class": class_of(source, number),
            "probability": float(found["highest"][number, part]), "cell": [int(place) for place in cell],
            "box": box, "of": list(photograph.size),
        })
        frame = (np.array(box) - seen[:2] * 2) * LARGE / (seen[2] - seen[0])  # the box in the crop
        gallery.patches.append(photograph.crop(box))
        gallery.framed.append(figures.framed(crop, frame.tolist()))
        gallery.maps.append(figures.highlight(crop, probability, max(SURE, found["strongest"][part])))
        for picture, longest in ((gallery.patches[-1], LARGE), (photograph, WHOLE)):
            picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)  # which never enlarges
        gallery.photographs.append(as_uri(photograph))
    return gallery


def boxes(image_size, size, centre, patch):
    """Two boxes in a photograph of image_size (width, height), in whole pixels of it.

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


def file_of(settings, source, number):
    """The file of an image as seen from the data folder; None of what is drawn or bundled."""
    if not hasattr(source, "path"):
        return None
    return printable(os.path.relpath(source.path(number), settings.data_folder))


def class_of(source, number):
    return None if source.labels is None else source.classes[source.labels[number]]


# ---------------------------------------------------------------------------------------------------- findings


def shared_places(model, found, galleries):
    """At how many of the places of part a's gallery part b is in its element, too: shares, N×N (a, b).

    That is: b has there, or in a cell next to it, log-odds as high as it has at best in the UPPER part of all images.
    """
    wanted, shares = np.quantile(found["odds"], 1 - UPPER, axis=0), []  # N
    for gallery in galleries:
        odds = log_odds(gallery.posterior.logits, model.occurrence.categorical)
        nearby = F.max_pool2d(odds, 3, stride=1, padding=1).cpu().numpy()  # B×N×h×w
        there = [values[:, *place["cell"]] >= wanted for values, place in zip(nearby, gallery.places)]  # B times N
        shares.append(np.mean(there, axis=0))
    return np.array(shares)


def describe(found, gallery):
    """What parts.json says of a part."""
    part, highest = gallery.part, found["highest"][:, gallery.part].astype(float)
    classes = Counter(place["class"] for place in gallery.places if place["class"] is not None)
    unused = "does not vary" if found["variance"][part] <= ACTIVE else None
    return {
        "part": part,
        "rate": float(found["rate"][part]),
        "strongest_share": float(found["strongest_share"][part]),
        "sure_share": float((highest > SURE).mean()),
        "confidence": {"highest": float(highest.max()), "mean": float(highest.mean())},
        "error_rise_when_off": float(found["rises"][part]),
        "error_rise_percent": 100 * float(found["rises"][part]) / max(found["error"], 1e-9),
        "dead": "never occurs" if found["placed"][part] < ABSENT else unused,
        "near_duplicates": near_duplicates(found, part),
        "classes_of_top_places": dict(classes.most_common()),
        "places": gallery.places,
    }


def near_duplicates(found, part):
    """The living parts that do what `part` does, the nearest first: a list of dicts.

    Either their maps correlate, or each of the two is in its element at half of the other's surest places: then they
    show the same to whom looks at their patches, even if one of them occurs more widely.
    """
    shared = np.minimum(found["shared"], found["shared"].T)[part]
    alike = found["correlation"][part]
    is_double = ((alike >= CORRELATED) | (shared >= SHARED)) & found["lives"] & found["lives"][part]
    is_double[part] = False
    return [
        {"part": int(other), "correlation": float(alike[other]), "shared_places": float(shared[other])}
        for other in np.argsort(-shared - alike, kind="stable") if is_double[other]
    ]


def choose_part(parts):
    """The number of the part whose absence costs most: of those that surely occur somewhere, or else of the living."""
    living = [part for part in parts if part["dead"] is None]
    sure = [part for part in living if part["confidence"]["highest"] > SURE]
    return by_contribution(sure or living or parts)[0]["part"]


def by_contribution(parts):
    """The parts whose absence costs most first."""
    return sorted(parts, key=lambda part: -part["error_rise_when_off"])


def remarks(part):
    """What a person should know before believing in a part: a list of words."""
    if part["dead"] is not None:
        return [f"not in use: {part['dead']}"]
    alike = [f"like part {near['part']}" for near in part["near_duplicates"][:2]]
    return alike + ["sure nowhere"] * (part["confidence"]["highest"] <= SURE)


# ---------------------------------------------------------------------------------------------------- drawing


def label(part):
    """The words beside a part."""
    costs = f"without it: error {part['error_rise_percent']:+.1f} %"
    return [f"part {part['part']}", costs, f"sure in {100 * part['sure_share']:.1f} % of images"]


def captions(gallery):
    """The probability in the surest cell, and the image's class."""
    return [f"{place['probability']:.2f} {place['class'] or ''}" for place in gallery.places]


def which(shown, parts):
    some = f"the {len(shown)} of {parts}" if len(shown) < parts else "all"
    return f"Shown are {some} parts, those first whose absence costs most."


def draw_parts(findings, shown):
    """The patches of each part in `shown`, a list of pairs: what describe() says of it, and its Gallery."""
    rows = [Row(label(part), gallery.patches, captions(gallery), remarks(part)) for part, gallery in shown]
    where = f"{findings['images']:,} images of {findings['dataset']} ({findings['split']})"
    heading = f"Where each part is surest in {where}, one place in an image; below it the part's probability there. "
    return table(rows, [heading + which(shown, len(findings['parts']))])


def draw_illustration(gallery, strongest, patches):
    """Images, where the part occurs in them, and the same part in other images."""
    where = ["where it occurs", f"in colour: {max(SURE, strongest):.2f}", "line: above one half"]
    images = [f"part {gallery.part}", "frame: its surest place"]
    rows = [Row(images, gallery.framed[:COLUMNS]), Row(where, gallery.maps[:COLUMNS])]
    for first in range(COLUMNS, min(COLUMNS + patches, len(gallery.places)), COLUMNS):
        some = slice(first, min(first + COLUMNS, COLUMNS + patches))
        words = ["the same part", "in other images"] if first == COLUMNS else []
        rows.append(Row(words, gallery.patches[some], captions(gallery)[some]))
    return table(rows, [f"Part {gallery.part} in the images where it is surest, and in others."], LARGE)


def draw_swap(model, images, gallery, direction):
    """The part's appearance in images B put into images A, both among its surest, and unlike in `direction`."""
    part, posterior = gallery.part, gallery.posterior
    appearance = posterior.mean[: 2 * COLUMNS, part].cpu().numpy()  # B×d
    order = np.argsort(appearance @ direction, kind="stable")
    half = max(1, len(order) // 2)
    a, b = order[:half], order[-half:]
    mine, other = (modules.Posterior(*(values[some] for values in posterior)) for some in (a, b))
    before, after = (decoded(model, images, each) for each in (mine, swapped(mine, other, part)))
    changes = np.abs(after.astype(float) - before).mean(axis=3) / 255  # B×H×W
    most = max(1e-9, changes.max())
    rows = [
        Row(["images A", f"frame: part {part}"], [gallery.framed[place] for place in a]),
        Row(["images B", f"frame: part {part}"], [gallery.framed[place] for place in b]),
        Row(["A, reconstructed"], list(before)),
        Row(["the same with the", f"appearance of part {part}", "in B"], list(after)),
        Row(["the difference", f"yellow: {100 * most:.0f} % of white"],
            [figures.lay_over(tile, change / most) for tile, change in zip(before, changes)]),
        Row([f"where part {part} occurs", "in A"], [gallery.maps[place] for place in a]),
    ]
    heading = f"Part {part} takes the appearance that it has in B and keeps its places in A; all other parts stay."
    return table(rows, [heading], LARGE)


def swapped(mine, other, part):
    """The Posterior `mine`, with the appearance that `part` has in `other`."""
    mean = mine.mean.clone()  # B×N×d
    mean[:, part] = other.mean[:, part]
    return mine._replace(mean=mean)


def draw_traversal(model, images, found, shown):
    """For each part in `shown`: its surest image, decoded with the part's appearance moved."""
    directions, rows = range(min(DIRECTIONS, model.appearance_size)), []
    words = ["", *("as it is" if step == 0 else f"{step:+g} sd" for step in STEPS)]
    for part, gallery in shown:
        tiles = [gallery.framed[0], gallery.maps[0]]
        for direction in directions:
            vector, deviation = (found[name][gallery.part, direction] for name in ("directions", "deviations"))
            tiles += [None, *decoded(model, images, moved(gallery.posterior, gallery.part, deviation * vector))]
        rows.append(Row(label(part), tiles, ["image", "where", *words * len(directions)], remarks(part)))
    heading = [
        "Each part in the image where it is surest; its appearance is moved along the directions in which it varies",
        "most over all images, the strongest left, in standard deviations (sd). Its places and all other parts stay.",
    ]
    return table(rows, [*heading, which(shown, model.parts)])


def moved(posterior, part, deviation):
    """The first image of a Posterior, with the appearance of `part` moved by STEPS times `deviation`: a Posterior."""
    first = modules.Posterior(*(values[:1].repeat_interleave(len(STEPS), dim=0) for values in posterior))
    first.mean[:, part] += torch.tensor(np.outer(STEPS, deviation)).to(first.mean)
    return first


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
    runtime.write(folder / "parts.html", lambda file: file.write(page.encode()))
    runtime.write(folder / "parts.csv", lambda file: file.write(listing.encode()))
    runtime.write_json(folder / "parts.json", findings)


def list_images(settings, source, found):
    """A line for each image, a column for each part, its highest probability in the image: CSV as str."""
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(["image", "class", *(f"part {part}" for part in range(settings.num_parts))])
    for number, values in enumerate(found["highest"]):
        name = file_of(settings, source, number) or number
        lines.writerow([name, class_of(source, number), *(f"{value:.4f}" for value in values)])
    return text.getvalue()


def draw_page(findings, pairs):
    """parts.html as str: all that it shows is in it."""
    photographs, rows = {}, []
    for part, gallery in pairs:
        places = zip(gallery.places, map(as_uri, gallery.patches), map(as_uri, gallery.maps))
        rows.append((part, list(places), remarks(part)))
        photographs |= zip((place["image"] for place in gallery.places), gallery.photographs)
    most = max(0.1, *(part["error_rise_percent"] for part, _ in pairs))
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    return page.render(findings, rows=rows, photographs=photographs, most=most, sees=sees(findings))


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


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ parts | length }} parts in {{ images }} images</title>
<style>
  body { font: 15px/1.45 system-ui, "DejaVu Sans", sans-serif; color: #222; background: #f4f4f2; margin: 0 auto;
         max-width: 1300px; padding: 1.5rem }
  h1, h2 { font-size: 1.2rem; margin: 0 } h1 { font-size: 1.6rem } p { margin: .4rem 0; max-width: 60rem; color: #555 }
  section { background: white; border-radius: 9px; padding: 1rem 1.2rem; margin: 1rem 0; box-shadow: 0 1px 3px #0002 }
  header { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: center; color: #555 } h2 { color: #222 }
  .bar { width: 120px; height: 8px; border-radius: 4px; background: linear-gradient(#d61, #d61) no-repeat #e8e8e4 }
  .remark { background: #fbe9e7; color: #a02020; border-radius: 99px; padding: 0 .6rem }
  .places { display: grid; grid-template-columns: repeat(auto-fill, minmax(94px, 1fr)); gap: .6rem; margin-top: .8rem }
  button { all: unset; cursor: zoom-in; min-width: 0; font-size: 12px; line-height: 1.35 }
  button:focus-visible { outline: 3px solid #d6671b } button:hover img { filter: brightness(1.1) }
  button img { width: 100%; aspect-ratio: 1; border-radius: 4px; display: block; margin-bottom: 3px }
  button span { display: block; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; color: #777 }
  button b { color: #222 }
  dialog { border: 0; border-radius: 10px; padding: 1rem 1.2rem } dialog::backdrop { background: #000a }
  .pair { display: flex; gap: 1rem; flex-wrap: wrap } .pair img { height: min(55vh, 440px); display: block }
  .pair div { position: relative } #frame { position: absolute; box-sizing: border-box; border: 3px solid #ffd200;
  outline: 1px solid #222 } img[src^="data:image/png"] { image-rendering: pixelated }
</style>
<h1>{{ parts | length }} parts in {{ "{:,}".format(images) }} images</h1>
<p>Data: {{ dataset }}, {{ split }}. Each part is shown where the model is surest of it, one place in an image, the
surest first. The number is the probability that the part occurs there; {{ sees }}. Click a patch to see the
whole image.</p>
<p>The parts whose absence costs most come first: the bar shows how the reconstruction error rises without them.</p>
{% for part, places, remarks in rows %}
<section id="part-{{ part.part }}"><header><h2>part {{ part.part }}</h2>
  <div class="bar" style="background-size: {{ [0, 100 * part.error_rise_percent / most] | max }}% 100%"></div>
  <span>without it the error rises by {{ part.error_rise_percent | round(1) }} %</span>
  <span>sure in {{ (100 * part.sure_share) | round(1) }} % of the images</span>
  {% for name, count in part.classes_of_top_places.items() %}<span>{{ name }} {{ count }}</span>{% endfor %}
  {% for remark in remarks %}<span class="remark">{{ remark }}</span>{% endfor %}</header>
  <div class="places">{% for place, patch, occurs in places %}{% set name = place.file or "image %s" % place.image %}
    <button data-photograph="{{ place.image }}" data-occurs="{{ occurs }}" data-frame="
      left: {{ 100 * place.box[0] / place.of[0] }}%; width: {{ 100 * (place.box[2] - place.box[0]) / place.of[0] }}%;
      top: {{ 100 * place.box[1] / place.of[1] }}%; height: {{ 100 * (place.box[3] - place.box[1]) / place.of[1] }}%"
      title="part {{ part.part }} in {{ name }}"><img src="{{ patch }}" alt="">
      <span><b>{{ "%.2f" | format(place.probability) }}</b> {{ place["class"] or "" }}</span>
      <span>{{ name.split("/")[-1] }}</span></button>{% endfor %}
  </div></section>
{% endfor %}
<dialog><p id="words"></p>
  <div class="pair"><div><img id="whole" alt="the photograph"><i id="frame"></i></div>
    <div><img id="occurs" alt="where the part occurs"></div></div>
  <p>Left the whole image, right what the model sees of it: there it keeps its colours where the part occurs; the line
  encloses what is above one half.</p></dialog>
<script>
  const photographs = {{ photographs | tojson }}, at = (id) => document.getElementById(id);
  const dialog = document.querySelector("dialog");
  dialog.onclick = () => dialog.close();
  for (const button of document.querySelectorAll("button")) button.onclick = () => {
    at("whole").src = photographs[button.dataset.photograph];
    at("occurs").src = button.dataset.occurs;
    at("frame").style = button.dataset.frame;
    at("words").textContent = button.title;
    dialog.showModal();
  };
</script></html>
"""


if __name__ == "__main__":
    runtime.start(main)
