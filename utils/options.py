"""The options that run.py and classifier.py share, and what they mean together."""

import math
import os
from pathlib import Path

import torch

from datasets import DATA_SETS, normalisation
from modules import ARCHS, DECODERS, ENCODERS, FIXED_STRIDE
from utils import batches, cache, checkpoints, ranks, runtime, tracking
from utils.console import RunError, UsageError, above, whole

SCALES = {"resnet": (4, 8, 16, 32)} | dict.fromkeys(("pyramid", "patches"), (2, 4, 8, 16, 32, 64))
# What a model file knows of itself; where the command line says otherwise, it contradicts the file.
DESCRIBED = ("arch", "encoder_arch", "decoder_arch", "size", "inet", "ngf", "independent", "scale", "num_parts")
DESCRIBED += ("hidden_size", "py", "categorical", "hard")
NEVER_SAVED = ("output_folder", "overwrite", "resume", "evaluate", "gpu")  # of this command, whatever it goes on with
DATA_FOLDER = "./data"
LEAST = {"alexnet": 28}  # pixels a side, below which an encoder's poolings leave nothing
PARTS_ONLY = ("categorical", "hard", "independent", "py")


def add_data_options(parser, of_model=False):
    """The group `data`; `of_model`: the data that the model at hand was trained on are the default, None here."""
    default = "the model's own" if of_model else "%(default)s"
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset", default=None if of_model else "cifar100", choices=DATA_SETS, metavar="NAME",
        help=f"one of {', '.join(DATA_SETS)}. shapes, binshapes, bincircles and digits need no files; folder takes "
        f"your own images (default: {default})",
    )
    group.add_argument(
        "--data-folder", default=None if of_model else DATA_FOLDER, metavar="DIR",
        help=f"where its files lie or are downloaded to; README lists the layouts (default: {default})",
    )
    group.add_argument(
        "--size", type=whole(2), metavar="PIXELS",
        help="side of the square images; a multiple of --scale (default: "
        + (f"{default})" if of_model else "32 for cifar, mnist, shapes and digits, 64 for folders of images)"),
    )
    group.add_argument(
        "--inet", action="store_true",
        help="normalise with ImageNet's mean and deviation instead of 0.5 and 0.5; the reconstruction then weighs "
        "about five times as much against the KL terms",
    )
    group.add_argument(
        "-j", "--workers", type=whole(0), default=4, metavar="K",
        help="processes that decode images, at most one per core; 0 decodes in the main process (default: %(default)s)",
    )
    group.add_argument(
        "--cache", default="auto", choices=cache.MODES,
        help="where decoded images stay, so that each is decoded once: device (on the GPU), ram, disk (a file in "
        "--cache-folder, which later runs use too) or none; auto takes the first with room (default: %(default)s)",
    )
    group.add_argument(
        "--cache-folder", metavar="DIR",
        help="where --cache disk keeps its files; best on a local SSD (default: .cache in the data folder)",
    )
    group.add_argument(
        "--skip-broken", action="store_true",
        help="decode all images at the start and leave out the broken, at most one in a hundred, listed in the cache "
        "folder; without it the first broken one stops the run",
    )


def add_model_options(parser):
    """The group `model`, without --arch, whose choices differ between the scripts."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--encoder-arch", default="resnet", choices=ENCODERS,
        help="resnet: ResNet-18 cut at --scale; resnet18, resnet50, alexnet: whole, scale 32 (alexnet: with zeros "
        "around an image, so that all of it counts); pyramid: plain stride-2 convolutions; patches: the same, but a "
        "cell sees only its own pixels (default: %(default)s)",
    )
    group.add_argument(
        "--decoder-arch", default="pyramid", choices=DECODERS,
        help="patches: a cell draws only its own pixels, so its part has to say what is there; with pyramid neighbours "
        "help, which looks smoother (default: %(default)s)",
    )
    group.add_argument(
        "--ngf", type=whole(1), default=64, metavar="K",
        help="width: channels of the decoder's last hidden layer and of pyramid's first (default: %(default)s)",
    )
    group.add_argument(
        "--scale", type=whole(2), metavar="K",
        help="pixels per cell of the part grid: smaller finds smaller parts (default: 8; 32 for the encoders that are "
        "whole networks)",
    )
    group.add_argument(
        "--num-parts", type=whole(1), default=16, metavar="N", help="number of parts (default: %(default)s)"
    )
    group.add_argument(
        "--hidden-size", type=whole(1), default=6, metavar="D",
        help="size of a part's appearance; --arch vae uses one vector of N times D (default: %(default)s)",
    )
    group.add_argument(
        "--categorical", action="store_true", help="exactly one part per cell instead of each part by itself"
    )
    group.add_argument(
        "--hard", action="store_true", help="sample occurrence as 0 or 1, with the relaxed sample's gradient"
    )
    group.add_argument(
        "--independent", action="store_true", help="decode every part by itself and add up; --ngf a multiple of N"
    )
    return group


def add_speed_options(group):
    """The options --precision and --compile."""
    group.add_argument(
        "--precision", default="auto", choices=runtime.PRECISIONS,
        help="bf16 trains about twice as fast: convolutions in bfloat16, weights, sampling, loss and tests in float32; "
        "auto takes it where the machine has it in hardware, fp32 elsewhere (default: %(default)s)",
    )
    group.add_argument(
        "--compile", action="store_true",
        help="let torch.compile make kernels for this machine first, half a minute or more; compare with "
        "utils/benchmark.py --compile whether it pays",
    )


def add_save_minutes(group):
    """The option --save-minutes."""
    group.add_argument(
        "--save-minutes", type=above(0), default=15.0, metavar="X",
        help="save also when this long has passed since the last time, for long epochs (default: %(default)s)",
    )


def complete(args, given):
    """Fill in the defaults that depend on other options, and refuse what cannot work together. Changes `args`."""
    if args.size is None:
        args.size = DATA_SETS[args.dataset].size
    if args.scale is None:
        args.scale = FIXED_STRIDE.get(args.encoder_arch, 8)
    scales = SCALES.get(args.encoder_arch, (FIXED_STRIDE.get(args.encoder_arch),))
    if args.scale not in scales:
        raise UsageError(f"--scale {args.scale} with --encoder-arch {args.encoder_arch}: use {_either(scales)}")
    if args.size % args.scale and args.arch in ARCHS:  # whole networks average whatever map they get
        near = max(args.scale, round(args.size / args.scale) * args.scale)
        raise UsageError(f"--size {args.size} is not a multiple of --scale {args.scale}; use --size {near}")
    if args.size < (least := LEAST.get(args.encoder_arch, 1)):
        raise UsageError(f"--size {args.size} leaves {args.encoder_arch} nothing to pool; use --size {least} or more")
    if args.arch == "vae":
        wrong = [name for name in PARTS_ONLY if name in given]
        if wrong:
            raise UsageError(f"--{wrong[0]} belongs to parts, which --arch vae has not; drop it or use --arch patchy")
    if args.independent and args.ngf % args.num_parts:
        fit = math.ceil(args.ngf / args.num_parts) * args.num_parts
        raise UsageError(f"--independent needs --ngf to be a multiple of --num-parts {args.num_parts}; use --ngf {fit}")


def _either(choices):
    *first, last = (str(choice) for choice in choices)
    return f"{', '.join(first)} or {last}" if first else last


def open_batches(args, sources, device):
    """Batches for each of the image sources, as the data options say: a list."""
    row = DATA_SETS[args.dataset]
    if min(map(len, sources)) < ranks.count():
        raise RunError(f"{ranks.count()} processes share {min(map(len, sources))} images; start fewer")
    for source in sources:
        ranks.check_same(len(source), "the number of images")
    mean, std = normalisation(row.channels, args.inet)
    folder = args.cache_folder or os.path.join(args.data_folder, batches.CACHE_FOLDER)
    mode = batches.choose_cache(args.cache, sources, args.size, device, folder)
    common = (args.size, mean, std, device, args.workers, row.flip, mode, folder, args.skip_broken)
    return [batches.Batches(source, *common) for source in sources]


def count_images(opened):
    """How many images the Batches `opened` have, of training and of test or of test alone, in words."""
    parts = ("training", "test")[-len(opened) :]
    return " and ".join(f"{len(batches):,} {part}" for batches, part in zip(opened, parts)) + " images"


def describe_model(args):
    """What rebuilds the model: the dict of plain values that modules.build_model takes and a model file carries."""
    channels = DATA_SETS[args.dataset].channels
    mean, std = normalisation(channels, args.inet)
    return {**{name: getattr(args, name) for name in DESCRIBED}, "channels": channels, "mean": mean, "std": std}


def follow_data(args, given, saved):
    """Let `args` take over the data set and its folder from the options `saved` of a model, where they are not given.

    Where the model's folder has another data set's images, the folder is that of every first run.
    """
    if "dataset" not in given:
        args.dataset = saved["dataset"]
    if "data_folder" not in given:
        args.data_folder = saved["data_folder"] if args.dataset == saved["dataset"] else DATA_FOLDER


def follow_file(args, given, described, path, free=()):
    """Let `args` take over what the model file at `path` says of itself, but for the options `free`, where given.

    Raises UsageError with all differences where an option on the command line says otherwise, and RunError where
    the data set's images have another number of channels.
    """
    fixed = [name for name in DESCRIBED if name not in free]
    names = [name for name in fixed if name in given and getattr(args, name) != described[name]]
    if names:
        raise UsageError(f"the options contradict {path}: {_differences(args, names, described)}; drop them")
    channels = DATA_SETS[args.dataset].channels
    if channels != described["channels"]:
        raise RunError(
            f"{path} was trained on images of {described['channels']} channels, those of --dataset {args.dataset} have "
            f"{channels}; choose another data set or model"
        )
    for name in DESCRIBED:
        if not (name in free and name in given):
            setattr(args, name, described[name])


def settle_resume(args, folder_name):
    """Where torchrun starts a failed job again (--max-restarts), let `args` go on, or begin anew if nothing is saved.

    `folder_name`: of the checkpoints in the output folder. Raises UsageError where options exclude each other.
    """
    if args.overwrite and args.resume is not None:
        raise UsageError("--overwrite and --resume exclude each other: replace the run or go on with it")
    if not ranks.restarted() or args.evaluate:
        return
    if args.resume is not None:
        named = Path(args.resume)
        args.resume = str(named.parent.parent) if named.parent.name == folder_name else args.resume
    elif ranks.largest(torch.tensor(int(tracking.held_before(args.output_folder)))):
        is_saved = checkpoints.numbered(os.path.join(args.output_folder, folder_name))
        args.resume, args.overwrite = ("", False) if is_saved else (None, True)


def check_batch(images, cells):
    """Refuse steps of `images` images, on maps of `cells` cells, that BatchNorm or a process of several cannot use."""
    if images < ranks.count():
        raise UsageError(f"--batch-size {images} leaves some of {ranks.count()} processes without an image; use more")
    if images // ranks.count() * cells == 1:
        raise UsageError(f"--batch-size {images} leaves one value of a channel, which cannot be normalised; use more")


def follow_run(args, given, saved, free):
    """Let `args` follow the options `saved` of the run that goes on; those in `free` may be given anew.

    Raises UsageError with all differences where another option on the command line says otherwise.
    """
    newer = [name for name in given if name not in (*saved, *free, *NEVER_SAVED)]
    if newer:
        raise UsageError(f"the run is of an older version, which had no --{newer[0].replace('_', '-')}; drop it")
    saved = {"precision": "fp32", **saved}  # nor that
    known = {**saved, **saved["typed"]}  # the same command as before, with --resume, contradicts nothing
    fixed = [name for name in known if name in given and name not in (*free, *NEVER_SAVED)]
    names = [name for name in fixed if getattr(args, name) != known[name]]
    if names:
        raise UsageError(f"the options contradict the run: {_differences(args, names, known)}; drop them")
    for name, value in saved.items():
        if name not in NEVER_SAVED and not (name in free and name in given):
            setattr(args, name, value)


def own_folder(args, given, folder, marker):
    """Make `folder`, where the run that goes on lies, the output folder. Raises UsageError if another one was given.

    `marker`: the file that every run's folder holds.
    """
    if "output_folder" in given and os.path.realpath(args.output_folder) != os.path.realpath(folder):
        raise UsageError(f"--resume goes on in the run's own folder, {folder}; leave out --output-folder")
    if not os.path.exists(os.path.join(folder, marker)):
        raise UsageError(f"--resume: {folder} is not the folder of a run (no {marker}); give the run's folder")
    args.output_folder = folder


def _differences(args, names, file):
    return ", ".join(f"--{name.replace('_', '-')} {getattr(args, name)} (file: {file[name]})" for name in names)
