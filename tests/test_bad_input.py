"""Bad input: one line on stderr that names the culprit and the remedy, the right exit status, nothing lost."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, call, paint, paint_classes

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
    paint(place / "mine" / "images" / "holiday.png")
    paint(place / "another_program" / "images" / "holiday.png")
    (place / "another_program" / "args.json").write_text('{"model": "gan"}')
    paint(place / "single" / "one.png")
    paint_classes(place / "broken", images=4)
    (place / "broken/ant/2.jpg").write_bytes(b"GIF89a but not really")
    (place / "broken/bee/1.jpg").write_bytes((place / "broken/bee/0.jpg").read_bytes()[:400])
    (place / "no_images/ant").mkdir(parents=True)
    lists = place / "places/trainvalsplit_places205"
    lists.mkdir(parents=True)
    (lists / "train_places205.csv").write_text("a/one.jpg 0\na/two.jpg zero\n")
    return place


# options, exit status, what the line must say
BAD_INPUT = [
    ("--dataset nothing", 2, ["--dataset", "nothing", "shapes"]),
    ("--nonsense 3", 2, ["--nonsense"]),
    ("--data-fol x", 2, ["--data-fol", "did you mean --data-folder?"]),
    ("--num-epoch 3", 2, ["--num-epoch", "did you mean --num-epochs?"]),
    ("--num-epoch=3", 2, ["did you mean --num-epochs?"]),
    ("--num-parts 0", 2, ["--num-parts", "'0'", "1 or more"]),
    ("--hidden-size -3", 2, ["--hidden-size"]),
    ("--hidden-size 2.5", 2, ["--hidden-size", "whole number"]),
    ("--batch-size zero", 2, ["--batch-size", "'zero'"]),
    ("--lr 0", 2, ["--lr", "above 0"]),
    ("--lr nan", 2, ["--lr", "'nan'"]),
    ("--beta-v -1", 2, ["--beta-v", "0 or more"]),
    ("--temp inf", 2, ["--temp"]),
    ("--temp 0.05", 2, ["--min-temp", "--temp"]),
    ("--py 0", 2, ["--py", "above 0"]),
    ("--py 1", 2, ["--py", "below 1"]),
    ("--num-parts 1", 2, ["single part", "--py 0.5"]),
    ("--seed -1", 2, ["--seed"]),
    ("--seed 4294967296", 2, ["--seed", "at most 4294967295"]),
    ("--num-epochs 0", 2, ["--num-epochs"]),
    ("--workers -1", 2, ["--workers"]),
    ("--arch unet", 2, ["--arch", "patchy"]),
    ("--encoder-arch vgg", 2, ["--encoder-arch", "resnet"]),
    ("--recon-mask all", 2, ["--recon-mask", "edge"]),
    ("--target edges --recon-mask edge", 2, ["--target edges", "--recon-mask"]),
    ("--scale 7", 2, ["--scale 7", "4, 8, 16 or 32"]),
    ("--scale 64", 2, ["--scale 64"]),
    ("--encoder-arch resnet50 --scale 8", 2, ["--scale 8", "resnet50", "32"]),
    ("--size 36", 2, ["--size 36", "--scale 8", "--size 32"]),
    ("--size 0", 2, ["--size"]),
    ("--size 32 --scale 32 --batch-size 1", 2, ["--batch-size 1"]),
    ("--independent --num-parts 10", 2, ["--independent", "--ngf"]),
    ("--arch vae --hard", 2, ["--hard", "--arch vae"]),
    ("--arch vae --py 0.1", 2, ["--py", "--arch vae"]),
    ("--output-folder=", 2, ["--output-folder", "empty"]),
    ("--pretrained=", 2, ["--pretrained", "empty"]),
    ("--output-folder {place}/finished", 2, ["already holds a run", "--overwrite"]),
    ("--output-folder {place}/finished --overwrite --pretrained {place}/./finished/model.pt", 2, ["--overwrite would"]),
    ("--output-folder {place}/finished --overwrite --resume", 2, ["--overwrite", "--resume"]),
    ("--resume {place}/finished --output-folder {place}/empty", 2, ["--resume", "own folder"]),
    ("--resume --output-folder {place}/finished --lr 0.3 --hard", 2, ["--lr 0.3 (there: 0.0001)", "--hard"]),
    ("--resume --output-folder {place}/empty", 1, ["no checkpoint", "--overwrite"]),
    ("--output-folder {place}/mine --overwrite", 2, ["mine holds images", "no run made"]),
    ("--output-folder {place}/another_program", 2, ["another_program holds", "no run made"]),
    ("--output-folder {place}/a_file", 2, ["--output-folder", "is a file"]),
    ("--output-folder {place}/a_file/below", 1, ["a_file"]),
    ("--output-folder /proc/nowhere", 1, ["/proc/nowhere"]),
    ("--pretrained {place}/none.pt", 1, ["none.pt", "no such file"]),
    ("--pretrained {place}/empty", 1, ["empty/model.pt", "no such file"]),
    ("--pretrained {place}/garbage.pt", 1, ["garbage.pt", "damaged"]),
    ("--pretrained {place}/cut.pt", 1, ["cut.pt", "damaged"]),
    ("--pretrained {place}/other.pt", 1, ["other.pt", "expected a model.pt of run.py"]),
    ("--pretrained {place}/older.pt", 1, ["older.pt", "earlier version", "train it again"]),
    ("--pretrained {place}/tensor.pt", 1, ["tensor.pt", "expected a model.pt of run.py"]),
    ("--pretrained {place}/nan.pt", 1, ["nan.pt", "no numbers", "smaller --lr"]),
    ("--pretrained {place}/finished --num-parts 5 --hard", 2, ["--num-parts 5 (there: 16)", "--hard"]),
    ("--dataset shapes --pretrained {place}/finished/model.pt", 1, ["channels", "--dataset shapes"]),
    ("--evaluate --output-folder {place}/empty", 1, ["model.pt", "train a model first"]),
    ("--dataset folder --data-folder {place}/none", 1, ["none", "--data-folder"]),
    ("--dataset folder --data-folder {place}/a_file", 1, ["a_file"]),
    ("--dataset folder --data-folder {place}/empty", 1, ["empty", "no images"]),
    ("--dataset folder --data-folder {place}/no_images", 1, ["no_images", "ant"]),
    ("--dataset folder --data-folder {place}/single", 1, ["single", "two or more"]),
    ("--dataset folder --data-folder {place}/broken", 1, ["cannot be decoded", "--skip-broken"]),
    ("--dataset folder --data-folder {place}/broken --output-folder {place}/finished", 2, ["already holds a run"]),
    ("--dataset cifar100 --data-folder {place}/broken", 1, ["holds images", "add --dataset folder"]),
    ("--dataset imagenet --data-folder {place}/empty", 1, ["empty/train", "CLASS"]),
    ("--dataset indoor --data-folder {place}/empty", 1, ["allminustest", "CLASS"]),
    ("--dataset miniimagenet --data-folder {place}/empty", 1, ["empty/train"]),
    ("--dataset places205 --data-folder {place}/empty", 1, ["train_places205.csv"]),
    ("--dataset places205 --data-folder {place}/places", 1, ["line 2", "path label"]),
    ("--lr 1e30", 1, ["--lr", "finite"]),
]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("options, status, words", BAD_INPUT, ids=[row[0] for row in BAD_INPUT])
def test_bad_input_is_one_line(options, status, words, place, tmp_path, line_of_error):
    arguments = ["--output-folder", str(tmp_path / "out"), *MODEL_OPTIONS, *options.format(place=place).split()]
    before = {name: contents(place / name) for name in ("finished", "mine", "another_program")}
    found, line = line_of_error(run.main, arguments)
    assert found == status
    assert all(word in line for word in words), line
    assert {name: contents(place / name) for name in before} == before


JOBS = [  # variables of a job that is none
    {"RANK": "", "WORLD_SIZE": ""},
    {"WORLD_SIZE": "2"},
    {"RANK": "1"},
    {"RANK": "0", "WORLD_SIZE": "2"},
    {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    {"RANK": "first", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "none"},
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
    done = call("run.py", "--num-parts", "0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith("run.py: error:")
    done = call("run.py", *MODEL_OPTIONS, "--dataset", "folder", "--data-folder", place / "broken", "--workers", "2",
                "--output-folder", place / "new")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cannot be decoded" in done.stderr


def test_too_few_open_files_are_one_line_with_the_remedy(place, class_folder):
    options = ["--dataset", "folder", "--data-folder", str(class_folder), *MODEL_OPTIONS[2:], "--workers", "2"]
    command = [sys.executable, str(ROOT / "run.py"), *options, "--size", "32", "--output-folder", str(place / "few")]
    done = subprocess.run(["sh", "-c", 'ulimit -n 24; exec "$@"', "sh", *command], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "ulimit -n" in done.stderr


@pytest.mark.parametrize("folder", ["there", "new"])
def test_a_folder_that_cannot_be_written_is_noticed_before_images_are_opened(folder, tmp_path, monkeypatch,
                                                                             line_of_error):
    def refuse(path, *arguments, **named):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "there").mkdir()
    monkeypatch.setattr(run, "open_split", None)
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "mkdir", refuse)
    status, line = line_of_error(run.main, [*MODEL_OPTIONS, "--output-folder", str(tmp_path / folder)])
    assert status == 1 and f"{tmp_path / folder}" in line and "choose a place you may write to" in line


def test_a_bug_of_ours_keeps_its_traceback():
    def buggy():
        raise KeyError("ours")

    with pytest.raises(KeyError):
        runtime.start(buggy)
