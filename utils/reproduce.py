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

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import classifier
import modules
import run
from utils import features, figures, options, runtime, training
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
FACTORS = {  # of --ablations: their values take turns, all else stays as in the recipe
    "num_parts": (4, 8, 16, 32, 64), "hidden_size": (3, 6, 16), "py": (0.01, 1 / 16, 0.25), "beta_a": (0.1, 1),
    "beta_v": (0.01, 0.1, 1, 10), "hide": (0, 0.25, 0.5, 0.75), "grey": (0, 0.5), "lr": (1e-4, 1e-3),
    "encoder_arch": ("pyramid", "resnet"), "scale": (4, 8),
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
    options.add_data_options(parser)
    options.add_model_options(parser)
    parser.section("what to do")
    parser.option("--rows", str, None, "NAME", "only these; an unknown name lists all (default: all)", nargs="+")
    parser.option("--seeds", options.seed, [1, 2, 3], "K", "one training each", nargs="+")
    parser.switch("--ablations", "another table: the recipe's PatchVAE, one thing changed at a time; --frozen-only")
    parser.switch("--frozen-only", "judge only encoders that are frozen as a whole: to train layers behind takes long")
    parser.switch("--quick", "all of it on drawn shapes with a tiny model, in minutes: to try it, not to judge")
    parser.option("--known", options.path, [], "FILE", "results.json of earlier reproductions, also on other machines: "
                  "what the same commands made, wherever data and output lay, is taken over", nargs="+")
    parser.option("--output-folder", options.path, "./reproduction", "DIR", "where tables, plots and all runs go")
    parser.switch("--no-inet", "without --inet, which is the default here")
    parser.section("budget and machine")
    parser.option("--num-epochs", options.whole(1), 30, "K", "epochs of training without labels; with --ablations 3")
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
    parser.defaults["dataset"] = "cifar10"
    return parser


def parse(argv):
    """The settings, and all rows of the table that they ask for: a list. Raises UsageError."""
    parser = build_parser()
    typed = parser.typed(argv)
    given = {**({"num_epochs": 3} if "ablations" in typed else {}), **(QUICK if "quick" in typed else {}), **typed}
    settings = options.Settings(**{**parser.defaults, **given, "inet": "no_inet" not in typed})
    precision = runtime.choose_precision(settings.precision, runtime.choose_device(settings.no_cuda))
    settings = settings.changed(precision=precision)  # typed into all commands: one folder has one
    rows = rows_of(settings, given)
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
    encoder: dict  # the options that say which encoder it is; a supervised network has none
    floor: str | None = None  # of what is trained: the name of the row with the same encoder and random weights
    against: tuple = ()  # the names of rows that it is compared with seed by seed


def rows_of(settings, given):
    """The rows of the table, with the model options that are `given`: a list. Raises UsageError."""
    model = {name: given[name] for name in options.DESCRIBED if name in given and name not in ("size", "inet")}
    rows, floors = [], {}
    for name, group, words, values, against in (ablations if settings.ablations else comparison)(model):
        command = {**chosen(settings, COMMON), **values}
        try:
            found = run.parse(options.typed_again(command, command))[0]
        except UsageError:
            if settings.ablations and rows:  # not every encoder has every scale
                continue
            raise
        encoder = chosen(found, ("encoder_arch", "scale") + ("ngf",) * (found.encoder_arch != "resnet"))
        floor = "-".join(["random", *map(str, encoder.values())])
        rows.append(Row(name, group, words, values, encoder, floor, against))
        words = f"random, {found.encoder_arch} of scale {found.scale}"
        floors[floor] = Row(floor, "without training", words, encoder, encoder)
    supervised = Row("supervised", "with labels", "ResNet-18, nothing frozen", {"arch": "resnet18", "lr": 0.1}, {})
    return [*rows, *floors.values(), *([] if settings.ablations else [supervised])]


def comparison(model):
    """What is trained, with the options of `model`: a list of (name, group, words, options, names of others)."""
    shared = {name: value for name, value in model.items() if name not in options.PARTS_ONLY}  # by the beta-VAE
    return [
        (f"{setting}-{name}", group, words, {**common, **(shared if own["arch"] == "vae" else model), **own},
         [f"{setting}-{other}" for other in others])
        for setting, (group, common) in SETTINGS.items()
        for name, (words, own, others) in MODELS.items()
    ]


def ablations(model):
    """The same for --ablations: the recipe's PatchVAE, and every other value of each factor."""
    common = {**RECIPE, **model, "arch": "patchy"}
    common["py"] = 1 / common.get("num_parts", 16)  # its default would change with the number of parts
    own, rows = {**run.build_parser().defaults, "scale": 8, **common}, []
    for factor, value in [(factor, value) for factor, values in FACTORS.items() for value in values]:
        words = f"{factor.replace('_', '-')} {value if isinstance(value, str) else format(value, 'g')}"
        row = (f"ablation-{words.replace(' ', '-')}", "our recipe, but", words, {**common, factor: value})
        rows += [(*row, ["ablation-base"])] if value != own[factor] else []
    return [("ablation-base", "our recipe", "PatchVAE", common, []), *rows]


def cuts_of(encoder):
    """Where an encoder can be frozen, a dict cut -> heading: ALL, then those of the paper within it, from deep."""
    with torch.device("meta"):  # its structure, no weights
        network, _ = modules.build_encoder(encoder["encoder_arch"], 3, encoder["scale"], encoder.get("ngf", 64))
    ends = features.children_until(encoder["encoder_arch"])
    whole = "".join(f" ({name})" for name, end in ends.items() if end == len(network))
    inner = [name for name, end in ends.items() if end < len(network)]
    return {ALL: f"all frozen{whole}", **{name: f"frozen: {name}" for name in reversed(inner)}}


class Cell(NamedTuple):
    """One call of run.py or classifier.py."""

    row: str  # and seed, e.g. "paper-vae-seed1"
    part: str  # "training", or e.g. "conv1-head", "all-probes"; "none-head" of a supervised network
    script: ModuleType
    folder: Path
    argv: list

    @property
    def command(self):
        return shlex.join(["python", f"{self.script.__name__}.py", *self.argv])


def cells_of(settings, row, seed, inner=True):
    """All that there is to do for one row and seed, in this order, at the `inner` cuts, too: a list of Cell."""
    home, cells = Path(settings.output_folder, "runs", f"{row.name}-seed{seed}"), []

    def add(part, script, **own):
        folder = home if part == "training" else home / part
        command = {**chosen(settings, COMMON), "seed": seed, **own, "output_folder": folder}
        cells.append(Cell(home.name, part, script, folder, options.typed_again(command, command)))

    def head(cut, epochs, **own):  # its learning rate falls after two thirds
        own |= {"epochs": epochs, "step": math.ceil(epochs * 2 / 3), "batch_size": settings.head_batch_size}
        add(f"{cut}-head", classifier, **own, label_fraction=settings.head_label_fraction)

    if not row.encoder:
        head("none", settings.supervised_epochs, **row.options)
        return cells
    encoder = {"arch": "patchy", "random_init": True, **row.options}
    if row.floor:
        encoder = {"arch": row.options["arch"], "pretrained": home / "model.pt"}
        add("training", run, **{**chosen(settings, ("num_epochs", "img_per_epoch", "batch_size")), **row.options})
    for cut in cuts_of(row.encoder) if inner else [ALL]:
        encoder["freeze"], epochs = (-1, settings.head_epochs) if cut == ALL else (cut, settings.tune_epochs)
        head(cut, epochs, **encoder, standardise=True, lr=0.03)  # classifier.py's own 0.1 is for whole networks
        add(f"{cut}-probes", classifier, **encoder, linear=True, knn=True, label_fraction=settings.label_fraction)
    return cells


def all_cells(settings, rows):
    """The cells of all rows, for every seed that the output folder has by now: a list."""
    seeds = {path.name.rpartition("-seed")[2] for path in Path(settings.output_folder, "runs").glob("*-seed*")}
    wanted = [(row, seed) for seed in sorted(map(int, filter(str.isdecimal, seeds))) for row in rows]
    return [cell for row, seed in wanted for cell in cells_of(settings, row, seed, not settings.ablations)]


def record_of(cell):
    """What is known of a cell, {} before it begins: the command, seconds, origin and, once it has finished, figures."""
    made, begins = cell.folder / "made.json", cell.folder / cell.script.CONTENTS[0]
    record = json.loads(made.read_text()) if made.exists() else {}
    if "command" not in record and begins.exists():  # of an older version: the files of the script tell
        typed = json.loads(begins.read_text(encoding="utf-8"))["typed"]
        command = cell._replace(argv=options.typed_again(typed, typed)).command
        record = {"command": command, **record, **figures_of(cell)}
    return record


def figures_of(cell):
    """What the files of the script say that its call has found: a dict, {} unless it has finished."""
    path = cell.folder / ("metrics.jsonl" if cell.script is run else "results.json")
    if not path.exists():
        return {}
    if cell.script is classifier:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in ("last", "best", "linear", "knn") if name in found}
    lines = path.read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines if line.endswith("}")]  # a killed process may leave half of one
    curve = [event["total"] for event in events if event["event"] == "test"]
    return {**events[-1], "curve": curve} if events and events[-1].pop("event") == "end" else {}


def is_finished(cell):
    return not record_of(cell).keys() <= set(NOTED)


def differences(cell, command, place=os.path.realpath):
    """How a recorded command differs from the cell's: str. `place` of a folder's path tells which images it has."""
    parser = cell.script.build_parser()
    try:
        found, wanted = ({**parser.defaults, **parser.typed(argv)} for argv in (shlex.split(command)[2:], cell.argv))
    except UsageError as error:  # an option that there is no more
        return str(error)
    names = [name for name in wanted if name not in PLACES and found[name] != wanted[name]]
    if wanted["dataset"] == "folder" and place(found["data_folder"]) != place(wanted["data_folder"]):
        names.append("data_folder")  # of others, the data set's name says which images
    return "; ".join(f"--{name.replace('_', '-')} {found[name]}, not {wanted[name]}" for name in names)


def take_over(path, cells):
    """Count as finished what the report at `path` has of those cells that have not begun here, and say so."""
    try:
        calls, taken, others = json.loads(Path(path).read_text(encoding="utf-8"))["calls"], 0, []
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"--known {path}: not a results.json of utils/reproduce.py; give one") from None
    for cell in [cell for cell in cells if not record_of(cell)]:
        known = calls.get(cell.row, {}).get(cell.part)
        other = differences(cell, known["command"], place=lambda path: Path(path).name) if known else ""
        others += [f"{cell.row}, {cell.part}: {other}"] if other else []
        if known and not other:
            cell.folder.mkdir(parents=True, exist_ok=True)
            runtime.write_json(cell.folder / "made.json", {**known, "command": cell.command, "known_from": path})
            taken += 1
    print(f"{path}: {taken} calls are taken over, {len(others)} have other options", *others[:1], sep="; ")


def fulfil(cells, origin):
    """Do what is left of one row and seed. Returns how many calls that were."""
    left, first = [cell for cell in cells if not is_finished(cell)], cells[0]
    if left and first.script is run and first not in left and not (first.folder / "model.pt").exists():
        print(f"\n{first.row}: the training is known, but its model.pt is not here to be judged: it is done again")
        left.insert(0, first)
    for cell in cells:
        saved = cell.folder / ("checkpoints" if cell.script is run else classifier.CHECKPOINTS)
        if cell in left:
            print(f"\n{runtime.relative(cell.folder)}", flush=True)
            make(cell, origin, goes_on=bool(training.numbered(str(saved))))
        shutil.rmtree(saved, ignore_errors=True)  # gigabytes, over a hundred calls, that nobody needs any more
    return len(left)


def make(cell, origin, goes_on):
    """Call the cell's script, which begins, or `goes_on` from its checkpoint, and record what came of it.

    Seconds and origins add up over calls; one that is refused, say by another process in the folder, counts nothing.
    """
    path, started, before, found = cell.folder / "made.json", time.perf_counter(), record_of(cell), {}
    record = {**{name: before[name] for name in NOTED if name in before}, "command": cell.command}
    if record != before:  # nothing is finished until the call has ended
        cell.folder.mkdir(parents=True, exist_ok=True)
        runtime.write_json(path, record)
    argv = [*cell.argv, *(["--resume", "auto"] if goes_on else ["--overwrite"])]
    if goes_on and "--pretrained" in argv:  # the checkpoint has its weights, and the folder may have been moved
        place = argv.index("--pretrained")
        del argv[place : place + 2]
    try:
        cell.script.main(argv)
        found = figures_of(cell)
    finally:
        if not isinstance(sys.exception(), RunError):
            record["seconds"] = round(record.get("seconds", 0) + time.perf_counter() - started, 1)
            record |= {name: list(dict.fromkeys([*record.get(name, []), value])) for name, value in origin.items()}
            runtime.write_json(path, {**record, **found})
    training.release(cell.folder)


def origin_of(device):
    """What the figures will be made with, as the records have it: the commit is that of the code that runs."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {"device": runtime.describe(device), "commit": commit or "unknown", "torch": torch.__version__}


def check_labels(settings):
    """Raises now what reading the labels would raise after the first training."""
    values = {**chosen(settings, COMMON), "arch": "resnet18"}
    values["label_fraction"] = min(settings.label_fraction, settings.head_label_fraction)
    classifier.labelled_sources(classifier.parse(options.typed_again(values, values))[0])


def main(argv=None):
    """Do and report what `argv` says; returns the content of results.json: a dict."""
    settings, rows = parse(argv)
    origin, done, failed = origin_of(runtime.choose_device(settings.no_cuda)), 0, []
    inner = not (settings.frozen_only or settings.ablations)
    wanted = [(row, seed) for seed in dict.fromkeys(settings.seeds) for row in rows if row.name in settings.rows]
    work = [cells_of(settings, row, seed, inner) for row, seed in wanted]  # seed by seed: every row is there soon
    for path in settings.known:
        take_over(path, sum(work, []))
    for cell in sum(work, all_cells(settings, rows)):
        command = record_of(cell).get("command")
        if command and (other := differences(cell, command)):
            raise UsageError(f"{cell.folder} has other options ({other}): delete it, or choose another --output-folder")
    if not all(is_finished(cell) for cell in sum(work, [])):
        check_labels(settings)
    for cells in work:
        try:
            made = fulfil(cells, origin)
            done += made
            if made:
                report(settings, rows)
        except (KeyboardInterrupt, runtime.Terminated) as signal:
            raise type(signal)("stopped; the same command goes on from here") from None
        except RunError as error:  # the other rows do not depend on it
            print(f"not finished: {error}", flush=True)
            failed.append(str(error))
    content = report(settings, rows)
    print(f"\n{markdown(content)}\n{done} calls made; what had been finished was not repeated. All of it lies in "
          f"{runtime.relative(settings.output_folder)}")
    if failed:
        raise RunError(f"{len(failed)} of {len(work)} models are not finished; the first: {failed[0]}")
    return content


# ---------------------------------------------------------------------------------------------------- what is reported


def report(settings, rows):
    """Write what the output folder has by now into it. Returns the content of results.json: a dict."""
    folder, prefix = Path(settings.output_folder), "ablations_" if settings.ablations else ""
    folder.mkdir(parents=True, exist_ok=True)
    with runtime.locked(folder / ".report.lock", -1, ""):  # other processes report into this folder, too
        calls = {}
        for cell in filter(is_finished, all_cells(settings, rows)):
            calls.setdefault(cell.row, {})[cell.part] = record_of(cell)
        content = gather(settings, rows, calls)
        runtime.write_json(folder / f"{prefix}results.json", content)
        runtime.write(folder / f"{prefix}table.md", lambda file: file.write(markdown(content).encode()))
        for name, picture in pictures(content, folder / "runs").items():
            figures.save(picture, folder / f"{prefix}{name}.png")
    return content


def gather(settings, rows, calls):
    """The content of results.json: a dict. `calls`: dicts row and seed -> part -> record."""
    top1, seeds = {}, set(settings.seeds)  # (name, column) -> seed -> top-1 after the last epoch, not the best
    for key, part, record in ((key, *one) for key, parts in calls.items() for one in parts.items()):
        name, _, seed = key.rpartition("-seed")
        seeds.add(int(seed))
        for judge, found in (("head", "last"), ("linear", "linear"), ("knn", "knn")):
            if found in record:
                column = f"{part.rpartition('-')[0]}-{judge}"
                top1.setdefault((name, column), {})[int(seed)] = record[found]["top1"]
    rows = [row for row in rows if row.name in {*settings.rows, *(key.rpartition("-seed")[0] for key in calls)}]
    cuts = {cut: words for row in rows if row.encoder for cut, words in cuts_of(row.encoder).items()}
    words = {f"{cut}-{judge}": f"{cuts.get(cut)}, {JUDGES[judge]}" for cut in (*features.CUTS, ALL) for judge in JUDGES}
    words["none-head"] = "nothing frozen"
    images = settings.dataset if settings.dataset != "folder" else Path(settings.data_folder).name
    return {
        "title": f"Recognition on {images} with frozen encoders",
        "frozen": cuts.get(ALL),
        "seeds": sorted(seeds),
        "columns": {column: words[column] for column in words if any((row.name, column) in top1 for row in rows)},
        **summarise(rows, top1),
        "notes": protocol(settings, images, {row.name: row.group for row in rows}, calls),
        **runtime.record(),
        "calls": calls,
    }


def summarise(rows, top1):
    """Statistics of rows and of paired differences, a dict. `top1`: dicts (name, column) -> seed -> top-1."""
    lines, differences, words = [], [], {row.name: row.words for row in rows}

    def paired(row, other, column):  # over the seeds that both have
        first, second = top1.get((row, column), {}), top1.get((other, column), {})
        return spread({seed: first[seed] - second[seed] for seed in first if seed in second})

    for row in rows:
        scores = {column: spread(values) for (name, column), values in top1.items() if name == row.name}
        lines.append({"name": row.name, "group": row.group, "words": row.words, "scores": scores})
        if row.floor in words:
            lines[-1] |= {"floor": row.floor, "above_random": paired(row.name, row.floor, "all-head")}
        for other in (other for other in row.against if other in words):
            found = {column: paired(row.name, other, column) for column in FROZEN}
            if any(one["n"] for one in found.values()):
                differences.append({"words": f"{row.words} − {words[other]}, {row.group}", **found})
    return {"rows": lines, "differences": differences}


def spread(values):
    """Mean, standard deviation (n - 1; None of a single one) and number of a dict seed -> value, and its values."""
    numbers = list(values.values())
    mean, sd = statistics.fmean(numbers) if numbers else None, statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": mean, "sd": sd, "n": len(numbers), "seeds": {str(seed): value for seed, value in values.items()}}


def protocol(settings, images, groups, calls):
    """How the figures came about: a list of str, the last ones commands that stand for all of their kind."""
    commands, hours, made = {}, 0, {"device": set(), "torch": set(), "commit": set()}
    for key, part, record in ((key, *one) for key, parts in calls.items() for one in parts.items()):
        kind = f"training, {groups[key.rpartition('-seed')[0]]}" if part == "training" else part
        commands.setdefault(kind, record["command"])
        hours += record.get("seconds", 0) / 3600
        for name in made:
            made[name].update(record.get(name, []))
    device, versions, commits = (", ".join(sorted(values)) or "?" for values in made.values())
    return [
        *(["A quick try of the command: these scores tell nothing of the models."] if settings.quick else []),
        f"Top-1 in % on the test images of {images}; ±: standard deviation over seeds (n − 1); differences are taken "
        "seed by seed.",
        "Authors' setting: run.py's defaults but for what the commands say. Recipe: "
        f"{shlex.join(options.typed_again(RECIPE, RECIPE))}, chosen for PatchVAE on held-out training images of "
        "CIFAR-10. The encoder is that of the epoch with the lowest loss on test images.",
        "Head: after its last epoch. Linear, kNN: on standardised features, of maps of more than "
        f"{features.LARGEST:,} numbers on averages over coarser cells. Random: BatchNorm keeps its first statistics.",
        f"Made in {hours:.2f} hours of {device}; torch {versions}; commit {commits}.",
        *(f"For instance ({kind}): `{commands[kind]}`" for kind in sorted(commands, reverse=True)),
    ]


def pictures(content, runs):
    """The scores, the losses of the trainings, and what the models draw: a dict of PIL images by name."""
    rows, found, lines, samples = [row for row in content["rows"] if FROZEN[0] in row["scores"]], {}, {}, {}
    panels, floors = {}, {}
    for column, judge in zip(FROZEN, JUDGES.values()):
        scores = {row["name"]: row["scores"].get(column, spread({})) for row in rows}
        axis = f"{judge}, {content['frozen']}: top-1 in %"
        panels[axis] = [list(scores[row["name"]]["seeds"].values()) for row in rows]
        floors[axis] = [scores.get(row.get("floor"), spread({}))["mean"] for row in rows]
    if rows:
        colours = ["0.4" if "floor" not in row else "C0" if row["words"].startswith("β") else "C1" for row in rows]
        words = [(row["group"], row["words"]) for row in rows], panels, floors, colours, content["title"]
        note = "dot: one seed    bar: mean ± standard deviation    dashed: the same encoder with random weights"
        found["plot"] = figures.points(*words, [note])
    for row in content["rows"]:
        calls = [parts for key, parts in content["calls"].items() if key.rpartition("-seed")[0] == row["name"]]
        losses = [parts["training"]["curve"] for parts in calls if "curve" in parts.get("training", {})]
        epochs = [spread(dict(enumerate(values))) for values in zip(*losses)]
        if epochs:
            line = [(number, epoch["mean"], epoch["sd"] or 0) for number, epoch in enumerate(epochs, 1)]
            lines.setdefault(f"epoch, {row['group']}", {})[row["words"]] = line
        for path in sorted(runs.glob(f"{row['name']}-seed*/images/samples_*.png"))[-1:]:
            samples[f"{row['group']}: {row['words']}"] = Image.open(path)
    if lines:
        title = "Learning curves: mean ± standard deviation over seeds"
        found["curves"] = figures.curves(lines, "loss of a test image", title, log=True)
    return {**found, "samples": figures.stacked(samples)} if samples else found


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
