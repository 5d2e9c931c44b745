"""Bad input: one line on stderr that names the culprit and the remedy, the right exit status, nothing lost."""

import shutil

import pytest
import torch
from conftest import TINY, call, paint, paint_classes

import run
from utils import checkpoints, console

MODEL_OPTIONS = ["--dataset", "digits", *TINY]


@pytest.fixture(scope="module")
def place(tmp_path_factory, finished):
    """A folder with everything that can be wrong in it."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(finished[0], place / "finished")
    content = checkpoints.load(place / "finished/model.pt", checkpoints.MODEL)
    torch.save({**content, "kind": "another"}, place / "other.pt")
    torch.save({**content, "kind": "patchvae-model"}, place / "older.pt")
    torch.save(torch.zeros(3), place / "tensor.pt")
    (place / "garbage.pt").write_bytes(b"no archive at all")
    whole = (place / "finished/model.pt").read_bytes()
    (place / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (place / "a_file").write_text("text")
    (place / "empty").mkdir()
    paint(place / "mine" / "images" / "holiday.png")
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
    ("--data-fol x", 2, ["--data-fol"]),
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
    ("--output-folder {place}/finished", 2, ["already holds a run", "--overwrite"]),
    ("--output-folder {place}/finished --overwrite --pretrained {place}/./finished/model.pt", 2, ["--overwrite would"]),
    ("--output-folder {place}/finished --overwrite --resume", 2, ["--overwrite", "--resume"]),
    ("--resume {place}/finished --output-folder {place}/empty", 2, ["--resume", "own folder"]),
    ("--resume --output-folder {place}/empty", 1, ["no checkpoint", "--overwrite"]),
    ("--output-folder {place}/mine --overwrite", 2, ["mine holds images", "no run made"]),
    ("--output-folder {place}/a_file", 2, ["--output-folder", "is a file"]),
    ("--output-folder {place}/a_file/below", 1, ["a_file"]),
    ("--output-folder /proc/nowhere", 1, ["/proc/nowhere"]),
    ("--pretrained {place}/none.pt", 1, ["none.pt", "no such file"]),
    ("--pretrained {place}/garbage.pt", 1, ["garbage.pt", "damaged"]),
    ("--pretrained {place}/cut.pt", 1, ["cut.pt", "damaged"]),
    ("--pretrained {place}/other.pt", 1, ["other.pt", "expected a model.pt of run.py"]),
    ("--pretrained {place}/older.pt", 1, ["older.pt", "earlier version", "train it again"]),
    ("--pretrained {place}/tensor.pt", 1, ["tensor.pt", "expected a model.pt of run.py"]),
    ("--pretrained {place}/finished/model.pt --num-parts 5 --hard", 2, ["--num-parts 5 (file: 16)", "--hard"]),
    ("--dataset shapes --pretrained {place}/finished/model.pt", 1, ["channels", "--dataset shapes"]),
    ("--evaluate --output-folder {place}/empty", 1, ["model.pt", "train a model first"]),
    ("--dataset folder --data-folder {place}/none", 1, ["none", "--data-folder"]),
    ("--dataset folder --data-folder {place}/a_file", 1, ["a_file"]),
    ("--dataset folder --data-folder {place}/empty", 1, ["empty", "no images"]),
    ("--dataset folder --data-folder {place}/no_images", 1, ["no_images", "ant"]),
    ("--dataset folder --data-folder {place}/single", 1, ["single", "two or more"]),
    ("--dataset folder --data-folder {place}/broken", 1, ["cannot be decoded"]),
    ("--dataset folder --data-folder {place}/broken --output-folder {place}/finished", 2, ["already holds a run"]),
    ("--dataset imagenet --data-folder {place}/empty", 1, ["empty/train", "CLASS"]),
    ("--dataset indoor --data-folder {place}/empty", 1, ["allminustest", "CLASS"]),
    ("--dataset miniimagenet --data-folder {place}/empty", 1, ["empty/train"]),
    ("--dataset places205 --data-folder {place}/empty", 1, ["train_places205.csv"]),
    ("--dataset places205 --data-folder {place}/places", 1, ["line 2", "path label"]),
    ("--lr 1e30", 1, ["--lr", "finite"]),
]


@pytest.mark.parametrize("options, status, words", BAD_INPUT, ids=[row[0] for row in BAD_INPUT])
def test_bad_input_is_one_line(options, status, words, place, tmp_path, line_of_error):
    arguments = ["--output-folder", str(tmp_path / "out"), *MODEL_OPTIONS, *options.format(place=place).split()]
    before = contents(place / "finished")
    found, line = line_of_error(run.main, arguments)
    assert found == status
    assert all(word in line for word in words), line
    assert contents(place / "finished") == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_the_real_process_behaves_alike(place):
    done = call("run.py", "--num-parts", "0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith("run.py: error:")
    done = call("run.py", *MODEL_OPTIONS, "--dataset", "folder", "--data-folder", place / "broken", "--workers", "2",
                "--output-folder", place / "new")  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "cannot be decoded" in done.stderr


def test_a_bug_of_ours_keeps_its_traceback():
    def buggy():
        raise KeyError("ours")

    with pytest.raises(KeyError):
        console.run(buggy)
