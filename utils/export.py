"""Write a trained encoder's weights as a plain file that torchvision's own networks load.

    python utils/export.py --pretrained scratch/model.pt --output encoder.pt

The lines of Python that load the file are printed. They are run before the file is left, and what they load must give
the encoder's features. resnet, resnet18, resnet50 and alexnet get torchvision's names; pyramid and patches, which
torchvision has not, keep their own.
"""

import math
import os
import sys
import tempfile
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import modules
from utils import options, runtime, training
from utils.runtime import RunError, UsageError

BORDER = modules.AlexNetTrunk.BORDER


def main(argv=None):
    """Export, check, explain. Returns the largest difference of the features, and the lines that load the file."""
    parser = options.Parser(description=__doc__)
    options.add_model_file(parser)
    parser.option("--output", options.path, "encoder.pt", "FILE", "ends in .pt; a file of that name is replaced")
    args = parser.settings(argv)
    if not args.output.endswith(".pt") or os.path.isdir(args.output):
        raise UsageError(f"--output {args.output} is a folder, or does not end in .pt; give the name of a file.pt")
    if os.path.realpath(args.output) == os.path.realpath(args.pretrained):
        raise UsageError(f"--output {args.output} would replace --pretrained; give another name")
    model, file = training.load_model(args.pretrained)
    arch, channels, size = (file["options"][name] for name in ("encoder_arch", "channels", "size"))
    prefix = "features." if arch == "alexnet" else ""
    weights = {prefix + name: tensor.contiguous() for name, tensor in model.encoder.state_dict().items()}
    x = torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(0))  # B×C×H×W
    made = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.save(weights, Path(folder, "encoder.pt"))
        exec(loading_code(Path(folder, "encoder.pt"), file["options"]), made)  # the very lines that are printed
        expected, found = model.encoder(x), made["encoder"](x)  # B×D×h×w each
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= 1e-6:  # also where it is not a number
        raise RunError(f"{args.pretrained}: torchvision {torchvision.__version__} computes other features from these "
                       f"weights (by {difference:.1e} of the largest); nothing was written; try another version of it")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    training.save(args.output, weights)
    code = loading_code(args.output, file["options"])
    print(f"{runtime.relative(args.output)}: {len(weights)} tensors of the encoder {arch}")
    print(f"checked: the file gives the same features (largest difference {difference:.1e} of the largest feature)")
    network = made.get("model", made["encoder"])
    absent = sorted({name.split(".")[0] for name in network.state_dict() if name not in weights})
    if absent:
        print(f"not in it, and random until you train them: {', '.join(absent)}")
    print(f"to use it, for images B x {channels} x {size} x {size}, encoder(normalise(pixels in [0, 1])):\n")
    print("\n".join(f"    {line}" for line in code.splitlines()))
    return difference, code


def loading_code(path, described):
    """Python that makes `encoder` and `normalise` from the file at `path`: a str of several lines."""
    arch, channels, scale = (described[name] for name in ("encoder_arch", "channels", "scale"))
    mean, std = ([round(value, 6) for value in described[name]] for name in ("mean", "std"))
    network = f"model = torchvision.models.{'resnet18' if arch == 'resnet' else arch}()"
    load = f"load_state_dict(torch.load({str(path)!r})"
    if arch in ("pyramid", "patches"):
        lines = ["import modules  # of this repository",
                 f"encoder, _ = modules.build_encoder({arch!r}, {channels}, {scale}, {described['ngf']})",
                 f"encoder.{load})", "encoder.eval()"]
    elif arch == "alexnet":
        lines = [network, f"model.features[0] = torch.nn.Conv2d({channels}, 64, 11, 4, 2)  # the images' channels",
                 f"model.{load}, strict=False)",
                 f"encoder = torch.nn.Sequential(torch.nn.ZeroPad2d({BORDER}), model.features).eval()  # zeros around"]
    else:
        children = 3 + int(math.log2(scale))  # conv1, bn1, relu, maxpool, layer1, …
        lines = [network, f"model.conv1 = torch.nn.Conv2d({channels}, 64, 7, 2, 3, bias=False)  # the images' channels",
                 f"model.{load}, strict=False)",
                 f"encoder = torch.nn.Sequential(*list(model.children())[:{children}]).eval()"]
    normalise = f"normalise = torchvision.transforms.Normalize({mean}, {std})"
    return "\n".join(["import torch, torchvision", *lines, normalise]) + "\n"


if __name__ == "__main__":
    runtime.start(main)
