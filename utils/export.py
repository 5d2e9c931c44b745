"""Write a trained encoder's weights as a plain file that torchvision's own networks load.

    python utils/export.py --pretrained scratch/model.pt --output encoder.pt

The lines of Python that load the file are printed. They are run before the file is written, and what they load must
give the encoder's features. resnet, resnet18, resnet50 and alexnet get torchvision's names; pyramid and patches, which
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

NAMES = {"resnet": "resnet18", "resnet18": "resnet18", "resnet50": "resnet50", "alexnet": "alexnet"}  # in torchvision
BORDER = modules.AlexNetTrunk.BORDER
TOLERANCE = 1e-6  # between the features, as a share of the largest

RESNET = """\
import torch, torchvision
model = torchvision.models.{name}()
model.conv1 = torch.nn.Conv2d({channels:d}, 64, 7, 2, 3, bias=False)  # the images' channels
model.load_state_dict(torch.load({path!r}), strict=False)
encoder = torch.nn.Sequential(*list(model.children())[:{children:d}]).eval()
"""
ALEXNET = """\
import torch, torchvision
model = torchvision.models.{name}()
model.features[0] = torch.nn.Conv2d({channels:d}, 64, 11, 4, 2)  # the images' channels
model.load_state_dict(torch.load({path!r}), strict=False)
encoder = torch.nn.Sequential(torch.nn.ZeroPad2d({border}), model.features).eval()  # a border of zeros
"""
OURS = """\
import torch, torchvision
import modules  # of this repository
encoder, _ = modules.build_encoder({encoder_arch!r}, {channels:d}, {scale:d}, {ngf:d})
encoder.load_state_dict(torch.load({path!r}))
encoder.eval()
"""
NORMALISE = "normalise = torchvision.transforms.Normalize({mean}, {std})\n"


def main(argv=None):
    """Export, check, explain. Returns the largest difference of the features, and the lines that load the file."""
    args = parse(argv)
    model, file = training.load_model(args.pretrained)
    described = file["options"]
    prefix = "features." if described["encoder_arch"] == "alexnet" else ""
    weights = {prefix + name: tensor.contiguous() for name, tensor in model.encoder.state_dict().items()}
    twin, absent = load_as_printed(weights, described)
    difference = compare(model.encoder, twin, described)
    if not difference <= TOLERANCE:  # also where it is not a number
        raise RunError(
            f"{args.pretrained}: torchvision {torchvision.__version__} computes other features from these weights (by "
            f"{difference:.1e} of the largest); nothing was written; try the version that requirements.txt names"
        )
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    training.save(args.output, weights)
    code = loading_code(args.output, described)
    report(args.output, described, weights, absent, difference, code)
    return difference, code


def parse(argv):
    """The checked command line `argv` as Settings. Raises UsageError."""
    parser = options.Parser(description=__doc__)
    parser.option("--pretrained", options.model_file, None, "FILE", "a model.pt of run.py, or the folder of its run",
                  required=True)
    parser.option("--output", options.path, "encoder.pt", "FILE", "ends in .pt; a file of that name is replaced")
    args = parser.settings(argv)
    if not args.output.endswith(".pt"):
        raise UsageError(f"--output {args.output}: give a name that ends in .pt")
    if os.path.isdir(args.output):
        raise UsageError(f"--output {args.output} is a folder; give the name of a file")
    if os.path.realpath(args.output) == os.path.realpath(args.pretrained):
        raise UsageError(f"--output {args.output} would replace --pretrained; give another name")
    return args


def loading_code(path, described):
    """Python that makes `encoder` and `normalise` from the file at `path`: a str of several lines."""
    arch = described["encoder_arch"]
    template = ALEXNET if arch == "alexnet" else RESNET if arch in NAMES else OURS
    mean, std = ([round(value, 6) for value in described[name]] for name in ("mean", "std"))
    children = 4 + int(math.log2(described["scale"])) - 1  # conv1, bn1, relu, maxpool, layer1, …
    values = {**described, "path": str(path), "name": NAMES.get(arch), "border": BORDER, "children": children}
    return (template + NORMALISE).format(**values | {"mean": mean, "std": std})


def load_as_printed(weights, described):
    """The encoder that loading_code() makes of `weights`, and the names of its network that they leave out: a list."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "encoder.pt")
        torch.save(weights, path)
        made = {}
        exec(loading_code(path, described), made)  # the very lines that are printed
    network = made.get("model", made["encoder"])
    return made["encoder"], sorted(set(network.state_dict()) - set(weights))


@torch.no_grad()
def compare(encoder, twin, described):
    """The largest difference of the features of random images, as a share of the largest feature."""
    shape = (4, described["channels"], described["size"], described["size"])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))  # B×C×H×W
    expected, found = encoder(x), twin(x)  # B×D×h×w each
    return float((found - expected).abs().max() / expected.abs().max())


def report(path, described, weights, absent, difference, code):
    """Say what was written, what was checked, and how to use it."""
    arch, channels, size = described["encoder_arch"], described["channels"], described["size"]
    print(f"{runtime.relative(path)}: {len(weights)} tensors of the encoder {arch}")
    print(f"checked: the file gives the same features (largest difference {difference:.1e} of the largest feature)")
    if absent:
        blocks = dict.fromkeys(name.split(".")[0] for name in absent)
        print(f"not in it, and random until you train them: {', '.join(blocks)}")
    colours = "grey images (one channel)" if channels == 1 else "colour images (red, green, blue)"
    print(f"to use it, for {colours} B x {channels} x {size} x {size}, encoder(normalise(pixels in [0, 1])):\n")
    print("\n".join(f"    {line}" for line in code.splitlines()))


if __name__ == "__main__":
    runtime.start(main)
