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
from conftest import ROOT

import classifier
import run
from utils import checkpoints, ranks

OPTIONS = ["--dataset", "digits", "--workers", "0", "--ngf", "8", "--encoder-arch", "pyramid", "--num-parts", "4"]
OPTIONS += ["--img-per-epoch", "64", "--batch-size", "15", "--log-interval", "2", "--num-epochs", "2", "--lr", "1e-3"]
HEAD = ["--dataset", "digits", "--workers", "0", "-b", "301", "--lr", "0.01"]

# Calls main() of several scripts and leaves what each returned, and the weights that this rank ended with.
DRIVER = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch, modules, run, classifier
from utils import ranks
made = []
def keep(build):
    return lambda *arguments: made.append(build(*arguments)) or made[-1]
modules.build_model, classifier.build_model = keep(modules.build_model), keep(classifier.build_model)
@ranks.together
def main(argv):
    results = [(run if script == "run" else classifier).main(options) for script, *options in json.loads(argv[0])]
    torch.save([model.state_dict() for model in made], f"rank{{ranks.rank()}}.pt")
    json.dump(results, open(f"rank{{ranks.rank()}}.json", "w"))
main(sys.argv[1:])
"""


def torchrun(*command, launch=(), cwd=None):
    """Start two processes in a group of their own: subprocess.Popen."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *launch]
    return subprocess.Popen(
        [*launcher, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"},
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


def events(folder, kind=None):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["event"])]


def wait_for(process, folder, text):
    path = folder / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and text in path.read_text()):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]


def test_two_processes_train_as_one_and_test_exactly(finished, tmp_path):
    encoder = [*HEAD, "--arch", "patchy", "--pretrained", str(finished[0] / "model.pt"), "--epochs", "2"]
    jobs = [
        ("run", *OPTIONS, "--output-folder", "parts"),
        ("classifier", *encoder, "--output-folder", "whole"),  # the whole network learns
        ("classifier", *encoder, "--freeze", "-1", "--output-folder", "head"),  # on features that both have computed
        ("classifier", *encoder, "--knn", "--output-folder", "knn"),
    ]
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    status, out, errors = finish(torchrun("driver.py", json.dumps(jobs), cwd=tmp_path))
    assert status == 0, errors
    assert out.count("digits: 1,437 training") == len(jobs)  # one process speaks
    for mine, other in zip(*(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))):
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    parts, whole, head, knn = (results := json.loads((tmp_path / "rank0.json").read_text()))
    assert json.loads((tmp_path / "rank1.json").read_text())[:3] == results[:3]

    assert run.main(["--evaluate", "--output-folder", str(tmp_path / "parts")]) == pytest.approx(
        {name: value for name, value in parts.items() if name != "epoch"}, rel=1e-6
    )
    assert [event["step"] for event in events(tmp_path / "parts", "train")] == [2, 4, 5, 7, 9, 10]
    for name, result in (("whole", whole), ("head", head)):
        alone = classifier.main([*HEAD, "--evaluate", "--output-folder", str(tmp_path / name)])
        assert alone == pytest.approx({figure: result["best"][figure] for figure in alone}, rel=1e-6)
        assert json.loads((tmp_path / name / "results.json").read_text())["data"]["test_images"] == 360
    alone = classifier.main([*encoder, "--knn", "--output-folder", str(tmp_path / "alone")])
    assert knn["knn"]["top1"] == alone["knn"]["top1"]


def test_a_signal_to_one_process_stops_both_after_the_same_step_and_one_goes_on(tmp_path):
    process = torchrun(ROOT / "run.py", *OPTIONS, "--output-folder", tmp_path, "--num-epochs", "1000")
    wait_for(process, tmp_path, '"step": 4')
    os.kill(members(process)[1], signal.SIGTERM)
    status, _, errors = finish(process, 60)
    assert status != 0 and "exitcode  : 143" in errors
    step = int(errors.split("run.py: stopped and saved after step ")[1].split(";")[0])
    assert f"run.py, rank 1: stopped and saved after step {step};" in errors
    assert checkpoints.newest(str(tmp_path / "checkpoints"), checkpoints.TRAINING)["progress"]["step"] == step
    epochs = step // 5 + 2
    run.main(["--output-folder", str(tmp_path), "--resume", "--num-epochs", str(epochs)])
    seen = [event["step"] for event in events(tmp_path, "train")]
    assert seen == [5 * epoch + step for epoch in range(epochs) for step in (2, 4, 5)]


def test_a_killed_job_starts_again_from_its_checkpoint_or_ends_soon_with_a_reason_and_no_orphan(tmp_path):
    command = [ROOT / "run.py", *OPTIONS, "--output-folder", tmp_path, "--num-epochs", "1000", "--overwrite"]
    process = torchrun(*command, launch=["--max-restarts", "1"])
    wait_for(process, tmp_path, '"step": 17')
    first = members(process)
    os.kill(first[1], signal.SIGKILL)
    while len(members(process)) < 2 or set(members(process).values()) & set(first.values()):
        assert process.poll() is None
        time.sleep(0.05)
    lines = (tmp_path / "metrics.jsonl").read_text().count("\n")
    while (tmp_path / "metrics.jsonl").read_text().count("\n") < lines + 5:  # the second attempt is at work
        assert process.poll() is None
        time.sleep(0.05)
    second, killed = members(process), time.monotonic()
    os.kill(second[1], signal.SIGKILL)
    status, out, errors = finish(process, 40)
    assert status != 0 and time.monotonic() - killed < 20
    assert "SIGKILL" in errors and "run.py: error: lost the other processes" in errors
    assert not [pid for pid in second.values() if Path(f"/proc/{pid}").exists()]
    assert out.count("epoch 1/1000 ") == 1  # the second attempt began later
    steps = [event["step"] for event in events(tmp_path, "test")]
    assert steps == [5 * epoch for epoch in range(1, len(steps) + 1)]


def test_a_restart_does_not_take_a_run_that_was_there_before(finished, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_bytes()
    lock = folder / ".lock"
    content = lock.read_text()
    lock.write_text(content.replace(f"started by process {os.getppid()} ", f"started by process {os.getppid()} other "))
    with pytest.raises(run.console.UsageError, match="already holds a run"):
        run.main(["--dataset", "digits", "--output-folder", str(folder)])
    lock.write_text(content)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_slurms_variables_stand_in_for_torchruns(tmp_path):
    job = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
    job |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_ID": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "run.py"), *OPTIONS, "--num-epochs", "1", "--output-folder", str(tmp_path)]
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in (0, 1)
    ]
    (first, spoken, errors), (second, silence, _) = map(finish, processes)
    assert (first, second) == (0, 0), errors
    assert "2 processes" in spoken and silence == ""


@pytest.mark.parametrize("nodes, first", [("gpu[03-05,9],login", "gpu03"), ("a7,b[1-2]", "a7"), ("node12", "node12")])
def test_the_first_of_slurms_hosts(nodes, first):
    assert ranks.first_host(nodes) == first


def test_shares_make_up_the_whole(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 3)
    shares = [ranks.share(10, of) for of in range(3)]
    assert [number for part in shares for number in range(10)[part]] == list(range(10))
    assert max(len(range(10)[part]) for part in shares) - min(len(range(10)[part]) for part in shares) <= 1


def test_more_processes_than_images_of_a_step_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(ranks, "count", lambda: 3)
    with pytest.raises(run.console.UsageError, match="--batch-size 2 leaves some of 3 processes"):
        run.main(["--dataset", "digits", "--batch-size", "2", "--output-folder", str(tmp_path)])
