"""Two processes as one run: the same weights, exact test figures, and all stop, die and start again together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_run, events, wait_for

import classifier
import run
from utils import runtime, training

OPTIONS = ["--dataset", "digits", "--workers", "0", "--ngf", "8", "--encoder-arch", "pyramid", "--num-parts", "4"]
OPTIONS += ["--img-per-epoch", "64", "--batch-size", "15", "--log-interval", "2", "--num-epochs", "2", "--lr", "1e-3"]
HEAD = ["--dataset", "digits", "--workers", "0", "-b", "301", "--lr", "0.01"]

# Calls main() of several scripts and leaves what each returned, and the weights that this process ended with.
DRIVER = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch, modules, run, classifier
from utils import runtime
made = []
def keep(build):
    return lambda *arguments: made.append(build(*arguments)) or made[-1]
modules.build_model, classifier.build_model = keep(modules.build_model), keep(classifier.build_model)
@runtime.together
def main(argv):
    results = [(run if script == "run" else classifier).main(options) for script, *options in json.loads(argv[0])]
    torch.save([model.state_dict() for model in made], f"rank{{runtime.rank()}}.pt")
    json.dump(results, open(f"rank{{runtime.rank()}}.json", "w"))
main(sys.argv[1:])
"""


def torchrun(*command, launch=(), cwd=None):
    """Start two processes in a group of their own: subprocess.Popen."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *launch]
    return subprocess.Popen(
        [*launcher, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process, seconds=120):
    out, errors = process.communicate(timeout=seconds)
    return process.returncode, out, errors


def members(process):
    """The processes that torchrun started, by rank: a dict of pids."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = dict(pair.split("=", 1) for pair in (place / "environ").read_text().split("\0") if "=" in pair)
        except OSError:
            continue
        if parent == process.pid and "RANK" in variables:
            found[int(variables["RANK"])] = int(place.name)
    return found


@pytest.fixture(scope="module")
def driven(finished, tmp_path_factory):
    """A folder with what four jobs of two processes left, and their common output."""
    place = tmp_path_factory.mktemp("driven")
    encoder = [*HEAD, "--arch", "patchy", "--pretrained", str(finished[0] / "model.pt"), "--epochs", "2"]
    jobs = [
        ("run", *OPTIONS, "--output-folder", "parts"),
        ("classifier", *encoder, "--output-folder", "whole"),  # the whole network learns
        ("classifier", *encoder, "--freeze", "-1", "--output-folder", "head"),  # on features that both have computed
        ("classifier", *encoder, "--knn", "--no-floor", "--output-folder", "knn"),
    ]
    (place / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    status, out, errors = finish(torchrun("driver.py", json.dumps(jobs), cwd=place))
    assert status == 0, errors
    assert out.count("digits: 1,437 training") == len(jobs)  # one process speaks
    return place


def test_two_processes_train_as_one_and_test_exactly(driven, finished, tmp_path):
    for mine, other in zip(*(torch.load(driven / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))):
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    parts, whole, head, knn = (results := json.loads((driven / "rank0.json").read_text()))
    assert json.loads((driven / "rank1.json").read_text())[:3] == results[:3]
    tested = run.main(["--evaluate", "--output-folder", str(driven / "parts")])
    assert tested == pytest.approx({name: value for name, value in parts.items() if name != "epoch"}, rel=1e-6)
    assert [event["step"] for event in events(driven / "parts", "train")] == [2, 4, 5, 7, 9, 10]
    for name, result in (("whole", whole), ("head", head)):
        alone = classifier.main([*HEAD, "--evaluate", "--output-folder", str(driven / name)])
        assert alone == pytest.approx({figure: result["best"][figure] for figure in alone}, rel=1e-6)
        assert json.loads((driven / name / "results.json").read_text())["test_images"] == 360
    probe = ["--pretrained", str(finished[0]), "--knn", "--no-floor", "--output-folder", str(tmp_path)]
    assert knn["knn"]["top1"] == classifier.main([*HEAD, *probe])["knn"]["top1"]


def test_a_killed_job_ends_soon_without_orphans_and_goes_on_bitwise_by_its_command_and_by_itself(driven, tmp_path):
    command = [ROOT / "run.py", *OPTIONS, "--output-folder", tmp_path, "--resume", "auto", "--save-minutes", "1e-9"]
    process = torchrun(*command)
    wait_for(process, tmp_path, '"step": 2')
    found, killed = members(process), time.monotonic()
    os.kill(found[1], signal.SIGKILL)
    status, _, errors = finish(process, 40)
    assert status != 0 and time.monotonic() - killed < 20
    assert "SIGKILL" in errors and "run.py: error: lost the other processes" in errors
    assert not [pid for pid in found.values() if Path(f"/proc/{pid}").exists()]
    process = torchrun(*command, launch=["--max-restarts", "1"])
    wait_for(process, tmp_path, '"step": 5')
    os.kill(members(process)[1], signal.SIGKILL)
    status, _, errors = finish(process)
    assert status == 0, errors
    assert_same_run(tmp_path, driven / "parts")


def test_a_signal_to_one_process_stops_both_after_the_same_step_and_one_goes_on(tmp_path):
    process = torchrun(ROOT / "run.py", *OPTIONS, "--output-folder", tmp_path, "--num-epochs", "1000")
    wait_for(process, tmp_path, '"step": 4')
    os.kill(members(process)[1], signal.SIGTERM)
    status, _, errors = finish(process, 60)
    assert status != 0 and "exitcode  : 143" in errors
    step = int(errors.split("run.py: stopped and saved after step ")[1].split(";")[0])
    assert f"run.py, rank 1: stopped and saved after step {step};" in errors
    assert training.newest(str(tmp_path / "checkpoints"), training.TRAINING)["progress"]["step"] == step
    epochs = step // 5 + 2
    run.main(["--output-folder", str(tmp_path), "--resume", "--num-epochs", str(epochs)])
    seen = [event["step"] for event in events(tmp_path, "train")]
    assert seen == [5 * epoch + step for epoch in range(epochs) for step in (2, 4, 5)]


WAITING = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import run
from utils import runtime
timer = threading.Timer
threading.Timer = lambda seconds, *more: timer(seconds / 100, *more)
runtime.MEETING /= 300
runtime.start(run.main)
"""


def test_a_process_that_waits_for_the_others_says_so_and_gives_up():
    job = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    command = [sys.executable, "-c", WAITING, str(ROOT)]
    done = subprocess.run(command, env={**os.environ, **job}, capture_output=True, text=True, timeout=60)
    waiting, reason = [line for line in done.stderr.splitlines() if line.startswith(("waiting", "-c"))]
    assert done.returncode == 1 and "waiting for the other processes of this job at localhost:1" in waiting
    assert "do not find each other at localhost:1" in reason


def test_shares_make_up_the_whole_and_too_many_processes_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "count", lambda: 3)
    shares = [list(range(10)[runtime.share(10, of)]) for of in range(3)]
    assert sum(shares, []) == list(range(10)) and {len(share) for share in shares} == {3, 4}
    with pytest.raises(runtime.UsageError, match="--batch-size 2 leaves some of 3 processes"):
        run.main(["--dataset", "digits", "--batch-size", "2", "--output-folder", str(tmp_path)])
