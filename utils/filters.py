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
from utils import figures, options, runtime, training

TINY = np.finfo(np.float32).tiny  # instead of a division by zero


def main(argv=None):
    """Draw the filters. Returns their numbers in the order of the tiles, and the norms of the filters so numbered."""
    args = parse(argv)
    model, file = training.load_model(args.pretrained)
    layer = next(module for module in model.encoder.modules() if isinstance(module, nn.Conv2d))
    filters = layer.weight.detach().numpy()  # K×C×k×k, C = 1 or 3
    norms = np.sqrt(np.square(filters).sum(axis=(1, 2, 3)))
    order = np.arange(len(filters)) if args.unsorted else np.argsort(-norms, kind="stable")
    tiles, columns = list(as_tiles(filters[order], args.common)), math.ceil(math.sqrt(len(filters)))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    title = [f"first layer of the {file['options']['encoder_arch']} encoder, trained as {file['options']['arch']}",
             f"{'in the order of channels' if args.unsorted else 'largest norm first'}, row by row; grey is zero, "
             f"{'all on one scale' if args.common else 'each on its own scale'}"]
    figures.save(figures.grid(rows, None, title), args.output)
    print(f"{len(filters)} filters of {' x '.join(map(str, filters.shape[2:]))} pixels, norms {norms.min():.2f} to "
          f"{norms.max():.2f}; neighbouring weights correlate {smoothness(filters):.2f} (0: noise, as before training; "
          f"towards 1: edges and blobs): {runtime.relative(args.output)}")
    return order, norms


def parse(argv):
    """The command line `argv` as Settings. Raises UsageError."""
    parser = options.Parser(description=__doc__)
    parser.option("--pretrained", options.model_file, None, "FILE", "a model.pt of run.py, or the folder of its run",
                  required=True)
    parser.option("--output", figures.png, "filters.png", "FILE", "the picture; a file of that name is replaced")
    parser.switch("--common", "draw all filters on one scale, so that weak ones look grey, instead of each from minus "
                  "to plus its own largest weight")
    parser.switch("--unsorted", "in the order of the layer's channels instead of the largest norm first")
    return parser.settings(argv)


def as_tiles(filters, common=False):
    """K×C×k×k weights -> K×k×k×3 uint8: minus the largest 0, zero 128, the largest 255.

    The largest absolute weight is that of the filter itself, or that of all of them (`common`).
    """
    largest = np.abs(filters).max(axis=None if common else (1, 2, 3), keepdims=True)
    unit = filters / np.maximum(largest, TINY)  # K×C×k×k, -1 to 1
    pixels = np.round(127.5 + 127.5 * unit).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3))


def smoothness(filters):
    """The correlation of weights that are neighbours in a row or column, mean zero assumed: a number from -1 to 1."""
    pairs = [(filters[..., 1:], filters[..., :-1]), (filters[..., 1:, :], filters[..., :-1, :])]
    product = sum((a * b).sum() for a, b in pairs)
    return product / max(sum((a**2 + b**2).sum() / 2 for a, b in pairs), TINY)


if __name__ == "__main__":
    runtime.start(main)
