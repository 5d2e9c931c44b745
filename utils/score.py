"""Score the parts of a trained PatchVAE against images whose every pixel has a known label.

    python utils/score.py --pretrained scratch/model.pt
    python utils/score.py --pretrained scratch/model.pt --masks DIR --ignore 255

Without --masks the images are drawn ones. Four things are known of a pixel, each scored by itself: figure or ground,
local geometry (straight edge by direction, corner, arc, interior), shape, colour. A cell has its commonest label.

With --masks DIR the images are files, and DIR mirrors --data-folder: the label map of DATA/train/bee/1.jpg is
DIR/train/bee/1.png, a grey or palette PNG of the image's size with one whole number per pixel. It is resized and
cropped as the image is, each pixel taking the nearest label. Scored are the cells of which one label covers at least
three quarters of the pixels (48 of 64), and the labelled pixels of all cells. Pixels of --ignore count as unlabelled.

Beside the model stand the same model with random weights, k-means with as many clusters on raw and on contrast-
normalised patches (of one cell; with --masks of one, two or three, whichever agrees best on training images), shuffled
labels, and the ceiling: the truth at the grid. Everything is fitted on training images and scored on test images.
"""

import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn import metrics
from sklearn.cluster import KMeans
from torchvision.transforms import InterpolationMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import modules
from datasets import open_split
from utils import batches, options, runtime, shapes, trained
from utils.runtime import RunError, UsageError

# Letters: B images, N parts, L labels, M locations (cells or pixels); maps, M×N: how surely each part occurs there.
MASK = "mask"  # what is labelled of image files
# What is labelled of drawn images, and how many labels there are; label 0 is the ground.
CLASSES = {"geometry": 12, "kind": 1 + len(shapes.KINDS), "colour": 1 + len(shapes.COLOURS), "figure": 2}
GROUND, INTERIOR, EDGE, CORNER, ARC = 0, 1, 2, 10, 11  # local geometry; 2 to 9: edges, turned by 22.5 degrees each
CLEAR = 0.75  # a cell of an image file is scored if one label covers this share of its pixels
BATCH = 100  # images at a time; as many take part in the swap test
PATCHES = 20_000  # at most, that k-means is fitted to
PIXEL_IMAGES = 250  # test images that are scored at full resolution: a million pixels at 64 px
SUREST = 50  # locations of a part that purity looks at
MODEL, RANDOM, RAW, CONTRAST = "PatchVAE", "random weights", "k-means raw", "k-means contrast"
PRINTED = {
    MASK: ("nmi", "ari", "miou_matched", "pixel_nmi", "pixel_ari", "pixel_miou_matched"),
    "geometry": ("nmi", "boundary_nmi", "pixel_nmi", "ari", "fg_nmi", "fg_ari", "bg_nmi", "miou_matched", "miou_voted",
                 "ap", "ap_gain", f"purity_at_{SUREST}"),
    "kind": ("fg_nmi",), "colour": ("fg_nmi",), "swap": ("inside", "outside"),
}


class Labelled(NamedTuple):
    """Images and the truth about them; `cells` and `pixels` by what is labelled: MASK, or the keys of CLASSES."""

    images: torch.Tensor  # B×C×H×W normalised, on the device
    cells: dict  # B×h×w each: the commonest label of a cell
    scored: np.ndarray  # B×h×w: whether the cell is scored
    pixels: dict  # P×H×W each, of the first P <= PIXEL_IMAGES images; -1: no label


@torch.no_grad()
def main(argv=None):
    """Score as `argv` says; returns what is written as JSON: a dict."""
    settings, model, device = trained.open_model(build_parser(), argv)
    output = Path(settings.output or Path(settings.pretrained).with_name("scores.json"))
    output = output / "scores.json" if output.is_dir() else output
    opened = batches.open_batches(settings, open_sources(settings), device)
    labels, classes = (read_masks if settings.masks else draw_labels)(settings, [found.source for found in opened])
    train, test = (label_images(*pair, settings) for pair in zip(opened, labels))
    torch.manual_seed(settings.seed)
    models = {MODEL: model, RANDOM: modules.build_model(options.describe_model(settings)).to(device).eval()}
    clusters = {name: cluster(train, test, name == CONTRAST, settings) for name in (RAW, CONTRAST)}
    protocol = describe(settings, train, test, classes, {name: width for name, (_, width) in clusters.items()})
    print("\n".join(f"{name}: {text}" for name, text in protocol.items()))
    maps = {name: [occurrence(found, split.images) for split in (train, test)] for name, found in models.items()}
    maps |= {name: found for name, (found, _) in clusters.items()}
    scores = score_all(maps, train, test, classes, settings.seed)
    for name, found in models.items():
        scores[name]["swap"] = swap_test(found, test.images[:BATCH], settings.scale)
    print("", *in_words(scores), "", sep="\n")
    content = {"protocol": protocol, "scores": scores}
    output.parent.mkdir(parents=True, exist_ok=True)
    runtime.write_json(output, content)
    print(f"every figure is in {runtime.relative(output)}")
    return content


def build_parser():
    parser = options.Parser(description=__doc__)
    trained.add_options(parser)
    parser.section("protocol")
    parser.option("--masks", options.path, None, "DIR", "label maps of a data set of image files (see above)")
    parser.option("--ignore", options.whole(0), None, "LABEL", "labels of --masks to leave out, as void", nargs="+")
    parser.option("--train-images", options.whole(1), 500, "K",
                  "training images that thresholds, matchings and k-means are fitted to")
    parser.option("--test-images", options.whole(2), 2000, "K",
                  "test images that are scored; fewer are faster, and less certain")
    parser.option("--seed", options.seed, 1, "K", "of random weights, k-means and the shuffle")
    parser.option("--output", options.path, None, "FILE", "where the figures go (default: scores.json by the model)")
    return parser


def open_sources(settings):
    """The image sources to fit on and to score on. Raises an error where there are no parts, or no truth about them."""
    name, masks, chosen = settings.dataset, settings.masks, []
    if settings.arch != "patchy":
        raise RunError(f"{settings.pretrained} has no parts (--arch {settings.arch}); give a model of --arch patchy")
    if settings.ignore and not masks:
        raise UsageError("--ignore names labels of --masks; give both, or drop it")
    for split, count in (("unlabelled", settings.train_images), ("test", settings.test_images)):
        source = open_split(name, settings.data_folder, split, settings.size)
        if masks and not hasattr(source, "path"):
            raise UsageError(f"--masks belongs to image files, --dataset {name} has none; use --dataset folder")
        if not masks and not hasattr(source, "scene"):
            raise UsageError(f"--dataset {name} does not know its pixels; use shapes or binshapes, or give --masks")
        # Neighbouring files are often of one scene, drawn images are not.
        order = np.random.default_rng(0).permutation(len(source)) if masks else np.arange(len(source))
        chosen.append(source.subset(order[:count]))
    return chosen


# ---------------------------------------------------------------------------------------------------- labels


def draw_labels(settings, sources):
    """Labels of drawn images, a dict of B×H×W for each source; the number of classes of what is scored, a dict."""
    labels, classes = [], dict(CLASSES)
    for source in sources:
        truths = [label_pixels(source.scene(index), source.size) for index in range(len(source))]
        labels.append({name: np.stack([truth[name] for truth in truths]) for name in classes})
    if sources[0].channels == 1:
        del classes["colour"]
    return labels, classes


def label_pixels(scene, size):
    """The truth about each pixel of a shapes.Scene: a dict of size×size int arrays, see CLASSES."""
    owner = scene.owner(size)  # 0, or 1, 2, 3: which figure
    kind = np.array([0, *(1 + shapes.KINDS.index(figure.kind) for figure in scene.figures)])
    colour = np.array([0, *(1 + figure.hue for figure in scene.figures)])
    known = {"kind": kind[owner], "colour": colour[owner], "figure": np.minimum(owner, 1)}
    return {"geometry": label_geometry(scene, size), **known}


def label_geometry(scene, size, width=1 / 32):
    """Ground, interior, and, within `width` (a share of the side) of a visible outline, the kind of outline: H×W."""
    centres = (np.arange(size) + 0.5) / size
    points = np.stack(np.meshgrid(centres, centres), axis=-1)  # H×W×(x, y)
    geometry = np.full((size, size), GROUND)
    for figure in scene.figures:  # a higher figure hides the outlines below it
        geometry[figure.coverage(size) >= 128] = INTERIOR
        distance, outline = outline_of(figure, points, corner_radius=1.5 * width)
        geometry = np.where(distance <= width, outline, geometry)
    return geometry


def outline_of(figure, points, corner_radius):
    """How far points, H×W×2, are from a figure's outline, and what the outline is there: H×W floats, H×W labels."""
    if figure.kind == "circle":
        distance = np.abs(np.linalg.norm(points - [figure.x, figure.y], axis=-1) - figure.reach)
        return distance, np.full(distance.shape, ARC)
    corners = figure.corners()  # k×2
    sides = np.roll(corners, -1, axis=0) - corners  # k×2, from each corner to the next
    offsets = points[:, :, None] - corners  # H×W×k×2
    along = np.clip((offsets * sides).sum(axis=-1) / np.square(sides).sum(axis=-1), 0, 1)  # H×W×k, 0 at the corner
    distances = np.linalg.norm(offsets - along[..., None] * sides, axis=-1)  # H×W×k
    degrees = np.degrees(np.arctan2(sides[:, 1], sides[:, 0])) % 180
    edges = EDGE + np.round(degrees / 22.5).astype(int) % 8
    is_corner = np.linalg.norm(offsets, axis=-1).min(axis=-1) <= corner_radius
    return distances.min(axis=-1), np.where(is_corner, CORNER, edges[distances.argmin(axis=-1)])


def read_masks(settings, sources):
    """The same of image files: the labels that occur are numbered 0, 1, … in ascending order, ignored ones -1."""
    masks = [np.stack([read_mask(settings, source, index) for index in range(len(source))]) for source in sources]
    values = np.setdiff1d(np.concatenate([np.unique(mask) for mask in masks]), settings.ignore or [])
    labels = [np.where(np.isin(mask, values), np.searchsorted(values, mask), -1) for mask in masks]
    return [{MASK: found} for found in labels], {MASK: len(values)}


def read_mask(settings, source, index):
    """The label map of image `index`, resized and cropped as the image is: size×size. Raises RunError."""
    image_path = source.path(index)
    path = Path(settings.masks, os.path.relpath(image_path, settings.data_folder)).with_suffix(".png")
    try:
        with Image.open(path) as mask:
            labels, mode = np.array(mask), mask.mode
    except FileNotFoundError:
        raise RunError(f"{path}: no label map for {image_path}; --masks mirrors --data-folder: add it") from None
    except Exception as error:  # Pillow raises many kinds for a broken file
        raise RunError(f"{path}: cannot be decoded ({error}); repair it") from None
    if labels.ndim != 2:
        raise RunError(f"{path}: mode {mode} is no label map; save one number per pixel, grey or with a palette")
    (height, width), size = labels.shape, source.image(index).size
    if (width, height) != size:
        raise RunError(f"{path}: {width}x{height} pixels, its image {size[0]}x{size[1]}; make the sizes equal")
    labels = Image.fromarray(labels.astype(np.int32))
    return np.asarray(batches.resize_and_crop(labels, settings.size, InterpolationMode.NEAREST))


def label_images(opened, labels, settings):
    """All images of the Batches `opened` with the labels of their pixels, dict of B×H×W: Labelled. Raises RunError."""
    found = {name: majority(values, settings.scale) for name, values in labels.items()}
    cells = {name: commonest for name, (commonest, _) in found.items()}
    scored = np.all([share >= (CLEAR if settings.masks else 0) for _, share in found.values()], axis=0)
    if settings.masks and len(np.unique(cells[MASK][scored])) < 2:
        raise RunError(f"{settings.masks}: fewer than two labels fill any cell; see --ignore and --size")
    images = torch.cat([x for x, _ in opened.in_order(BATCH)])
    return Labelled(images, cells, scored, {name: values[:PIXEL_IMAGES] for name, values in labels.items()})


def majority(labels, cell):
    """The commonest label of every cell, the lowest of equals, and its share of the pixels: B×H×W -> B×h×w twice."""
    cells = labels.reshape(len(labels), -1, cell, labels.shape[2] // cell, cell)
    counts = np.stack([(cells == label).sum(axis=(2, 4)) for label in range(max(labels.max(), 0) + 1)])  # L×B×h×w
    return counts.argmax(axis=0), counts.max(axis=0) / cell**2


def describe(settings, train, test, classes, widths):
    """What was done, in words: a dict of str. `widths`: of the patches of each k-means, in cells."""
    cell, rule = settings.scale, "label of a cell: its commonest"
    if settings.masks:
        rule = (f"{classes[MASK]} labels, ignored: {' '.join(map(str, settings.ignore or ['-']))}; scored: "
                f"cells with at least {CLEAR * cell**2:g} of {cell**2} pixels of one label, "
                f"{test.scored.sum():,} of {test.scored.size:,}")
    return {
        "model": f"{settings.pretrained}, {settings.num_parts} parts (K) of size {settings.hidden_size}",
        "data": f"{settings.dataset}, {settings.size} px, cells of {cell} px; {rule}",
        "protocol": f"fitted on {len(train.images):,} training images, scored on {len(test.images):,} test images "
        f"(pixels: {min(PIXEL_IMAGES, len(test.images))}), seed {settings.seed}; the part of a cell: the strongest",
        "patches": ", ".join(f"{name} {width * cell} px" for name, width in widths.items()),
    }


# ---------------------------------------------------------------------------------------------------- maps


def occurrence(model, images):
    """Where the parts of a model occur: B×C×H×W -> B×N×h×w on the CPU."""
    return torch.cat([model.encode(x).occurrence.float().cpu() for x in images.split(BATCH)])


def cluster(train, test, contrast, settings):
    """Maps B×K×h×w of training and of test images: how close patches are to the K centres of a k-means.

    Returned with the patches' width in cells: with --masks that which agrees best with labels of training images.
    """
    found, cell, truth = {}, settings.scale, next(iter(train.cells.values()))[train.scored]
    chosen = np.random.default_rng(settings.seed).permutation(train.scored.size)[:PATCHES]
    for width in (1, 2, 3) if settings.masks else (1,):
        centres = KMeans(settings.num_parts, n_init=3, random_state=settings.seed)
        centres.fit(patches(train.images, cell, width, contrast, chosen))
        maps = closeness(centres, train.images, cell, width, contrast)
        found[agreement(maps.argmax(dim=1).numpy()[train.scored], truth)["nmi"]] = maps, centres, width
    maps, centres, width = found[max(found)]
    return [maps, closeness(centres, test.images, cell, width, contrast)], width


def closeness(centres, images, cell, width, contrast):
    """How close all patches are to each centre of a fitted KMeans: B×C×H×W -> B×K×h×w."""
    distances = [centres.transform(patches(x, cell, width, contrast)) for x in images.split(BATCH)]  # (B·h·w)×K
    grid = images.shape[-1] // cell
    return -torch.from_numpy(np.concatenate(distances)).unflatten(0, (-1, grid, grid)).movedim(-1, 1)


def patches(x, cell, width, contrast, chosen=None):
    """Patches of `width` cells a side around all cells or those `chosen`, borders repeated: B×C×H×W -> M×(C·P).

    `contrast`: less their channel means, and divided by their norm; flat ones become 0.
    """
    side, rim = width * cell, (width - 1) * cell // 2
    views = F.pad(x.cpu(), [rim] * 4, mode="replicate").unfold(2, side, cell).unfold(3, side, cell)
    views = views.permute(0, 2, 3, 1, 4, 5)  # B×h×w×C×side×side, no copy
    found = views.flatten(0, 2) if chosen is None else views[np.unravel_index(chosen, views.shape[:3])]
    found = found.flatten(2)  # M×C×P
    if contrast:
        found = found - found[..., :1]  # first, so that a flat patch gives exactly 0
        found = found - found.mean(dim=2, keepdim=True)
        norm = found.square().sum(dim=(1, 2), keepdim=True).sqrt()
        found = found / torch.where(norm > 0, norm, 1)
    return found.flatten(1).numpy()


# ---------------------------------------------------------------------------------------------------- figures


def agreement(found, labels, prefix=""):
    """NMI (arithmetic mean) and adjusted Rand index of two labellings; None each where the labels do not differ."""
    differ = len(np.unique(labels)) > 1
    return {f"{prefix}nmi": float(metrics.normalized_mutual_info_score(labels, found)) if differ else None,
            f"{prefix}ari": float(metrics.adjusted_rand_score(labels, found)) if differ else None}


def strongest(found, labels, fitted, has_ground, prefix=""):
    """Figures of the strongest parts, M, against labels, M: a dict. `fg_…`: without the ground, label 0.

    `fitted`, N×L, says how often each part meets each label in training. Mean IoU is of labels with the part that is
    matched to each there, and with all parts that vote for it.
    """
    figures = agreement(found, labels, prefix)
    if has_ground:
        figures |= agreement(found[labels > 0], labels[labels > 0], f"{prefix}fg_")
    union = fitted.sum(axis=1, keepdims=True) + fitted.sum(axis=0) - fitted
    parts, names = linear_sum_assignment(fitted / np.maximum(union, 1), maximize=True)
    matched = np.full(len(fitted), -1)  # the label of each part
    matched[parts] = names
    for how, label_of in (("matched", matched), ("voted", fitted.argmax(axis=1))):
        iou = metrics.jaccard_score(labels, label_of[found], labels=np.unique(labels), average="macro")
        figures[f"{prefix}miou_{how}"] = float(iou)
    return figures


def precision(scores, where):
    """Average precision of scores M as a detector of M booleans, and how far it is above chance, where 1 is perfect."""
    chance = where.mean()
    found = float(metrics.average_precision_score(where, scores)) if chance > 0 else 0.0
    return found, (found - chance) / (1 - chance) if 0 < chance < 1 else 0.0


def detection(train_maps, train, test_maps, test, classes):
    """Every map as a detector of the label that it detects best in training: means over the parts."""
    best = [np.argmax([precision(scores, train == label)[1] for label in range(classes)]) for scores in train_maps.T]
    found = [precision(scores, test == label) for scores, label in zip(test_maps.T, best)]
    return dict(zip(("ap", "ap_gain"), np.mean(found, axis=0).tolist()))


def purity(maps, labels):
    """Of the SUREST locations of each part, the share that has their commonest label: mean over the parts."""
    surest = min(SUREST, len(maps))
    top = np.argpartition(-maps, surest - 1, axis=0)[:surest]  # surest×N
    return float(np.mean([np.bincount(column).max() / surest for column in labels[top].T]))


def ground_threshold(maps, labels):
    """The strength of the strongest part that best tells figure from ground: the largest hit rate less false alarms."""
    if labels.min() > 0 or labels.max() == 0:
        return float(maps.min())
    false_alarms, hits, thresholds = metrics.roc_curve(labels > 0, maps.max(axis=1))
    return float(thresholds[1:][np.argmax((hits - false_alarms)[1:])])  # the first is infinite


def score(name, train_maps, test_maps, train, test, classes):
    """All figures of maps B×N×h×w for what `name` labels: a dict of floats, None for what is undefined."""
    fitting = train_maps.movedim(1, -1).numpy()[train.scored], train.cells[name][train.scored]
    maps, labels = test_maps.movedim(1, -1).numpy()[test.scored], test.cells[name][test.scored]
    found, has_ground = maps.argmax(axis=1), name != MASK
    fitted = np.zeros((maps.shape[1], classes), int)
    np.add.at(fitted, (fitting[0].argmax(axis=1), fitting[1]), 1)
    figures = strongest(found, labels, fitted, has_ground)
    figures |= detection(*fitting, maps, labels, classes)
    figures[f"purity_at_{SUREST}"] = purity(maps, labels)
    if has_ground:  # background counts as one more part where no map reaches a threshold
        is_sure = maps.max(axis=1) >= ground_threshold(*fitting)
        figures |= agreement(np.where(is_sure, found + 1, 0), labels, "bg_")
    if name == "geometry":
        figures |= agreement(found[labels >= EDGE], labels[labels >= EDGE], "boundary_")
    size, pixels = test.images.shape[-2:], test.pixels[name]
    parts = test_maps[:PIXEL_IMAGES].split(BATCH)
    found = torch.cat([F.interpolate(part, size=size, mode="bilinear").argmax(dim=1) for part in parts]).numpy()
    return figures | strongest(found[pixels >= 0], pixels[pixels >= 0], fitted, has_ground, "pixel_")


def shuffled(images, seed):
    """The same images, all labels in random order."""
    mix = np.random.default_rng(seed).permuted
    cells, pixels = ({name: mix(labels) for name, labels in truth.items()} for truth in (images.cells, images.pixels))
    return images._replace(cells=cells, pixels=pixels)


def score_all(maps, train, test, classes, seed):
    """Scores by the name of what made the maps, and of what is labelled; of shuffled labels and the ceiling, too."""
    mixed = shuffled(train, seed), shuffled(test, seed + 1)
    scores = {maker: {} for maker in (*maps, "shuffled labels", "ceiling")}
    for name, count in classes.items():
        for maker, found in maps.items():
            scores[maker][name] = score(name, *found, train, test, count)
        scores["shuffled labels"][name] = score(name, *maps[MODEL], *mixed, count)
        truth = [F.one_hot(torch.from_numpy(split.cells[name]), count).movedim(-1, 1) for split in (train, test)]
        scores["ceiling"][name] = score(name, *(cells.float() for cells in truth), train, test, count)
    return scores


def swap_test(model, x, cell):
    """Mean change of pixels in [0, 1] where a part is the strongest and elsewhere if it looks as in another image."""
    posterior, std = model.encode(x), model.decoder.pixel_std
    before, strongest = model.decoder(model.latents(posterior)), posterior.occurrence.argmax(dim=1)  # B×C×H×W, B×h×w
    changes, parts = [], strongest.unique().tolist()
    for part in parts if len(parts) > 1 else []:
        mean = posterior.mean.clone()
        mean[:, part] = posterior.mean[:, part].roll(1, dims=0)  # of the image before
        after = model.decoder(model.latents(posterior._replace(mean=mean)))
        change = ((after - before).abs() * std).mean(dim=1)  # B×H×W
        inside = (strongest == part).repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)
        changes.append([change[inside].mean().item(), change[~inside].mean().item()])
    inside, outside = np.mean(changes, axis=0).tolist() if changes else (None, None)
    return {"inside": inside, "outside": outside, "ratio": inside / outside if outside else None, "parts": len(changes)}


def in_words(scores):
    """The report as lines of text: a row per figure, a column per maker of maps."""
    rows = {"": scores}
    for name, figures in PRINTED.items():
        for figure in figures if name in scores[MODEL] else ():
            values = [found.get(name, {}).get(figure) for found in scores.values()]
            rows[f"{name} {figure}"] = ["-" if value is None else f"{value:.4f}" for value in values]
    return [f"{title:24}" + "".join(f"{text:>18}" for text in row) for title, row in rows.items()]


if __name__ == "__main__":
    runtime.start(main)
