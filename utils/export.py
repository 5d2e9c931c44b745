"""Write a trained encoder's weights as a plain file that torchvision's own networks load.

    python utils/export.py --pretrained scratch/model.pt --output encoder.pt
    python utils/export.py --pretrained scratch/model.pt --output encoder.safetensors

The file is read back into the network of that name, which must give the same features before anything is written; the
lines of Python that load it are printed. Encoders: resnet, resnet18, resnet50 and alexnet get torchvision's names;
pyramid, which torchvision has not, keeps its own.
"""

import io
import math
import os
import sys
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import modules  # noqa: E402
from utils import checkpoints, console, tracking, trained  # noqa: E402

try:
    import safetensors.torch as safetensors
except ImportError:  # nothing else here needs it
    safetensors = None

TWINS = {"resnet": "resnet18", "resnet18": "resnet18", "resnet50": "resnet50", "alexnet": "alexnet"}  # in torchvision
GREY = ("model.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)  # its own takes three channels, these are grey",
        "model.features[0] = torch.nn.Conv2d(1, 64, 11, 4, 2)  # its own takes three channels, these are grey")
BORDER = modules.AlexNetTrunk.BORDER
TOLERANCE = 1e-6  # of the features, as a share of the largest


def main(argv=None):
    """Export, check, explain. Returns the number of `tensors`, the names `absent`, the `difference` and the `code`."""
    args = parse(argv)
    model, file = trained.load_model(args.pretrained)
    described = file["options"]
    content = encode(under_their_names(model.encoder, described), args.output)
    weights = decode(content, args.output)
    twin, absent = rebuild(weights, described)
    difference = compare(model.encoder, twin, described)
    if not difference <= TOLERANCE:  # also where it is no number
        raise console.RunError(f"{args.pretrained}: torchvision {torchvision.__version__} computes other features from "
                               f"these weights (by {difference:.1e} of the largest); nothing was written")
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    checkpoints.write(args.output, lambda target: target.write(content))
    code = instructions(args.output, described)
    report(args.output, described, len(weights), absent, difference, code)
    return {"tensors": len(weights), "absent": absent, "difference": difference, "code": code}


def parse(argv):
    """The checked command line `argv` as a namespace. Raises UsageError, or RunError where a package is missing."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--pretrained", required=True, metavar="FILE",
                        help="a model.pt of run.py, PatchVAE or beta-VAE; it knows its encoder")
    parser.add_argument("--output", default="encoder.pt", metavar="FILE",
                        help="ends in .pt: a state dict for torch.load, or in .safetensors: for any program that reads "
                        "that format; a file of that name is replaced (default: %(default)s)")
    args = parser.parse_args(argv)
    if not args.output.endswith((".pt", ".safetensors")):
        raise console.UsageError(f"--output {args.output}: give a name that ends in .pt or .safetensors")
    if os.path.isdir(args.output):
        raise console.UsageError(f"--output {args.output} is a folder; give the name of a file")
    if os.path.realpath(args.output) == os.path.realpath(args.pretrained):
        raise console.UsageError(f"--output {args.output} would replace --pretrained; give another name")
    if args.output.endswith(".safetensors") and safetensors is None:
        raise console.RunError(f"--output {args.output} needs a package: pip install safetensors, or choose a .pt file")
    return args


def under_their_names(encoder, described):
    """The encoder's state dict under torchvision's names."""
    prefix = "features." if described["encoder_arch"] == "alexnet" else ""
    return {prefix + name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}


def encode(weights, path):
    """The bytes of a file of `weights`, in the format that the end of `path` names."""
    if path.endswith(".safetensors"):
        return safetensors.save(weights)
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def decode(content, path):
    """The weights in the bytes of a file."""
    if path.endswith(".safetensors"):
        return safetensors.load(content)
    return torch.load(io.BytesIO(content), weights_only=True)


def rebuild(weights, described):
    """The network that the file is for with `weights` in it, and the names that they leave out: sorted."""
    arch, channels = described["encoder_arch"], described["channels"]
    if arch not in TWINS:
        twin, _ = modules.build_encoder(arch, channels, described["scale"], described["ngf"])
    else:
        twin = torchvision.models.get_model(TWINS[arch], weights=None)
    if channels != 3 and arch == "alexnet":
        twin.features[0] = modules.with_channels(twin.features[0], channels)
    elif channels != 3 and arch in TWINS:
        twin.conv1 = modules.with_channels(twin.conv1, channels)
    absent, unknown = twin.load_state_dict(weights, strict=False)
    if unknown:
        raise console.RunError(f"torchvision {torchvision.__version__} has no {unknown[0]} in {TWINS[arch]}; try the "
                               "version that requirements.txt names")
    return twin, sorted(absent)


@torch.no_grad()
def compare(encoder, twin, described):
    """The largest difference of the features of random images, as a share of the largest feature."""
    shape = (4, described["channels"], described["size"], described["size"])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))  # B×C×H×W
    expected, found = encoder(x), cut(twin.eval(), described["encoder_arch"], len(encoder))(x)  # B×D×h×w each
    return float((found - expected).abs().max() / expected.abs().max())


def cut(twin, arch, children):
    """`twin` up to where our encoder ends: a module."""
    if arch not in TWINS:
        return twin
    if arch == "alexnet":
        return torch.nn.Sequential(torch.nn.ZeroPad2d(BORDER), twin.features)
    return torch.nn.Sequential(*list(twin.children())[:children])


def instructions(path, described):
    """Lines of Python that make `encoder`, from normalised images to features, of the file at `path`."""
    arch, channels, scale = described["encoder_arch"], described["channels"], described["scale"]
    is_safe = path.endswith(".safetensors")
    reader = f"safetensors.torch.load_file({path!r})" if is_safe else f"torch.load({path!r})"
    lines = ["import torch, torchvision" + (", safetensors.torch" if is_safe else "")]
    if arch not in TWINS:
        lines += ["import modules  # of this repository",
                  f"encoder, _ = modules.build_encoder({arch!r}, {channels}, {scale}, {described['ngf']})",
                  f"encoder.load_state_dict({reader})",
                  "encoder.eval()"]
    else:
        lines += [f"model = torchvision.models.{TWINS[arch]}()",
                  *([GREY[arch == "alexnet"]] if channels == 1 else []),
                  f"model.load_state_dict({reader}, strict=False)",
                  f"encoder = torch.nn.Sequential({layers(arch, scale)}).eval()"]
    mean, std = ([round(value, 6) for value in described[name]] for name in ("mean", "std"))
    return [*lines, f"normalise = torchvision.transforms.Normalize({mean}, {std})"]


def layers(arch, scale):
    """Python for the modules of torchvision's `model` that are the encoder."""
    if arch == "alexnet":
        return f"torch.nn.ZeroPad2d({BORDER}), model.features"
    return f"*list(model.children())[:{4 + int(math.log2(scale)) - 1}]"


def report(path, described, tensors, absent, difference, code):
    """Say what was written, what was checked, and how to use it."""
    arch, channels, size = described["encoder_arch"], described["channels"], described["size"]
    network = f"torchvision's {TWINS[arch]}" if arch in TWINS else "modules.build_encoder, as torchvision has none"
    print(f"{tracking.relative(path)}: {tensors} tensors of the encoder {arch}, for {network}")
    print(f"checked: the file gives the same features (largest difference {difference:.1e} of the largest feature)")
    if absent:
        print(f"not in it, and random until you train them: {', '.join(dict.fromkeys(map(block, absent)))}")
    if arch == "alexnet":
        print(f"the features are these only behind a border of zeros, {BORDER} pixels left, right, above and below")
    colours = "grey images (one channel)" if channels == 1 else "colour images (red, green, blue)"
    print(f"to use it, for {colours} B x {channels} x {size} x {size}, encoder(normalise(pixels in [0, 1])):\n")
    print("\n".join(f"    {line}" for line in code))


def block(name):
    """Where a weight belongs: layer4 for layer4.0.conv1.weight."""
    return name.split(".")[0]


if __name__ == "__main__":
    console.run(main)
