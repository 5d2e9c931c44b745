"""Show what the parts of a trained PatchVAE are: where they occur, what they look like, what each contributes.

    python utils/parts.py --pretrained scratch/model.pt

    python utils/parts.py --pretrained scratch/model.pt --part 7 --patches 20 --output-folder part_7

parts.png: the patches where each part occurs most surely. illustration.png: where one part occurs in some images, and
the same part in others. swap.png: that part's appearance in images B put into images A. traversal.png: the appearance
of each part moved along its strongest directions. parts.json: the figures. logs_parts/: the pictures for TensorBoard.

Nothing is picked by hand or at random: the same command gives the same files.
"""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import modules  # noqa: E402
from datasets import SPLITS, normalisation, open_split  # noqa: E402
from run import ACTIVE  # noqa: E402
from utils import console, grids, options, survey, tables, tracking, trained  # noqa: E402

ABSENT = 0.01  # a part that is placed nowhere with more than this never occurs
DUPLICATE = 0.9  # correlation of the occurrence maps of two parts that are near-duplicates
CELLS = 3  # width of a patch in cells, where the receptive field is wider than the image
DECODED = 16_000_000  # pixels decoded to see what the parts contribute: a minute or less on a CPU core
SHOWN = 64  # parts in a picture
COLUMNS = 8  # images in illustration.png, pairs in swap.png
STEPS = (-3.0, -1.5, 0.0, 1.5, 3.0)  # of traversal.png, in standard deviations
DIRECTIONS = 2  # of traversal.png
LARGE = 96  # smallest width of an image in illustration.png and swap.png
CONTENTS = ("parts.json", "parts.png", "illustration.png", "swap.png", "traversal.png", "logs_parts")


def build_parser():
    parser = console.Parser(description=__doc__)
    trained.add_options(parser)
    parser.set_defaults(cache="none")  # every image is looked at once
    group = parser.add_argument_group("what to look at")
    group.add_argument(
        "--split", default="test", choices=SPLITS,
        help="test, unlabelled (what run.py trained on) or train (what classifier.py trains on) (default: %(default)s)",
    )
    group.add_argument(
        "--images", type=console.whole(1), metavar="K",
        help="only so many images, spread evenly over the split; for a quick look (default: all)",
    )
    group.add_argument(
        "--ablation-images", type=console.whole(1), metavar="K",
        help="images on which each part in turn is switched off, to see what it contributes; each is decoded N times "
        "(default: 500; fewer, down to 20, where the images are large or the parts many)",
    )
    group.add_argument(
        "--batch-size", type=console.whole(1), default=128, metavar="K",
        help="images encoded at once; fewer need less memory (default: %(default)s)",
    )
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--patches", type=console.whole(1, 50), default=12, metavar="K",
        help="patches of each part, each from another image (default: %(default)s)",
    )
    group.add_argument(
        "--patch-size", type=console.whole(1), metavar="PIXELS",
        help="side of a patch, which has a cell in its middle (default: the encoder's receptive field; where that is "
        "wider than the image, three cells of --scale pixels, but no more than half of the image and no less than a "
        "cell)",
    )
    group.add_argument(
        "--part", type=console.whole(0), metavar="N",
        help="the part of illustration.png and swap.png (default: the one whose absence costs most, of those that "
        "occur somewhere with a probability above one half)",
    )
    group.add_argument(
        "--output-folder", metavar="DIR",
        help="where the files go, over those of an earlier call (default: the folder parts beside the model)",
    )
    return parser


def main(argv=None):
    """Look at the images, draw, write. Returns the content of parts.json."""
    parser = build_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    model, device = trained.open_model(args, given)
    check(args)
    images = chosen_images(args, device)
    folder = tracking.prepare_folder(args.output_folder, CONTENTS, keep=True)
    figures = survey.watch(model, images, args.batch_size, kept=COLUMNS + max(COLUMNS, args.patches))
    examples = images.examples(args.ablation_images)
    moments = normalisation(examples.shape[1], args.inet)
    target = modules.reconstruction_target(examples, args.target, *moments)
    error, rises = survey.contributions(model, examples, target, args.batch_size)
    field = survey.receptive_field(model.encoder)
    patch = patch_size(args, field)
    parts = [describe(figures, part, float(rises[part]), images.source, args.patches) for part in range(args.num_parts)]
    about = {name: getattr(args, name) for name in ("pretrained", "dataset", "data_folder", "split")}
    about |= {"images": len(images), "ablation_images": len(examples), "reconstruction_error": error}
    about |= {"receptive_field": field, "patch_size": patch}
    number = choose_part(parts) if args.part is None else args.part
    view = View(model, images, figures, parts, patch)
    pictures = {
        "parts": draw_parts(view, slice(args.patches), f"{len(images):,} images of {args.dataset} ({args.split})"),
        "illustration": draw_illustration(view, number, args.patches),
        "swap": draw_swap(view, number),
        "traversal": draw_traversal(view),
    }
    write(folder, {**about, "parts": parts}, pictures)
    say(about, parts, number, folder)
    return {**about, "parts": parts}


def check(args):
    """Complete the options by what the model says. Raises UsageError or RunError where they do not fit it."""
    if args.arch == "vae":
        raise console.RunError(f"{args.pretrained} is a beta-VAE (--arch vae), which has no parts; give a PatchVAE")
    if args.part is not None and args.part >= args.num_parts:
        raise console.UsageError(f"--part {args.part}: the model has the parts 0 to {args.num_parts - 1}")
    if args.patch_size is not None and args.patch_size > args.size:
        raise console.UsageError(f"--patch-size {args.patch_size}: the images are {args.size} pixels wide; give less")
    if args.ablation_images is None:
        args.ablation_images = min(500, max(20, DECODED // (args.num_parts * args.size**2)))
    if args.output_folder is None:
        args.output_folder = os.path.join(os.path.dirname(args.pretrained), "parts")


def chosen_images(args, device):
    """The batches of the split, or of --images of it."""
    source = open_split(args.dataset, args.data_folder, args.split, args.size)
    if args.images is not None and args.images < len(source):
        source = source.subset(np.linspace(0, len(source) - 1, args.images).round().astype(int))
    return options.open_batches(args, [source], device)[0]


# ---------------------------------------------------------------------------------------------------- findings


def describe(figures, part, rise, source, places):
    """What parts.json says of a part; `rise`: of the error without it, `places`: how many images' classes count."""
    alike = figures["correlation"][part]
    others = [int(other) for other in np.argsort(-alike, kind="stable") if other != part and alike[other] >= DUPLICATE]
    names = class_names(source, figures["top_images"][part, :places])
    unused = "does not vary" if figures["variance"][part] <= ACTIVE else None
    return {
        "part": part,
        "rate": float(figures["rate"][part]),
        "strongest_share": float(figures["strongest"][part]),
        "confidence": {"highest": float(figures["top"][part, 0]), "mean": float(figures["mean_best"][part])},
        "error_rise_when_off": rise,
        "dead": "never occurs" if figures["placed"][part] < ABSENT else unused,
        "near_duplicates": [{"part": other, "correlation": float(alike[other])} for other in others],
        "classes_of_top_places": dict(Counter(names).most_common()),
    }


def class_names(source, numbers):
    """The classes of the images at the positions `numbers`, none where the data have none."""
    return [] if source.labels is None else [source.classes[label] for label in source.labels[numbers]]


def choose_part(parts):
    """The number of the part whose absence costs most: of those that surely occur somewhere, or else of the living."""
    living = [part for part in parts if part["dead"] is None]
    sure = [part for part in living if part["confidence"]["highest"] > 0.5]
    return max(sure or living or parts, key=lambda part: part["error_rise_when_off"])["part"]


def patch_size(args, field):
    """The side of a patch in pixels: --patch-size, or what its help text says; `field`: of the encoder."""
    if args.patch_size is not None:
        return args.patch_size
    return field if field <= args.size else max(args.scale, min(CELLS * args.scale, args.size // 2))


# ---------------------------------------------------------------------------------------------------- drawing


class View(NamedTuple):
    """What the pictures are drawn from. Below, `ranks` (a slice or an array) are some of a part's surest images."""

    model: nn.Module
    batches: object
    figures: dict  # see survey.Statistics.read
    parts: list  # see describe
    patch: int  # side of a patch in pixels

    def images(self, part, ranks):
        """Those images: x, B×C×H×W, normalised."""
        return self.batches.chosen(self._numbers(part, ranks))

    def _numbers(self, part, ranks):
        return self.figures["top_images"][part][ranks]

    def rgb(self, x):
        """x: B×C×H×W, normalised -> B H×W×3 uint8 arrays."""
        return list(grids.to_rgb(x, self.batches.mean.flatten().tolist(), self.batches.std.flatten().tolist()))

    def around(self, part, ranks, draw=tables.cut, **style):
        """The surroundings of each image's surest cell: patches, or with draw=tables.framed frames in the images."""
        cells = np.stack(np.divmod(self.figures["top_cells"][part][ranks], self.model.grid), axis=1)  # B×2
        images = self.rgb(self.images(part, ranks))
        centres = (cells + 0.5) * (len(images[0]) / self.model.grid) - 0.5  # rows and columns in pixels
        return [draw(image, centre, self.patch, **style) for image, centre in zip(images, centres)]

    @torch.no_grad()
    def maps(self, part, ranks):
        """Where the part occurs in those images: heat from 0 to its highest probability, at least to one half."""
        x = self.images(part, ranks)
        occurrence = self.model.encode(x).occurrence[:, part].cpu().numpy()  # B×h×w
        return [grids.lay_over(image, values / self.hottest(part)) for image, values in zip(self.rgb(x), occurrence)]

    def hottest(self, part):
        """The probability that maps() draws in yellow."""
        return max(0.5, self.figures["top"][part, 0])

    def captions(self, part, ranks):
        """The probability in the surest cell, and the image's class."""
        values = [f"{value:.2f}" for value in self.figures["top"][part][ranks]]
        names = class_names(self.batches.source, self._numbers(part, ranks))
        return [f"{value} {name}" for value, name in zip(values, names)] or values

    def row(self, part, tiles, captions=(), brief=False):
        """A table's row, with what parts.json says of the part beside it."""
        found = self.parts[part]
        label = [f"part {part}", f"without it: error {round(found['error_rise_when_off'], 1) + 0:+.1f}"]
        if not brief:
            label[1:1] = [f"mean probability {found['rate']:.3f}", f"highest {found['confidence']['highest']:.2f}",
                          f"strongest in {found['strongest_share']:.1%} of cells"]  # fmt: skip
        remarks = [f"like part {near['part']} ({near['correlation']:.2f})" for near in found["near_duplicates"][:1]]
        if found["dead"] is not None:
            remarks.append(f"dead: {found['dead']}")
        elif found["confidence"]["highest"] <= 0.5:
            remarks.append("never above one half")
        return tables.Row(label, tiles, captions, remarks)

    def shown(self):
        """The numbers of the parts that fit into a picture, and the lines that say what was left out."""
        costly = sorted(self.parts, key=lambda part: -part["error_rise_when_off"])[:SHOWN]
        words = f"Shown are the {SHOWN} of {len(self.parts)} parts whose absence costs most; parts.json has all."
        return sorted(part["part"] for part in costly), [words] if len(self.parts) > SHOWN else []


def draw_parts(view, ranks, looked_at):
    """The patches of each part; `looked_at`: in what, in words."""
    shown, left_out = view.shown()
    rows = [view.row(part, view.around(part, ranks), view.captions(part, ranks)) for part in shown]
    heading = [
        f"Where each part occurs most surely in {looked_at}: one cell in an image, the surest image first.",
        f"Patches of {view.patch} px around these cells; below each the part's probability there, the image's class.",
    ]
    return tables.table(rows, heading + left_out)


def draw_illustration(view, part, patches):
    """Images, where the part occurs in them, and the same part in other images."""
    first, heat = slice(COLUMNS), f"grey 0, yellow {view.hottest(part):.2f}"
    framed = view.around(part, first, tables.framed, smallest=LARGE)
    rows = [
        tables.Row(["images (frame:", "around the surest cell)"], framed),
        tables.Row([f"where part {part} occurs,", "its probability:", heat], view.maps(part, first)),
    ]
    for start in range(COLUMNS, min(COLUMNS + patches, len(view.figures["top"][part])), COLUMNS):
        ranks = slice(start, min(start + COLUMNS, COLUMNS + patches))
        label = [f"part {part}", "in other images"] if start == COLUMNS else []
        rows.append(tables.Row(label, view.around(part, ranks), view.captions(part, ranks)))
    heading = [f"Part {part} in the images where it is surest, where it occurs in them, and the same part in others."]
    return tables.table(rows, heading, LARGE)


def draw_swap(view, part):
    """The part's appearance in images B put into images A, both among its surest, unlike in its strongest direction."""
    model, ranks = view.model, np.arange(len(view.figures["top"][part]))[: 2 * COLUMNS]
    with torch.no_grad():
        appearance = model.encode(view.images(part, ranks)).mean[:, part].cpu().numpy()  # B×d
    order = np.argsort(appearance @ view.figures["directions"][part, 0], kind="stable")
    half = max(1, len(order) // 2)
    a, b = ranks[order[:half]], ranks[order[-half:]]
    x = view.images(part, a)
    before, after = (view.rgb(swapped(model, x, other, part)) for other in (x, view.images(part, b)))
    changes = [np.abs(new.astype(float) - old).mean(axis=2) / 255 for new, old in zip(after, before)]  # H×W
    most = max(1e-9, max(change.max() for change in changes))
    rows = [
        tables.Row([name, f"(frame: part {part})"], view.around(part, which, tables.framed, smallest=LARGE))
        for name, which in (("images A", a), ("images B", b))
    ]
    rows += [
        tables.Row(["A, reconstructed"], before),
        tables.Row(["the same with the", f"appearance of part {part}", "in B"], after),
        tables.Row(["the difference:", f"grey 0, yellow {most:.2f}"],
                  [grids.lay_over(old, change / most) for old, change in zip(before, changes)]),
        tables.Row([f"where part {part} occurs", "in A"], view.maps(part, a)),
    ]  # fmt: skip
    heading = [f"Part {part} takes the appearance that it has in B and keeps its places in A; all other parts stay."]
    return tables.table(rows, heading, LARGE)


@torch.no_grad()
def swapped(model, a, b, part):
    """The images `a`, decoded with the appearance that `part` has in the images `b`: B×C×H×W three times."""
    mine, other = model.encode(a), model.encode(b)
    appearance = mine.mean.clone()  # B×N×d
    appearance[:, part] = other.mean[:, part]
    return model.decoder(model.latents(mine._replace(mean=appearance)))


def draw_traversal(view):
    """For each part: its surest image, decoded with the part's appearance moved."""
    shown, left_out = view.shown()
    directions = range(min(DIRECTIONS, view.model.appearance_size))
    first, rows = slice(1), []
    for part in shown:
        tiles, x = view.around(part, first, tables.framed) + view.maps(part, first), view.images(part, first)
        for direction in directions:
            vector, deviation = (view.figures[name][part, direction] for name in ("directions", "deviations"))
            tiles += [None, *view.rgb(moved(view.model, x, part, deviation * vector))]
        rows.append(view.row(part, tiles, brief=True))
    captions = ["", *("as it is" if step == 0 else f"{step:+g} sd" for step in STEPS)]
    rows[0] = rows[0]._replace(captions=["image", "where", *captions * len(directions)])
    heading = [
        "Each part in the image where it is surest; its appearance is moved along the directions in which it varies",
        "most over all images, the strongest left, in standard deviations (sd). Its places and all other parts stay.",
    ]
    return tables.table(rows, heading + left_out)


@torch.no_grad()
def moved(model, x, part, deviation):
    """The image x, 1×C×H×W, decoded with the appearance of `part` moved by STEPS times `deviation`: STEPS×C×H×W."""
    posterior = model.encode(x)
    appearance = posterior.mean.repeat(len(STEPS), 1, 1)  # STEPS×N×d
    appearance[:, part] += torch.tensor(np.outer(STEPS, deviation)).to(appearance)
    logits = posterior.logits.expand(len(STEPS), -1, -1, -1)
    return model.decoder(model.latents(posterior._replace(mean=appearance, logits=logits)))


# ---------------------------------------------------------------------------------------------------- output


def write(folder, findings, pictures):
    """parts.json, the pictures, and these in TensorBoard; each replaces what an earlier call left."""
    for name, picture in pictures.items():
        grids.save(picture, folder / f"{name}.png")
    for old in (folder / "logs_parts").glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(folder / "logs_parts") as board:
        for name, picture in pictures.items():
            board.add_image(name, np.asarray(picture), dataformats="HWC")
    tracking.write_json(folder / "parts.json", findings)


def say(about, parts, number, folder):
    """What was found, in three lines."""
    sure = sum(part["confidence"]["highest"] > 0.5 for part in parts)
    dead, double = (sum(bool(part[name]) for part in parts) for name in ("dead", "near_duplicates"))
    print(f"{about['images']:,} images, {len(parts)} parts: {sure} above one half, {dead} dead, {double} like another")
    error, rise = about["reconstruction_error"], parts[number]["error_rise_when_off"]
    print(f"part {number} is drawn; without it the reconstruction error of {error:.1f} rises by {rise:.1f}")
    sees = f"a cell sees {about['receptive_field']} pixels, a patch shows {about['patch_size']}"
    print(f"{sees}; pictures and parts.json are in {tracking.relative(folder)}")


if __name__ == "__main__":
    console.run(main)
