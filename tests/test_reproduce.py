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
CUTS = {"4": ["conv1"], "8": ["conv1"], "16": ["conv1", "conv1-3"], "32": ["conv1", "conv1-3"]}  # and all, by scale


def command(folder, *more):
    rows = ["--rows", "paper-patchy", "random-pyramid-8-8", "--seeds", "3"]
    return [*TINY, *rows, *map(str, more), "--output-folder", str(folder)]


def rows_and_cells(*argv, seed=3):
    """All rows by name, and their cells in lists by name."""
    settings, rows = reproduce.parse(list(map(str, argv)))
    return {row.name: row for row in rows}, {row.name: reproduce.cells_of(settings, row, seed) for row in rows}


def argv_of(cell):
    return shlex.split(cell.command)[2:]


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
    return shutil.copytree(made[0], tmp_path / "copy")


@pytest.fixture
def calls(monkeypatch):
    """The calls of run.main and classifier.main, e.g. "paper-vae-seed1/all-head --resume", from now on: a list."""
    made = []
    for script in (run, classifier):
        def main(argv, original=script.main):
            folder = argv[argv.index("--output-folder") + 1].split("/runs/")[1]
            made.append(folder + (" --resume" if "--resume" in argv else ""))
            return original(argv)

        monkeypatch.setattr(script, "main", main)
    return made


def test_everything_is_judged_and_stands_in_the_files(made, tmp_path):
    folder, content = made
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(content))
    assert list(content["columns"]) == [f"{cut}-{judge}" for cut in ("conv1", "all") for judge in reproduce.JUDGES]
    for row in content["rows"]:
        for column in content["columns"]:  # what the scripts themselves have written
            cut, judge = column.split("-")
            place = folder / "runs" / f"{row['name']}-seed3" / f"{cut}-{'head' if judge == 'head' else 'probes'}"
            found = json.loads((place / "results.json").read_text())["last" if judge == "head" else judge]
            assert found.get("epoch", 2) == 2 and row["scores"][column]["seeds"] == {"3": found["top1"]}
    training, events = content["calls"][TRAINED]["training"], (folder / "runs" / TRAINED / "metrics.jsonl").read_text()
    losses = [event["total"] for event in map(json.loads, events.splitlines()) if event["event"] == "test"]
    assert training["curve"] == losses and len(losses) == 2 and training["seconds"] > 0
    table = (folder / "table.md").read_text()
    assert "| authors' setting | PatchVAE |" in table and "frozen (conv1-3)" in table and "±0" not in table + "± 0.00"
    assert all((folder / f"{name}.png").stat().st_size > 10_000 for name in ("plot", "curves"))
    assert f"`python utils/{content['command']}` made this table" in table and "try of the command" not in table
    call = content["calls"][RANDOM]["all-head"]
    argv = [*shlex.split(call["command"])[2:], "--output-folder", str(tmp_path)]
    assert classifier.main(argv)["last"] == call["last"]  # the commands make the same figures


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
    assert figures(reproduce.main(command(copied))) == figures(made[1]) and calls == [TRAINED, f"{TRAINED}/all-head"]
    assert f"{TRAINED}: the training is known, but its model.pt is not here" in capsys.readouterr().out


def test_a_report_has_all_that_the_folder_has(made, tmp_path, calls, monkeypatch):
    """Also what other processes make meanwhile."""
    monkeypatch.setattr(reproduce, "check_labels", lambda _: shutil.copytree(made[0], tmp_path, dirs_exist_ok=True))
    content = reproduce.main(command(tmp_path, "--rows", "random-pyramid-8-8", "--seeds", "4"))
    assert {call.split("/")[0] for call in calls} == {"random-pyramid-8-8-seed4"}
    scores = {row["name"]: row["scores"]["conv1-knn"]["seeds"] for row in content["rows"]}
    assert [list(seeds) for seeds in scores.values()] == [["3"], ["3", "4"]] and content["seeds"] == [3, 4]
    assert "(n = 1)" in (tmp_path / "table.md").read_text()


def test_seconds_and_origins_add_up_and_what_is_refused_is_not_noted(tmp_path, monkeypatch):
    def refuse():
        raise runtime.RunError("the folder is in use")

    cell = reproduce.Cell("x-seed1", "all-head", classifier, tmp_path, {})
    for commit, work in (("a", lambda: None), ("b", lambda: signal.raise_signal(signal.SIGINT)), ("c", refuse)):
        monkeypatch.setattr(classifier, "main", lambda argv, work=work: time.sleep(0.11) or work() or {})
        before = reproduce.record_of(cell).get("seconds", 0)
        with contextlib.suppress(KeyboardInterrupt, runtime.RunError):
            reproduce.make(cell, {"commit": commit, "device": "a CPU"})
        assert (reproduce.record_of(cell)["seconds"] > before + 0.05) == (commit != "c")
    assert reproduce.record_of(cell)["commit"] == ["a", "b"] and reproduce.record_of(cell)["device"] == ["a CPU"]


def test_a_run_of_which_there_is_no_record_is_not_replaced(made, copied, line_of_error):
    model = copied / "runs" / TRAINED / "model.pt"
    (model.parent / "made.json").unlink()
    status, line = line_of_error(reproduce.main, command(copied))
    assert status == 1 and "already holds a run" in line
    assert model.read_bytes() == (made[0] / "runs" / TRAINED / "model.pt").read_bytes()


def test_random_weights_are_those_that_training_starts_from(made):
    """The floor is paired with the trained row: the same seed draws the same encoder."""
    cells = rows_and_cells(*command(made[0]))[1]
    training, head = (cells[name][0].script.parse(argv_of(cells[name][0]))[0] for name in (TRAINED[:-6], RANDOM[:-6]))
    torch.manual_seed(training.seed)
    trained = modules.build_model(options.describe_model(training)).encoder.state_dict()
    torch.manual_seed(head.seed)
    floor = classifier.build_model(head, 10).encoder.state_dict()
    assert trained.keys() == floor.keys() and all(torch.equal(trained[name], floor[name]) for name in trained)


def test_interrupted_thrice_and_continued_is_as_uninterrupted(made, tmp_path, monkeypatch, calls, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py"])
    features = classifier.features  # SIGTERM in the second epoch of both, and in a probe, which saves nothing
    for module, name, last in ((run, "train_step", 6), (classifier, "train_step", 8), (features, "linear_probe", 1)):
        steps, original = iter(range(1, 100)), getattr(module, name)
        with monkeypatch.context() as patch:
            def stopped(*values, original=original, steps=steps, last=last):
                if next(steps) == last:
                    signal.raise_signal(signal.SIGTERM)
                return original(*values)

            patch.setattr(module, name, stopped)
            with pytest.raises(SystemExit) as left:
                runtime.start(lambda: reproduce.main(command(tmp_path)))
        line = capsys.readouterr().err
        assert left.value.code == 143 and line == "reproduce.py: stopped; the same command goes on from here\n"
    assert not (tmp_path / "results.json").exists()
    assert figures(reproduce.main(command(tmp_path))) == figures(made[1])
    parts = ["", " --resume", "/all-head", "/all-head --resume", "/all-probes", "/all-probes"]
    assert calls[:6] == [TRAINED + part for part in parts] and len(calls) == len(set(calls)) + 1 == 6 + 6


def test_what_earlier_reports_know_is_taken_over(made, tmp_path, calls, capsys):
    report = made[0] / "results.json"
    content = reproduce.main(command(tmp_path / "a", "--known", report, "--cache", "none", "--no-cuda"))
    assert calls == [] and figures(content) == figures(made[1])
    assert f"{report}: 9 calls are taken over, 0 have other options" in capsys.readouterr().out
    assert reproduce.main(command(tmp_path / "a"))["calls"] == content["calls"]  # from now on without it
    reproduce.main(command(tmp_path / "b", "--known", report, "--head-epochs", "3", "--frozen-only"))
    assert calls == [TRAINED, f"{TRAINED}/all-head", f"{RANDOM}/all-head"]  # the model to be judged is not there
    out = capsys.readouterr().out
    assert "3 calls are taken over, 2 have other options" in out and f"{TRAINED}, all-head: --epochs 2, not 3" in out


@pytest.mark.parametrize("place, counts, is_refused", [
    ("one/images", True, False), ("other/images", True, True), ("one/photographs", False, True),
])
def test_images_are_known_by_their_folder_and_elsewhere_by_its_name(tmp_path, place, counts, is_refused):
    folders = [["--dataset", "folder", "--data-folder", tmp_path / folder] for folder in ("one/images", place)]
    one, other = (rows_and_cells(*folder, *command(tmp_path)[2:])[1]["paper-vae"][0] for folder in folders)
    known = {"calls": {one.row: {"training": {"command": one.command, "total": 1}}}}
    (tmp_path / "known.json").write_text(json.dumps(known))
    assert bool(reproduce.differences(other, one.command)) == is_refused
    reproduce.take_over(str(tmp_path / "known.json"), [other])
    assert reproduce.is_finished(other) == counts


@pytest.mark.parametrize("more, status, words", [
    (["--seeds", "4", "3", "--num-epochs", "3"], 2, "--num-epochs 2, not 3"),
    (["--seeds", "4", "3", "--head-epochs", "3"], 2, "--epochs 2, not 3"),
    (["--seeds", "4", "3", "--label-fraction", "0.2"], 2, "--label-fraction 0.1, not 0.2"),
    (["--rows", "patchvae"], 2, "--rows patchvae: there is no such row; choose from paper-vae"),
    (["--known", ROOT / "README.md"], 2, "--known"), (["--known", "nowhere.json"], 1, "nowhere.json: No such file"),
])
def test_what_does_not_fit_is_refused_before_anything_is_done(copied, calls, line_of_error, more, status, words):
    found, line = line_of_error(reproduce.main, command(copied, *more))
    assert found == status and words in line and calls == []


def test_another_recipe_is_refused(copied, monkeypatch, line_of_error):
    monkeypatch.setitem(reproduce.SETTINGS, "paper", ("authors' setting", {"beta_a": 0.5}))
    status, line = line_of_error(reproduce.main, command(copied))
    assert status == 2 and "--beta-a 1.0, not 0.5" in line and str(copied / "runs" / TRAINED) in line


def test_too_few_labels_are_refused_before_anything_is_trained(tmp_path, class_folder, calls, line_of_error):
    (tmp_path / "flat").mkdir()
    for image in (path for path in class_folder.rglob("*") if path.is_file()):
        shutil.copy(image, tmp_path / "flat" / f"{image.parent.name}_{image.name}")
    status, line = line_of_error(reproduce.main, command(tmp_path / "out", "--label-fraction", "0.001"))
    assert status == 2 and "--label-fraction 0.001 leaves a class without" in line
    more = ["--dataset", "folder", "--data-folder", tmp_path / "flat"]
    status, line = line_of_error(reproduce.main, command(tmp_path / "out", *more))
    assert status == 1 and "without classes" in line and calls == []


def test_a_row_that_fails_does_not_keep_the_others_from_their_end(tmp_path, monkeypatch, line_of_error):
    def diverge(argv):
        raise runtime.RunError("the loss is no finite number")

    monkeypatch.setattr(run, "main", diverge)
    status, line = line_of_error(reproduce.main, command(tmp_path, "--frozen-only"))
    assert status == 1 and "1 of 2 models" in line and "no finite number" in line
    row, floor = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert not row["scores"] and floor["scores"]["all-head"]["n"] == 1


@pytest.mark.parametrize("scale", CUTS)
def test_the_table_has_every_row_and_every_cut(scale):
    rows, cells = rows_and_cells("--scale", scale)
    trained = [f"{setting}-{model}" for setting in ("paper", "recipe") for model in reproduce.MODELS]
    floors = [f"random-resnet-{scale}", f"random-pyramid-{scale}-64"]
    assert list(rows) == [*trained, *floors, "supervised"]
    assert [row.floor for row in rows.values()] == [floors[0]] * 4 + [floors[1]] * 4 + [None] * 3
    for name, row in rows.items():
        found = {cell.part.rpartition("-")[0] for cell in cells[name]} - {""}
        assert found == ({*CUTS[scale], "all"} if row.cuts else {"none"})
        for cell in (cell for cell in cells[name] if "pretrained" not in cell.options):
            cell.script.parse(argv_of(cell))  # the scripts have all these options


def test_the_authors_setting_is_the_defaults_but_for_inet():
    argv, parser = argv_of(rows_and_cells()[1]["paper-patchy"][0]), run.build_parser()
    differ = {name for name, value in parser.typed(argv).items() if value != parser.defaults[name]}
    assert differ == {"dataset", "inet", "precision", "output_folder", "seed"}


def test_options_of_the_command_line_are_those_of_all_rows_that_have_them():
    rows, _ = rows_and_cells("--encoder-arch", "patches", "--scale", "16", "--categorical", "--ngf", "32")
    assert {row.floor for row in rows.values()} == {"random-patches-16-32", None}
    for row in (row for row in rows.values() if row.floor):
        assert {**row.options, **rows[row.floor].options} == row.options and row.options["scale"] == 16
        assert ("categorical" in row.options) == (row.options["arch"] == "patchy")


def test_means_spreads_and_paired_differences_and_how_the_table_says_them():
    cuts = {"all": "all frozen"}
    rows = [
        reproduce.Row("vae", "paper", "β-VAE", {}, cuts, "random"), reproduce.Row("random", "none", "random", {}, cuts),
        reproduce.Row("patchy", "paper", "PatchVAE", {}, cuts, "random", ["vae", "absent"]),
    ]
    head = {"vae": {1: 50.0, 2: 52.0, 3: 57.0}, "random": {1: 45.0, 2: 45.0, 3: 46.0}, "patchy": {1: 51.0, 3: 60.0}}
    calls = {f"{name}-seed{seed}": {"all-head": {"last": {"top1": value}, "best": {"top1": 99.0}}}
             for name, values in head.items() for seed, value in values.items()}
    calls["patchy-seed1"]["all-probes"] = {"linear": {"top1": 30.0}, "knn": {"top1": 40.0}}
    content = reproduce.gather(reproduce.parse([])[0].changed(rows=[], seeds=[1, 2, 3]), rows, calls)
    vae, random, patchy = content["rows"]
    assert vae["scores"]["all-head"]["mean"] == 53 and vae["scores"]["all-head"]["sd"] == pytest.approx(math.sqrt(13))
    assert vae["above_random"]["mean"] == pytest.approx(23 / 3) and "above_random" not in random
    sd = pytest.approx(math.sqrt(32))
    assert patchy["above_random"] == {"mean": 10, "sd": sd, "n": 2, "seeds": {"1": 6, "3": 14}}
    assert patchy["scores"]["all-knn"] == {"mean": 40, "sd": None, "n": 1, "seeds": {"1": 40}}
    lines = reproduce.markdown(content).splitlines()
    assert "| paper | β-VAE | 53.00 ± 3.61 | – | – | +7.67 ± 3.06 |" in lines
    probes = "30.00 (n = 1) | 40.00 (n = 1)"
    assert f"| paper | PatchVAE | 55.50 ± 6.36 (n = 2) | {probes} | +10.00 ± 5.66 (n = 2) |" in lines
    assert "| PatchVAE − β-VAE, paper | +2.00 ± 1.41 (n = 2) | – | – |" in lines
    assert lines[-1] == f"- {content['notes'][-1]}"


def test_plots_draw_every_seed_mean_deviation_and_loss():
    top1 = {"random": [[50.0]], "β-VAE": [[51.0, 53.0]], "none": [], "PatchVAE": [[60.0, 62.0, 64.0], [9.0], [1.0]]}
    rows = [{"name": words, "group": "recipe", "words": words, "scores": {
        column: reproduce.spread(dict(enumerate(found))) for column, found in zip(reproduce.FROZEN, values)}}
        for words, values in top1.items()]
    curves = {f"PatchVAE-seed{seed}": {"training": {"curve": curve}} for seed, curve in ((1, [5, 3]), (2, [7, 4]))}
    calls = {**curves, "random-seed1": {}, "PatchVAE-seed3": {"training": {"total": 3.0}}}  # of code that kept no curve
    content = {"title": "title", "frozen": "all frozen", "rows": rows, "calls": calls}
    (axes,) = reproduce.plot_scores(content).axes
    assert (axes.get_xlabel(), axes.get_title()) == ("top-1 in %, all frozen", "title")
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["recipe: random", "recipe: β-VAE", "recipe: PatchVAE"]
    dots = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "." and len(line.get_xdata())]
    assert dots == [[50], [51, 53], [60, 62, 64], [9], [1]]
    bars = [bar.get_segments()[0][:, 0].tolist() for bar in axes.collections]
    assert bars == [pytest.approx([52 - 2**0.5, 52 + 2**0.5]), [60, 64]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["head", "linear", "kNN"]
    (axes,) = reproduce.plot_curves(content).axes
    (line,), (band,) = axes.lines, axes.collections
    assert line.get_xydata().tolist() == [[1, 6], [2, 3.5]] and line.get_label() == "recipe: PatchVAE"
    assert band.get_paths()[0].get_extents().ymax == pytest.approx(6 + 2**0.5)
    assert axes.get_xlabel() == "epoch" and axes.get_xscale() == axes.get_yscale() == "log"


def test_the_study_shows_the_figures_on_record():
    """A line <!-- NAME.json --> in imgs/reproduction.md says which record the rows of the next tables are of."""
    study, name, shown = ROOT / "imgs" / "reproduction.md", None, {}
    for line in study.read_text(encoding="utf-8").splitlines() if study.exists() else []:
        mark = re.fullmatch(r"<!-- (\S+\.json) -->", line.strip())
        name = mark[1] if mark else name if line.startswith("|") or not line.strip() else None  # up to other words
        if name and line.startswith("|"):
            shown.setdefault(name, []).append(line)
    for name, lines in shown.items():
        content = json.loads((ROOT / "imgs" / name).read_text(encoding="utf-8"))
        assert not set(lines) - set(reproduce.markdown(content).splitlines())
        for row in content["rows"]:
            for column, score in row["scores"].items():
                cut, _, judge = column.rpartition("-")
                for seed, value in score["seeds"].items():
                    calls = content["calls"][f"{row['name']}-seed{seed}"]
                    found = calls[f"{cut}-head"]["last"] if judge == "head" else calls[f"{cut}-probes"][judge]
                    assert found["top1"] == value
    assert shown or not study.exists()
