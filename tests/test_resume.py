"""Nothing is lost: a stopped or killed run continues as if nothing had happened; damaged files are noticed."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import classifier
import run
from utils import batches, checkpoints, console, tracking

OPTIONS = ["--dataset", "digits", "--workers", "1", "--ngf", "8", "--encoder-arch", "pyramid", "--num-parts", "4"]
OPTIONS += ["--img-per-epoch", "64", "--batch-size", "16", "--log-interval", "3", "--num-epochs", "3", "--hide", "0.3"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run.main([*OPTIONS, "--output-folder", str(folder)])
    return folder


def start(folder, *options):
    """run.py in a process group of its own, as a terminal or a scheduler starts it."""
    command = [sys.executable, str(ROOT / "run.py"), *OPTIONS, "--output-folder", str(folder), *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(process, folder, text):
    """Wait until metrics.jsonl holds `text` or the process is gone."""
    path = folder / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and text in path.read_text()):
        time.sleep(0.005)


def events(folder, name="metrics.jsonl"):
    """The run's JSON lines without what time alone decides."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def assert_same(folder, other):
    for name in ("model.pt", "checkpoints/step_000000012.pt"):
        kind = checkpoints.MODEL if name == "model.pt" else checkpoints.TRAINING
        mine, theirs = (checkpoints.load(place / name, kind) for place in (folder, other))
        assert all(torch.equal(mine["model"][key], theirs["model"][key]) for key in theirs["model"])
        assert mine.get("progress") == theirs.get("progress") and mine.get("test") == theirs.get("test")
    assert events(folder) == events(other)
    board = EventAccumulator(str(folder / "logs"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss/train/total")] == [3, 4, 7, 8, 11, 12]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_loses_no_step_and_the_resumed_run_is_bitwise_the_same(number, status, uninterrupted, tmp_path):
    process = start(tmp_path)
    wait_for(process, tmp_path, '"step": 4')
    os.killpg(process.pid, number)  # the data-loading process gets it too
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == status and errors.count("\n") == 1 and "stopped and saved after step" in errors
    step = int(errors.split("after step ")[1].split(";")[0])
    assert 4 <= step <= 12 and (tmp_path / f"checkpoints/step_{step:09d}.pt").is_file()
    run.main(["--resume", "--output-folder", str(tmp_path)])
    assert_same(tmp_path, uninterrupted)


def test_tensorboard_reads_the_attempts_in_their_order_however_soon_they_follow(tmp_path, monkeypatch):
    """The number of a process may sort before that of an earlier one."""
    for process, step in ((9, 0), (10, 2), (11, 4)):
        monkeypatch.setattr(os, "getpid", lambda: process)
        with tracking.Tracker(tmp_path, step=step) as tracker:
            for later in (1, 2, 3):
                tracker.scalars(step + later, {"loss": process})
    board = EventAccumulator(str(tmp_path / "logs"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        *((step, 9) for step in (1, 2)),
        *((step, 10) for step in (3, 4)),
        *((step, 11) for step in (5, 6, 7)),
    ]


LONG_STEP = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from utils import loop
with loop.Keeper(None, None, None, None):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in one call, in which Python runs no handler
"""


def test_a_second_signal_does_not_wait_for_the_step():
    command = [sys.executable, "-c", LONG_STEP, str(ROOT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for wait in (2.1, 0):  # sooner, it would count as a copy of the first
        assert process.poll() is None
        process.terminate()
        time.sleep(wait)
    assert process.communicate(timeout=30)[1] == "stopped at once, without saving\n" and process.returncode == 143


def test_kill_9_at_random_instants_is_survived(uninterrupted, tmp_path):
    """Every attempt is killed a little later, until one gets through."""
    generator, kills = random.Random(0), 0
    process = start(tmp_path, "--save-minutes", "1e-9")  # saves after every step, so that kills meet saves
    while True:
        wait_for(process, tmp_path, f'"step": {3 + 4 * kills}')
        time.sleep(generator.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        if kills == 2:
            break
        process = start(tmp_path, "--resume")
    assert not [path for path in (tmp_path / "checkpoints").glob("*.pt") if not is_whole(path)]
    (tmp_path / "checkpoints/step_000000009.pt.unfinished").write_bytes(b"what a kill in the middle of a save leaves")
    run.main(["--resume", "--output-folder", str(tmp_path)])
    assert_same(tmp_path, uninterrupted)
    assert not list(tmp_path.rglob("*.unfinished"))


def is_whole(path):
    try:
        return bool(checkpoints.load(path, checkpoints.TRAINING))
    except console.RunError:
        return False


def test_a_signal_leaves_a_test_at_once_and_the_resumed_run_repeats_it(uninterrupted, tmp_path, monkeypatch):
    in_order, drawn = batches.Batches.in_order, []  # how many batches each test has drawn

    def terminating(self, batch_size):
        drawn.append(0)
        for batch in in_order(self, batch_size):
            drawn[-1] += 1
            if len(drawn) == 2 and drawn[-1] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(batches.Batches, "in_order", terminating)
    with pytest.raises(console.Terminated, match="after step 8"):
        run.main([*OPTIONS, "--output-folder", str(tmp_path)])
    monkeypatch.undo()
    assert drawn == [23, 3] and [event["step"] for event in events(tmp_path) if event["event"] == "test"] == [4]
    run.main(["--resume", "--output-folder", str(tmp_path)])
    assert_same(tmp_path, uninterrupted)


HEAD = ["--dataset", "digits", "--workers", "0", "--arch", "patchy", "--encoder-arch", "pyramid", "--ngf", "8"]
HEAD += ["-b", "128", "--lr", "0.01", "--epochs", "2", "--label-fraction", "0.3", "--print-freq", "2"]


def test_a_classifier_stopped_in_an_epoch_goes_on_bitwise_the_same(tmp_path, monkeypatch):
    whole = classifier.main([*HEAD, "--output-folder", str(tmp_path / "whole")])
    train_step = classifier.train_step

    def interrupting(args, network, optimizer, x, labels, batch_size, progress):
        train_step(args, network, optimizer, x, labels, batch_size, progress)
        if progress.step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(classifier, "train_step", interrupting)
    with pytest.raises(console.Terminated, match="after step 5"):  # status 143
        classifier.main([*HEAD, "--output-folder", str(tmp_path / "parts")])
    monkeypatch.undo()
    assert classifier.main(["--resume", "--output-folder", str(tmp_path / "parts")]) == whole
    (mine, theirs), (my_lines, their_lines) = (
        [read(tmp_path / name) for name in ("parts", "whole")] for read in (classifier_state, classifier_events)
    )
    assert all(torch.equal(mine["model"][name], theirs["model"][name]) for name in theirs["model"])
    assert mine["progress"] == theirs["progress"] and my_lines == their_lines


def classifier_state(folder):
    assert (folder / "checkpoint.pt").resolve() == (folder / "checkpoints_classifier/step_000000008.pt").resolve()
    return checkpoints.load(folder / "checkpoint.pt", checkpoints.CLASSIFIER)


def classifier_events(folder):
    return events(folder, "classifier.jsonl")


def test_flipped_bits_and_cuts_are_noticed(uninterrupted, tmp_path):
    whole = (uninterrupted / "checkpoints/step_000000012.pt").read_bytes()
    generator, path = random.Random(1), tmp_path / "damaged.pt"
    content = checkpoints.load(uninterrupted / "checkpoints/step_000000012.pt", checkpoints.TRAINING)
    for trial in range(40):
        damaged = bytearray(whole)
        if trial % 4 == 0:
            damaged = damaged[: generator.randrange(len(damaged))]
        else:
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            read = checkpoints.load(path, checkpoints.TRAINING)
        except console.RunError:
            continue
        # A bit that nothing reads, such as padding between the archive's parts: then all that is read must be right.
        assert all(torch.equal(read["model"][name], content["model"][name]) for name in content["model"])
        assert read["progress"] == content["progress"] and read["args"] == content["args"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(uninterrupted, tmp_path, capsys):
    for name in ("step_000000008.pt", "step_000000012.pt"):
        content = (uninterrupted / "checkpoints" / name).read_bytes()
        (tmp_path / name).write_bytes(content if "8" in name else content[:-100])
    assert checkpoints.newest(str(tmp_path), checkpoints.TRAINING)["progress"]["step"] == 8
    warning = capsys.readouterr().err
    assert "step_000000012.pt" in warning and "the one before" in warning and warning.count("\n") == 1


def test_a_run_goes_on_from_an_older_checkpoint_in_its_own_folder(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    older = tmp_path / "run/checkpoints/step_000000004.pt"
    run.main(["--resume", str(older), "--num-epochs", "2"])
    assert [path.name for path in sorted(older.parent.iterdir())] == ["step_000000004.pt", "step_000000008.pt"]
    run.main([*OPTIONS, "--resume", "--output-folder", str(tmp_path / "run")])  # the first command again
    assert_same(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("force", [None, "1"])
def test_a_hostile_file_is_refused_unread(force, tmp_path, monkeypatch):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    torch.save({"kind": checkpoints.MODEL, "options": Hostile()}, tmp_path / "model.pt")
    with pytest.raises(console.RunError, match="model.pt"):
        run.main(["--evaluate", "--output-folder", str(tmp_path)])
    assert not (tmp_path / "executed").exists()


def test_a_folder_in_use_is_refused_and_a_killed_holder_does_not_block(tmp_path):
    process = start(tmp_path, "--num-epochs", "1000")
    wait_for(process, tmp_path, '"step": 3')
    again = [*OPTIONS, "--num-epochs", "1", "--output-folder", str(tmp_path), "--overwrite"]
    with pytest.raises(console.RunError, match=f"in use by process {process.pid}"):
        run.main(again)
    assert '"step": 3' in (tmp_path / "metrics.jsonl").read_text()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run.main(again)
    assert len(events(tmp_path)) == 4  # two windows, a test, the end


def test_a_folder_that_was_killed_while_it_was_cleared_can_be_overwritten(tmp_path, monkeypatch):
    contents = ("args.json", "model.pt", "metrics.jsonl")
    for killed_after in range(4):
        for name in contents:
            (tmp_path / name).touch()
        unlink, removed = Path.unlink, []

        def killed(path):
            if len(removed) == killed_after:
                raise KeyboardInterrupt
            removed.append(path)
            unlink(path)

        monkeypatch.setattr(Path, "unlink", killed)
        with contextlib.suppress(KeyboardInterrupt):
            tracking.prepare_folder(tmp_path, contents, overwrite=True)
        monkeypatch.undo()
        tracking.prepare_folder(tmp_path, contents, overwrite=True)
        assert not [name for name in contents if (tmp_path / name).exists()]


def test_a_full_disk_is_one_line_and_leaves_the_older_file(uninterrupted, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    checkpoints.save(path, {"kind": checkpoints.MODEL, "value": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        checkpoints.save(path, {"kind": checkpoints.MODEL, "value": 2})
    assert checkpoints.load(path, checkpoints.MODEL)["value"] == 1 and [p.name for p in tmp_path.iterdir()] == [
        "model.pt"
    ]
