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
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, average_precision_score, normalized_mutual_info_score, roc_curve
from torchvision.transforms import InterpolationMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import modules
from datasets import open_split
from utils import batches, options, runtime, shapes, trained
from utils.runtime import RunError, UsageError

# Letters: B images, N parts, L labels, M locations (cells or pixels); maps, M×N: how surely each part occurs there.
MASK = "mask"  # what image files are labelled with; drawn images with the following, of which label 0 is the ground
CLASSES = {"geometry": len(shapes.GEOMETRY), "kind": 1 + len(shapes.KINDS)}
CLASSES |= {"colour": 1 + len(shapes.COLOURS), "figure": 2}
CLEAR = 0.75  # a cell of an image file is scored if one label covers this share of its pixels
BATCH = 100  # images at a time; as many take part in the swap test
PATCHES = 20_000  # at most, that k-means is fitted to
PIXEL_IMAGES = 250  # test images that are scored at full resolution: a million pixels at 64 px
SUREST = 50  # locations of a part that purity looks at
MODEL, RANDOM, RAW, CONTRAST = "PatchVAE", "random weights", "k-means raw", "k-means contrast"
GEOMETRY = ("nmi", "boundary_nmi", "pixel_nmi", "ari", "fg_nmi", "fg_ari", "bg_nmi", "miou_matched", "miou_voted", "ap")
PRINTED = [(MASK, f"{prefix}{figure}") for prefix in ("", "pixel_") for figure in ("nmi", "ari", "miou_matched")]
PRINTED += [("geometry", figure) for figure in (*GEOMETRY, "ap_gain", f"purity_at_{SUREST}")]
PRINTED += [("kind", "fg_nmi"), ("colour", "fg_nmi"), ("swap", "inside"), ("swap", "outside")]


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
    detectors = {name: lambda x, model=model: model.encode(x).occurrence for name, model in models.items()}
    clusters = {name: best_clusters(train, name == CONTRAST, settings) for name in (RAW, CONTRAST)}
    detectors |= {name: detect for name, (detect, _) in clusters.items()}
    protocol = describe(settings, train, test, classes)
    protocol["patches"] = ", ".join(f"{name} {width * settings.scale} px" for name, (_, width) in clusters.items())
    print("\n".join(f"{name}: {text}" for name, text in protocol.items()))
    scores = score_all(detectors, train, test, classes, settings.seed)
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
    if settings.arch != "patchy":
        raise RunError(f"{settings.pretrained} has no parts (--arch {settings.arch}); give a model of --arch patchy")
    name, chosen = settings.dataset, []
    for split, count in (("unlabelled", settings.train_images), ("test", settings.test_images)):
        source = open_split(name, settings.data_folder, split, settings.size)
        if settings.masks and not hasattr(source, "path"):
            raise UsageError(f"--masks belongs to image files, --dataset {name} has none; use --dataset folder")
        if not settings.masks and not hasattr(source, "pixel_labels"):
            raise UsageError(f"--dataset {name} does not know its pixels; use shapes or binshapes, or give --masks")
        # Neighbouring files are often of one scene, drawn images are not.
        order = np.random.default_rng(0).permutation(len(source)) if settings.masks else np.arange(len(source))
        chosen.append(source.subset(order[:count]))
    if settings.ignore and not settings.masks:
        raise UsageError("--ignore names labels of --masks; give both, or drop it")
    return chosen


def draw_labels(settings, sources):
    """Labels of drawn images, a dict of B×H×W for each source; the number of classes of what is scored, a dict."""
    labels = []
    for source in sources:
        truths = [source.pixel_labels(index) for index in range(len(source))]
        labels.append({name: np.stack([truth[name] for truth in truths]) for name in ("geometry", "kind", "colour")})
        labels[-1]["figure"] = np.stack([np.minimum(truth["instance"], 1) for truth in truths])
    return labels, {name: count for name, count in CLASSES.items() if name != "colour" or sources[0].channels == 3}


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
    classes = range(max(labels.max(), 0) + 1)
    counts = np.stack([(cells == label).sum(axis=(2, 4)) for label in classes])  # L×B×h×w
    return counts.argmax(axis=0), counts.max(axis=0) / cell**2


def describe(settings, train, test, classes):
    """What was done, in words: a dict of str."""
    cell, rule = settings.scale, "label of a cell: its commonest"
    if settings.masks:
        rule = f"{classes[MASK]} labels, ignored: {' '.join(map(str, settings.ignore or ['-']))}; scored: "
        rule += f"cells with at least {CLEAR * cell**2:g} of {cell**2} pixels of one label, "
        rule += f"{test.scored.sum():,} of {test.scored.size:,}"
    return {
        "model": f"{settings.pretrained}, {settings.num_parts} parts (K) of size {settings.hidden_size}",
        "data": f"{settings.dataset}, {settings.size} px, cells of {cell} px; {rule}",
        "protocol": f"fitted on {len(train.images):,} training images, scored on {len(test.images):,} test images "
        f"(pixels: {min(PIXEL_IMAGES, len(test.images))}), seed {settings.seed}; the part of a cell: the strongest",
    }


def detect_all(detect, x):
    """The maps of many images by a detector, on the CPU: B×C×H×W -> B×N×h×w."""
    return torch.cat([detect(part).float().cpu() for part in x.split(BATCH)])


def contrast_normalised(patches):
    """Patches less their channel means, divided by their norm; flat ones become 0: M×C×P -> M×C×P."""
    patches = patches - patches[..., :1]  # first, so that a flat patch gives exactly 0
    patches = patches - patches.mean(dim=2, keepdim=True)
    norm = patches.square().sum(dim=(1, 2), keepdim=True).sqrt()
    return patches / torch.where(norm > 0, norm, 1)


def patches(x, cell, width, contrast, chosen=None):
    """Patches of `width` cells a side around all cells or those `chosen`, borders repeated: B×C×H×W -> M×(C·P)."""
    side, rim = width * cell, (width - 1) * cell // 2
    views = F.pad(x.cpu(), [rim] * 4, mode="replicate").unfold(2, side, cell).unfold(3, side, cell)
    views = views.permute(0, 2, 3, 1, 4, 5)  # B×h×w×C×side×side, no copy
    found = views.flatten(0, 2) if chosen is None else views[np.unravel_index(chosen, views.shape[:3])]
    found = found.flatten(2)  # M×C×P
    return (contrast_normalised(found) if contrast else found).flatten(1).numpy()


def fit_clusters(x, clusters, cell, width, contrast, seed):
    """k-means on patches of x, B×C×H×W, as a detector: images -> closeness to each centre, B×K×h×w."""
    grid = x.shape[-1] // cell
    chosen = np.random.default_rng(seed).permutation(len(x) * grid**2)[:PATCHES]
    centres = KMeans(clusters, n_init=3, random_state=seed).fit(patches(x, cell, width, contrast, chosen))

    def detect(x):
        distance = torch.from_numpy(centres.transform(patches(x, cell, width, contrast)))  # (B·h·w)×K
        return -distance.unflatten(0, (len(x), grid, grid)).movedim(-1, 1)

    return detect


def best_clusters(train, contrast, settings):
    """k-means as a detector, and its patches' width in cells: with masks that of the best NMI on training images."""
    found, truth = {}, next(iter(train.cells.values()))[train.scored]
    for width in (1, 2, 3) if settings.masks else (1,):
        detect = fit_clusters(train.images, settings.num_parts, settings.scale, width, contrast, settings.seed)
        closest = detect_all(detect, train.images).argmax(dim=1).numpy()[train.scored]
        found[agreement(closest, truth)["nmi"]] = detect, width
    return found[max(found)]


def agreement(found, labels, prefix=""):
    """NMI (arithmetic mean) and adjusted Rand index of two labellings; None each where the labels do not differ."""
    measures = {f"{prefix}nmi": normalized_mutual_info_score, f"{prefix}ari": adjusted_rand_score}
    differ = len(np.unique(labels)) > 1
    return {name: float(measure(labels, found)) if differ else None for name, measure in measures.items()}


def contingency(found, labels, parts, classes):
    """How often each part meets each label: M and M whole numbers -> N×L counts."""
    return np.bincount(found * classes + labels, minlength=parts * classes).reshape(parts, classes)


def overlap(table):
    """Intersection over union of every row with every column of a table of counts; 0 where both are empty."""
    return table / np.maximum(table.sum(axis=1, keepdims=True) + table.sum(axis=0) - table, 1)


def mean_overlap(fitted, table, prefix=""):
    """Mean IoU in `table`, N×L, of labels with the part matched to each, and with all that vote for it, in `fitted`."""
    parts, labels = linear_sum_assignment(overlap(fitted), maximize=True)
    matched, votes = np.zeros(table.shape[1]), np.zeros((table.shape[1], table.shape[1]), int)
    matched[labels] = overlap(table)[parts, labels]
    np.add.at(votes, fitted.argmax(axis=1), table)
    found = {"miou_matched": matched, "miou_voted": np.diag(overlap(votes))}
    return {f"{prefix}{name}": float(iou[table.any(axis=0)].mean()) for name, iou in found.items()}


def precision(scores, where):
    """Average precision of scores M as a detector of M booleans, and how far it is above chance, where 1 is perfect."""
    chance = where.mean()
    found = float(average_precision_score(where, scores)) if chance > 0 else 0.0
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
    false_alarms, hits, thresholds = roc_curve(labels > 0, maps.max(axis=1))
    return float(thresholds[1:][np.argmax((hits - false_alarms)[1:])])  # the first is infinite


def strongest(found, labels, fitted, has_ground, prefix=""):
    """Figures of the strongest parts, M, against labels, M: a dict. `fg_…`: without the ground, label 0."""
    figures = agreement(found, labels, prefix)
    if has_ground:
        figures |= agreement(found[labels > 0], labels[labels > 0], f"{prefix}fg_")
    return figures | mean_overlap(fitted, contingency(found, labels, *fitted.shape), prefix)


def score(name, train_maps, test_maps, train, test, classes):
    """All figures of maps B×N×h×w for what `name` labels: a dict of floats, None for what is undefined."""
    fitting = train_maps.movedim(1, -1).numpy()[train.scored], train.cells[name][train.scored]
    maps, labels = test_maps.movedim(1, -1).numpy()[test.scored], test.cells[name][test.scored]
    found, has_ground = maps.argmax(axis=1), name != MASK
    fitted = contingency(fitting[0].argmax(axis=1), fitting[1], maps.shape[1], classes)
    figures = strongest(found, labels, fitted, has_ground)
    figures |= detection(*fitting, maps, labels, classes)
    figures[f"purity_at_{SUREST}"] = purity(maps, labels)
    if has_ground:  # background counts as one more part where no map reaches a threshold
        is_sure = maps.max(axis=1) >= ground_threshold(*fitting)
        figures |= agreement(np.where(is_sure, found + 1, 0), labels, "bg_")
    if name == "geometry":
        figures |= agreement(found[labels >= shapes.EDGE], labels[labels >= shapes.EDGE], "boundary_")
    size, pixels = test.images.shape[-2:], test.pixels[name]
    parts = test_maps[:PIXEL_IMAGES].split(BATCH)
    found = torch.cat([F.interpolate(part, size=size, mode="bilinear").argmax(dim=1) for part in parts]).numpy()
    return figures | strongest(found[pixels >= 0], pixels[pixels >= 0], fitted, has_ground, "pixel_")


def shuffled(images, seed):
    """The same images, all labels in random order."""
    mix = np.random.default_rng(seed).permuted
    cells = {name: mix(labels.ravel()).reshape(labels.shape) for name, labels in images.cells.items()}
    pixels = {name: mix(labels.ravel()).reshape(labels.shape) for name, labels in images.pixels.items()}
    return images._replace(cells=cells, pixels=pixels)


def score_all(detectors, train, test, classes, seed):
    """Scores by the name of a detector and of what is labelled; also of shuffled labels and of the ceiling."""
    scores, mixed = {}, (shuffled(train, seed), shuffled(test, seed + 1))
    for detector, detect in detectors.items():
        maps = [detect_all(detect, split.images) for split in (train, test)]
        scores[detector] = {name: score(name, *maps, train, test, count) for name, count in classes.items()}
        if detector == MODEL:
            chance = {name: score(name, *maps, *mixed, count) for name, count in classes.items()}
    scores |= {"shuffled labels": chance, "ceiling": {}}
    for name, count in classes.items():
        cells = [F.one_hot(torch.from_numpy(split.cells[name]), count) for split in (train, test)]
        maps = [labels.movedim(-1, 1).float() for labels in cells]
        scores["ceiling"][name] = score(name, *maps, train, test, count)
    return scores


@torch.no_grad()
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
    """The report as lines of text: a row per figure, a column per detector."""
    rows = {"": scores}
    for name, figure in PRINTED:
        if name in scores[MODEL]:
            values = [found.get(name, {}).get(figure) for found in scores.values()]
            rows[f"{name} {figure}"] = ["-" if value is None else f"{value:.4f}" for value in values]
    return [f"{title:24}" + "".join(f"{text:>18}" for text in row) for title, row in rows.items()]


if __name__ == "__main__":
    runtime.start(main)
