"""Score the parts of a trained PatchVAE against images whose every pixel is known.

    python utils/score.py --pretrained scratch/model.pt
    python utils/score.py --pretrained scratch/model.pt --dataset shapes --output-folder scores --seed 2

Four things are known of a pixel, each scored by itself: figure or ground, local geometry (straight edge by direction,
corner, arc, interior), shape, colour. Beside the model stand the same model with random weights, k-means with as many
clusters on raw and on contrast-normalised patches, shuffled labels, and the ceiling: the truth at the model's grid.
Thresholds and matchings are chosen on training images; every figure is that of test images. The table is printed, and
everything is written to scores.json.
"""

import functools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import modules  # noqa: E402
from datasets import open_split  # noqa: E402
from utils import console, options, part_scores, shapes, tracking, trained  # noqa: E402

CLASSES = {  # labels of a pixel, 0 is the ground
    "geometry": len(shapes.GEOMETRY), "kind": 1 + len(shapes.KINDS), "colour": 1 + len(shapes.COLOURS), "figure": 2,
}  # fmt: skip
BATCH = 100  # images at a time
PATCHES = 20_000  # at most, that k-means is fitted to
PIXEL_IMAGES = 250  # test images that are scored at full resolution: a million pixels at 64 px
SWAPS = 100  # pairs of images of the swap test
# Columns of the two tables: title, label, figure
KEY_COLUMNS = (
    ("geometry", "geometry", "nmi"), ("boundaries", "geometry", "boundary_nmi"), ("shape (fg)", "kind", "fg_nmi"),
    ("colour (fg)", "colour", "fg_nmi"), ("geom. pixels", "geometry", "pixel_nmi"),
)  # fmt: skip
MORE = ("ari", "fg_nmi", "fg_ari", "bg_nmi", "miou_matched", "miou_voted", "ap", "ap_above_chance", "purity_at_50")
MORE_COLUMNS = tuple((name.replace("above_chance", "gain"), "geometry", name) for name in MORE)
MODEL, RANDOM, RAW, CONTRAST = "PatchVAE", "random weights", "k-means raw", "k-means contrast"
SHUFFLED, CEILING = "shuffled labels", "ceiling"


class Known(NamedTuple):
    """Images and the truth about them: labels 0, 1, … by name (see CLASSES)."""

    images: torch.Tensor  # B×C×H×W normalised, on the device
    cells: dict  # B×h×w each: the majority of a cell's pixels
    pixels: dict  # P×H×W each, of the first P <= PIXEL_IMAGES images


def main(argv=None):
    """Score as `argv` says; returns the content of scores.json: a dict."""
    args, given = parse(argv)
    model, device = trained.open_model(args, given)
    sources = open_known(args)
    folder = Path(args.output_folder or Path(args.pretrained).parent)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = (know(batches, args.scale) for batches in options.open_batches(args, sources, device))
    protocol = describe(args, sources, test)
    print("\n".join(f"{name}: {text}" for name, text in protocol.items()))
    torch.manual_seed(args.seed)
    untrained = modules.build_model(options.describe_model(args)).to(device).eval()
    models = {MODEL: model, RANDOM: untrained}
    detectors = {name: functools.partial(occurrence, found) for name, found in models.items()}
    for name, prepare in ((RAW, raw), (CONTRAST, contrast_normalised)):
        detectors[name] = fit_clusters(train.images, prepare, args.num_parts, args.scale, args.seed)
    scores = score_all(detectors, train, test, args.seed)
    swap = {name: swap_test(found, test.images[:SWAPS], args.scale) for name, found in models.items()}
    content = {"protocol": protocol, "scores": scores, "swap": swap}
    print(in_words(content))
    tracking.write_json(folder / "scores.json", content)
    print(f"every figure is in {tracking.relative(folder / 'scores.json')}")
    return content


def parse(argv):
    """The command line `argv`: its options, and the names of those that were typed. Raises UsageError."""
    parser = console.Parser(description=__doc__)
    trained.add_options(parser)
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--train-images", type=console.whole(1), default=500, metavar="K",
        help="training images that thresholds, matchings and k-means are fitted to (default: %(default)s)",
    )
    group.add_argument(
        "--test-images", type=console.whole(2), default=2000, metavar="K",
        help="test images that are scored; fewer are faster, and less certain (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=console.seed, default=1, metavar="K",
        help="of random weights, k-means and the shuffle (default: %(default)s)",
    )
    group.add_argument("--output-folder", metavar="DIR", help="where scores.json goes (default: the model's folder)")
    return parser.parse_args(argv), parser.given(argv)


# ---------------------------------------------------------------------------------------------------- what is known


def open_known(args):
    """The image sources to fit on and to score on. Raises an error where there are no parts, or no truth about them."""
    if args.arch != "patchy":
        raise console.RunError(f"{args.pretrained} has no parts (--arch {args.arch}); give a model of --arch patchy")
    sources = [open_split(args.dataset, args.data_folder, split, args.size) for split in ("unlabelled", "test")]
    if not hasattr(sources[0], "pixel_labels"):
        raise console.UsageError(f"--dataset {args.dataset} does not know its pixels; use shapes or binshapes")
    counts = args.train_images, args.test_images
    return [source.subset(np.arange(min(count, len(source)))) for source, count in zip(sources, counts)]


def know(batches, cell):
    """All images of `batches` and the truth about them: Known."""
    pixels = {name: [] for name in CLASSES}
    cells = {name: [] for name in CLASSES}
    for index in range(len(batches)):
        truth = batches.source.pixel_labels(index)
        truth["figure"] = np.minimum(truth["instance"], 1)
        for name, classes in CLASSES.items():
            cells[name].append(part_scores.majority(truth[name][None], cell, classes)[0])  # h×w
            if index < PIXEL_IMAGES:
                pixels[name].append(truth[name])
    images = torch.cat([x for x, _ in batches.in_order(BATCH)])
    return Known(images, *({name: np.stack(found) for name, found in labels.items()} for labels in (cells, pixels)))


def shuffled(known, seed):
    """The same images, all labels in random order."""
    mix = np.random.default_rng(seed).permuted
    return known._replace(
        cells={name: mix(labels.ravel()).reshape(labels.shape) for name, labels in known.cells.items()},
        pixels={name: mix(labels.ravel()).reshape(labels.shape) for name, labels in known.pixels.items()},
    )


def describe(args, sources, test):
    """What was done, in words: a dict of str."""
    fitted, scored = (len(source) for source in sources)
    cells = " x ".join(map(str, test.cells["figure"].shape[1:]))
    return {
        "model": f"{args.pretrained}, {args.num_parts} parts (K) of size {args.hidden_size}",
        "data": f"{args.dataset}, {args.size} px, {cells} cells of {args.scale} px; label of a cell: its commonest",
        "protocol": f"fitted on {fitted:,} training images, scored on {scored:,} test images "
        f"(pixels: {len(test.pixels['figure'])}), seed {args.seed}; the part of a cell: the strongest",
    }


# ---------------------------------------------------------------------------------------------------- detectors


@torch.no_grad()
def occurrence(model, x):
    """How probable each part of `model` is: x: B×C×H×W -> B×N×h×w."""
    return model.encode(x).occurrence


def raw(patches):
    """Patches as they are: M×C×P -> M×C×P."""
    return patches


def contrast_normalised(patches):
    """Patches less their channel means, divided by their norm; flat ones become 0: M×C×P -> M×C×P."""
    patches = patches - patches[..., :1]  # first, so that a flat patch gives exactly 0
    patches = patches - patches.mean(dim=2, keepdim=True)
    norm = patches.square().sum(dim=(1, 2), keepdim=True).sqrt()
    return patches / torch.where(norm > 0, norm, 1)


def cut(x, cell):
    """B×C×H×W -> the patches of all cells, row by row: (B·h·w)×C×(cell·cell), on the CPU."""
    rows = x.cpu().unfold(2, cell, cell).unfold(3, cell, cell)  # B×C×h×w×cell×cell
    return rows.permute(0, 2, 3, 1, 4, 5).flatten(4).flatten(0, 2)


def fit_clusters(x, prepare, clusters, cell, seed):
    """k-means on the prepared patches of x, B×C×H×W, as a detector: images -> closeness to each centre, B×K×h×w."""
    patches = prepare(cut(x, cell)).flatten(1).numpy()
    chosen = np.random.default_rng(seed).permutation(len(patches))[:PATCHES]
    centres = KMeans(clusters, n_init=3, random_state=seed).fit(patches[chosen])

    def detect(x):
        side = x.shape[-1] // cell
        distance = centres.transform(prepare(cut(x, cell)).flatten(1).numpy())  # (B·h·w)×K
        return -torch.from_numpy(distance).unflatten(0, (len(x), side, side)).movedim(-1, 1)

    return detect


# ---------------------------------------------------------------------------------------------------- scoring


def score_all(detectors, train, test, seed):
    """Scores by the name of a detector and of a label: those of `detectors`, of shuffled labels, of the ceiling."""
    scores = {}
    for name, detect in detectors.items():
        maps = [torch.cat([detect(x).float().cpu() for x in known.images.split(BATCH)]) for known in (train, test)]
        scores[name] = {label: score_label(label, *maps, train, test) for label in labels_of(test)}
        if name == MODEL:
            mixed = shuffled(train, seed), shuffled(test, seed + 1)
            scores[SHUFFLED] = {label: score_label(label, *maps, *mixed) for label in labels_of(test)}
    scores[CEILING] = {}
    for label in labels_of(test):
        maps = [as_maps(known.cells[label], CLASSES[label]) for known in (train, test)]
        scores[CEILING][label] = score_label(label, *maps, train, test)
    order = (*detectors, SHUFFLED, CEILING)
    return {name: scores[name] for name in order}


def labels_of(known):
    """The labels that the images can show: there is no colour in grey ones."""
    return [name for name in CLASSES if name != "colour" or known.images.shape[1] == 3]


def as_maps(labels, classes):
    """Labels B×h×w as maps of 0 and 1: B×L×h×w."""
    return F.one_hot(torch.from_numpy(labels), classes).movedim(-1, 1).float()


def score_label(label, train_maps, test_maps, train, test):
    """All figures of maps B×N×h×w for one label: those of part_scores.score, of boundaries alone, and of pixels."""
    truth = test.cells[label].ravel()
    fitted = part_scores.fit(flat(train_maps), train.cells[label].ravel(), CLASSES[label])
    figures = part_scores.score(flat(test_maps), truth, fitted)
    if label == "geometry":
        found = flat(test_maps).argmax(axis=1)
        figures["boundary_nmi"], figures["boundary_ari"] = part_scores.agreement(found, truth, truth >= shapes.EDGE)
    truth = test.pixels[label].ravel()
    found = at_pixels(test_maps[:PIXEL_IMAGES], test.images.shape[-1]).ravel()
    figures["pixel_nmi"], figures["pixel_ari"] = part_scores.agreement(found, truth)
    figures["pixel_fg_nmi"], figures["pixel_fg_ari"] = part_scores.agreement(found, truth, truth > 0)
    figures |= zip(("pixel_miou_matched", "pixel_miou_voted"), part_scores.mean_overlap(found, truth, fitted))
    return figures


def flat(maps):
    """B×N×h×w -> (B·h·w)×N array."""
    return maps.movedim(1, -1).flatten(0, 2).numpy()


def at_pixels(maps, size):
    """The strongest part of every pixel, the maps interpolated: B×N×h×w -> B×size×size array."""
    chunks = maps.split(BATCH)
    found = [F.interpolate(part, size=(size, size), mode="bilinear").argmax(dim=1) for part in chunks]
    return torch.cat(found).numpy()


@torch.no_grad()
def swap_test(model, x, cell):
    """What changes if one part looks as in another image: mean absolute change of pixels in [0, 1].

    `inside`: where the part is the strongest, `outside`: elsewhere; means over parts that are somewhere the strongest,
    None if a single part is so everywhere.
    """
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


# ---------------------------------------------------------------------------------------------------- report


def in_words(content):
    """The tables and the swap test as text."""
    swaps = [
        f"{name} {number(found['inside'], 4)} inside, {number(found['outside'], 4)} outside"
        for name, found in content["swap"].items()
    ]
    return "\n".join([
        "", "NMI of the strongest part with", table(content["scores"], KEY_COLUMNS),
        "", "local geometry in more figures", table(content["scores"], MORE_COLUMNS),
        "", f"swap of appearances, mean change of a pixel: {'; '.join(swaps)}",
    ])  # fmt: skip


def table(scores, columns):
    """Scores as aligned text: a line per detector, a column for each (title, label, figure)."""
    lines = [" " * 18 + "".join(f"{title:>14}" for title, _, _ in columns)]
    for name, found in scores.items():
        values = [found.get(label, {}).get(figure) for _, label, figure in columns]
        lines.append(f"{name:18}" + "".join(f"{number(value):>14}" for value in values))
    return "\n".join(lines)


def number(value, digits=3):
    """A float in text, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    console.run(main)
