"""Draw what --recon-mask edge of run.py weighs: images, their edges, and how much each cell's error counts.

    python utils/edges.py --dataset shapes --scale 4
    python utils/edges.py --dataset folder --data-folder my/images --size 128 --scale 16 --output edges.png

Edges are the absolute Laplacian of the pixels, weights what the loss multiplies squared errors with (modules.py); both
averaged over the colours. A weight of 1 is what every pixel has without the option.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import modules
from datasets import DATA_SETS, open_split
from utils import batches, figures, options, runtime
from utils.runtime import UsageError

HEAVY = 6.0  # the weight from which on the picture shows the brightest colour


def main(argv=None):
    """Draw images, edges and weights. Returns the weights, averaged over the colours: B×H×W float32 array."""
    settings = parse(argv)
    source = open_split(settings.dataset, settings.data_folder, "test", settings.size)
    (images,) = batches.open_batches(settings, [source], torch.device("cpu"))
    x = images.examples(settings.images)  # B×C×H×W
    edges = modules.laplacian(x).abs().mean(dim=1).numpy()  # B×H×W
    weights = modules.edge_weights(x, settings.scale).mean(dim=1).numpy()  # B×H×W
    pictures = figures.to_rgb(x, images.mean.flatten().tolist(), images.std.flatten().tolist())
    picture = draw(pictures, edges, weights)
    Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
    runtime.write(settings.output, lambda file: picture.savefig(file, format="png"))
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


def draw(pictures, edges, weights):
    """Images B×H×W×3 uint8, edges and weights B×H×W -> a matplotlib figure, three panels for each image."""
    columns = 6 if len(pictures) > 1 else 3
    rows = math.ceil(3 * len(pictures) / columns)
    figure = Figure(figsize=(2 * columns, 2 * rows + 1), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel, title in zip(panels[0], ("image", "edges", "weights") * 2):
        panel.set_title(title)
    for panel in panels.flat:
        panel.set_axis_off()
    for trio, image, edge, weight in zip(panels.reshape(-1, 3), pictures, edges, weights):
        trio[0].imshow(image)
        trio[1].imshow(edge, "gray", vmin=0)
        shown = trio[2].imshow(weight, "hot", vmin=0, vmax=HEAVY)
    label = "weight of a pixel's error; 1 without the option"
    figure.colorbar(shown, ax=panels, location="bottom", shrink=0.5, aspect=40, extend="max", label=label)
    return figure


if __name__ == "__main__":
    runtime.start(main)
