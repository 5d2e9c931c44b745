"""Nothing is lost: a stopped or killed run continues as if nothing had happened; damaged files are noticed."""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, assert_same_run, call, curves, events, paint_classes, wait_for

import classifier
import run
from utils import batches, runtime, training

OPTIONS = ["--dataset", "digits", "--workers", "1", "--ngf", "8", "--encoder-arch", "pyramid", "--num-parts", "4"]
OPTIONS += ["--img-per-epoch", "64", "--batch-size", "16", "--log-interval", "3", "--num-epochs", "3", "--hide", "0.3"]
LAST = "checkpoints/step_000000012.pt"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run.main([*OPTIONS, "--output-folder", str(folder)])
    assert [step for step, _ in curves(folder)["loss/train/total"]] == [3, 4, 7, 8, 11, 12]
    return folder


def start(folder, *options):
    """run.py in a process group of its own, as a terminal or a scheduler starts it."""
    command = [sys.executable, str(ROOT / "run.py"), *OPTIONS, "--output-folder", str(folder), *options]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env)


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
    assert_same_run(tmp_path, uninterrupted)


def test_kill_9_at_random_instants_is_survived_by_one_command(uninterrupted, tmp_path):
    """Every attempt is killed a little later, until one gets through; the first begins, the others go on."""
    generator = random.Random(0)
    for text in ('"step": 3', '"test"', '"step": 7'):
        process = start(tmp_path, "--resume", "auto", "--save-minutes", "1e-9")  # every step: kills meet saves
        wait_for(process, tmp_path, text)
        time.sleep(generator.uniform(0, 0.05))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        training.load(path, training.TRAINING)
    (tmp_path / "checkpoints/step_000000009.pt.unfinished").write_bytes(b"what a kill in the middle of a save leaves")
    run.main([*OPTIONS, "--resume", "auto", "--output-folder", str(tmp_path)])
    assert_same_run(tmp_path, uninterrupted)
    assert not list(tmp_path.rglob("*.unfinished"))


def test_tensorboard_reads_the_attempts_in_their_order_however_soon_they_follow(tmp_path, monkeypatch):
    """The number of a process may sort before that of an earlier one."""
    for process, step in ((9, 0), (10, 2), (11, 4)):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        attempt = training.Run(tmp_path, SimpleNamespace(), {}, batch_size=1, images=9, epochs=1)
        attempt.step = step
        with attempt:
            for attempt.step in range(step + 1, step + 4):
                attempt.scalars({"loss": process})
    assert curves(tmp_path)["loss"] == [(1, 9), (2, 9), (3, 10), (4, 10), (5, 11), (6, 11), (7, 11)]


LONG_STEP = """
import sys, time
sys.path.insert(0, sys.argv[1])
from utils import training
with training.Run(sys.argv[2], None, {}, batch_size=1, images=1, epochs=1):
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_second_signal_does_not_wait_for_the_step(tmp_path):
    command = [sys.executable, "-c", LONG_STEP, str(ROOT), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for number, wait in ((signal.SIGTERM, 0), (signal.SIGTERM, 2.1), (signal.SIGINT, 0)):  # the second is a copy
        assert process.poll() is None
        process.send_signal(number)
        time.sleep(wait)
    assert process.communicate(timeout=30)[1] == "stopped at once, without saving\n" and process.returncode == 130


def test_a_killed_loading_process_is_one_line(tmp_path, monkeypatch, line_of_error):
    def killing(*arguments, train_step=run.train_step):
        for child in multiprocessing.active_children():
            child.kill()
        return train_step(*arguments)

    monkeypatch.setattr(run, "train_step", killing)
    status, line = line_of_error(run.main, [*OPTIONS, "--cache", "none", "--output-folder", str(tmp_path)])
    assert status == 1 and "a data-loading process died" in line and "--workers 0" in line


def test_a_signal_in_a_test_stops_the_run_after_it(uninterrupted, tmp_path, monkeypatch):
    in_order, drawn = batches.Batches.in_order, []  # how many batches each test has drawn

    def terminating(self, batch_size):
        drawn.append(0)
        for batch in in_order(self, batch_size):
            drawn[-1] += 1
            if len(drawn) == 2 and drawn[-1] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(batches.Batches, "in_order", terminating)
    with pytest.raises(runtime.Terminated, match="after step 8"):
        run.main([*OPTIONS, "--output-folder", str(tmp_path)])
    monkeypatch.undo()
    assert drawn == [23, 23] and [event["step"] for event in events(tmp_path, "test")] == [4, 8]
    run.main(["--resume", "--output-folder", str(tmp_path)])
    assert_same_run(tmp_path, uninterrupted)


HEAD = ["--dataset", "digits", "--workers", "0", "--arch", "patchy", "--encoder-arch", "pyramid", "--ngf", "8"]
HEAD += ["-b", "128", "--lr", "0.01", "--epochs", "2", "--label-fraction", "0.3", "--print-freq", "2"]


def test_a_classifier_stopped_in_an_epoch_goes_on_bitwise_the_same(tmp_path, monkeypatch):
    whole = classifier.main([*HEAD, "--output-folder", str(tmp_path / "whole")])
    train_step = classifier.train_step

    def interrupting(settings, network, optimizer, x, labels, step, *more):
        if step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_step(settings, network, optimizer, x, labels, step, *more)

    monkeypatch.setattr(classifier, "train_step", interrupting)
    with pytest.raises(runtime.Terminated, match="after step 5"):  # status 143
        classifier.main([*HEAD, "--output-folder", str(tmp_path / "parts")])
    monkeypatch.undo()
    assert classifier.main([*HEAD, "--resume", "auto", "--output-folder", str(tmp_path / "parts")]) == whole
    assert_same_run(tmp_path / "parts", tmp_path / "whole", ["best.pt", "checkpoints_classifier"],
                    "classifier.jsonl", "logs_classifier")


def test_a_classifier_goes_on_from_its_best_model_in_its_own_folder(tmp_path):
    classifier.main([*HEAD, "--output-folder", str(tmp_path / "run")])
    training.release(tmp_path / "run")
    classifier.main(["--resume", str(tmp_path / "run/best.pt"), "--epochs", "3"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [event["epoch"] for event in events(tmp_path / "run", "test", "classifier.jsonl")] == [1, 2, 3]


def test_options_that_cannot_be_right_replace_no_classifier(tmp_path, line_of_error):
    classifier.main([*HEAD, "--output-folder", str(tmp_path)])
    status, line = line_of_error(classifier.main, [*HEAD, "-b", "1", "--overwrite", "--output-folder", str(tmp_path)])
    assert status == 2 and "--batch-size 1" in line and (tmp_path / "best.pt").is_file()


def test_flipped_bits_and_cuts_are_noticed(uninterrupted, tmp_path):
    whole, content = (uninterrupted / LAST).read_bytes(), training.load(uninterrupted / LAST, training.TRAINING)
    generator, path = random.Random(1), tmp_path / "damaged.pt"
    for trial in range(40):
        damaged = bytearray(whole)
        if trial % 4 == 0:
            damaged = damaged[: generator.randrange(len(damaged))]
        else:
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(runtime.RunError):
            read = training.load(path, training.TRAINING)
            # A bit that nothing reads, such as padding between the archive's parts: all that is read must be right.
            assert all(torch.equal(read["model"][name], content["model"][name]) for name in content["model"])
            assert read["progress"] == content["progress"] and read["args"] == content["args"]


@pytest.mark.parametrize("damage", ["cut", "not a number"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    if damage == "cut":
        (tmp_path / LAST).write_bytes((uninterrupted / LAST).read_bytes()[:-100])
    else:
        content = training.load(tmp_path / LAST, training.TRAINING)
        next(iter(content["model"].values())).fill_(float("nan"))
        torch.save(content, tmp_path / LAST)
    assert training.newest(str(tmp_path / "checkpoints"), training.TRAINING)["progress"]["step"] == 8
    warning = capsys.readouterr().err
    assert "step_000000012.pt" in warning and "the one before" in warning and warning.count("\n") == 1


def test_a_run_goes_on_from_an_older_checkpoint_in_its_own_folder(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    older = tmp_path / "run/checkpoints/step_000000004.pt"
    run.main(["--resume", str(older), "--num-epochs", "2"])
    assert [path.name for path in sorted(older.parent.iterdir())] == ["step_000000004.pt", "step_000000008.pt"]
    run.main([*OPTIONS, "--resume", "--output-folder", str(tmp_path / "run")])  # the first command again
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_copy_of_a_checkpoint_and_less_epochs_than_are_done_are_refused(uninterrupted, tmp_path, line_of_error):
    shutil.copy(uninterrupted / LAST, tmp_path / "step_000000012.pt")
    status, line = line_of_error(run.main, ["--resume", str(tmp_path / "step_000000012.pt")])
    assert status == 2 and "name that folder" in line and len(list(tmp_path.iterdir())) == 1
    shutil.copytree(uninterrupted, tmp_path / "run")
    status, line = line_of_error(run.main, ["--resume", str(tmp_path / "run"), "--num-epochs", "1"])
    assert status == 2 and "3 are done" in line and (tmp_path / "run" / LAST).is_file()


@pytest.mark.parametrize("name", ["args", "images", "model", "optimizer", "progress"])
def test_a_checkpoint_that_lacks_something_is_one_line(name, uninterrupted, tmp_path, line_of_error):
    shutil.copytree(uninterrupted, tmp_path / "run")
    content = torch.load(tmp_path / "run" / LAST)
    torch.save({key: value for key, value in content.items() if key != name}, tmp_path / "run" / LAST)
    status, line = line_of_error(run.main, ["--resume", str(tmp_path / "run" / LAST)])
    assert status == 1 and f"{name} is missing" in line


@pytest.mark.parametrize("force", ["0", "1"])
def test_a_hostile_file_is_refused_unread(force, tmp_path, monkeypatch):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (f"{tmp_path}/executed",)

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    torch.save({"kind": training.MODEL, "options": Hostile()}, tmp_path / "model.pt")
    with pytest.raises(runtime.RunError, match="model.pt"):
        run.main(["--evaluate", "--output-folder", str(tmp_path)])
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------------------------ the output folder


def test_a_folder_in_use_is_refused_and_a_killed_holder_does_not_block(tmp_path, monkeypatch):
    locked, process = runtime.locked, start(tmp_path, "--num-epochs", "1000")
    wait_for(process, tmp_path, '"step": 3')
    again = [*OPTIONS, "--num-epochs", "1", "--output-folder", str(tmp_path), "--overwrite"]
    monkeypatch.setattr(runtime, "locked", lambda path, patience, words: locked(path, patience / 100, words))
    with pytest.raises(runtime.RunError, match="in use by another run"):
        run.main(again)
    monkeypatch.undo()
    assert '"step": 3' in (tmp_path / "metrics.jsonl").read_text()
    os.kill(process.pid, signal.SIGKILL)  # its data-loading process ends by itself
    process.communicate()
    run.main(again)
    assert len(events(tmp_path)) == 4  # two windows, a test, the end


def test_data_loading_processes_end_with_a_killed_run_though_nobody_takes_their_batches(tmp_path):
    large = ["--dataset", "shapes", "--size", "64", "--batch-size", "64", "--img-per-epoch", "6400", "--cache", "none"]
    process = start(tmp_path, *large, "--workers", "2", "--log-interval", "1")
    wait_for(process, tmp_path, '"step": 1')
    process.kill()
    process.communicate()
    with runtime.locked(tmp_path / ".lock", 5, "a process of the killed run holds its folder"):
        assert (tmp_path / "args.json").is_file()


def test_what_another_run_saves_before_it_leaves_the_folder_is_not_replaced(uninterrupted, tmp_path, monkeypatch):
    def locked(path, patience, otherwise):  # the other run leaves, and saves before
        shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
        return contextlib.nullcontext()

    monkeypatch.setattr(runtime, "locked", locked)
    with pytest.raises(runtime.UsageError, match="already holds a run"):
        training.prepare_folder(tmp_path, run.CONTENTS)
    assert (tmp_path / LAST).is_file()
    training.release(tmp_path)
    os.remove(tmp_path / LAST)
    checkpoint = run.parse(["--resume", "auto", "--output-folder", str(tmp_path)])[2]
    assert checkpoint["progress"]["step"] == 12  # and so it is what --resume goes on from


def test_overwrite_deletes_nothing_of_a_job_that_torchrun_starts_again(uninterrupted, tmp_path, monkeypatch):
    shutil.copytree(uninterrupted, tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(runtime.UsageError, match="--resume auto"):
        run.main([*OPTIONS, "--overwrite", "--output-folder", str(tmp_path / "run")])
    assert (tmp_path / "run" / LAST).is_file()


def test_without_locks_a_run_warns_once_and_goes_on(tmp_path, monkeypatch, capsys):
    def unable(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unable)
    runtime.warn_once.cache_clear()
    for name in ("one", "other"):
        training.prepare_folder(tmp_path / name, run.CONTENTS)
    warning = capsys.readouterr().err
    assert "cannot be locked" in warning and "No locks available" in warning and warning.count("\n") == 1


def test_a_folder_without_a_checkpoint_is_no_run(tmp_path, capsys):
    """A first epoch that fails leaves nothing that the next try has to be told to replace."""
    command = [*OPTIONS, "--output-folder", str(tmp_path)]
    with pytest.raises(runtime.RunError, match="no finite number"):
        run.main([*command, "--lr", "1e30"])
    assert (tmp_path / "args.json").is_file() and (tmp_path / "logs").is_dir()
    (tmp_path / "notes.txt").write_text("mine")
    training.release(tmp_path)
    run.main([*command, "--resume", "auto", "--num-epochs", "1"])
    assert (tmp_path / "notes.txt").is_file() and len(list((tmp_path / "logs").iterdir())) == 1
    with pytest.raises(runtime.UsageError, match="already holds a run"):
        run.main(command)


@pytest.mark.parametrize("script, options", [(run, OPTIONS), (classifier, HEAD)])
def test_a_run_stopped_after_its_first_best_model_was_kept_can_go_on(script, options, tmp_path, monkeypatch):
    """A best model without a checkpoint would be neither a run to go on with nor one to replace."""

    def killed(*arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "tqdm", SimpleNamespace(write=killed))
    with pytest.raises(KeyboardInterrupt):
        script.main([*options, "--output-folder", str(tmp_path)])
    monkeypatch.undo()
    script.main([*options, "--resume", "auto", "--output-folder", str(tmp_path)])
    name = "metrics.jsonl" if script is run else "classifier.jsonl"
    tests = [event["epoch"] for event in events(tmp_path, "test", name)]
    assert tests == list(range(1, len(tests) + 1)) and len(tests) > 1


@pytest.mark.parametrize("killed_after", range(4))
def test_a_folder_that_was_killed_while_it_was_cleared_can_be_overwritten(killed_after, tmp_path, monkeypatch):
    contents, unlink, removed = ("args.json", "model.pt", "metrics.jsonl"), Path.unlink, []
    for name in contents:
        (tmp_path / name).write_text('{"encoder_arch": "resnet"}')

    def killed(path):
        if len(removed) == killed_after:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path)

    monkeypatch.setattr(Path, "unlink", killed)
    with contextlib.suppress(KeyboardInterrupt):
        training.prepare_folder(tmp_path, contents, overwrite=True)
    monkeypatch.undo()
    training.prepare_folder(tmp_path, contents, overwrite=True)
    assert not [name for name in contents if (tmp_path / name).exists()]


def test_a_full_disk_is_one_line_and_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    content = {**dict.fromkeys(training.HOLDS[training.TRAINING], {}), "kind": training.TRAINING}
    training.save(path, {**content, "value": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        training.save(path, {**content, "value": 2})
    assert training.load(path, training.TRAINING)["value"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_folders_whose_names_are_no_text_survive_a_training(tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    paint_classes(odd / "images" / "train")
    (deep := tmp_path / ("x" * 117)).mkdir()  # no name for a socket
    short = ["--img-per-epoch", "8", "--batch-size", "4", "--num-epochs", "1", "--size", "32"]
    data = ["--dataset", "folder", "--data-folder", odd / "images", "--output-folder", tmp_path / "out"]
    done = call("run.py", *OPTIONS, *short, *data, env={**os.environ, "PYTHONUTF8": "1", "TMPDIR": str(deep)})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    call("run.py", "--resume", tmp_path / "out", "--num-epochs", "2")
    assert [event["epoch"] for event in events(tmp_path / "out", "test")] == [1, 2]
    assert "caf" in done.stdout and len(curves(tmp_path / "out")["loss/test/total"]) == 2
