"""Draw what the first layer of a trained encoder looks for.

    python utils/filters.py --pretrained scratch/model.pt
    python utils/filters.py --pretrained scratch/model.pt --common --unsorted --output filters.png

Each tile is one filter, as large as the patch of the image that it is compared with. Grey stands for a weight of zero,
brighter for a positive and darker for a negative one, in the channel's colour where the images have colours.
"""

import math
import sys
from pathlib import Path

import numpy as np
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import console, grids, tracking, trained  # noqa: E402


def main(argv=None):
    """Draw the filters. Returns their numbers in the order of the tiles, and the norms of the filters so numbered."""
    args = parse(argv)
    model, file = trained.load_model(args.pretrained)
    name, filters = first_filters(model.encoder)
    norms = np.sqrt(np.square(filters).sum(axis=(1, 2, 3)))
    order = np.arange(len(filters)) if args.unsorted else np.argsort(-norms, kind="stable")
    tiles = as_tiles(filters[order], args.common)
    grids.save(sheet(tiles, headline(file["options"], name, args)), args.output)
    print(f"{len(filters)} filters of {' x '.join(map(str, filters.shape[2:]))} pixels, norms {norms.min():.2f} to "
          f"{norms.max():.2f}; neighbouring weights correlate {smoothness(filters):.2f} (0: noise, as before training; "
          f"towards 1: edges and blobs): {tracking.relative(args.output)}")
    return order, norms


def parse(argv):
    """The command line `argv` as a namespace. Raises UsageError."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--pretrained", required=True, metavar="FILE",
                        help="a model.pt of run.py, such as scratch/model.pt; no images are needed")
    parser.add_argument("--output", type=grids.png, default="filters.png", metavar="FILE",
                        help="the picture; a file of that name is replaced (default: %(default)s)")
    parser.add_argument("--common", action="store_true",
                        help="draw all filters on one scale, so that weak ones look grey (default: each from minus to "
                        "plus its own largest weight, so that the pattern of weak ones shows too)")
    parser.add_argument("--unsorted", action="store_true",
                        help="in the order of the layer's channels (default: the filter of the largest norm first)")
    return parser.parse_args(argv)


def first_filters(encoder):
    """The name of the encoder's first convolution, and its weights: K×C×k×k float32 array, C = 1 or 3."""
    name, layer = next((name, layer) for name, layer in encoder.named_modules() if isinstance(layer, nn.Conv2d))
    return name, layer.weight.detach().numpy()


def as_tiles(filters, common=False):
    """K×C×k×k weights -> K×k×k×3 uint8: minus the largest 0, zero 128, the largest 255.

    The largest absolute weight is that of the filter itself, or that of all of them (`common`).
    """
    largest = np.abs(filters).max(axis=None if common else (1, 2, 3), keepdims=True)
    unit = filters / np.maximum(largest, np.finfo(np.float32).tiny)  # K×C×k×k, -1 to 1; a filter of zeros stays grey
    pixels = np.round(127.5 + 127.5 * unit).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels


def smoothness(filters):
    """The correlation of weights that are neighbours in a row or column, mean zero assumed: a number from -1 to 1."""
    pairs = [(filters[..., 1:], filters[..., :-1]), (filters[..., 1:, :], filters[..., :-1, :])]
    product = sum((a * b).sum() for a, b in pairs)
    return product / max(sum((a**2 + b**2).sum() / 2 for a, b in pairs), np.finfo(np.float32).tiny)


def sheet(tiles, lines):
    """The tiles as rows of a picture about as wide as high, below `lines` of text: PIL image."""
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = [list(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
    return grids.titled(grids.grid(rows), lines)


def headline(options, name, args):
    """What the picture shows: two short lines."""
    order = "in the layer's order" if args.unsorted else "largest norm first"
    scale = "all on one scale" if args.common else "each on its own scale"
    return [f"first layer of the {options['encoder_arch']} encoder ({name}), trained as {options['arch']}",
            f"{order}, row by row; grey is zero, {scale}"]


if __name__ == "__main__":
    console.run(main)
