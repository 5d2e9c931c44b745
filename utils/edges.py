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
from utils.runtime import UsageError

HEAVY, SIDE = 6.0, 128  # the weight that is drawn in the brightest colour; pixels to which small images are magnified
TITLE = ["Edges: white is the image's strongest.",
         f"Weights, over the image in grey: no colour 0, faint red 1, red {HEAVY / 2:g}, yellow {HEAVY:g} or more."]


def main(argv=None):
    """Draw images, edges and weights. Returns the weights, averaged over the colours: B×H×W float32 array."""
    settings = parse(argv)
    source = open_split(settings.dataset, settings.data_folder, "test", settings.size)
    (images,) = batches.open_batches(settings, [source], torch.device("cpu"))
    x = images.examples(settings.images)  # B×C×H×W
    edges = modules.laplacian(x).abs().mean(dim=1).numpy()  # B×H×W
    weights = modules.edge_weights(x, settings.scale).mean(dim=1).numpy()  # B×H×W
    pictures = figures.to_rgb(x, images.mean.flatten().tolist(), images.std.flatten().tolist())
    tiles = [tile for trio in zip(pictures, edges, weights) for tile in tiles_of(*trio)]
    rows = [tiles[start : start + 6] for start in range(0, len(tiles), 6)]
    captions = ["image", "edges", "weights"] * (len(rows[0]) // 3)
    figures.save(figures.grid(rows, captions, TITLE), settings.output)
    heaviest = np.sort(weights, axis=None)[-(weights.size // 10) :].sum() / weights.sum()
    print(f"{len(x)} test images of {settings.dataset}, cells of {settings.scale} x {settings.scale} pixels: weights "
          f"from {weights.min():.2f} to {weights.max():.2f}; the heaviest tenth of the pixels has {heaviest:.0%} of "
          f"the weight: {runtime.relative(settings.output)}")
    return weights


def parse(argv):
    """The checked command line `argv` as Settings. Raises UsageError."""
    parser = options.Parser(description=__doc__)
    options.add_data_options(parser)
    parser.defaults["cache"] = "none"  # a few images, once
    parser.section("picture")
    parser.option("--scale", options.whole(1), 8, "K", "side of a cell in pixels, as --scale of the run that you plan; "
                  "larger spreads the weights wider")
    parser.option("--images", options.whole(1), 12, "K", "test images to draw, evenly spread over all")
    parser.option("--output", figures.png, "edges.png", "FILE", "the picture; a file of that name is replaced")
    settings = parser.settings(argv)
    size, scale = settings.size or DATA_SETS[settings.dataset].size, settings.scale
    if size % scale:
        near = max(scale, round(size / scale) * scale)
        raise UsageError(f"--size {size} is not a multiple of --scale {scale}; use --size {near}")
    return settings.changed(size=size)


def tiles_of(image, edges, weights):
    """An image H×W×3 uint8, its edges and weights H×W -> what the picture shows of it: three tiles like the image."""
    strength = edges / max(edges.max(), np.finfo(np.float32).tiny)  # 0 to 1
    grey = np.round(255 * strength).astype(np.uint8)
    tiles = image, np.stack([grey] * 3, axis=2), figures.lay_over(image, weights / HEAVY)
    magnify = max(1, SIDE // len(image))
    return [tile.repeat(magnify, axis=0).repeat(magnify, axis=1) for tile in tiles]


if __name__ == "__main__":
    runtime.start(main)
