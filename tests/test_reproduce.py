"""utils/reproduce.py does everything once, goes on where it stopped, refuses what does not fit, and reports truly."""

import contextlib
import json
import math
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import classifier
import modules
import run
from utils import options, reproduce, runtime

TINY = ["--dataset", "digits", "--size", "16", "--encoder-arch", "pyramid", "--scale", "8", "--ngf", "8"]
TINY += ["--num-parts", "4", "--workers", "0", "--num-epochs", "2", "--img-per-epoch", "64", "--batch-size", "16"]
TINY += ["--head-epochs", "2", "--tune-epochs", "2", "--supervised-epochs", "1", "--head-batch-size", "64"]
TINY += ["--label-fraction", "0.1", "--head-label-fraction", "0.2", "--precision", "fp32"]
TRAINED, RANDOM = "paper-patchy-seed3", "random-pyramid-8-8-seed3"


def command(folder, *more):
    rows = ["--rows", "paper-patchy", "random-pyramid-8-8", "--seeds", "3"]
    return [*TINY, *rows, *map(str, more), "--output-folder", str(folder)]


def figures(content):
    """What was found, without what may differ from call to call."""
    text = json.dumps([content["rows"], content["calls"]], sort_keys=True)
    return re.sub(r'"(command|seconds|known_from)": ("[^"]*"|[\d.e-]+),? ?', "", text)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished reproduction of two rows, one seed: its folder and what main returned."""
    folder = tmp_path_factory.mktemp("reproduction")
    return folder, reproduce.main(command(folder))


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "copy", symlinks=True)


@pytest.fixture
def calls(monkeypatch):
    """The calls of run.main and classifier.main from now on: a list of e.g. "paper-vae-seed1/all-head --resume"."""
    made = []
    for script in (run, classifier):
        def main(argv, original=script.main):
            folder = argv[argv.index("--output-folder") + 1].split("/runs/")[1]
            made.append(folder + (" --resume" if "--resume" in argv else ""))
            return original(argv)

        monkeypatch.setattr(script, "main", main)
    return made


# ---------------------------------------------------------------------------------------------------- doing it once


def test_everything_is_judged_and_stands_in_the_files(made):
    folder, content = made
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(content))
    assert list(content["columns"]) == [f"{cut}-{judge}" for cut in ("conv1", "all") for judge in reproduce.JUDGES]
    assert "(conv1-3)" in content["columns"]["all-head"]
    for row in content["rows"]:
        assert set(row["scores"]) == set(content["columns"])
        for cut in ("conv1", "all"):  # what the scripts themselves have written
            home = folder / "runs" / f"{row['name']}-seed3"
            last = json.loads((home / f"{cut}-head" / "results.json").read_text())["last"]
            assert last["epoch"] == 2 and row["scores"][f"{cut}-head"]["seeds"] == {"3": last["top1"]}
            probes = json.loads((home / f"{cut}-probes" / "results.json").read_text())
            for judge in ("linear", "knn"):
                assert row["scores"][f"{cut}-{judge}"]["mean"] == probes[judge]["top1"]
    training = content["calls"][TRAINED]["training"]
    tests = [json.loads(line) for line in (folder / "runs" / TRAINED / "metrics.jsonl").read_text().splitlines()]
    assert training["curve"] == [event["total"] for event in tests if event["event"] == "test"]
    assert len(training["curve"]) == 2 and training["seconds"] > 0
    assert training["command"].startswith("python run.py --dataset digits")
    table = (folder / "table.md").read_text()
    assert "| authors' setting | PatchVAE |" in table and "±0" not in table and "± 0.00" not in table


def test_the_commands_in_the_records_make_the_same_figures(made, tmp_path):
    call = made[1]["calls"][RANDOM]["all-head"]
    _, script, *typed = shlex.split(call["command"])
    assert script == "classifier.py" and classifier.main([*typed, "--output-folder", str(tmp_path)])["last"] == call["last"]


def test_nothing_finished_is_repeated_and_frozen_only_does_and_forgets_nothing(made, copied, calls):
    for more in ([], ["--frozen-only"]):
        again = reproduce.main(command(copied, *more))
        assert again["columns"] == made[1]["columns"] and figures(again) == figures(made[1])
    for place in copied.glob("runs/*/conv1-*"):
        shutil.rmtree(place)
    assert list(reproduce.main(command(copied, "--frozen-only"))["columns"]) == reproduce.FROZEN
    assert calls == []


def test_a_lost_model_is_trained_again_only_if_it_is_needed(made, copied, calls, capsys):
    (copied / "runs" / TRAINED / "model.pt").unlink()
    reproduce.main(command(copied))
    assert calls == []
    shutil.rmtree(copied / "runs" / TRAINED / "all-head")
    again = reproduce.main(command(copied))
    assert calls == [TRAINED, f"{TRAINED}/all-head"] and figures(again) == figures(made[1])
    assert f"{TRAINED}: the training is known, but its model.pt is not here" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_report_has_all_that_the_folder_has(made, tmp_path, calls, monkeypatch, when):
    """Also what other commands have made, or other processes make."""
    def copy(settings=None):
        shutil.copytree(made[0], tmp_path, dirs_exist_ok=True, symlinks=True)

    copy() if when == "before" else monkeypatch.setattr(reproduce, "check_labels", copy)
    content = reproduce.main(command(tmp_path, "--rows", "random-pyramid-8-8", "--seeds", "4"))
    assert {call.split("/")[0] for call in calls} == {"random-pyramid-8-8-seed4"}
    scores = {row["name"]: row["scores"]["conv1-knn"]["seeds"] for row in content["rows"]}
    assert [list(seeds) for seeds in scores.values()] == [["3"], ["3", "4"]] and content["seeds"] == [3, 4]
    assert "(n = 1)" in (tmp_path / "table.md").read_text()


def test_the_protocol_is_what_was_called(made):
    notes = "\n".join(made[1]["notes"])
    for call in (call for found in made[1]["calls"].values() for call in found.values()):
        assert call["command"].split("/runs/")[0].split(" --arch ")[0] in notes  # up to the model
    assert "For instance (training, authors' setting): `python run.py" in notes and "try of the command" not in notes
    assert "resnet18" not in notes and "training, our recipe" not in notes


def test_seconds_and_origins_add_up_and_what_is_refused_is_not_noted(tmp_path, monkeypatch):
    def refuse():
        raise runtime.RunError("the folder is in use")

    cell = reproduce.Cell("x-seed1", "all-head", classifier, {"output_folder": tmp_path})
    for commit, work in (("a", lambda: None), ("b", lambda: signal.raise_signal(signal.SIGINT)), ("c", refuse)):
        monkeypatch.setattr(reproduce, "commit", lambda commit=commit: commit)
        monkeypatch.setattr(classifier, "main", lambda argv, work=work: time.sleep(0.11) or work())
        before = reproduce.record_of(cell).get("seconds", 0)
        with contextlib.suppress(KeyboardInterrupt, runtime.RunError):
            reproduce.make(cell, torch.device("cpu"), goes_on=False)
        assert (reproduce.record_of(cell)["seconds"] >= before + 0.1) == (commit != "c")
    assert reproduce.record_of(cell)["commit"] == ["a", "b"] and len(reproduce.record_of(cell)["device"]) == 1


def test_random_weights_are_those_that_training_starts_from(made):
    """The floor is paired with the trained row: the same seed draws the same encoder."""
    settings, rows = reproduce.parse(command(made[0]))
    first = {row.name: reproduce.cells_of(settings, row, 3)[0] for row in rows}
    training, head = (cell.script.parse(cell.argv)[0] for cell in (first["paper-patchy"], first["random-pyramid-8-8"]))
    torch.manual_seed(training.seed)
    trained = modules.build_model(options.describe_model(training)).encoder.state_dict()
    torch.manual_seed(head.seed)
    floor = classifier.build_model(head, 10).encoder.state_dict()
    assert trained.keys() == floor.keys() and all(torch.equal(trained[name], floor[name]) for name in trained)


def test_interrupted_twice_and_continued_is_as_uninterrupted(made, tmp_path, monkeypatch, calls, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py"])
    for script, last in ((run, 6), (classifier, 8)):  # SIGTERM in the second epoch of both
        steps = iter(range(1, 100))
        with monkeypatch.context() as patch:
            def train_step(*values, original=script.train_step, steps=steps, last=last):
                if next(steps) == last:
                    signal.raise_signal(signal.SIGTERM)
                return original(*values)

            patch.setattr(script, "train_step", train_step)
            with pytest.raises(SystemExit) as left:
                runtime.start(lambda: reproduce.main(command(tmp_path)))
        line = capsys.readouterr().err
        assert left.value.code == 143 and line == "reproduce.py: stopped; the same command goes on from here\n"
    content = reproduce.main(command(tmp_path))
    assert calls[:4] == [TRAINED, f"{TRAINED} --resume", f"{TRAINED}/all-head", f"{TRAINED}/all-head --resume"]
    assert len(calls) == len(set(calls)) == 4 + 7
    assert figures(content) == figures(made[1])


def test_what_had_saved_nothing_starts_again(made, tmp_path, monkeypatch, calls):
    only = ["--rows", "random-pyramid-8-8", "--frozen-only"]
    with monkeypatch.context() as patch:
        patch.setattr(classifier.features, "linear_probe", lambda *arguments: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
            reproduce.main(command(tmp_path, *only))
    assert not (tmp_path / "results.json").exists()
    content = reproduce.main(command(tmp_path, *only))
    assert calls == [f"{RANDOM}/{part}" for part in ("all-head", "all-probes", "all-probes")]
    assert content["rows"][0]["scores"]["all-knn"] == made[1]["rows"][1]["scores"]["all-knn"]


def test_a_folder_of_an_older_version_counts(made, copied, calls):
    """Whose made.json has seconds alone; a training that was killed in between goes on or starts again."""
    for path in copied.glob("runs/**/made.json"):
        path.write_text(json.dumps({name: json.loads(path.read_text())[name] for name in ("seconds", "commit")}))
    again = reproduce.main(command(copied))
    assert calls == [] and again["rows"] == made[1]["rows"]
    assert again["calls"][TRAINED]["training"]["curve"] == made[1]["calls"][TRAINED]["training"]["curve"]
    metrics = copied / "runs" / TRAINED / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]) + '{"event": "en')
    reproduce.main(command(copied))
    assert calls == [TRAINED]


# ---------------------------------------------------------------------------------------------------- what is known


def test_what_earlier_reports_know_is_taken_over(made, tmp_path, calls, capsys):
    report = made[0] / "results.json"
    content = reproduce.main(command(tmp_path, "--known", report, "--cache", "none", "--seeds", "3", "--no-cuda"))
    assert calls == [] and figures(content) == figures(made[1])
    assert f"{report}: 9 calls are taken over, 0 have other options" in capsys.readouterr().out
    assert reproduce.main(command(tmp_path))["calls"] == content["calls"]  # from now on without it


def test_what_was_made_otherwise_is_not_taken_over(made, tmp_path, calls, capsys):
    report = made[0] / "results.json"
    reproduce.main(command(tmp_path, "--known", report, "--head-epochs", "3", "--frozen-only"))
    assert calls == [TRAINED, f"{TRAINED}/all-head", f"{RANDOM}/all-head"]  # its model is not there
    out = capsys.readouterr().out
    assert "3 calls are taken over, 2 have other options" in out and f"{TRAINED}, all-head: --epochs 2, not 3" in out


@pytest.mark.parametrize("known, folder, same", [
    ("data/cifar10", "/elsewhere/cifar10", True), ("data/cifar10", "/elsewhere/photographs", False),
])
def test_images_are_known_by_their_folders_name(tmp_path, known, folder, same):
    cells = []
    for place in (known, folder):
        settings, rows = reproduce.parse(["--dataset", "folder", "--data-folder", place, *command(tmp_path)[2:]])
        cells.append(reproduce.cells_of(settings, rows[0], 3)[0])
    (tmp_path / "known.json").write_text(json.dumps({"calls": {cells[0].row: {"training": {"command": cells[0].command, "total": 1}}}}))
    reproduce.take_over(str(tmp_path / "known.json"), cells[1:])
    assert reproduce.is_finished(cells[1]) == same


# ---------------------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize("option, value", [("--num-epochs", "3"), ("--head-epochs", "3"), ("--label-fraction", "0.2")])
def test_other_options_are_refused_before_anything_is_done(made, calls, line_of_error, option, value):
    status, line = line_of_error(reproduce.main, command(made[0], "--seeds", "4", "3", option, value))
    assert status == 2 and str(made[0] / "runs") in line and "--output-folder" in line and f"not {value}" in line
    assert calls == []


def test_other_recipes_and_other_images_of_the_same_name_are_refused(copied, tmp_path, monkeypatch, line_of_error):
    with monkeypatch.context() as patch:
        patch.setitem(reproduce.SETTINGS, "paper", ("authors' setting", {"beta_a": 0.5}))
        status, line = line_of_error(reproduce.main, command(copied))
    assert status == 2 and "--beta-a 1.0, not 0.5" in line
    for place in ("one/images", "other/images"):
        options = ["--dataset", "folder", "--data-folder", str(tmp_path / place), *command(tmp_path / "out")[2:]]
        settings, rows = reproduce.parse(options)
        cell = reproduce.cells_of(settings, rows[0], 3)[0]
        cell.folder.mkdir(parents=True, exist_ok=True)
        if place == "one/images":
            runtime.write_json(cell.folder / "made.json", {"command": cell.command})
    status, line = line_of_error(reproduce.main, options)
    assert status == 2 and "--data-folder" in line


def test_images_without_labels_are_refused_before_anything_is_trained(tmp_path, class_folder, calls, line_of_error):
    for image in (path for path in class_folder.rglob("*") if path.is_file()):
        (tmp_path / "flat").mkdir(exist_ok=True)
        shutil.copy(image, tmp_path / "flat" / f"{image.parent.name}_{image.name}")
    more = ["--dataset", "folder", "--data-folder", tmp_path / "flat"]
    status, line = line_of_error(reproduce.main, command(tmp_path / "out", *more))
    assert status == 1 and "without classes" in line and calls == []


def test_a_row_that_there_is_not_is_refused(line_of_error):
    status, line = line_of_error(reproduce.main, ["--rows", "patchvae"])
    assert status == 2 and "--rows patchvae" in line and "paper-patchy" in line


def test_a_row_that_fails_does_not_keep_the_others_from_their_end(tmp_path, monkeypatch, line_of_error):
    def diverge(argv):
        raise runtime.RunError("the loss is no finite number")

    monkeypatch.setattr(run, "main", diverge)
    status, line = line_of_error(reproduce.main, command(tmp_path, "--frozen-only"))
    assert status == 1 and "1 of 2 models" in line and "no finite number" in line
    row, floor = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert not row["scores"] and floor["scores"]["all-head"]["n"] == 1


# ---------------------------------------------------------------------------------------------------- what is compared


@pytest.mark.parametrize("scale, expected", [
    ("8", {"conv1", "all"}), ("32", {"conv1", "conv1-3", "all"}), ("4", {"conv1", "all"}),
    ("16", {"conv1", "conv1-3", "all"}),
])
def test_the_table_has_every_row_and_every_cut(tmp_path, scale, expected):
    settings, rows = reproduce.parse(["--output-folder", str(tmp_path), "--scale", scale])
    trained = [f"{setting}-{model}" for setting in ("paper", "recipe") for model in reproduce.MODELS]
    floors = [f"random-resnet-{scale}", f"random-pyramid-{scale}-64"]
    assert [row.name for row in rows] == [*trained, *floors, "supervised"]
    assert [row.floor for row in rows] == [floors[0]] * 4 + [floors[1]] * 4 + [None] * 3
    for row in rows:
        cells = reproduce.cells_of(settings, row, 1)
        assert {cell.part.rpartition("-")[0] for cell in cells} - {""} == (expected if row.encoder else {"none"})
        for cell in cells:
            if "pretrained" not in cell.options:
                cell.script.parse(cell.argv)  # the scripts have all these options


def test_the_authors_setting_is_the_defaults_but_for_inet():
    settings, rows = reproduce.parse(["--dataset", "cifar10"])
    cell = reproduce.cells_of(settings, next(row for row in rows if row.name == "paper-patchy"), 1)[0]
    found, defaults = run.build_parser().typed(cell.argv), run.build_parser().defaults
    differ = {name for name, value in found.items() if value != defaults[name]}
    assert differ == {"dataset", "inet", "precision", "output_folder"}


def test_options_of_the_command_line_are_those_of_all_rows_that_have_them():
    for more in ([], ["--ablations"]):
        _, rows = reproduce.parse(["--encoder-arch", "patches", "--scale", "16", "--categorical", "--ngf", "32", *more])
        for row in (row for row in rows if row.floor and "encoder-arch" not in row.name):
            assert row.encoder == {"encoder_arch": "patches", "scale": row.options["scale"], "ngf": 32}
            assert ("categorical" in row.options) == (row.options["arch"] == "patchy")
    assert reproduce.parse(["--encoder-arch", "pyramid", "--scale", "64", "--size", "128"])[1][0].encoder["scale"] == 64


def test_both_tables_call_the_same_encoder_by_the_same_name():
    tables = [{row.name: row.options for row in reproduce.parse(more)[1]} for more in ([], ["--ablations"])]
    shared = tables[0].keys() & tables[1].keys()
    assert shared == {"random-pyramid-8-64", "random-resnet-8"}
    assert all(tables[0][name] == tables[1][name] for name in shared)


def test_ablations_change_one_thing_at_a_time_and_leave_out_what_an_option_rules_out():
    trained = {row.name: row.options for row in reproduce.parse(["--ablations"])[1] if row.floor}
    base = {**run.build_parser().defaults, **trained.pop("ablation-base")}
    for name, values in trained.items():
        (changed,) = [key for key, value in values.items() if value != base[key]]
        assert changed in reproduce.FACTORS and changed.replace("_", "-") in name
    assert len(trained) == sum(len(values) - 1 for values in reproduce.FACTORS.values())
    names = {row.name for row in reproduce.parse(["--ablations", "--scale", "2"])[1]}
    assert {"ablation-scale-4", "ablation-scale-8"} < names and "ablation-encoder-arch-resnet" not in names


# ---------------------------------------------------------------------------------------------------- reporting


@pytest.fixture
def made_up():
    """What reproduce makes of scores of two models over two and three seeds."""
    rows = [
        reproduce.Row("vae", "paper", "β-VAE", {}, {}, "random"), reproduce.Row("random", "none", "random", {}, {}),
        reproduce.Row("patchy", "paper", "PatchVAE", {}, {}, "random", ["vae", "absent"]),
        reproduce.Row("supervised", "labels", "ResNet-18", {}, {}),
    ]
    top1 = {
        ("vae", "all-head"): {1: 50.0, 2: 52.0, 3: 57.0}, ("random", "all-head"): {1: 45.0, 2: 45.0, 3: 46.0},
        ("patchy", "all-head"): {1: 51.0, 3: 60.0}, ("patchy", "all-knn"): {1: 40.0},
        ("supervised", "none-head"): {1: 80.0},
    }
    columns = {"all-head": "head", "all-linear": "linear", "all-knn": "kNN", "none-head": "nothing frozen"}
    rest = {"title": "Made up", "frozen": "all", "seeds": [1, 2, 3], "columns": columns, "notes": ["a note"]}
    return {**reproduce.summarise(rows, top1), **rest}


def test_means_spreads_and_paired_differences(made_up):
    vae, random, patchy, _ = made_up["rows"]
    assert vae["scores"]["all-head"]["mean"] == 53 and vae["scores"]["all-head"]["sd"] == pytest.approx(math.sqrt(13))
    assert vae["above_random"]["mean"] == pytest.approx(23 / 3) and "above_random" not in random
    sd = pytest.approx(math.sqrt(32))
    assert patchy["above_random"] == {"mean": 10, "sd": sd, "n": 2, "seeds": {"1": 6, "3": 14}}
    assert patchy["scores"]["all-knn"] == {"mean": 40, "sd": None, "n": 1, "seeds": {"1": 40}}
    (difference,) = made_up["differences"]
    assert difference["all-head"] == {"mean": 2, "sd": pytest.approx(math.sqrt(2)), "n": 2, "seeds": {"1": 1, "3": 3}}
    assert difference["all-knn"]["n"] == 0


def test_the_table_says_what_the_figures_are(made_up):
    lines = reproduce.markdown(made_up).splitlines()
    assert "| paper | β-VAE | 53.00 ± 3.61 | – | – | – | +7.67 ± 3.06 |" in lines
    assert "| paper | PatchVAE | 55.50 ± 6.36 (n = 2) | – | 40.00 (n = 1) | – | +10.00 ± 5.66 (n = 2) |" in lines
    assert "| labels | ResNet-18 | – | – | – | 80.00 (n = 1) | – |" in lines
    assert "| PatchVAE − β-VAE, paper | +2.00 ± 1.41 (n = 2) | – | – |" in lines and lines[-1] == "- a note"


def test_the_last_epoch_counts_not_the_best_on_the_test_images(made):
    settings, rows = reproduce.parse(command(made[0]))
    records = {"all-head": {"command": "", "last": {"top1": 60.0}, "best": {"top1": 70.0}}}
    (row,) = reproduce.gather(settings.changed(rows=[]), rows, {("paper-vae", 1): records})["rows"]
    assert row["scores"]["all-head"]["mean"] == 60


def test_the_study_shows_the_figures_on_record():
    """A comment <!-- NAME.json --> in imgs/reproduction.md says where the figures of the table below it come from."""
    study, name, seen = ROOT / "imgs" / "reproduction.md", None, 0
    if not study.exists():
        pytest.skip("no study yet")
    for line in study.read_text(encoding="utf-8").splitlines():
        mark = re.fullmatch(r"<!-- (\S+\.json) -->", line.strip())
        name = mark[1] if mark else name if line.startswith("|") or not line.strip() else None
        if name and line.startswith("|"):
            content = json.loads((ROOT / "imgs" / name).read_text(encoding="utf-8"))
            assert line in reproduce.markdown(content).splitlines(), line
            seen += 1
    assert seen
    for content in (json.loads(path.read_text()) for path in ROOT.glob("imgs/reproduction*.json")):
        for row in content["rows"]:
            for column, score in row["scores"].items():
                for seed, value in score["seeds"].items():
                    part, _, judge = column.rpartition("-")
                    call = content["calls"][f"{row['name']}-seed{seed}"][f"{part}-{'head' if judge == 'head' else 'probes'}"]
                    assert call["last" if judge == "head" else judge]["top1"] == value
