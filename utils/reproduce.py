"""Reproduce the paper's comparison: train every row of the table over several seeds, judge the encoders, report.

    python utils/reproduce.py --data-folder data --output-folder reproduction
    python utils/reproduce.py --quick --output-folder quick

The rows: beta-VAE and PatchVAE, plain and with the edge-weighted loss, in the paper's own setting and with our recipe;
random initialisation; a supervised ResNet-18. Encoders are frozen up to each of the paper's cuts and judged by
classifier.py's head, a linear and a nearest-neighbour probe. table.md, plot.png, results.json and samples.png
in the output folder are renewed whenever a model has been judged. The same command goes on where it was stopped and
repeats nothing that is finished. Processes may share the work, with other --seeds or --rows each: every report has all
that the folder has.
"""

import contextlib
import fcntl
import json
import math
import shlex
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import classifier  # noqa: E402
import modules  # noqa: E402
import run  # noqa: E402
from utils import checkpoints, console, features, grids, jobs, options, runtime, standings, tracking  # noqa: E402
from utils.rows import (  # noqa: E402  # noqa: E402
    ALL,
    RECIPE,
    ablation_rows,
    all_frozen,
    contrasts,
    cuts_of,
    floor_of,
    table_rows,
    typed_again,
    unsupervised,
)

HEAD = ["--standardise", "--lr", "0.03"]  # classifier.py's own 0.1 is for whole networks
SUPERVISED = ["--arch", "resnet18", "--lr", "0.1"]
NONE = "none"  # the cut of a supervised network
NAMES = {False: ("table.md", "plot.png", "results.json", "samples.png"),
         True: ("ablations.md", "ablations.png", "ablations.json", "ablation_samples.png")}  # fmt: skip
DATA = ("dataset", "data_folder", "size", "inet", "workers", "cache", "cache_folder", "skip_broken")
# What --quick puts in place of options that are not given.
QUICK = {
    "dataset": "shapes", "size": 32, "encoder_arch": "pyramid", "ngf": 8, "scale": 8, "num_parts": 8, "seeds": [1, 2],
    "num_epochs": 1, "img_per_epoch": 1000, "batch_size": 32, "head_epochs": 4, "tune_epochs": 2,
    "supervised_epochs": 1, "head_batch_size": 64, "label_fraction": 0.01, "head_label_fraction": 0.01, "workers": 0,
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------- command line


def parse(argv):
    """The checked options, and all rows of the table that they ask for: a list. Raises UsageError."""
    parser = build_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    quick = {name: value for name, value in QUICK.items() if args.quick and name not in given}
    vars(args).update(quick)
    args.given = given | set(quick)
    if args.num_epochs is None:
        args.num_epochs = 3 if args.ablations else 10
    rows = ablation_rows(args) if args.ablations else table_rows(args)
    names = [row.name for row in rows]
    args.rows = args.rows or names
    unknown = set(args.rows) - set(names)
    if unknown:
        raise console.UsageError(f"--rows {min(unknown)}: there is no such row; choose from {', '.join(names)}")
    args.seeds = list(dict.fromkeys(args.seeds))
    return args, rows


def build_parser():
    parser = console.Parser(description=__doc__)
    options.add_data_options(parser)
    options.add_model_options(parser)
    parser.set_defaults(dataset="cifar10", inet=True)
    what = parser.add_argument_group("what to do")
    what.add_argument("--rows", nargs="+", metavar="NAME",
                      help="only these rows, e.g. recipe-vae recipe-patchy; an unknown name lists all (default: all)")
    what.add_argument("--seeds", nargs="+", type=console.seed, default=[1, 2, 3], metavar="K",
                      help="one training each; three or more tell how far chance reaches (default: 1 2 3)")
    what.add_argument("--ablations", action="store_true",
                      help="another table instead, ablations.md: the recipe's PatchVAE with other numbers of parts, "
                      "appearance sizes, priors, betas, damage, another learning rate, encoder or scale, one at a "
                      "time; judged as with --frozen-only")  # fmt: skip
    what.add_argument("--frozen-only", action="store_true",
                      help="judge only encoders that are frozen as a whole; the other cuts train the layers behind "
                      "them, which takes longer than all else but the training itself")
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


# ---------------------------------------------------------------------------------------------------- what is done


def jobs_of(args, row, seed, inner=True):
    """All that there is to do for one row and seed, in this order, at the `inner` cuts, too: a list of Job."""
    home = runs(args) / f"{row.name}-seed{seed}"
    common = [*data_options(args), "--seed", str(seed)]

    def job(part, script, *typed):
        folder = home if part == "training" else home / part
        return jobs.Job(part, folder, script, [*common, *typed, "--output-folder", str(folder)])

    if row.kind == "supervised":
        return [job(f"{NONE}-head", classifier, *SUPERVISED, *head_budget(args, args.supervised_epochs))]
    length = ["num_epochs", "img_per_epoch"] + ["batch_size"] * ("--batch-size" not in row.typed)
    todo = [job("training", run, *typed_again(args, length), *row.typed)] if row.kind == "trained" else []
    for cut in cuts_of(row) if inner else [ALL]:
        where = [*encoder_of(row, home), "--freeze", "-1" if cut == ALL else cut]
        epochs = args.head_epochs if cut == ALL else args.tune_epochs
        probes = ["--linear", "--knn", "--label-fraction", f"{args.label_fraction:g}"]
        todo.append(job(f"{cut}-head", classifier, *where, *HEAD, *head_budget(args, epochs)))
        todo.append(job(f"{cut}-probes", classifier, *where, *probes))
    return todo


def runs(args):
    return Path(args.output_folder, "runs")


def data_options(args):
    return typed_again(args, [*DATA, "precision", "compile", "no_cuda"])


def encoder_of(row, home):
    """The options of classifier.py that name the encoder of `row`, whose model lies in the folder `home`."""
    if row.kind == "random":
        return ["--arch", "patchy", "--random-init", *row.typed]
    return ["--arch", row.settled.arch, "--pretrained", str(home / "model.pt")]


def head_budget(args, epochs):
    """The options of classifier.py for `epochs` of training, the learning rate falling after two thirds."""
    budget = ["--epochs", epochs, "--step", math.ceil(epochs * 2 / 3), "--batch-size", args.head_batch_size]
    return [*map(str, budget), "--label-fraction", f"{args.head_label_fraction:g}"]


def begun(args, rows):
    """What the output folder has of `rows` by now, by whatever command: a dict (name, seed) -> its jobs."""
    by_name = {row.name: row for row in rows}
    parted = [path.name.rpartition("-seed") for path in sorted(runs(args).glob("*-seed*"))]
    found = [(name, int(seed)) for name, _, seed in parted if name in by_name and seed.isdecimal()]
    return {(name, seed): jobs_of(args, by_name[name], seed, inner=not args.ablations) for name, seed in found}


def check_labels(args):
    """Raises now what reading the labels would raise after the first training."""
    judging = classifier.parse([*data_options(args), "--arch", "resnet18"])[0]
    train, _ = classifier.labelled_sources(judging)
    for fraction in (args.head_label_fraction, args.label_fraction):
        classifier.few_labels(train.labels, fraction, judging.seed)


def main(argv=None):
    """Do and report what `argv` says; returns the content of results.json: a dict."""
    args, rows = parse(argv)
    device, done, failed = runtime.choose_device(args.no_cuda), 0, []
    args.precision = runtime.choose_precision(args.precision, device)  # typed into all calls: one folder has one
    wanted = [(row, seed) for seed in args.seeds for row in rows if row.name in args.rows]  # every row is soon there
    work = [jobs_of(args, row, seed, inner=not (args.frozen_only or args.ablations)) for row, seed in wanted]
    for job in (job for todo in [*work, *begun(args, rows).values()] for job in todo):
        jobs.check(job)
    if any(jobs.figures_of(job) is None for todo in work for job in todo):
        check_labels(args)
    for todo in work:
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
            report(args, rows)
    content = report(args, rows)
    print(f"\n{standings.markdown(content)}\n{done} calls made; what had been finished was not repeated")
    kinds = ("this table", "its plot", "every figure and its command", "what the models draw")
    for path, what in zip((Path(args.output_folder, name) for name in NAMES[args.ablations]), kinds):
        if path.exists():  # random weights alone draw nothing
            print(f"{what}: {tracking.relative(path)}")
    if failed:
        raise console.RunError(f"{len(failed)} of {len(work)} models are not finished; the first: {failed[0]}")
    return content


# ---------------------------------------------------------------------------------------------------- what is reported


def report(args, rows):
    """Write what the output folder has by now into it. Returns the content of the JSON file: a dict."""
    folder = Path(args.output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    table, plot, figures, samples = (folder / name for name in NAMES[args.ablations])
    with open(folder / ".report.lock", "w") as lock:
        with contextlib.suppress(OSError):  # not every network's file system can lock
            fcntl.lockf(lock, fcntl.LOCK_EX)  # other processes report into this folder, too
        content, strips = gather(args, rows)
        tracking.write_json(figures, content)
        grids.save(standings.plot(content), str(plot))
        if strips:
            grids.save(grids.stacked(strips), str(samples))
        checkpoints.write(table, lambda file: file.write(standings.markdown(content).encode()))
    return content


def gather(args, rows):
    """What the output folder has by now: the content of the JSON file, a dict, and strips_of() it."""
    known = begun(args, rows)
    calls = {key: account(known[key]) for key in sorted(known, key=lambda key: key[1])}  # by seed
    rows = [row for row in rows if row.name in args.rows or any(calls[key] for key in calls if key[0] == row.name)]
    scores = {row.name: {} for row in rows}
    for (name, seed), found in calls.items():
        for column, value in scores_of(found).items():
            scores[name].setdefault(column, {})[seed] = value
    floor = {row.name: floor_of(row, rows) for row in rows}
    statistics = standings.summarise(rows, scores, contrasts(rows, args.ablations), floor)
    content = {
        "title": f"Recognition on {images_of(args)} with frozen encoders{', one change at a time' * args.ablations}",
        "frozen": all_frozen(rows), "seeds": sorted({*args.seeds, *(seed for _, seed in calls)}),
        "columns": columns_of(rows, scores), **statistics, "notes": protocol(args, rows, calls), **runtime.record(),
        "calls": {f"{name}-seed{seed}": found for (name, seed), found in calls.items() if found},
    }  # fmt: skip
    return content, strips_of(args, rows, calls)


def strips_of(args, rows, calls):
    """What each trained row draws at random after its last epoch, of its first seed: a list of PIL images."""
    strips = []
    for row in rows:
        seeds = [seed for (name, seed), found in calls.items() if name == row.name and "training" in found]
        pictures = [*(runs(args) / f"{row.name}-seed{seeds[0]}" / "images").glob("samples_*.png")] if seeds else []
        if pictures:
            last = max(pictures, key=lambda path: (len(path.name), path.name))
            strips.append(grids.titled(Image.open(last), [grids.spelt(f"{row.group}: {row.words}")]))
    return strips


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


def columns_of(rows, scores):
    """The columns of the table and their headings: a dict. Those of the inner cuts only where `scores` has one."""
    words = {cut: f"frozen: {cut}" for cut in modules.CUTS} | {ALL: all_frozen(rows)}
    found = {ALL} | {column.rpartition("-")[0] for row in rows for column in scores[row.name]}
    cuts = [cut for cut in words if cut in found]
    columns = {f"{cut}-{judge}": f"{words[cut]}, {title}" for cut in cuts for judge, title in standings.JUDGES.items()}
    return columns | ({f"{NONE}-head": "nothing frozen"} if len(unsupervised(rows)) < len(rows) else {})


def protocol(args, rows, calls):
    """How the figures came about: a list of str, the last ones commands that stand for all of their kind."""
    group = {row.name: row.group for row in rows}
    commands, origins = {}, {"commit": set(), "torch": set(), "device": set()}
    for (name, _), found in calls.items():
        for part, call in found.items():
            commands.setdefault(f"training, {group[name]}" if part == "training" else part, call["command"])
            for key, values in origins.items():
                values.update(call.get(key, ()))
    hours = sum(call.get("seconds", 0) for found in calls.values() for call in found.values()) / 3600
    made = {key: ", ".join(sorted(values)) or "?" for key, values in origins.items()}
    notes = [
        f"Top-1 in % on the test images of {images_of(args)}; ±: standard deviation over seeds (n − 1); differences "
        "are taken seed by seed.",
        "Paper's setting: run.py's defaults but for what the commands below say, of which length matters most. "
        f"Recipe, likewise: {shlex.join(RECIPE)}, chosen for PatchVAE on held-out training images of CIFAR-10. The "
        "encoder is that of the epoch with the lowest loss on test images.",
        "Head: after its last epoch. Linear, kNN: on standardised features, of maps of more than "
        f"{features.LARGEST:,} numbers on averages over coarser cells. Random: BatchNorm keeps its first statistics.",
        f"Made in {hours:.2f} hours of {made['device']}; torch {made['torch']}; commit {made['commit']}.",
    ]
    notes = ["A quick try of the command: these scores tell nothing of the models.", *notes] if args.quick else notes
    kinds = sorted(commands, key=lambda what: not what.startswith("training"))
    return notes + [f"For instance ({what}): `{commands[what]}`" for what in kinds]


if __name__ == "__main__":
    console.run(main)
