"""The command line: what was typed, what a file or a run says, and the defaults, put together once."""

import argparse
import difflib
import math
import os
import re
from types import SimpleNamespace

from datasets import DATA_SETS, normalisation
from modules import ARCHS, DECODERS, ENCODERS, FIXED_STRIDE
from utils import batches, runtime
from utils.runtime import RunError, UsageError

SCALES = {"resnet": (4, 8, 16, 32)} | dict.fromkeys(("pyramid", "patches"), (2, 4, 8, 16, 32, 64))
LEAST = {"alexnet": 28}  # pixels a side, below which an encoder's poolings leave nothing
PARTS_ONLY = ("categorical", "hard", "independent", "py")
# What a model file knows of itself; where the command line says otherwise, it contradicts the file.
DESCRIBED = ("arch", "encoder_arch", "decoder_arch", "size", "inet", "ngf", "independent", "scale", "num_parts")
DESCRIBED += ("hidden_size", "py", "categorical", "hard")
OF_COMMAND = ("overwrite", "resume", "evaluate", "gpu")  # not of the run that goes on


# ---------------------------------------------------------------------------------------------------- types


def whole(low, high=None):
    """An argparse type: a whole number from `low` to `high` (no upper bound if None)."""
    return _number(int, low, high)


def real(low, high=None):
    """An argparse type: a finite number from `low` to `high`."""
    return _number(float, low, high)


def above(low, high=None):
    """An argparse type: a finite number greater than `low`, at most `high`."""
    return _number(float, low, high, strictly=True)


def _number(kind, low, high, strictly=False):
    wanted = ("a whole number " if kind is int else "a number ") + (f"above {low}" if strictly else f"of {low} or more")
    wanted += "" if high is None else f", at most {high}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        fits = math.isfinite(value) and (value > low if strictly else value >= low) and (high is None or value <= high)
        if not fits:
            raise argparse.ArgumentTypeError(f"'{text}' is not {wanted}")
        return value

    return parse


seed = whole(0, 2**32 - 1)  # as large as scikit-learn takes them


def path(text):
    """An argparse type: the path of a file or folder; ~ is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a path, or leave it out")
    return os.path.expanduser(text)


def model_file(text):
    """An argparse type: the path of a model.pt, or of the folder that holds it."""
    found = path(text)
    return os.path.join(found, "model.pt") if os.path.isdir(found) else found


class Parser(argparse.ArgumentParser):
    """An ArgumentParser for typed options: its errors are UsageErrors, it takes no abbreviations.

    `option` and `switch` add to the section begun last. The defaults lie in `defaults`, a dict, so that what was typed
    stays apart from them; in `free` the names of the options that a resumed run may change, as no figure depends on
    them.
    """

    def __init__(self, **options):
        super().__init__(
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
            **options,
        )
        self.defaults, self.free, self.current = {}, set(OF_COMMAND), self

    def section(self, title):
        self.current = self.add_argument_group(title)

    def option(self, flags, kind, default, metavar, words, free=False, **more):
        """An option with a value: its flags, a type or a tuple of choices, and a help text."""
        more |= {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        more |= {"metavar": metavar} if metavar else {}
        words += "" if default is None else f" (default: {default})"
        self._add(flags, default, words, free, **more)

    def switch(self, flags, words, free=False):
        """An option without a value, off by default."""
        self._add(flags, False, words, free, action="store_true")

    def _add(self, flags, default, words, free, **how):
        action = self.current.add_argument(*flags.split(), help=words, default=argparse.SUPPRESS, **how)
        self.defaults[action.dest] = default
        self.free |= {action.dest} if free else set()

    def typed(self, argv=None):
        """What `argv` itself says: a dict. Raises UsageError."""
        return vars(self.parse_args(argv))

    def settings(self, argv=None):
        """The Settings of a tool that knows nothing but its command line."""
        return Settings(**{**self.defaults, **self.typed(argv)})

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        known = [flag for action in self._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[1], known, 1, 0.5) if unknown else []
        raise UsageError(f"{message} ({f'did you mean {near[0]}? ' if near else ''}see --help)")


# ---------------------------------------------------------------------------------------------------- settings


class Settings(SimpleNamespace):
    """The options of a script as attributes; they stay as they are, and changed() gives others."""

    def __setattr__(self, name, value):
        raise AttributeError(f"settings are not changed ({name}); use changed()")

    def changed(self, **values):
        return Settings(**{**vars(self), **values})


def merge(defaults, saved, typed, fixed=(), source="the run"):
    """Defaults, under what a file or run has `saved`, under what was `typed`: a dict.

    What is typed may differ from what is saved, but for the names `fixed`: raises UsageError with all differences. The
    command that once made the run says nothing else when it is typed again.
    """
    earlier = {**saved, **saved.get("typed", {})}
    wrong = [name for name in fixed if name in typed and typed[name] not in (saved.get(name), earlier.get(name))]
    if wrong:
        words = ", ".join(f"--{name.replace('_', '-')} {typed[name]} (there: {saved.get(name)})" for name in wrong)
        raise UsageError(f"the options contradict {source}: {words}; drop them")
    kept = {name: value for name, value in typed.items() if not (name in fixed and name in saved)}
    return {**defaults, **saved, **kept, "typed": typed}


def follow_run(parser, saved, typed):
    """The options of the run that goes on, `saved`; those that the parser calls free may be typed anew: a dict."""
    own = {name: parser.defaults[name] for name in OF_COMMAND if name in parser.defaults}
    fixed = [name for name in parser.defaults if name not in parser.free]
    return {**merge(parser.defaults, {**saved, **own}, typed, fixed), "typed": saved["typed"]}


def follow_model(parser, file, path, typed, fixed=DESCRIBED, of_training=None):
    """The options under what the model file `path`, whose content is `file`, says of its model: a dict.

    `fixed`: which of these may not be typed otherwise. `of_training`: names of options that its training answers,
    too, as it does for its data; another data set has a folder of its own. Raises UsageError or RunError.
    """
    model, training = file["options"], file["args"]
    saved = {"pretrained": path, **{name: model[name] for name in DESCRIBED}}
    if of_training is not None:
        is_same = typed.get("dataset", training["dataset"]) == training["dataset"]
        names = (*of_training, "dataset", *["data_folder"] * is_same)
        saved |= {name: training[name] for name in names if name in training}  # a file of earlier code knows fewer
    values = merge(parser.defaults, saved, typed, fixed, path)
    channels = DATA_SETS[values["dataset"]].channels
    if channels != model["channels"]:
        raise RunError(
            f"{path} was trained on images of {model['channels']} channels, those of --dataset {values['dataset']} "
            f"have {channels}; choose another data set or model"
        )
    return values | {"data_folder": values["data_folder"] or "./data"}


def complete(values, typed):
    """The options `values`, a dict, with the defaults that depend on others. Raises UsageError for what cannot be."""
    values = dict(values)
    values["size"] = values["size"] or DATA_SETS[values["dataset"]].size
    values["scale"] = values["scale"] or FIXED_STRIDE.get(values["encoder_arch"], 8)
    size, scale, encoder = values["size"], values["scale"], values["encoder_arch"]
    scales = SCALES.get(encoder, (FIXED_STRIDE.get(encoder),))
    if scale not in scales:
        *first, last = map(str, scales)
        use = f"{', '.join(first)} or {last}" if first else last
        raise UsageError(f"--scale {scale} with --encoder-arch {encoder}: use {use}")
    if values["arch"] in ARCHS:  # whole networks average whatever map they get
        check_size(size, scale)
    if size < (least := LEAST.get(encoder, 1)):
        raise UsageError(f"--size {size} leaves {encoder} nothing to pool; use --size {least} or more")
    wrong = [name for name in PARTS_ONLY if name in typed and values["arch"] == "vae"]
    if wrong:
        raise UsageError(f"--{wrong[0]} belongs to parts, which --arch vae has not; drop it or use --arch patchy")
    if values["independent"] and values["ngf"] % values["num_parts"]:
        fit = math.ceil(values["ngf"] / values["num_parts"]) * values["num_parts"]
        raise UsageError(f"--independent needs --ngf to be a multiple of --num-parts {values['num_parts']}; use {fit}")
    return values


def check_size(size, scale):
    """Raises UsageError for images that cells of `scale` pixels do not fill."""
    if size % scale:
        near = max(scale, round(size / scale) * scale)
        raise UsageError(f"--size {size} is not a multiple of --scale {scale}; use --size {near}")


def describe_model(settings):
    """What rebuilds the model: the dict of plain values that modules.build_model takes and a model file carries."""
    channels = DATA_SETS[settings.dataset].channels
    mean, std = normalisation(channels, settings.inet)
    return {**{name: getattr(settings, name) for name in DESCRIBED}, "channels": channels, "mean": mean, "std": std}


def check_batch(images, cells):
    """Refuse steps of `images` images, on maps of `cells` cells, that BatchNorm or a process of several cannot use."""
    if images < runtime.count():
        raise UsageError(f"--batch-size {images} leaves some of {runtime.count()} processes without an image; use more")
    if images // runtime.count() * cells == 1:
        raise UsageError(f"--batch-size {images} leaves one value of a channel, which cannot be normalised; use more")


def typed_again(values, names):
    """The options `names` of the dict `values` as they are typed: a list of str; None and False are left out."""
    typed = []
    for name in names:
        value, flag = values[name], f"--{name.replace('_', '-')}"
        typed += [] if value is None or value is False else [flag] if value is True else [flag, str(value)]
    return typed


# ---------------------------------------------------------------------------------------------------- shared options


def add_model_file(parser):
    """The option --pretrained of the tools."""
    parser.option("--pretrained", model_file, None, "FILE", "a model.pt of run.py, or the folder of its run",
                  required=True)


def add_data_options(parser, dataset="cifar100", cache="auto"):
    """The section `data`. Without a `dataset`, what the model at hand was trained on is the default, None here."""
    native = "default: 32, of folders of images 64" if dataset else "the model's own"
    parser.section("data")
    parser.option("--dataset", tuple(DATA_SETS), dataset, "NAME", f"one of {', '.join(DATA_SETS)}. shapes, binshapes, "
                  "bincircles and digits need no files; folder takes your own images")
    parser.option("--data-folder", path, "./data" if dataset else None, "DIR",
                  "where its files lie or are downloaded to; README lists the layouts", free=True)
    parser.option("--size", whole(2), None, "PIXELS", f"side of the square images; a multiple of --scale ({native})")
    parser.switch("--inet", "normalise with ImageNet's mean and deviation instead of 0.5 and 0.5; the reconstruction "
                  "then weighs about five times as much against the KL terms")
    parser.option("-j --workers", whole(0), 4, "K", "processes that decode images, at most one per core; 0 decodes in "
                  "the main process", free=True)
    parser.option("--cache", batches.CACHES, cache, None, "where decoded images stay: device (on the GPU), ram, disk "
                  "(a file that later runs use too) or none; auto takes the first with room", free=True)
    parser.option("--cache-folder", path, None, "DIR", "where --cache disk keeps its files; best on a local SSD "
                  "(default: .cache in the data folder)", free=True)
    parser.switch("--skip-broken", "decode all images at the start and leave out the broken, at most one in a hundred, "
                  "listed in the cache folder; without it the first broken one stops the run")


def add_model_options(parser):
    """The section `model`, without --arch, whose choices differ between the scripts."""
    parser.section("model")
    parser.option("--encoder-arch", ENCODERS, "resnet", None, "resnet: ResNet-18 cut at --scale; resnet18, resnet50, "
                  "alexnet: whole, scale 32; pyramid: plain stride-2 convolutions; patches: the same, but a cell sees "
                  "only its own pixels")
    parser.option("--decoder-arch", DECODERS, "pyramid", None, "patches: a cell draws only its own pixels, so its part "
                  "has to say what is there; with pyramid neighbours help, which looks smoother")
    parser.option("--ngf", whole(1), 64, "K", "channels of the decoder's last hidden layer and of pyramid's first")
    parser.option("--scale", whole(2), None, "K", "pixels per cell of the part grid: smaller finds smaller parts "
                  "(default: 8; 32 for the encoders that are whole networks)")
    parser.option("--num-parts", whole(1), 16, "N", "number of parts")
    parser.option("--hidden-size", whole(1), 6, "D", "size of a part's appearance; --arch vae has one vector of N x D")
    parser.switch("--categorical", "exactly one part per cell instead of each part by itself")
    parser.switch("--hard", "sample occurrence as 0 or 1, with the relaxed sample's gradient")
    parser.switch("--independent", "decode every part by itself and add up; --ngf a multiple of N")


def add_run_options(parser):
    """The section `machine and output` of both scripts."""
    parser.section("machine and output")
    parser.option("--precision", runtime.PRECISIONS, "auto", None, "bf16 trains about twice as fast: convolutions in "
                  "bfloat16, the rest in float32; auto takes it where the hardware has it")
    parser.switch("--compile", "let torch.compile make kernels for this machine first, half a minute or more; "
                  "utils/benchmark.py --compile tells whether it pays")
    parser.switch("--no-cuda", "compute on the CPU even where there is a GPU", free=True)
    parser.option("--output-folder", path, "./scratch", "DIR", "where everything goes that the run leaves", free=True)
    parser.option("--resume", path, None, "PATH", "go on with the run of this folder or checkpoint (default: the "
                  "output folder), with its options; auto: go on if there is one, else begin, as jobs want that are "
                  "started again", nargs="?", const=False)
    parser.switch("--overwrite", "replace the run that the output folder holds")
    parser.option("--save-minutes", above(0), 15.0, "X", "save also when this long has passed since the last time",
                  free=True)
