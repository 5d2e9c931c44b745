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


def main(argv=None):
    """Draw the filters. Returns their numbers in the order of the tiles, and the norms of the filters so numbered."""
    parser = options.Parser(description=__doc__)
    options.add_model_file(parser)
    parser.option("--output", figures.png, "filters.png", "FILE", "the picture; a file of that name is replaced")
    parser.switch("--common", "draw all filters on one scale, so that weak ones look grey, instead of each from minus "
                  "to plus its own largest weight")
    parser.switch("--unsorted", "in the order of the layer's channels instead of the largest norm first")
    args = parser.settings(argv)
    model, file = training.load_model(args.pretrained)
    layer = next(module for module in model.encoder.modules() if isinstance(module, nn.Conv2d))
    weights = layer.weight.detach()  # K×C×k×k, C = 1 or 3
    norms = np.sqrt(np.square(weights.numpy()).sum(axis=(1, 2, 3)))
    order = np.arange(len(norms)) if args.unsorted else np.argsort(-norms, kind="stable")
    largest = weights.abs().amax(dim=(0, 1, 2, 3) if args.common else (1, 2, 3), keepdim=True)
    channels = weights.shape[1]
    tiles = figures.to_rgb(weights / largest.clamp(min=1e-30), [0.5] * channels, [0.5] * channels)[order]  # K×k×k×3
    title = [f"first layer of the {file['options']['encoder_arch']} encoder, trained as {file['options']['arch']}",
             f"{'in the order of channels' if args.unsorted else 'largest norm first'}, row by row; grey is zero, "
             f"{'all on one scale' if args.common else 'each on its own scale'}"]
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = [list(tiles[start : start + columns]) for start in range(0, len(tiles), columns)]
    figures.save(figures.grid(rows, None, title), args.output)
    print(f"{len(tiles)} filters of {' x '.join(map(str, weights.shape[2:]))} pixels, norms {norms.min():.2f} to "
          f"{norms.max():.2f}; neighbouring weights correlate {smoothness(weights.numpy()):.2f} (0: noise, as before "
          f"training; towards 1: edges and blobs): {runtime.relative(args.output)}")
    return order, norms


def smoothness(filters):
    """The correlation of weights, K×C×k×k, that are neighbours in a row or column, mean zero assumed: from -1 to 1."""
    pairs = [(filters[..., 1:], filters[..., :-1]), (filters[..., 1:, :], filters[..., :-1, :])]
    return sum((a * b).sum() for a, b in pairs) / max(sum((a**2 + b**2).sum() / 2 for a, b in pairs), 1e-30)


if __name__ == "__main__":
    runtime.start(main)
