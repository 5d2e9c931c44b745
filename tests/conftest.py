"""What the tests share: the import path, small folders of images, and calling the scripts as a user does."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: runs are bit for bit the same on a CPU only
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only wait for a second thread

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

tqdm.set_lock(threading.RLock())  # its own is shared with forked processes: one that is killed may keep it for good

# Small enough for seconds on two cores, and still every layer of the real model.
TINY = ["--num-epochs", "1", "--img-per-epoch", "32", "--batch-size", "16", "--workers", "0", "--ngf", "16"]


def paint(path, side=(40, 30), seed=0):
    """Save a small random photograph-like image (smooth colours) at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), np.uint8)
    Image.fromarray(coarse).resize(side, Image.Resampling.BICUBIC).save(path)


def paint_classes(folder, classes=("ant", "bee"), images=6, side=(40, 30)):
    """Fill `folder` with CLASS/0.jpg, CLASS/1.jpg, …"""
    for number, name in enumerate(classes):
        for image in range(images):
            paint(Path(folder, name, f"{image}.jpg"), side, seed=1000 * number + image)
    return Path(folder)


def call(script, *options, cwd=None, env=None, timeout=240):
    """Run a script in a process of its own: subprocess.CompletedProcess with text output."""
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, env=env, timeout=timeout)


def events(folder, kind=None, name="metrics.jsonl"):
    """The run's JSON lines, of one `kind` of event or all, without what time alone decides."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines
            if kind in (None, line["event"])]


def curves(folder, logs="logs"):
    """TensorBoard's curves without what time alone decides, and results: a dict of (step, value) lists.

    A test that was killed before its checkpoint is done again, and its points are then there twice.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / logs))
    board.Reload()
    return {tag: list(dict.fromkeys((event.step, event.value) for event in board.Scalars(tag)))
            for tag in board.Tags()["scalars"]
            if tag != "run/images_per_second" and not tag.startswith("result/")}


def assert_same_run(folder, other, names=("model.pt", "checkpoints"), lines="metrics.jsonl", logs="logs"):
    """Models, newest checkpoints, records and curves of two runs are the same bit for bit."""
    import torch

    for name in names:
        mine, theirs = (torch.load(sorted([place / name, *(place / name).glob("*")])[-1]) for place in (folder, other))
        assert all(torch.equal(mine["model"][key], theirs["model"][key]) for key in theirs["model"])
        assert mine.get("progress") == theirs.get("progress") and mine.get("test") == theirs.get("test")
    assert events(folder, name=lines) == events(other, name=lines)
    assert curves(folder, logs) == curves(other, logs)


def wait_for(process, folder, text):
    """Wait until metrics.jsonl in `folder` holds `text`; the process has to live so long."""
    path = folder / "metrics.jsonl"
    while not (path.exists() and text in path.read_text()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


@pytest.fixture
def line_of_error(capsys, monkeypatch):
    """A function that calls a script's main(argv), which has to fail in one line: its exit status and that line."""
    from utils import runtime

    def line_of_error(main, argv):
        monkeypatch.setattr(sys, "argv", ["script.py"])
        with pytest.raises(SystemExit) as left:
            runtime.start(lambda: main(argv))
        line = capsys.readouterr().err
        assert line.startswith("script.py: error: ") and line.endswith("\n") and line.count("\n") == 1, line
        return left.value.code, line

    return line_of_error


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory):
    """A folder of CLASS/* with twelve images in two classes."""
    return paint_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of two epochs: its folder and what main returned."""
    import run

    folder = tmp_path_factory.mktemp("run") / "scratch"
    options = ["--dataset", "digits", *TINY, "--num-epochs", "2", "--log-interval", "1", "--output-folder", str(folder)]
    return folder, run.main(options)
