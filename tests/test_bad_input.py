"""Bad input: one line on stderr that names the culprit and the remedy, the right exit status, nothing lost."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, paint, paint_classes

import run
from utils import runtime, training

MODEL_OPTIONS = ["--dataset", "digits", *TINY]


@pytest.fixture(scope="module")
def place(tmp_path_factory, finished):
    """A folder with everything that can be wrong in it."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(finished[0], place / "finished")
    content = training.load(place / "finished/model.pt", training.MODEL)
    torch.save({**content, "kind": "another"}, place / "other.pt")
    torch.save({**content, "kind": "patchvae-model"}, place / "older.pt")
    weights = {name: value * float("nan") if value.is_floating_point() else value
               for name, value in content["model"].items()}
    torch.save({**content, "model": weights}, place / "nan.pt")
    torch.save(torch.zeros(3), place / "tensor.pt")
    (place / "garbage.pt").write_bytes(b"no archive at all")
    whole = (place / "finished/model.pt").read_bytes()
    (place / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (place / "a_file").write_text("text")
    (place / "empty").mkdir()
    for name in ("mine", "other"):
        paint(place / name / "images" / "holiday.png")
    (place / "other" / "args.json").write_text('{"model": "gan"}')  # another program's
    paint(place / "single" / "one.png")
    for name in ("whole", "broken"):
        paint_classes(place / name, images=4)
    (place / "broken/ant/2.jpg").write_bytes(b"GIF89a but not really")
    (place / "broken/bee/1.jpg").write_bytes((place / "broken/bee/0.jpg").read_bytes()[:400])
    (place / "no_images/ant").mkdir(parents=True)
    lists = place / "places/trainvalsplit_places205"
    lists.mkdir(parents=True)
    (lists / "train_places205.csv").write_text("a/one.jpg 0\na/two.jpg zero\n")
    return place


# Options, by exit status: and what the line must say. The places are those of the fixture `place`.
WRONG = {2: (
    "--dataset nothing: --dataset, shapes", "--nonsense 3: --nonsense", "--data-fol x: did you mean --data-folder?",
    "--num-epoch 3: did you mean --num-epochs?", "--num-epoch=3: did you mean --num-epochs?", "--output-folder=: empty",
    "--num-parts 0: --num-parts, '0', 1 or more", "--hidden-size -3: --hidden-size", "--pretrained=: empty",
    "--hidden-size 2.5: --hidden-size, whole number", "--batch-size zero: --batch-size, 'zero'", "--lr 0: above 0",
    "--lr nan: --lr, 'nan'", "--beta-v -1: --beta-v, 0 or more", "--temp inf: --temp", "--temp 0.05: --min-temp",
    "--py 0: --py, above 0", "--py 1: --py, below 1", "--num-parts 1: single part, --py 0.5", "--seed -1: --seed",
    "--seed 4294967296: at most 4294967295", "--num-epochs 0: --num-epochs", "--workers -1: --workers",
    "--arch unet: --arch, patchy", "--encoder-arch vgg: resnet", "--recon-mask all: edge", "--size 0: --size",
    "--target edges --recon-mask edge: --target edges, --recon-mask", "--scale 7: --scale 7, 4, 8, 16 or 32",
    "--scale 64: --scale 64", "--encoder-arch resnet50 --scale 8: --scale 8, resnet50, 32",
    "--size 36: --size 36, --scale 8, --size 32", "--size 32 --scale 32 --batch-size 1: --batch-size 1",
    "--independent --num-parts 10: --independent, --ngf", "--arch vae --hard: --hard, --arch vae",
    "--arch vae --py 0.1: --py, --arch vae", "--output-folder finished: already holds a run, --overwrite",
    "--output-folder finished --overwrite --pretrained ./finished/model.pt: --overwrite would",
    "--output-folder finished --overwrite --resume: --overwrite, --resume", "--output-folder a_file: is a file",
    "--resume finished --output-folder empty: --resume, own folder", "--output-folder mine: mine holds images, no run",
    "--output-folder mine --overwrite: mine holds images, no run made", "--output-folder other: other holds, no run",
    "--resume --output-folder finished --lr 0.3 --hard: --lr 0.3 (there: 0.0001), --hard",
    "--pretrained finished --num-parts 5 --hard: --num-parts 5 (there: 16), --hard",
    "--dataset folder --data-folder broken --output-folder finished: already holds a run",
), 1: (
    "--resume --output-folder empty: no checkpoint, --overwrite", "--output-folder a_file/below: a_file",
    "--output-folder /proc/nowhere: /proc/nowhere", "--pretrained none.pt: none.pt, no such file",
    "--pretrained empty: empty/model.pt, no such file", "--pretrained garbage.pt: garbage.pt, damaged",
    "--pretrained cut.pt: cut.pt, damaged", "--pretrained other.pt: other.pt, expected a model.pt of run.py",
    "--pretrained older.pt: older.pt, earlier version, train it again", "--pretrained nan.pt: no numbers, smaller --lr",
    "--pretrained tensor.pt: tensor.pt, expected a model.pt of run.py", "--lr 1e30: --lr, finite",
    "--dataset shapes --pretrained finished/model.pt: channels, --dataset shapes",
    "--evaluate --output-folder empty: model.pt, train a model first",
    "--dataset folder --data-folder none: none, --data-folder", "--dataset places205 --data-folder places: line 2",
    "--dataset folder --data-folder a_file: a_file",
    "--dataset folder --data-folder empty: empty, no images", "--dataset folder --data-folder single: two or more",
    "--dataset folder --data-folder no_images: no_images, no images",
    "--dataset indoor --data-folder empty: allminustest",
    "--dataset folder --data-folder broken: cannot be decoded, --skip-broken",
    "--dataset cifar100 --data-folder broken: holds images, add --dataset folder",
    "--dataset imagenet --data-folder empty: empty/train, CLASS", "--dataset miniimagenet --data-folder empty: /train",
    "--dataset places205 --data-folder empty: train_places205.csv",
)}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("status, row", [(status, row) for status, rows in WRONG.items() for row in rows])
def test_bad_input_is_one_line(status, row, place, tmp_path, line_of_error, monkeypatch):
    monkeypatch.chdir(place)
    options, words = row.split(": ", 1)
    before = {name: contents(place / name) for name in ("finished", "mine", "other")}
    found, line = line_of_error(run.main, ["--output-folder", str(tmp_path / "out"), *MODEL_OPTIONS, *options.split()])
    assert found == status
    assert all(word in line for word in words.split(", ")), line
    assert {name: contents(place / name) for name in before} == before


MEETING = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
JOBS = [  # variables of a job that is none
    {"RANK": "", "WORLD_SIZE": ""}, {"WORLD_SIZE": "2"}, {"RANK": "1"}, {"RANK": "0", "WORLD_SIZE": "2"},
    {"RANK": "2", "WORLD_SIZE": "2", **MEETING}, {"RANK": "first", "WORLD_SIZE": "2", **MEETING},
    {"RANK": "0", "WORLD_SIZE": "2", **MEETING, "MASTER_PORT": "none"},
]


@pytest.mark.parametrize("variables", JOBS, ids=map(str, JOBS))
def test_variables_of_another_job_are_one_line(variables, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        runtime.start(run.main)
    line = capsys.readouterr().err
    assert left.value.code == 2 and line.count("\n") == 1 and "torchrun" in line and "unset" in line


def test_the_real_process_behaves_alike(place):
    def start(few, *options):  # all at once, as starting takes longest
        command = ["sh", "-c", f'ulimit -n {few}; exec "$@"', "sh", sys.executable, ROOT / "run.py", *options]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    folder = [*MODEL_OPTIONS, "--dataset", "folder", "--size", "32", "--workers", "2", "--data-folder"]
    for process, status, words in [
        (start(9999, "--num-parts", "0"), 2, "--num-parts"),
        (start(9999, *folder, place / "broken", "--output-folder", place / "new"), 1, "cannot be decoded"),
        (start(24, *folder, place / "whole", "--output-folder", place / "few"), 1, "raise `ulimit -n`"),
    ]:
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == status and errors.count("\n") == 1, errors
        assert errors.startswith("run.py: error:") and words in errors


def test_a_folder_that_cannot_be_written_is_noticed_before_images_are_opened(tmp_path, monkeypatch, line_of_error):
    monkeypatch.setattr(run, "open_split", None)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for folder in (tmp_path, tmp_path / "new" / "run"):
        status, line = line_of_error(run.main, [*MODEL_OPTIONS, "--output-folder", str(folder)])
        assert status == 1 and f"{tmp_path} may not be written to; choose another" in line


def test_a_bug_of_ours_keeps_its_traceback():
    def buggy():
        raise KeyError("ours")

    with pytest.raises(KeyError):
        runtime.start(buggy)
