"""A model that run.py trained, opened to be looked at, with the images to look at it on: how every tool begins."""

import modules
from datasets import open_split
from utils import checkpoints, options, runtime
from utils.console import RunError


def add_options(parser):
    """The options --pretrained and --no-cuda, and the group `data`, which the model's own training answers."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained", required=True, metavar="FILE", help="a model.pt of run.py, such as scratch/model.pt"
    )
    group.add_argument("--no-cuda", action="store_true", help="compute on the CPU even where there is a GPU")
    options.add_data_options(parser, of_model=True)


def open_model(args, given):
    """The trained model, in evaluation mode on its device, and that device. `args` takes over what the file knows.

    `given`: the options that the user typed (console.Parser.given). Raises UsageError where they contradict the file,
    RunError where it is missing or damaged.
    """
    device = runtime.choose_device(args.no_cuda)
    model, file = load_model(args.pretrained, device)
    options.follow_data(args, given, file["args"])
    args.target = file["args"].get("target", "image")  # older files know of no other
    options.follow_file(args, given, file["options"], args.pretrained)
    return model, device


def load_model(path, device="cpu"):
    """The trained model in the file `path`, in evaluation mode on `device`, and all that the file holds: a dict.

    Raises RunError where the file is missing or damaged.
    """
    file = checkpoints.load(path, checkpoints.MODEL)
    try:
        model = modules.build_model(file["options"])
        model.load_state_dict(file["model"])
    except (LookupError, TypeError, ValueError, RuntimeError) as error:  # of the right kind, with the wrong content
        reason = str(error).splitlines()[0]
        raise RunError(f"{path}: its weights and its options do not fit ({reason}); train the model again") from None
    return model.to(device).eval(), file


def open_images(args, splits, device):
    """Batches for each of the `splits` of the data set ("unlabelled", "train", "test"), as the data options say."""
    sources = [open_split(args.dataset, args.data_folder, split, args.size) for split in splits]
    return options.open_batches(args, sources, device)
