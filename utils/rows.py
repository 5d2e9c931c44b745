"""The rows of the tables that utils/reproduce.py makes: what is trained, how, and what it is held against.

Cuts are where an encoder is frozen: the paper's (modules.CUTS), or ALL of it.
"""

import contextlib
import functools
from typing import NamedTuple

import torch

import modules
import run
from utils import options
from utils.console import UsageError

# The options of run.py that served recognition best, for PatchVAE, on held-out training images of CIFAR-10.
RECIPE = "--encoder-arch pyramid --lr 1e-3 --batch-size 64 --beta-a 0.1 --beta-v 0.1 --hide 0.5 --grey 0.5".split()
SETTINGS = {"paper": ("paper's setting", []), "recipe": ("recipe", RECIPE)}
MODELS = {
    "vae": ("β-VAE", ["--arch", "vae"]),
    "vae-edges": ("β-VAE + edges", ["--arch", "vae", "--recon-mask", "edge"]),
    "patchy": ("PatchVAE", ["--arch", "patchy"]),
    "patchy-edges": ("PatchVAE + edges", ["--arch", "patchy", "--recon-mask", "edge"]),
}
CONTRASTS = (("patchy", "vae"), ("patchy-edges", "vae-edges"), ("patchy-edges", "patchy"), ("vae-edges", "vae"))
FACTORS = {  # of --ablations: their values take turns, all else stays as in the recipe
    "num_parts": ("number of parts", (4, 8, 16, 32, 64)),
    "hidden_size": ("appearance size", (3, 6, 16)),
    "py": ("prior of a part", (0.01, 1 / 16, 0.25)),
    "beta_v": ("beta-v", (0.01, 0.1, 1, 10)),
    "beta_a": ("beta-a", (0.1, 1)),
    "hide": ("what is hidden", (0, 0.25, 0.5, 0.75)),
    "grey": ("what is grey", (0, 0.5)),
    "lr": ("learning rate", (1e-4, 1e-3)),
    "encoder_arch": ("encoder", ("pyramid", "resnet")),
    "scale": ("scale", (4, 8)),
}
ALL = "all"


class Row(NamedTuple):
    """One line of a table. Supervised networks have no options of run.py, random ones those of a row of theirs."""

    name: str  # of its folders, and for --rows
    group: str
    words: str
    typed: list  # options of run.py
    kind: str = "trained"  # or "random", or "supervised"

    @property
    def settled(self):
        """What run.py makes of the options."""
        return _settled(tuple(self.typed))

    @property
    def encoder(self):
        """The options that say which encoder it is: a tuple of str."""
        names = ("encoder_arch", "scale")
        names += ("ngf",) if self.settled.encoder_arch in ("pyramid", "patches") else ()
        return tuple(typed_again(self.settled, names))


@functools.cache
def _settled(typed):
    return run.parse([*typed, "--size", "64"])[0]  # a size that every scale divides; rows say nothing of it


# ---------------------------------------------------------------------------------------------------- rows


def table_rows(args):
    """The rows of the table: a list."""
    rows = [
        Row(f"{setting}-{model}", group, words, [*common, *model_options(args, model), *typed])
        for setting, (group, common) in SETTINGS.items()
        for model, (words, typed) in MODELS.items()
    ]
    return [*rows, *random_rows(rows), Row("supervised", "with labels", "ResNet-18, nothing frozen", [], "supervised")]


def ablation_rows(args):
    """The rows of --ablations: the recipe's PatchVAE, and every other possible value of each factor: a list."""
    common = [*RECIPE, *model_options(args, "patchy")]
    base = _settled(tuple(common))
    common += ["--py", str(base.py)]  # its default would change with the number of parts
    rows = [Row("ablation-base", "recipe", "PatchVAE", common)]
    for name, (group, values) in FACTORS.items():
        flag, own = f"--{name.replace('_', '-')}", getattr(base, name)
        for text in (in_short(value) for value in values if value != own):
            row = Row(f"ablation{flag[1:]}-{text}", f"{group} (recipe: {in_short(own)})", text, [*common, flag, text])
            with contextlib.suppress(UsageError):  # not every encoder has every scale
                _settled(tuple(row.typed))
                rows.append(row)
    return [*rows, *random_rows(rows)]


def in_short(value):
    return value if isinstance(value, str) else f"{value:g}"


def model_options(args, model):
    """The given options of the model, without those that a beta-VAE has not."""
    own = set(options.DESCRIBED) - {"size", "inet"} - set(() if model.startswith("patchy") else options.PARTS_ONLY)
    return typed_again(args, [name for name in options.DESCRIBED if name in own & args.given])


def typed_again(args, names):
    """The options `names` of `args` as they are typed: a list of str; what is None or False is left out."""
    typed = []
    for name in names:
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        typed += [] if value is None or value is False else [flag] if value is True else [flag, str(value)]
    return typed


def random_rows(rows):
    """A row of random initialisation for every encoder that `rows` have: a list."""
    encoders = list(dict.fromkeys(row.encoder for row in rows))
    known = [dict(zip(encoder[::2], encoder[1::2])) for encoder in encoders]  # option -> its value
    differ = [flag for flag in known[-1] if len({found.get(flag, known[-1][flag]) for found in known}) > 1]
    floors = []
    for encoder, found in zip(encoders, known):
        own = [f"{flag.lstrip('-')} {found[flag]}".removeprefix("encoder-arch ") for flag in differ if flag in found]
        name = "-".join(["random", *found.values()])  # the same whatever else is in the table
        floors.append(Row(name, "without training", ", ".join(["random", *own]), list(encoder), "random"))
    return floors


# ---------------------------------------------------------------------------------------------------- against what


def floor_of(row, rows):
    """The name of that one of `rows` which is `row` with random weights, or None."""
    if row.kind != "trained":
        return None
    return next((other.name for other in rows if other.kind == "random" and other.encoder == row.encoder), None)


def unsupervised(rows):
    """Those of `rows` that have an encoder to be frozen: a list."""
    return [row for row in rows if row.kind != "supervised"]


def contrasts(rows, ablations):
    """What is compared seed by seed: a list of (words, name of a row, name of the row that is subtracted)."""
    names = {row.name for row in rows}
    pairs = [(f"{MODELS[one][0]} − {MODELS[two][0]}, {words}", f"{setting}-{one}", f"{setting}-{two}")
             for setting, (words, _) in SETTINGS.items() for one, two in CONTRASTS]  # fmt: skip
    if ablations:
        trained = [row for row in rows if row.kind == "trained" and row.name != "ablation-base"]
        pairs = [(f"{row.group}: {row.words} − recipe", row.name, "ablation-base") for row in trained]
    return [pair for pair in pairs if names.issuperset(pair[1:])]


# -------------------------------------------------------------------------------------------------- where it is frozen


def cuts_of(row):
    """Where the encoder of `row` is frozen: ALL, which is cheap to judge, and the paper's cuts within it: a list."""
    ends, children = _ends_of(*row.encoder)
    return [ALL, *reversed([name for name, end in ends.items() if end < children])]


def all_frozen(rows):
    """"all frozen", and the paper's name for that cut in brackets, if the encoders of `rows` share one."""
    found = [_ends_of(*row.encoder) for row in unsupervised(rows)]
    names = {next((f" ({name})" for name, end in ends.items() if end == children), "") for ends, children in found}
    return f"all frozen{names.pop() if len(names) == 1 else ''}"


@functools.cache
def _ends_of(*encoder):
    """How many children of the encoder each of the paper's cuts freezes: a dict, and how many there are."""
    found = _settled(encoder)
    with torch.device("meta"):  # its structure, no weights
        network, _ = modules.build_encoder(found.encoder_arch, 3, found.scale, found.ngf)
    return modules.children_until(found.encoder_arch), len(network)
