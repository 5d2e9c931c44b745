"""utils/reproduce.py does everything once, goes on where it stopped, refuses what does not fit, and reports truly."""

import collections
import contextlib
import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scipy import ndimage

import classifier
import modules
import run
import utils.rows
from utils import console, jobs, options, reproduce, standings

TINY = ["--dataset", "digits", "--size", "16", "--encoder-arch", "pyramid", "--scale", "8", "--ngf", "8"]
TINY += ["--num-parts", "4", "--workers", "0", "--num-epochs", "2", "--img-per-epoch", "64", "--batch-size", "16"]
TINY += ["--head-epochs", "2", "--tune-epochs", "2", "--supervised-epochs", "1", "--head-batch-size", "64"]
TINY += ["--label-fraction", "0.1", "--head-label-fraction", "0.2", "--precision", "fp32"]
ROW = ["--rows", "paper-patchy", "random-pyramid-8-8", "--seeds", "3"]
MADE_UP = collections.namedtuple("Row", "name group words")


def command(folder, *more):
    return [*TINY, *ROW, *more, "--output-folder", str(folder)]


def figures(content):
    """What was found, without what may differ from call to call."""
    calls = {name: {part: dict(found) for part, found in parts.items()} for name, parts in content["calls"].items()}
    for found in (found for parts in calls.values() for found in parts.values()):
        for name in ("seconds", "command"):
            found.pop(name)
        for judge in {"linear", "knn"} & set(found):
            found[judge] = {name: value for name, value in found[judge].items() if name != "seconds"}
    return content["rows"], calls


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished reproduction of two rows, one seed: its folder and what main returned."""
    folder = tmp_path_factory.mktemp("reproduction")
    return folder, reproduce.main(command(folder))


@pytest.fixture
def calls(monkeypatch):
    """The calls of run.main and classifier.main from now on: a list of output folders below runs/, with --resume."""
    made = []
    for script in (run, classifier):
        def main(argv, original=script.main):
            folder = Path(argv[argv.index("--output-folder") + 1])
            made.append(str(folder).split("/runs/")[1] + (" " + argv[-1] if argv[-1].startswith("--") else ""))
            return original(argv)

        monkeypatch.setattr(script, "main", main)
    return made


# ---------------------------------------------------------------------------------------------------- doing it once


def test_everything_is_judged_and_stands_in_the_files(finished):
    folder, content = finished
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(content))
    columns = [f"{cut}-{judge}" for cut in ("conv1", "all") for judge in standings.JUDGES]
    assert list(content["columns"]) == columns and "(conv1-3)" in content["columns"]["all-head"]
    for row in content["rows"]:
        assert set(row["scores"]) == set(columns)
        home = folder / "runs" / f"{row['name']}-seed3"
        for cut in ("conv1", "all"):  # what the scripts themselves have written
            last = json.loads((home / f"{cut}-head" / "results.json").read_text())["last"]
            assert last["epoch"] == 2 and row["scores"][f"{cut}-head"]["seeds"] == {"3": last["top1"]}
            probes = json.loads((home / f"{cut}-probes" / "results.json").read_text())
            assert [row["scores"][f"{cut}-{judge}"]["mean"] for judge in ("linear", "knn")] == [
                probes[judge]["top1"] for judge in ("linear", "knn")
            ]
    training = content["calls"]["paper-patchy-seed3"]["training"]
    assert training["command"].startswith("python run.py --dataset digits") and training["seconds"] > 0
    table = (folder / "table.md").read_text()
    assert "| paper's setting | PatchVAE |" in table and "±0" not in table and "± 0.00" not in table
    drawn = np.asarray(Image.open(folder / "runs" / "paper-patchy-seed3" / "images" / "samples_epoch_002.png"))
    shown = np.asarray(Image.open(folder / "samples.png"))  # random weights have no strip in it
    assert (shown[-len(drawn) :, : drawn.shape[1]] == drawn).all() and len(shown) < 2 * len(drawn)


def test_the_commands_in_the_records_make_the_same_figures(finished, tmp_path):
    call = finished[1]["calls"]["random-pyramid-8-8-seed3"]["all-head"]
    typed = call["command"].split()
    typed[typed.index("--output-folder") + 1] = str(tmp_path)
    assert typed[:2] == ["python", "classifier.py"]
    assert classifier.main(typed[2:])["last"] == call["last"]


def test_nothing_finished_is_repeated(finished, calls):
    folder, content = finished
    again = reproduce.main(command(folder))
    assert calls == [] and again["calls"] == content["calls"] and again["rows"] == content["rows"]


def test_frozen_only_does_less_and_reports_no_less(finished, tmp_path, calls):
    folder, content = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    again = reproduce.main(command(tmp_path, "--frozen-only"))
    assert calls == [] and again["columns"] == content["columns"] and again["rows"] == content["rows"]
    for place in tmp_path.glob("runs/*/conv1-*"):
        shutil.rmtree(place)
    again = reproduce.main(command(tmp_path, "--frozen-only"))
    assert calls == [] and list(again["columns"]) == standings.FROZEN


def test_a_lost_model_matters_to_those_alone_who_need_it(finished, tmp_path, calls, line_of_error):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    home = tmp_path / "runs" / "paper-patchy-seed3"
    (home / "model.pt").unlink()
    again = reproduce.main(command(tmp_path))
    assert calls == [] and again["rows"] == finished[1]["rows"]
    status, line = line_of_error(reproduce.main, command(tmp_path, "--head-epochs", "9", "--rows", "paper-patchy"))
    assert status == 2 and "--epochs 2, not 9" in line
    shutil.rmtree(home / "all-head")
    status, line = line_of_error(reproduce.main, command(tmp_path))
    assert status == 1 and "1 of 2 models" in line and "model.pt" in line


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_report_has_all_that_the_folder_has(finished, tmp_path, calls, monkeypatch, when):
    """Also what other commands have made, or other processes make."""
    def check_labels(args):
        shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)

    check_labels(None) if when == "before" else monkeypatch.setattr(reproduce, "check_labels", check_labels)
    content = reproduce.main(command(tmp_path, "--rows", "random-pyramid-8-8", "--seeds", "4"))
    assert {call.split("/")[0] for call in calls} == {"random-pyramid-8-8-seed4"}
    scores = {row["name"]: row["scores"]["conv1-knn"]["seeds"] for row in content["rows"]}
    assert [list(seeds) for seeds in scores.values()] == [["3"], ["3", "4"]] and content["seeds"] == [3, 4]
    assert "(n = 1)" in (tmp_path / "table.md").read_text()


def test_the_protocol_is_what_was_called(finished):
    notes = "\n".join(finished[1]["notes"])
    for call in (call for found in finished[1]["calls"].values() for call in found.values()):
        kind = call["command"].split("/runs/")[0].split(" --arch ")[0]  # up to the model
        assert kind in notes
    assert "For instance (training, paper's setting): `python run.py" in notes and "try of the command" not in notes
    assert "ResNet-18" not in notes and "training, recipe" not in notes


def test_seconds_and_origins_add_up_and_what_is_refused_is_not_noted(tmp_path, monkeypatch):
    def refuse():
        raise console.RunError("the folder is in use")

    for commit, work in (("a", lambda: None), ("b", lambda: signal.raise_signal(signal.SIGINT)), ("c", refuse)):
        monkeypatch.setattr(jobs, "commit", lambda commit=commit: commit)
        before = json.loads((tmp_path / "made.json").read_text()) if commit != "a" else {"seconds": 0}
        with contextlib.suppress(KeyboardInterrupt, console.RunError):
            with jobs.accounted(tmp_path, torch.device("cpu")):
                time.sleep(0.11)
                work()
        made = json.loads((tmp_path / "made.json").read_text())
        assert (made["seconds"] >= before["seconds"] + 0.1) == (commit != "c")
    assert made["commit"] == ["a", "b"] and len(made["device"]) == 1


def test_random_weights_are_those_that_training_starts_from(finished):
    """The floor is paired with the trained row: the same seed draws the same encoder."""
    folder, _ = finished
    args, rows = reproduce.parse(command(folder))
    first = {row.name: reproduce.jobs_of(args, row, 3)[0] for row in rows}
    training, head = (job.script.parse(job.argv)[0] for job in (first["paper-patchy"], first["random-pyramid-8-8"]))
    assert training.seed == head.seed == 3
    torch.manual_seed(training.seed)
    trained = modules.build_model(options.describe_model(training)).encoder.state_dict()
    torch.manual_seed(head.seed)
    floor = classifier.build_model(head, 10).encoder.state_dict()
    assert trained.keys() == floor.keys() and all(torch.equal(trained[name], floor[name]) for name in trained)


class Stop:
    """Sends SIGTERM in the middle of the `number`-th optimiser step from now on."""

    def __init__(self, monkeypatch, script, number):
        self.left, step = number, script.train_step

        def train_step(*arguments):
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGTERM)
            return step(*arguments)

        monkeypatch.setattr(script, "train_step", train_step)


def test_interrupted_twice_and_continued_is_as_uninterrupted(finished, tmp_path, monkeypatch, calls, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py"])
    for script, step in ((run, 6), (classifier, 8)):  # in the second epoch of both
        with monkeypatch.context() as patch:
            Stop(patch, script, step)
            with pytest.raises(SystemExit) as left:
                console.run(lambda: reproduce.main(command(tmp_path)))
        line = capsys.readouterr().err
        assert left.value.code == 143 and line == "reproduce.py: stopped; the same command goes on from here\n"
    assert calls[-1] == "paper-patchy-seed3/all-head"
    del calls[:]
    content = reproduce.main(command(tmp_path))
    assert calls[0] == "paper-patchy-seed3/all-head --resume" and "paper-patchy-seed3" not in calls
    assert len(calls) == len(set(calls)) == 8
    assert figures(content) == figures(finished[1])


def test_what_had_saved_nothing_starts_again(finished, tmp_path, monkeypatch, calls):
    with monkeypatch.context() as patch:
        patch.setattr(classifier.features, "linear_probe", lambda *arguments: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
            reproduce.main(command(tmp_path, "--rows", "random-pyramid-8-8", "--frozen-only"))
    assert not (tmp_path / "results.json").exists()
    content = reproduce.main(command(tmp_path, "--rows", "random-pyramid-8-8", "--frozen-only"))
    done = ["all-head", "all-probes", "all-probes --overwrite"]
    assert calls == [f"random-pyramid-8-8-seed3/{call}" for call in done]
    assert content["rows"][0]["scores"]["all-knn"] == finished[1]["rows"][1]["scores"]["all-knn"]


# ---------------------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize("option, value", [("--num-epochs", "3"), ("--head-epochs", "3"), ("--label-fraction", "0.2")])
def test_other_options_are_refused_before_anything_is_done(finished, calls, line_of_error, option, value):
    folder, _ = finished
    status, line = line_of_error(reproduce.main, command(folder, "--seeds", "4", "3", option, value))
    assert status == 2 and str(folder / "runs") in line and "--output-folder" in line and f"not {value}" in line
    assert calls == []


def test_another_recipe_is_refused(tmp_path, monkeypatch, line_of_error):
    rows = ["--rows", "recipe-vae", "--frozen-only"]
    reproduce.main(command(tmp_path, *rows))
    recipe = {"recipe": ("recipe", [*utils.rows.RECIPE, "--beta-a", "0.5"])}
    monkeypatch.setattr(utils.rows, "SETTINGS", {**utils.rows.SETTINGS, **recipe})
    status, line = line_of_error(reproduce.main, command(tmp_path, *rows))
    assert status == 2 and "--beta-a 0.1, not 0.5" in line


def test_other_images_of_the_same_name_are_refused(tmp_path, class_folder, line_of_error):
    args, rows = reproduce.parse(["--dataset", "folder", "--data-folder", str(class_folder), *command(tmp_path)[2:]])
    job = reproduce.jobs_of(args, rows[0], 3)[0]
    job.folder.mkdir(parents=True)
    job.record.write_text(json.dumps(vars(run.parse(job.argv)[0])))
    jobs.check(job)
    argv = [str(tmp_path) if word == str(class_folder) else word for word in job.argv]
    with pytest.raises(console.UsageError, match="--data-folder"):
        jobs.check(job._replace(argv=argv))


def test_images_without_labels_are_refused_before_anything_is_trained(tmp_path, class_folder, calls, line_of_error):
    flat = tmp_path / "flat"
    flat.mkdir()
    for image in (path for path in class_folder.rglob("*") if path.is_file()):
        shutil.copy(image, flat / f"{image.parent.name}_{image.name}")
    more = ["--dataset", "folder", "--data-folder", flat]
    status, line = line_of_error(reproduce.main, list(map(str, command(tmp_path / "out", *more))))
    assert status == 1 and "without classes" in line and calls == []


def test_a_row_that_there_is_not_is_refused(line_of_error):
    status, line = line_of_error(reproduce.main, ["--rows", "patchvae"])
    assert status == 2 and "--rows patchvae" in line and "paper-patchy" in line


# ---------------------------------------------------------------------------------------------------- what is compared


def test_the_table_has_every_row_and_every_cut(tmp_path):
    names = {}
    for more, expected in {
        (): {"conv1", "all"},
        ("--scale", "32"): {"conv1", "conv1-3", "all"},
        ("--scale", "4"): {"conv1", "all"},
        ("--scale", "16"): {"conv1", "conv1-3", "all"},
    }.items():
        args, rows = reproduce.parse(["--output-folder", str(tmp_path), *more])
        found = [job for row in rows for job in reproduce.jobs_of(args, row, 1)]
        names[more] = {row.name: [job.part for job in reproduce.jobs_of(args, row, 1)] for row in rows}
        for job in found:
            if job.script is run or "--pretrained" not in job.argv:
                job.script.parse(job.argv)  # the scripts know all that is typed
        for name, parts in names[more].items():
            cuts = {part.rpartition("-")[0] for part in parts if "-" in part}
            assert cuts == ({"none"} if name == "supervised" else expected), name
    models = [f"{setting}-{model}" for setting in ("paper", "recipe") for model in utils.rows.MODELS]
    assert all(list(found)[:8] == models and list(found)[-1] == "supervised" for found in names.values())
    assert list(names[()])[8:-1] == ["random-resnet-8", "random-pyramid-8-64"]


def test_a_recipe_with_another_encoder_has_a_floor_of_its_own(monkeypatch):
    monkeypatch.setitem(utils.rows.SETTINGS, "recipe", ("recipe", ["--scale", "16"]))
    _, rows = reproduce.parse([])
    floors = {row.name: utils.rows.floor_of(row, rows) for row in rows}
    assert floors["paper-vae"] == "random-resnet-8" and floors["recipe-vae"] == "random-resnet-16"
    assert floors["random-resnet-8"] is None and floors["supervised"] is None
    assert [row.words for row in rows if row.kind == "random"] == ["random, scale 8", "random, scale 16"]


def test_an_encoder_on_the_command_line_is_that_of_all_rows():
    for more in ([], ["--ablations"]):
        _, rows = reproduce.parse(["--encoder-arch", "patches", "--scale", "16", *more])
        trained = [row for row in rows if row.kind == "trained" and "encoder-arch" not in row.name]
        assert {row.settled.encoder_arch for row in trained} == {"patches"}
    assert reproduce.parse(["--encoder-arch", "pyramid", "--scale", "64", "--size", "128"])[1][0].settled.scale == 64


def test_both_tables_call_the_same_encoder_by_the_same_name():
    tables = [{row.name: row.typed for row in reproduce.parse(more)[1]} for more in ([], ["--ablations"])]
    shared = tables[0].keys() & tables[1].keys()
    assert shared == {"random-pyramid-8-64", "random-resnet-8"}
    assert all(tables[0][name] == tables[1][name] for name in shared)


def test_a_row_that_fails_does_not_keep_the_others_from_their_end(tmp_path, monkeypatch, line_of_error):
    def diverge(argv):
        raise console.RunError("the loss is no finite number")

    monkeypatch.setattr(run, "main", diverge)
    status, line = line_of_error(reproduce.main, command(tmp_path, "--frozen-only"))
    assert status == 1 and "1 of 2 models" in line and "no finite number" in line
    row, floor = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert not row["scores"] and floor["scores"]["all-head"]["n"] == 1


def test_what_an_older_record_does_not_know_was_the_default(finished, tmp_path):
    args, rows = reproduce.parse(command(tmp_path))
    training = reproduce.jobs_of(args, rows[0], 3)[0]
    training.folder.mkdir(parents=True)
    record = {name: value for name, value in vars(run.parse(training.argv)[0]).items() if name != "hide"}
    training.record.write_text(json.dumps(record))
    jobs.check(training)
    with pytest.raises(console.UsageError, match="--hide 0.0, not 0.5"):
        jobs.check(training._replace(argv=[*training.argv, "--hide", "0.5"]))


def test_options_of_parts_do_not_reach_the_vae():
    _, rows = reproduce.parse(["--categorical", "--ngf", "32"])
    for row in rows:
        if row.kind == "trained":
            assert ("--categorical" in row.typed) == ("patchy" in row.name) and "--ngf" in row.typed
            run.parse(row.typed)


def test_ablations_change_one_thing_at_a_time():
    _, rows = reproduce.parse(["--ablations"])
    trained = {row.name: run.parse(row.typed)[0] for row in rows if row.kind == "trained"}
    base = trained.pop("ablation-base")
    for name, args in trained.items():
        changed = {key for key, value in vars(args).items() if value != getattr(base, key)} - {"typed"}
        assert len(changed) == 1 and changed <= set(utils.rows.FACTORS), name
    assert len(trained) == sum(len(values) - 1 for _, values in utils.rows.FACTORS.values())


def test_ablations_leave_out_what_an_option_rules_out():
    names = {row.name for row in reproduce.parse(["--ablations", "--scale", "2"])[1]}
    assert {"ablation-scale-4", "ablation-scale-8"} < names and "ablation-encoder-arch-resnet" not in names


# ---------------------------------------------------------------------------------------------------- reporting


@pytest.fixture
def made_up():
    """Scores of two models over two and three seeds, and what standings make of them."""
    rows = [MADE_UP("paper-vae", "paper", "β-VAE"), MADE_UP("paper-patchy", "paper", "PatchVAE")]
    rows += [MADE_UP("random", "none", "random"), MADE_UP("supervised", "labels", "ResNet-18")]
    scores = {
        "paper-vae": {"all-head": {1: 50.0, 2: 52.0, 3: 57.0}},
        "paper-patchy": {"all-head": {1: 51.0, 3: 60.0}, "all-knn": {1: 40.0}},
        "random": {"all-head": {1: 45.0, 2: 45.0, 3: 46.0}},
        "supervised": {"none-head": {1: 80.0}},
    }
    floor = {"paper-vae": "random", "paper-patchy": "random"}
    content = standings.summarise(rows, scores, [("PatchVAE − β-VAE", "paper-patchy", "paper-vae")], floor)
    columns = {"all-head": "head", "all-linear": "linear", "all-knn": "kNN", "none-head": "nothing frozen"}
    return {**content, "title": "Made up", "frozen": "all", "seeds": [1, 2, 3], "columns": columns, "notes": ["a note"]}


def test_means_spreads_and_paired_differences(made_up):
    vae, patchy, random, _ = made_up["rows"]
    assert vae["scores"]["all-head"]["mean"] == 53 and vae["scores"]["all-head"]["sd"] == pytest.approx(math.sqrt(13))
    assert vae["above_random"]["mean"] == pytest.approx(23 / 3)
    sd = pytest.approx(math.sqrt(32))
    assert patchy["above_random"] == {"mean": 10, "sd": sd, "n": 2, "seeds": {"1": 6, "3": 14}}
    assert patchy["scores"]["all-knn"] == {"mean": 40, "sd": None, "n": 1, "seeds": {"1": 40}}
    assert "above_random" not in random
    (difference,) = made_up["differences"]
    assert difference["all-head"] == {"mean": 2, "sd": pytest.approx(math.sqrt(2)), "n": 2, "seeds": {"1": 1, "3": 3}}
    assert difference["all-knn"]["n"] == 0


def test_the_last_epoch_counts_not_the_best_on_the_test_images():
    head = {"last": {"top1": 60.0}, "best": {"top1": 70.0}}
    calls = {"training": {}, "conv1-3-head": head, "all-probes": {"linear": {"top1": 50.0}, "knn": {"top1": 40.0}}}
    assert reproduce.scores_of(calls) == {"conv1-3-head": 60, "all-linear": 50, "all-knn": 40}


def test_the_table_says_what_the_figures_are(made_up):
    lines = standings.markdown(made_up).splitlines()
    assert "| paper | β-VAE | 53.00 ± 3.61 | – | – | – | +7.67 ± 3.06 |" in lines
    assert "| paper | PatchVAE | 55.50 ± 6.36 (n = 2) | – | 40.00 (n = 1) | – | +10.00 ± 5.66 (n = 2) |" in lines
    assert "| labels | ResNet-18 | – | – | – | 80.00 (n = 1) | – |" in lines
    assert "| PatchVAE − β-VAE | +2.00 ± 1.41 (n = 2) | – | – |" in lines and lines[-1] == "- a note"


def test_readme_shows_the_figures_on_record():
    content = json.loads((ROOT / "imgs" / "reproduction.json").read_text())
    lines = [line for line in standings.markdown(content).splitlines() if line.startswith("|")]
    shown = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 10 and set(lines) <= set(shown)
    for row in content["rows"]:
        (column,) = {"all-head", "none-head"} & set(row["scores"])
        score = row["scores"][column]
        assert score["mean"] == pytest.approx(np.mean(list(score["seeds"].values())))
        for seed, value in score["seeds"].items():
            assert content["calls"][f"{row['name']}-seed{seed}"][column]["last"]["top1"] == value
    (longer,) = json.loads((ROOT / "imgs" / "longer.json").read_text())["rows"]
    shorter = next(row for row in content["rows"] if row["name"] == longer["name"])
    for found in (longer, shorter):
        scores = " / ".join(f"{found['scores'][column]['seeds']['1']:.1f}" for column in standings.FROZEN)
        assert any(scores in line for line in shown)


def test_readme_shows_the_ablations_on_record():
    content = json.loads((ROOT / "imgs" / "ablations.json").read_text())
    rows = {row["name"]: row["scores"] for row in content["rows"]}
    shown = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    base = reproduce.parse(["--ablations"])[1][0].settled
    for name, (words, values) in utils.rows.FACTORS.items():
        lines = []
        for value in values:
            is_base, text = value == getattr(base, name), utils.rows.in_short(value)
            scores = rows["ablation-base" if is_base else f"ablation-{name.replace('_', '-')}-{text}"]
            means = [f"{scores[column]['mean']:.1f}" for column in standings.FROZEN]
            lines.append([f"**{cell}**" if is_base else cell for cell in (text, *means)])
        assert f"| {' | '.join([words, *map(' · '.join, zip(*lines))])} |" in shown


def places(picture, colour):
    """The middles of what is drawn in `colour` in the first panel: a list of (x, y), from left to right."""
    mask = np.abs(np.asarray(picture).astype(int) - colour).max(axis=2) < 60
    mask[:, standings.LABELS + standings.PANEL :] = False
    mask[:, : standings.LABELS] = False
    blobs, count = ndimage.label(mask)
    return sorted((x, y) for y, x in ndimage.center_of_mass(mask, blobs, range(1, count + 1)))


def test_dots_are_where_the_figures_say(made_up):
    for row in made_up["rows"]:  # dots alone, without lines and bars
        for score in row["scores"].values():
            score["sd"] = None
    picture = standings.plot(made_up)
    axis = standings.Axis([45.0, 60.0], standings.LABELS, standings.LABELS + standings.PANEL)
    _, lines, _ = standings.layout(made_up["rows"][:3])
    for row, y in lines[:2]:
        values = sorted(row["scores"]["all-head"]["seeds"].values())
        found = places(picture, standings.COLOURS[row["words"]])
        assert [x for x, _ in found] == pytest.approx([axis(value) for value in values], abs=1)
        assert [place for _, place in found] == pytest.approx([y] * len(values), abs=1)


def test_floors_are_dashed_and_where_there_are_none_nothing_is(made_up):
    def middles():
        _, _, bottom = standings.layout(made_up["rows"][:-1])
        found = [(x, y) for x, y in places(standings.plot(made_up), standings.FADED) if standings.TOP < y < bottom]
        return [x for x, _ in found]

    assert len(middles()) > 3
    made_up["rows"] = [{**row, "floor": "random"} for row in made_up["rows"] if row["name"] != "random"]
    assert not middles()
    for row in made_up["rows"]:
        del row["floor"]  # as where no random row was asked for
    assert not middles()


def test_an_axis_is_linear_and_its_ticks_are_round():
    axis = standings.Axis([40.2, 41.7], 100, 300)
    assert axis.low < 40.2 and axis.high > 41.7 and axis(axis.low) == 100 and axis(axis.high) == 300
    assert axis((axis.low + axis.high) / 2) == pytest.approx(200)
    assert axis.ticks() == [40.5, 41.0, 41.5]
    assert len(standings.Axis([55.0], 0, 1).ticks()) > 1 and standings.Axis([], 0, 1).ticks()
