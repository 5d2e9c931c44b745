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
import modules  # noqa: E402
from datasets import DATA_SETS  # noqa: E402
from utils import console, grids, options, tracking, trained  # noqa: E402

HEAVY = 6.0  # the weight from which on the picture shows the brightest colour
BLOCKS, SIDE = 2, 128  # of the picture: images beside each other, and the side that small ones are magnified to


def main(argv=None):
    """Draw images, edges and weights. Returns the weights, averaged over the colours: B×H×W float32 array."""
    args = parse(argv)
    (images,) = trained.open_images(args, ["test"], torch.device("cpu"))
    x = images.examples(args.images)  # B×C×H×W
    edges = modules.laplacian(x).abs().mean(dim=1).numpy()  # B×H×W
    weights = modules.edge_weights(x, args.scale).mean(dim=1).numpy()  # B×H×W
    pictures = grids.to_rgb(x, images.mean.flatten().tolist(), images.std.flatten().tolist())
    grids.save(sheet(pictures, edges, weights, args.scale), args.output)
    heaviest = np.sort(weights, axis=None)[-(weights.size // 10) :].sum() / weights.sum()
    print(f"{len(x)} test images of {args.dataset}, cells of {args.scale} x {args.scale} pixels: weights from "
          f"{weights.min():.2f} to {weights.max():.2f}; the heaviest tenth of the pixels has {heaviest:.0%} of the "
          f"weight: {tracking.relative(args.output)}")
    return weights


def parse(argv):
    """The checked command line `argv` as a namespace. Raises UsageError."""
    parser = console.Parser(description=__doc__)
    options.add_data_options(parser)
    parser.set_defaults(cache="none")  # a few images, once
    parser.add_argument("--scale", type=console.whole(1), default=8, metavar="K",
                        help="pixels per side of a cell, as --scale of the run that you plan: larger spreads the "
                        "weights wider (default: %(default)s)")
    parser.add_argument("--images", type=console.whole(1), default=12, metavar="K",
                        help="test images to draw, evenly spread over all (default: %(default)s)")
    parser.add_argument("--output", type=grids.png, default="edges.png", metavar="FILE",
                        help="the picture; a file of that name is replaced (default: %(default)s)")
    args = parser.parse_args(argv)
    args.size = args.size or DATA_SETS[args.dataset].size
    if args.size % args.scale:
        near = max(args.scale, round(args.size / args.scale) * args.scale)
        raise console.UsageError(f"--size {args.size} is not a multiple of --scale {args.scale}; use --size {near}")
    return args


def sheet(pictures, edges, weights, scale):
    """Images B×H×W×3 uint8, edges and weights B×H×W -> one PIL image with three columns for each image."""
    blocks = min(BLOCKS, len(pictures))
    magnify = max(1, SIDE // len(pictures[0]))
    tiles = [tile for trio in zip(pictures, edges, weights) for tile in draw(*trio)]
    tiles = [tile.repeat(magnify, axis=0).repeat(magnify, axis=1) for tile in tiles]
    rows = [tiles[start : start + 3 * blocks] for start in range(0, len(tiles), 3 * blocks)]
    picture = grids.grid(rows, ["image", "edges", "weights"] * blocks)
    return grids.titled(picture, [
        f"--recon-mask edge, cells of {scale} x {scale} pixels. Edges: white is the image's strongest.",
        f"Weights, over the image in grey: no colour 0, faint red 1, red {HEAVY / 2:g}, yellow {HEAVY:g} or more.",
    ])


def draw(image, edges, weights):
    """One image H×W×3, its edges and weights H×W -> the three tiles, H×W×3 uint8 each."""
    strength = edges / max(edges.max(), np.finfo(np.float32).tiny)  # 0 to 1
    grey = np.repeat(np.round(255 * strength).astype(np.uint8)[..., None], 3, axis=2)
    return image, grey, grids.lay_over(image, weights / HEAVY)


if __name__ == "__main__":
    console.run(main)
