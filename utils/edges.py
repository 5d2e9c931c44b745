"""Draw what --recon-mask edge of run.py weighs: images, their edges, and how much each cell's error counts.

    python utils/edges.py --dataset shapes --scale 4
    python utils/edges.py --dataset folder --data-folder my/images --size 128 --scale 16 --output edges.png

Edges are the absolute Laplacian of the pixels, weights what the loss multiplies squared errors with (modules.py); both
averaged over the colours. A weight of 1 is what every pixel has without the option.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import modules
from datasets import DATA_SETS, open_split
from utils import batches, figures, options, runtime

HEAVY, SIDE = 6.0, 128  # the weight that is drawn in the brightest colour; pixels to which small images are magnified
TITLE = ["Edges: white is the image's strongest.",
         f"Weights, over the image in grey: no colour 0, faint red 1, red {HEAVY / 2:g}, yellow {HEAVY:g} or more."]


def main(argv=None):
    """Draw images, edges and weights. Returns the weights, averaged over the colours: B×H×W float32 array."""
    parser = options.Parser(description=__doc__)
    options.add_data_options(parser, cache="none")  # a few images, once
    parser.section("picture")
    parser.option("--scale", options.whole(1), 8, "K", "side of a cell in pixels; larger spreads the weights wider")
    parser.option("--images", options.whole(1), 12, "K", "test images to draw, evenly spread over all")
    parser.option("--output", figures.png, "edges.png", "FILE", "the picture; a file of that name is replaced")
    args = parser.settings(argv)
    size, scale = args.size or DATA_SETS[args.dataset].size, args.scale
    options.check_size(size, scale)
    source = open_split(args.dataset, args.data_folder, "test", size)
    (images,) = batches.open_batches(args.changed(size=size), [source], torch.device("cpu"))
    x = images.examples(args.images)  # B×C×H×W
    edges = modules.laplacian(x).abs().mean(dim=1, keepdim=True)  # B×1×H×W
    weights = modules.edge_weights(x, scale).mean(dim=1).numpy()  # B×H×W
    pictures = figures.to_rgb(x, images.mean.flatten().tolist(), images.std.flatten().tolist())
    strongest = edges.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-30)
    heat = [figures.lay_over(*pair) for pair in zip(pictures, weights / HEAVY)]
    tiles = np.stack([pictures, figures.to_rgb(edges / strongest, [0], [1]), heat], axis=1).reshape(-1, size, size, 3)
    magnified = tiles.repeat(max(1, SIDE // size), axis=1).repeat(max(1, SIDE // size), axis=2)
    rows = [list(magnified[start : start + 6]) for start in range(0, len(magnified), 6)]
    figures.save(figures.grid(rows, ["image", "edges", "weights"] * (len(rows[0]) // 3), TITLE), args.output)
    heaviest = np.sort(weights, axis=None)[-(weights.size // 10) :].sum() / weights.sum()
    print(f"{len(x)} test images of {args.dataset}, cells of {scale} x {scale} pixels: weights from "
          f"{weights.min():.2f} to {weights.max():.2f}; the heaviest tenth of the pixels has {heaviest:.0%} of the "
          f"weight: {runtime.relative(args.output)}")
    return weights


if __name__ == "__main__":
    runtime.start(main)
