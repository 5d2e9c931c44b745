"""Reproduce the paper's comparison, on CIFAR-10 unless --dataset is given: train, judge the encoders, report.

    python utils/reproduce.py --data-folder data --output-folder reproduction
    python utils/reproduce.py --quick --output-folder quick

A row of the table (a beta-VAE or PatchVAE, random weights, a supervised network) is a dict of options. With a seed it
becomes cells: its training and, for each place where the paper freezes the encoder, classifier.py's head and probes. A
cell is one command; made.json in its folder records that command and what came of it. The same command goes on where it
was stopped and repeats nothing that is finished; processes may share a folder, with other --seeds or --rows each.
"""

import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import classifier
import modules
import run
from utils import features, options, runtime, training
from utils.runtime import RunError, UsageError

# What served recognition best, for PatchVAE, on held-out training images of CIFAR-10.
RECIPE = {"encoder_arch": "pyramid", "lr": 1e-3, "batch_size": 64}
RECIPE |= {"beta_a": 0.1, "beta_v": 0.1, "hide": 0.5, "grey": 0.5}
SETTINGS = {"paper": ("authors' setting", {}), "recipe": ("our recipe", RECIPE)}
MODELS = {  # what they are called, their options, and which others they are held against
    "vae": ("β-VAE", {"arch": "vae"}, []),
    "vae-edges": ("β-VAE + edges", {"arch": "vae", "recon_mask": "edge"}, ["vae"]),
    "patchy": ("PatchVAE", {"arch": "patchy"}, ["vae"]),
    "patchy-edges": ("PatchVAE + edges", {"arch": "patchy", "recon_mask": "edge"}, ["vae-edges", "patchy"]),
}
ALL = "all"  # the encoder is frozen as a whole; else at one of features.CUTS
JUDGES = {"head": "head", "linear": "linear", "knn": "kNN"}
FROZEN = [f"{ALL}-{judge}" for judge in JUDGES]  # columns of the table
COMMON = ("dataset", "data_folder", "size", "inet", "workers", "cache", "cache_folder", "skip_broken", "precision")
COMMON += ("compile", "no_cuda")  # options of all commands
PLACES = ("data_folder", "output_folder", "pretrained", "cache", "cache_folder", "workers", "no_cuda")  # not what
PLACES += ("overwrite", "resume")
NOTED = ("command", "seconds", "device", "commit", "torch", "known_from")  # of a record; all else is its figures
QUICK = {  # what --quick puts in place of options that are not given
    "dataset": "shapes", "size": 32, "encoder_arch": "pyramid", "ngf": 8, "scale": 8, "num_parts": 8, "seeds": [1, 2],
    "num_epochs": 1, "img_per_epoch": 1000, "batch_size": 32, "head_epochs": 4, "tune_epochs": 2, "workers": 0,
    "supervised_epochs": 1, "head_batch_size": 64, "label_fraction": 0.01, "head_label_fraction": 0.01,
}


def build_parser():
    parser = options.Parser(description=__doc__)
    options.add_data_options(parser, dataset="cifar10")
    parser.switch("--no-inet", "without --inet, which is the default here")
    options.add_model_options(parser)
    parser.section("what to do")
    parser.option("--rows", str, None, "NAME", "only these; an unknown name lists all (default: all)", nargs="+")
    parser.option("--seeds", options.seed, [1, 2, 3], "K", "one training each", nargs="+")
    parser.switch("--frozen-only", "judge only encoders that are frozen as a whole: to train layers behind takes long")
    parser.switch("--quick", "all of it on drawn shapes with a tiny model, in minutes: to try it, not to judge")
    parser.option("--known", options.path, [], "FILE", "results.json of earlier reproductions, also on other machines: "
                  "what the same commands made, wherever data and output lay, is taken over", nargs="+")
    parser.option("--output-folder", options.path, "./reproduction", "DIR", "where tables, plots and all runs go")
    parser.section("budget and machine")
    parser.option("--num-epochs", options.whole(1), 30, "K", "epochs of training without labels")
    parser.option("--img-per-epoch", options.whole(1), 50_000, "K", "images of one of them")
    parser.option("--batch-size", options.whole(1), 128, "K", "images of a step of them; the recipe has its own")
    parser.option("--head-epochs", options.whole(1), 12, "K", "epochs of the head on a whole frozen encoder; cheap")
    parser.option("--tune-epochs", options.whole(1), 3, "K", "epochs of the head with layers behind an inner cut; dear")
    parser.option("--supervised-epochs", options.whole(1), 15, "K", "epochs of the supervised network")
    parser.option("--head-batch-size", options.whole(1), 256, "K", "images of a step of these three")
    parser.option("--head-label-fraction", options.above(0, 1), 1.0, "P", "share of the labels for these three")
    parser.option("--label-fraction", options.above(0, 1), 0.2, "P", "share of the labels for the probes; dear")
    parser.option("--precision", runtime.PRECISIONS, "auto", None, "of all trainings; see run.py")
    parser.switch("--compile", "let torch.compile make kernels for all trainings; see run.py")
    parser.switch("--no-cuda", "compute on the CPU even where there is a GPU")
    return parser


def parse(argv):
    """The settings, and all rows of the table that they ask for: a list. Raises UsageError."""
    parser = build_parser()
    typed = parser.typed(argv)
    given = {**(QUICK if "quick" in typed else {}), **typed}
    settings = options.Settings(**{**parser.defaults, **given, "inet": "no_inet" not in typed})
    precision = runtime.choose_precision(settings.precision, runtime.choose_device(settings.no_cuda))
    settings = settings.changed(precision=precision)  # typed into all commands: one folder has one
    model = {name: given[name] for name in options.DESCRIBED if name in given and name not in ("size", "inet")}
    rows = rows_of(settings, model)
    names = [row.name for row in rows]
    unknown = set(settings.rows or []) - set(names)
    if unknown:
        raise UsageError(f"--rows {min(unknown)}: there is no such row; choose from {', '.join(names)}")
    return settings.changed(rows=settings.rows or names), rows


def chosen(settings, names):
    return {name: getattr(settings, name) for name in names}


# ---------------------------------------------------------------------------------------------------- rows and cells


class Row(NamedTuple):
    """One line of the table."""

    name: str  # of its folders, and for --rows
    group: str
    words: str
    options: dict  # of run.py; of random weights those of the encoder, of a supervised network classifier.py's
    cuts: dict  # where its encoder can be frozen, see cuts_of; a supervised network has none
    floor: str | None = None  # of what is trained: the name of the row with the same encoder and random weights
    against: tuple = ()  # the names of rows that it is compared with seed by seed


def rows_of(settings, model):
    """The rows of the table, with the options `model` of encoder and decoder: a list. Raises UsageError."""
    rows, floors = [], {}
    for setting, (group, common) in SETTINGS.items():
        for name, (words, own, others) in MODELS.items():
            unfit = options.PARTS_ONLY if own["arch"] == "vae" else ()
            values = {name: value for name, value in {**common, **model}.items() if name not in unfit} | own
            command = {**chosen(settings, COMMON), **values}
            found = run.parse(options.typed_again(command, command))[0]
            encoder = chosen(found, ("encoder_arch", "scale") + ("ngf",) * (found.encoder_arch != "resnet"))
            floor = "-".join(["random", *map(str, encoder.values())])
            floor_words = f"random, {found.encoder_arch} of scale {found.scale}"
            floors[floor] = Row(floor, "without training", floor_words, encoder, cuts_of(found))
            against = [f"{setting}-{other}" for other in others]
            rows.append(Row(f"{setting}-{name}", group, words, values, cuts_of(found), floor, against))
    supervised = Row("supervised", "with labels", "ResNet-18, nothing frozen", {"arch": "resnet18", "lr": 0.1}, {})
    return [*rows, *floors.values(), supervised]


def cuts_of(model):
    """Where the encoder of run.py's settings can be frozen: a dict cut -> heading, ALL, then the paper's, from deep."""
    with torch.device("meta"):  # its structure, no weights
        network, _ = modules.build_encoder(model.encoder_arch, 3, model.scale, model.ngf)
    ends = features.children_until(model.encoder_arch)
    whole = "".join(f" ({name})" for name, end in ends.items() if end == len(network))
    inner = [name for name, end in ends.items() if end < len(network)]
    return {ALL: f"all frozen{whole}", **{name: f"frozen: {name}" for name in reversed(inner)}}


class Cell(NamedTuple):
    """One call of run.py or classifier.py."""

    row: str  # and seed, e.g. "paper-vae-seed1"
    part: str  # "training", or e.g. "conv1-head", "all-probes"; "none-head" of a supervised network
    script: ModuleType
    folder: Path
    options: dict

    @property
    def command(self):
        return shlex.join(["python", f"{self.script.__name__}.py", *options.typed_again(self.options, self.options)])


def cells_of(settings, row, seed, inner=True):
    """All that there is to do for one row and seed, in this order, at the `inner` cuts, too: a list of Cell."""
    home, calls = Path(settings.output_folder, "runs", f"{row.name}-seed{seed}"), {}

    def head(epochs):  # its learning rate falls after two thirds
        return {"epochs": epochs, "step": math.ceil(epochs * 2 / 3), "batch_size": settings.head_batch_size,
                "label_fraction": settings.head_label_fraction}

    encoder = {"arch": "patchy", "random_init": True, **row.options}
    if row.floor:
        encoder = {"arch": row.options["arch"], "pretrained": home / "model.pt"}
        calls["training"] = {**chosen(settings, ("num_epochs", "img_per_epoch", "batch_size")), **row.options}
    probes = {"linear": True, "knn": True, "label_fraction": settings.label_fraction}
    for cut in [cut for cut in row.cuts if inner or cut == ALL]:
        encoder["freeze"], epochs = (-1, settings.head_epochs) if cut == ALL else (cut, settings.tune_epochs)
        calls[f"{cut}-head"] = {**encoder, "standardise": True, "lr": 0.03, **head(epochs)}  # 0.1 is for whole networks
        calls[f"{cut}-probes"] = {**encoder, **probes}
    if not row.cuts:
        calls["none-head"] = {**row.options, **head(settings.supervised_epochs)}
    cells = []
    for part, own in calls.items():
        script, folder = (run, home) if part == "training" else (classifier, home / part)
        values = {**chosen(settings, COMMON), "seed": seed, **own, "output_folder": folder}
        cells.append(Cell(home.name, part, script, folder, values))
    return cells


def all_cells(settings, rows):
    """The cells of all rows, for every seed that the output folder has by now: a list."""
    seeds = {path.name.rpartition("-seed")[2] for path in Path(settings.output_folder, "runs").glob("*-seed*")}
    wanted = [(row, seed) for seed in sorted(map(int, filter(str.isdecimal, seeds))) for row in rows]
    return [cell for row, seed in wanted for cell in cells_of(settings, row, seed)]


def record_of(cell):
    """What is known of a cell, {} before it begins: the command, seconds, origin and, once it has finished, figures."""
    path = cell.folder / "made.json"
    return json.loads(path.read_text()) if path.exists() else {}


def is_finished(cell):
    return not record_of(cell).keys() <= set(NOTED)


def differences(cell, command, place=os.path.realpath):
    """How a recorded command differs from the cell's: str. `place` of a folder's path tells which images it has."""
    parser = cell.script.build_parser()
    try:
        found = {**parser.defaults, **parser.typed(shlex.split(command)[2:])}
    except UsageError as error:  # an option that there is no more
        return str(error)
    wanted = {**parser.defaults, **cell.options}
    names = [name for name in wanted if name not in PLACES and found[name] != wanted[name]]
    if wanted["dataset"] == "folder" and place(found["data_folder"]) != place(wanted["data_folder"]):
        names.append("data_folder")  # of others, the data set's name says which images
    return "; ".join(f"--{name.replace('_', '-')} {found[name]}, not {wanted[name]}" for name in names)


def take_over(path, cells):
    """Count as finished what the report at `path` has of those cells that have not begun here, and say so."""
    try:
        calls = json.loads(Path(path).read_text(encoding="utf-8"))["calls"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--known {path}: not a results.json of utils/reproduce.py; give one") from None
    known = [(cell, calls[cell.row][cell.part]) for cell in cells if cell.part in calls.get(cell.row, {})]
    taken, others = 0, []
    for cell, record in known:
        if record_of(cell):
            continue
        if other := differences(cell, record["command"], place=lambda path: Path(path).name):
            others.append(f"{cell.row}, {cell.part}: {other}")
            continue
        cell.folder.mkdir(parents=True, exist_ok=True)
        runtime.write_json(cell.folder / "made.json", {**record, "command": cell.command, "known_from": path})
        taken += 1
    print(f"{path}: {taken} calls are taken over, {len(others)} have other options", *others[:1], sep="; ")


# ---------------------------------------------------------------------------------------------------- doing it


def fulfil(cells, origin):
    """Do what is left of one row and seed. Returns the cells that it did."""
    left, first = [cell for cell in cells if not is_finished(cell)], cells[0]
    if left and first.script is run and first not in left and not (first.folder / "model.pt").exists():
        print(f"\n{first.row}: the training is known, but its model.pt is not here to be judged: it is done again")
        left.insert(0, first)
    for cell in left:
        print(f"\n{runtime.relative(cell.folder)}", flush=True)
        make(cell, origin)
    return left


def make(cell, origin):
    """Call the cell's script, which begins or goes on from its checkpoint, and record what came of it.

    Seconds and origins add up over calls; one that is refused, say by another process in the folder, counts nothing.
    """
    path, started, before, found = cell.folder / "made.json", time.perf_counter(), record_of(cell), {}
    record = {**{name: before[name] for name in NOTED if name in before}, "command": cell.command}
    if record != before:  # nothing is finished until the call has ended
        cell.folder.mkdir(parents=True, exist_ok=True)
        runtime.write_json(path, record)
    saved = cell.folder / ("checkpoints" if cell.script is run else classifier.CHECKPOINTS)
    how = {"overwrite": "command" in before}  # only what this folder has a record of is replaced
    if training.numbered(saved):  # it has the weights of --pretrained, and the folder may have been moved
        how = {"pretrained": None, "resume": "auto"}
    argv = options.typed_again({**cell.options, **how}, {**cell.options, **how})
    try:
        found = figures_of(cell, cell.script.main(argv))
    finally:
        if not isinstance(sys.exception(), (RunError, OSError)):
            record["seconds"] = round(record.get("seconds", 0) + time.perf_counter() - started, 1)
            record |= {name: list(dict.fromkeys([*record.get(name, []), value])) for name, value in origin.items()}
            runtime.write_json(path, {**record, **found})
    shutil.rmtree(saved, ignore_errors=True)  # gigabytes, over a hundred calls, that nobody needs any more
    training.release(cell.folder)


def figures_of(cell, returned):
    """What the record keeps of what the cell's script has `returned` or, of run.py, left in its folder: a dict."""
    if cell.script is classifier:
        return {name: returned[name] for name in ("last", "best", "linear", "knn") if name in returned}
    lines = (cell.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    *events, end = map(json.loads, lines)
    del end["event"]
    return {**end, "curve": [event["total"] for event in events if event["event"] == "test"]}


def origin_of(device):
    """What the figures will be made with, as the records have it: the commit is that of the code that runs."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {"device": runtime.describe(device), "commit": found or "unknown", "torch": torch.__version__}


def check_labels(settings):
    """Raises now what reading the labels would raise after the first training."""
    values = {**chosen(settings, COMMON), "arch": "resnet18"}
    values["label_fraction"] = min(settings.label_fraction, settings.head_label_fraction)
    classifier.labelled_sources(classifier.parse(options.typed_again(values, values))[0])


def main(argv=None):
    """Do and report what `argv` says; returns the content of results.json: a dict."""
    settings, rows = parse(argv)
    origin, failed = origin_of(runtime.choose_device(settings.no_cuda)), []
    wanted = [(row, seed) for seed in dict.fromkeys(settings.seeds) for row in rows if row.name in settings.rows]
    work = [cells_of(settings, row, seed, not settings.frozen_only) for row, seed in wanted]  # every row is there soon
    cells = sum(work, [])
    for path in settings.known:
        take_over(path, cells)
    for cell in [*all_cells(settings, rows), *cells]:
        command = record_of(cell).get("command")
        if command and (other := differences(cell, command)):
            raise UsageError(f"{cell.folder} has other options ({other}): delete it, or choose another --output-folder")
    if not all(map(is_finished, cells)):
        check_labels(settings)
    for cells in work:
        try:
            if fulfil(cells, origin):
                report(settings, rows)
        except (KeyboardInterrupt, runtime.Terminated) as signal:
            raise type(signal)("stopped; the same command goes on from here") from None
        except (RunError, OSError) as error:  # the other rows do not depend on it
            failed.append(str(error) if isinstance(error, RunError) else runtime.explain(error))
            print(f"not finished: {failed[-1]}", flush=True)
    content = report(settings, rows)
    print(f"\n{markdown(content)}\nAll of it lies in {runtime.relative(settings.output_folder)}")
    if failed:
        raise RunError(f"{len(failed)} of {len(work)} models are not finished; the first: {failed[0]}")
    return content


# ---------------------------------------------------------------------------------------------------- what is reported


def report(settings, rows):
    """Write what the output folder has by now into it. Returns the content of results.json: a dict."""
    folder, calls = Path(settings.output_folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    with runtime.locked(folder / ".report.lock"):  # other processes report into this folder, too
        for cell in filter(is_finished, all_cells(settings, rows)):
            calls.setdefault(cell.row, {})[cell.part] = record_of(cell)
        content = gather(settings, rows, calls)
        runtime.write_json(folder / "results.json", content)
        runtime.write(folder / "table.md", lambda file: file.write(markdown(content).encode()))
        for name, figure in (("plot", plot_scores(content)), ("curves", plot_curves(content))):
            runtime.write(folder / f"{name}.png", figure.savefig)
    return content


def gather(settings, rows, calls):
    """The content of results.json: a dict. `calls`: dicts row and seed -> part -> record."""
    names, seeds = ({key.rsplit("-seed", 1)[place] for key in calls} for place in (0, 1))
    rows = {row.name: row for row in rows if row.name in {*settings.rows, *names}}
    cuts = {cut: words for row in rows.values() for cut, words in row.cuts.items()}
    columns = {}  # all that there can be
    for cut in [cut for cut in (*features.CUTS, ALL) if cut in cuts]:
        columns |= {f"{cut}-{judge}": f"{cuts[cut]}, {words}" for judge, words in JUDGES.items()}
    columns["none-head"] = "nothing frozen"
    scores = {name: {column: top1(calls, name, column) for column in columns} for name in rows}
    lines, differences = [], []
    for name, row in rows.items():
        found = {column: spread(values) for column, values in scores[name].items() if values}
        lines.append({"name": name, "group": row.group, "words": row.words, "scores": found})
        if row.floor in rows:
            lines[-1]["floor"] = row.floor
            lines[-1]["above_random"] = paired(scores[name][FROZEN[0]], scores[row.floor][FROZEN[0]])
        for other in [other for other in row.against if other in rows]:
            found = {column: paired(scores[name][column], scores[other][column]) for column in FROZEN}
            if any(one["n"] for one in found.values()):
                differences.append({"words": f"{row.words} − {rows[other].words}, {row.group}", **found})
    images = settings.dataset if settings.dataset != "folder" else Path(settings.data_folder).name
    return {
        "title": f"Recognition on {images} with frozen encoders",
        "frozen": cuts.get(ALL),
        "seeds": sorted({*settings.seeds, *map(int, seeds)}),
        "columns": {column: words for column, words in columns.items() if any(scores[name][column] for name in rows)},
        "rows": lines,
        "differences": differences,
        "notes": protocol(settings, images, calls),
        **runtime.record(),
        "calls": calls,
    }


def top1(calls, name, column):
    """Top-1 after the last epoch, not the best, of a row in a column of the table: a dict seed -> %."""
    cut, judge = column.rsplit("-", 1)
    part, found = (f"{cut}-head", "last") if judge == "head" else (f"{cut}-probes", judge)
    of_row = {key.removeprefix(f"{name}-seed"): parts for key, parts in calls.items() if key.startswith(f"{name}-seed")}
    return {seed: parts[part][found]["top1"] for seed, parts in of_row.items() if part in parts}


def spread(values):
    """Mean, standard deviation (n - 1; None of a single one) and number of a dict seed -> value, and its values."""
    numbers = list(values.values())
    mean, sd = statistics.fmean(numbers) if numbers else None, statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": mean, "sd": sd, "n": len(numbers), "seeds": values}


def paired(values, others):
    """The spread of the differences of two dicts seed -> value, over the seeds that both have."""
    return spread({seed: value - others[seed] for seed, value in values.items() if seed in others})


def protocol(settings, images, calls):
    """How the figures came about: a list of str."""
    records = [record for parts in calls.values() for record in parts.values()]
    made = [{value for record in records for value in record.get(name, [])} for name in ("device", "torch", "commit")]
    device, versions, commits = (", ".join(sorted(values)) or "?" for values in made)
    hours = sum(record.get("seconds", 0) for record in records) / 3600
    notes = [
        f"Top-1 in % on the test images of {images}; ±: standard deviation over seeds (n − 1); differences are taken "
        "seed by seed.",
        "Authors' setting: run.py's defaults but for what the commands say. Recipe: "
        f"{shlex.join(options.typed_again(RECIPE, RECIPE))}, chosen for PatchVAE on held-out training images of "
        "CIFAR-10. The encoder is that of the epoch with the lowest loss on test images.",
        "Head: after its last epoch. Linear, kNN: on standardised features, of maps of more than "
        f"{features.LARGEST:,} numbers on averages over coarser cells. Random: BatchNorm keeps its first statistics.",
        f"Made in {hours:.2f} hours of {device}; torch {versions}; commit {commits}. `python utils/"
        f"{runtime.record()['command']}` made this table; results.json has the command of each call.",
    ]
    return ["A quick try of the command: these scores tell nothing of the models."] * settings.quick + notes


def plot_scores(content):
    """Top-1 with the whole encoder frozen, a line for each row: dots are seeds, bars mean ± deviation. A Figure."""
    rows = [row for row in content["rows"] if FROZEN[0] in row["scores"]]
    figure = Figure((10, 2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for number, (column, judge) in enumerate(zip(FROZEN, JUDGES.values())):
        for height, row in enumerate(rows):
            score = row["scores"].get(column, spread({}))
            axes.plot(list(score["seeds"].values()), [height] * score["n"], ".", color=f"C{number}")
            if score["n"]:
                axes.errorbar(score["mean"], height, xerr=score["sd"], fmt="|", color=f"C{number}", capsize=3)
        axes.plot([], [], ".", color=f"C{number}", label=judge)
    axes.set_yticks(range(len(rows)), [f"{row['group']}: {row['words']}" for row in rows])
    axes.invert_yaxis()
    axes.grid(color="0.9")
    axes.legend()
    axes.set_xlabel(f"top-1 in %, {content['frozen']}")
    axes.set_title(content["title"], parse_math=False)
    return figure


def plot_curves(content):
    """The losses of the trainings on test images by epoch: mean ± deviation over seeds. A matplotlib Figure."""
    figure = Figure((10, 5), layout="constrained")
    axes = figure.subplots()
    for row in content["rows"]:
        calls = [parts for key, parts in content["calls"].items() if key.startswith(f"{row['name']}-seed")]
        losses = [parts["training"]["curve"] for parts in calls if "curve" in parts.get("training", {})]  # older: none
        if losses:
            epochs, mean = range(1, len(losses[0]) + 1), np.mean(losses, axis=0)  # seeds×epochs -> epochs
            deviation = np.std(losses, axis=0, ddof=1) if len(losses) > 1 else np.zeros_like(mean)
            axes.plot(epochs, mean, marker=".", label=f"{row['group']}: {row['words']}")
            axes.fill_between(epochs, mean - deviation, mean + deviation, alpha=0.2)
    axes.set(xlabel="epoch", ylabel="loss of a test image", xscale="log", yscale="log")
    if axes.lines:
        axes.legend()
    return figure


def markdown(content):
    """The content of results.json as two Markdown tables and notes: str."""
    seeds, columns, text = len(content["seeds"]), content["columns"], [f"# {content['title']}", ""]
    rows = [["setting", "model", *columns.values(), "head, all frozen: above random initialisation"]]
    for row in content["rows"]:
        shown = [in_words(row["scores"].get(column), seeds) for column in columns]
        rows.append([row["group"], row["words"], *shown, in_words(row.get("above_random"), seeds, "+")])
    differences = [["difference in points, all frozen, paired over seeds", *JUDGES.values()]]
    for line in content["differences"]:
        differences.append([line["words"], *(in_words(line[column], seeds, "+") for column in FROZEN)])
    for heading, *lines in (rows, differences) if content["differences"] else (rows,):
        text += ["| " + " | ".join(line) + " |" for line in (heading, ["---"] * len(heading), *lines)] + [""]
    return "\n".join([*text, *(f"- {note}" for note in content["notes"])]) + "\n"


def in_words(found, seeds, sign=""):
    """"57.61 ± 0.12" of a spread, with its n where that is not `seeds`; a single value has no spread."""
    if not found or not found["n"]:
        return "–"
    few = f" (n = {found['n']})" if found["n"] != seeds else ""
    return f"{found['mean']:{sign}.2f}" + ("" if found["sd"] is None else f" ± {found['sd']:.2f}") + few


if __name__ == "__main__":
    runtime.start(main)
