"""Reproduce the paper's comparison: train every row of the table over several seeds, judge the encoders, report.

    python utils/reproduce.py --data-folder data --output-folder reproduction
    python utils/reproduce.py --quick --output-folder quick

The rows: beta-VAE and PatchVAE, plain and with the edge-weighted loss, in the paper's own setting and with our recipe;
random initialisation; a supervised ResNet-18. Encoders are frozen up to each of the paper's cuts and judged by
classifier.py's head, a linear and a nearest-neighbour probe. table.md, plot.png and results.json in the output folder
are renewed whenever a model has been judged. The same command goes on where it was stopped and repeats nothing that is
finished. Processes may share the work, with other --seeds each: the command with all of them then only reports.
"""

import fcntl
import functools
import json
import math
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import classifier  # noqa: E402
import modules  # noqa: E402
import run  # noqa: E402
from utils import checkpoints, console, grids, jobs, options, runtime, standings, tracking  # noqa: E402

# ---------------------------------------------------------------------------------------------------- what is compared

# The options of run.py that have served recognition best, chosen on held-out training images of CIFAR-10.
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
}
HEAD = ["--standardise", "--lr", "0.03"]  # classifier.py's own 0.1 is for whole networks
SUPERVISED = ["--arch", "resnet18", "--lr", "0.1"]
ALL, NONE = "all", "none"  # cuts: the whole encoder is frozen, or nothing of a supervised network
NAMES = {False: ("table.md", "plot.png", "results.json"), True: ("ablations.md", "ablations.png", "ablations.json")}
# What --quick puts in place of options that are not given.
QUICK = {
    "dataset": "shapes", "size": 32, "encoder_arch": "pyramid", "ngf": 8, "scale": 8, "num_parts": 8, "seeds": [1, 2],
    "num_epochs": 1, "img_per_epoch": 1000, "batch_size": 32, "head_epochs": 4, "tune_epochs": 2,
    "supervised_epochs": 1, "head_batch_size": 64, "label_fraction": 0.01, "head_label_fraction": 0.01, "workers": 0,
}  # fmt: skip


class Row(NamedTuple):
    """One line of the table. Supervised networks have no options of run.py, random ones those of a row of theirs."""

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
    return run.parse(typed)[0]


def table_rows(args):
    """The rows of the table: a list."""
    rows = [
        Row(f"{setting}-{model}", group, words, [*model_options(args, model), *common, *typed])
        for setting, (group, common) in SETTINGS.items()
        for model, (words, typed) in MODELS.items()
    ]
    return [*rows, *floors(rows), Row("supervised", "with labels", "ResNet-18, nothing frozen", [], "supervised")]


def ablation_rows(args):
    """The rows of --ablations: the recipe's PatchVAE, and every other value of each factor: a list."""
    common = [*model_options(args, "patchy"), *RECIPE]
    base = run.parse(common)[0]
    common += ["--py", str(base.py)]  # its default would change with the number of parts
    rows = [Row("ablation-base", "recipe", "PatchVAE", common)]
    for name, (group, values) in FACTORS.items():
        flag, own = f"--{name.replace('_', '-')}", getattr(base, name)
        for text in (in_short(value) for value in values if value != own):
            words = f"{group} (recipe: {in_short(own)})"
            rows.append(Row(f"ablation{flag[1:]}-{text}", words, text, [*common, flag, text]))
    return [*rows, *floors(rows)]


def in_short(value):
    return value if isinstance(value, str) else f"{value:g}"


def floors(rows):
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


# ---------------------------------------------------------------------------------------------------- command line


def parse(argv):
    """The checked options, and the rows that are wanted: a list. Raises UsageError."""
    parser = build_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    quick = {name: value for name, value in QUICK.items() if args.quick and name not in given}
    vars(args).update(quick)
    args.given = given | set(quick)
    if args.num_epochs is None:
        args.num_epochs = 3 if args.ablations else 10
    rows = ablation_rows(args) if args.ablations else table_rows(args)
    unknown = set(args.rows or ()) - {row.name for row in rows}
    if unknown:
        names = ", ".join(row.name for row in rows)
        raise console.UsageError(f"--rows {min(unknown)}: there is no such row; choose from {names}")
    args.seeds = list(dict.fromkeys(args.seeds))
    return args, [row for row in rows if not args.rows or row.name in args.rows]


def build_parser():
    parser = console.Parser(description=__doc__)
    options.add_data_options(parser)
    options.add_model_options(parser)
    parser.set_defaults(dataset="cifar10", inet=True)
    what = parser.add_argument_group("what to do")
    what.add_argument("--rows", nargs="+", metavar="NAME",
                      help="only these rows, e.g. recipe-vae recipe-patchy; an unknown name lists all (default: all)")
    what.add_argument("--seeds", nargs="+", type=console.whole(0), default=[1, 2, 3], metavar="K",
                      help="one training each; three or more tell how far chance reaches (default: 1 2 3)")
    what.add_argument("--ablations", action="store_true",
                      help="another table instead, ablations.md: the recipe's PatchVAE with other numbers of parts, "
                      "appearance sizes, priors, betas, damage, another learning rate or encoder, one at a time")  # fmt: skip
    what.add_argument("--frozen-only", action="store_true",
                      help="judge only encoders that are frozen as a whole; the other cuts train the layers behind "
                      "them, which takes longer than all else but the training itself; so does --ablations")
    what.add_argument("--quick", action="store_true",
                      help="all of it on drawn shapes with a tiny model, in minutes: to try the command, not to judge")
    what.add_argument("--no-inet", dest="inet", action="store_false",
                      help="without --inet, which is the default here, as the paper's commands have it")
    what.add_argument("--output-folder", default="./reproduction", metavar="DIR",
                      help="where the table, the plot, the figures and all runs go (default: %(default)s)")
    what.add_argument("--no-cuda", action="store_true", help="compute on the CPU even where there is a GPU")
    add_budget(parser.add_argument_group("budget"))
    return parser


def add_budget(group):
    """The options that say how long everything trains."""
    whole, share = console.whole(1), console.above(0, 1)
    for flag, kind, default, words in (
        ("--num-epochs", whole, None, "epochs of training without labels (default: 10, with --ablations 3)"),
        ("--img-per-epoch", whole, 50_000, "images of one of them (default: %(default)s)"),
        ("--batch-size", whole, 128, "images of a step of them, unless the recipe has its own (default: %(default)s)"),
        ("--head-epochs", whole, 12, "epochs of the head where the whole encoder is frozen; cheap, as features are "
         "stored (default: %(default)s)"),
        ("--tune-epochs", whole, 3, "epochs where the layers behind the cut are trained with the head; as dear as "
         "supervised training (default: %(default)s)"),
        ("--supervised-epochs", whole, 15, "epochs of the supervised network (default: %(default)s)"),
        ("--head-batch-size", whole, 256, "images of a step of these three (default: %(default)s)"),
        ("--head-label-fraction", share, 1.0, "share of the labels for these three (default: all)"),
        ("--label-fraction", share, 0.2, "share of the labels for the linear and nearest-neighbour probes; with all of "
         "CIFAR's they take many minutes (default: %(default)s)"),
    ):  # fmt: skip
        group.add_argument(flag, type=kind, default=default, metavar="K" if kind is whole else "P", help=words)
    options.add_speed_options(group)


def typed_again(args, names):
    """The options `names` of `args` as they are typed: a list of str; what is None or False is left out."""
    typed = []
    for name in names:
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        typed += [] if value is None or value is False else [flag] if value is True else [flag, str(value)]
    return typed


def model_options(args, model):
    """The given options of the model, without those that a beta-VAE has not."""
    own = set(options.DESCRIBED) - {"size", "inet"} - set(() if model.startswith("patchy") else options.PARTS_ONLY)
    return typed_again(args, [name for name in options.DESCRIBED if name in own & args.given])


# ---------------------------------------------------------------------------------------------------- what is done


def jobs_of(args, row, seed):
    """All that has to be done for one row and seed, in this order: a list of Job."""
    home = Path(args.output_folder, "runs", f"{row.name}-seed{seed}")
    data = ["dataset", "data_folder", "size", "inet", "workers", "cache", "cache_folder", "skip_broken"]
    common = [*typed_again(args, [*data, "precision", "compile", "no_cuda"]), "--seed", str(seed)]

    def job(part, script, *typed):
        folder = home if part == "training" else home / part
        return jobs.Job(part, folder, script, [*common, *typed, "--output-folder", str(folder)])

    if row.kind == "supervised":
        return [job(f"{NONE}-head", classifier, *SUPERVISED, *head_budget(args, args.supervised_epochs))]
    budget = typed_again(args, ["num_epochs", "img_per_epoch", "batch_size"])
    todo = [job("training", run, *budget, *row.typed)] if row.kind == "trained" else []
    for cut in cuts_of(args, row):
        where = [*encoder_of(row, home), "--freeze", "-1" if cut == ALL else cut]
        epochs = args.head_epochs if cut == ALL else args.tune_epochs
        probes = ["--linear", "--knn", "--label-fraction", f"{args.label_fraction:g}"]
        todo.append(job(f"{cut}-head", classifier, *where, *HEAD, *head_budget(args, epochs)))
        todo.append(job(f"{cut}-probes", classifier, *where, *probes))
    return todo


def encoder_of(row, home):
    """The options of classifier.py that name the encoder of `row`, whose model lies in the folder `home`."""
    if row.kind == "random":
        return ["--arch", "patchy", "--random-init", *row.typed]
    return ["--arch", row.settled.arch, "--pretrained", str(home / "model.pt")]


def head_budget(args, epochs):
    """The options of classifier.py for `epochs` of training, the learning rate falling after two thirds."""
    budget = ["--epochs", epochs, "--step", math.ceil(epochs * 2 / 3), "--batch-size", args.head_batch_size]
    return [*map(str, budget), "--label-fraction", f"{args.head_label_fraction:g}"]


def cuts_of(args, row):
    """Where the encoder of `row` is frozen: ALL, which is cheap to judge, and the paper's cuts within it: a list."""
    ends, children = ends_of(*row.encoder)
    inner = [] if args.frozen_only or args.ablations else [name for name, end in ends.items() if end < children]
    return [ALL, *reversed(inner)]


def last_cut(rows):
    """The paper's name for the end of the encoders of `rows` in brackets, or "" where they differ or have none."""
    found = [ends_of(*row.encoder) for row in unsupervised(rows)]
    names = {next((f" ({name})" for name, end in ends.items() if end == children), "") for ends, children in found}
    return names.pop() if len(names) == 1 else ""


@functools.cache
def ends_of(*encoder):
    """How many children of the encoder each of the paper's cuts freezes: a dict, and how many there are."""
    found = _settled(encoder)
    with torch.device("meta"):  # its structure, no weights
        network, _ = modules.build_encoder(found.encoder_arch, 3, found.scale, found.ngf)
    return modules.children_until(found.encoder_arch), len(list(network.children()))


def main(argv=None):
    """Do and report what `argv` says; returns the content of results.json: a dict."""
    args, rows = parse(argv)
    work = {(row.name, seed): jobs_of(args, row, seed) for seed in args.seeds for row in rows}
    for job in (job for todo in work.values() for job in todo):
        jobs.check(job)
    device, done, failed = runtime.choose_device(args.no_cuda), 0, []
    for todo in work.values():  # seed by seed: every row is soon there
        try:
            made = [jobs.fulfil(job, device) for job in todo]
        except (KeyboardInterrupt, console.Terminated) as signal:
            raise type(signal)("stopped; the same command goes on from here") from None
        except console.UsageError:
            raise
        except console.RunError as error:  # the other rows do not depend on it
            print(f"not finished: {error}", flush=True)
            failed.append(str(error))
            continue
        done += sum(made)
        if any(made):
            report(args, rows, work)
    content = report(args, rows, work)
    print(f"\n{standings.markdown(content)}\n{done} calls made; what had been finished was not repeated")
    for name, what in zip(NAMES[args.ablations], ("this table", "its plot", "every figure and its command")):
        print(f"{what}: {tracking.relative(Path(args.output_folder, name))}")
    if failed:
        raise console.RunError(f"{len(failed)} of {len(work)} models are not finished; the first: {failed[0]}")
    return content


# ---------------------------------------------------------------------------------------------------- what is reported


def report(args, rows, work):
    """Write what is known by now into the output folder. Returns the content of the JSON file: a dict."""
    calls = {f"{name}-seed{seed}": account(todo) for (name, seed), todo in work.items()}
    scores = {row.name: {} for row in rows}
    for name, seed in work:
        for column, value in scores_of(calls[f"{name}-seed{seed}"]).items():
            scores[name].setdefault(column, {})[seed] = value
    floor = {row.name: floor_of(row, rows) for row in rows}
    statistics = standings.summarise(rows, scores, contrasts(rows, args.ablations), floor)
    content = {
        "title": f"Recognition on {images_of(args)} with frozen encoders{', one change at a time' * args.ablations}",
        "frozen": f"all frozen{last_cut(rows)}", "seeds": args.seeds, "columns": columns_of(args, rows), **statistics,
        "notes": protocol(args, rows, calls), **runtime.record(), "calls": calls,
    }  # fmt: skip
    folder = Path(args.output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    table, plot, figures = (folder / name for name in NAMES[args.ablations])
    with open(folder / ".report.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)  # other processes report into this folder, too
        tracking.write_json(figures, content)
        grids.save(standings.plot(content), str(plot))
        checkpoints.write(table, lambda file: file.write(standings.markdown(content).encode()))
    return content


def images_of(args):
    """What the images are called: the data set, or the folder they lie in."""
    return args.dataset if args.dataset != "folder" else Path(args.data_folder).name or args.dataset


def account(todo):
    """Of the finished ones of `todo`: a dict part -> command, figures, seconds, and what it was made with."""
    found = {}
    for job in todo:
        figures, made = jobs.figures_of(job), job.folder / "made.json"
        if figures is not None:
            command = shlex.join(["python", f"{job.script.__name__}.py", *job.argv])
            origin = json.loads(made.read_text()) if made.exists() else {}
            found[job.part] = {"command": command, **figures, **origin}
    return found


def scores_of(calls):
    """Top-1 by column, e.g. "conv1-head": of heads and networks after the last epoch, not the best one."""
    scores = {}
    for part, found in calls.items():
        cut, _, judge = part.rpartition("-")
        if judge == "head":
            scores[part] = found["last"]["top1"]
        elif judge == "probes":
            scores |= {f"{cut}-{name}": found[name]["top1"] for name in ("linear", "knn")}
    return scores


def columns_of(args, rows):
    """The columns of the table and their headings: a dict."""
    found = {cut for row in unsupervised(rows) for cut in cuts_of(args, row)}
    words = {cut: f"frozen: {cut}" for cut in modules.CUTS} | {ALL: f"all frozen{last_cut(rows)}"}
    cuts = [cut for cut in words if cut in found]
    columns = {f"{cut}-{judge}": f"{words[cut]}, {title}" for cut in cuts for judge, title in standings.JUDGES.items()}
    return columns | ({f"{NONE}-head": "nothing frozen"} if len(unsupervised(rows)) < len(rows) else {})


def protocol(args, rows, calls):
    """How the figures came about, in words: a list of str."""
    made = [call for found in calls.values() for call in found.values()]
    origin = {name: ", ".join(sorted({str(call.get(name)) for call in made})) for name in ("commit", "torch", "device")}
    hours = sum(call.get("seconds", 0) for call in made) / 3600
    few = f", {100 * args.head_label_fraction:.3g} % of the labels" if args.head_label_fraction < 1 else ""
    is_cut = any(len(cuts_of(args, row)) > 1 for row in unsupervised(rows))
    behind = f", {args.tune_epochs} where the layers behind the cut are trained with it" if is_cut else ""
    notes = [
        f"Top-1 in % on the test images of {images_of(args)}; seeds {', '.join(map(str, args.seeds))}. ±: standard "
        "deviation over seeds (n − 1); differences are taken seed by seed.",
        f"Trained without labels: {args.num_epochs} x {args.img_per_epoch:,} images, batch {args.batch_size}, "
        f"{'; '.join(sorted({' '.join(row.encoder) for row in unsupervised(rows)}))}; recipe: "
        f"{shlex.join(RECIPE)}. The model is that of the epoch with the lowest loss on test images.",
        f"Head: dropout, linear to 512, ReLU, linear; {shlex.join(HEAD)}; {args.head_epochs} epochs where all is frozen"
        f"{behind}{few}; after the last epoch.",
        f"Linear, kNN: on the frozen features, standardised, with {100 * args.label_fraction:.3g} % of the labels.",
        f"Made in {hours:.2f} hours of {origin['device']}, torch {origin['torch']}, commit {origin['commit']}, by: "
        f"{runtime.record()['command']}",
    ]
    if len(unsupervised(rows)) < len(rows):
        with_labels = f"{args.supervised_epochs} epochs{few}, {shlex.join(SUPERVISED[2:])}; after the last epoch."
        notes.insert(-1, f"ResNet-18: {with_labels}")
    return notes


if __name__ == "__main__":
    console.run(main)
