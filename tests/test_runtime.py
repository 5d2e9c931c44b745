"""Which GPU a process takes, with CUDA played by stand-ins; and, where there is a GPU, the scripts on it."""

import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import GPUS, TINY, call

from utils import ranks, runtime
from utils.console import UsageError

MACHINES = {  # the GPUs that each process is shown, by the machine's own numbers; which it takes; do two meet?
    "alone": ([[0, 1]], [0], False),
    "torchrun": ([[0, 1, 2]] * 2, [0, 1], False),
    "one each, as Slurm shows them": ([[0], [1]], [0, 0], False),
    "too many processes": ([[0, 1]] * 3, [0, 1, 0], True),
    "one for both": ([[0]] * 2, [0, 0], True),
}


@pytest.mark.parametrize("shown, expected, meet", MACHINES.values(), ids=MACHINES)
def test_every_process_takes_a_gpu_of_its_own(monkeypatch, shown, expected, meet):
    taken, names = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(ranks, "clash", names.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as it was, afterwards
    for own, gpus in enumerate(shown):
        monkeypatch.setattr(ranks, "local_rank", lambda: own)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid=f"GPU-{gpus[gpu]}"))
        runtime.choose_device()
    assert taken == expected and (len(set(names)) < len(names)) == meet


@pytest.mark.parametrize("other, meet", [("this machine", True), ("that machine", False)])
def test_processes_with_one_name_are_noticed(monkeypatch, other, meet):
    said = []
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "total", lambda own: said.append(own) or sum(said))
    monkeypatch.setattr(ranks, "rank", lambda: len(said))
    ranks.clash("this machine")
    assert ranks.clash(other) == meet


def test_processes_that_share_a_gpu_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid="GPU-0"))
    monkeypatch.setattr(ranks, "clash", lambda name: True)
    with pytest.raises(UsageError, match="two processes of this job have the same GPU"):
        runtime.choose_device()


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="--gpu 2: this machine has the GPUs 0 to 1"):
        runtime.choose_device(gpu=2)


def has_gpu():
    if GPUS == "" or not shutil.which("nvidia-smi"):
        return False
    return "GPU" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout


@pytest.mark.skipif(not has_gpu(), reason="no GPU")
def test_the_scripts_run_on_a_gpu(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    env |= {} if GPUS is None else {"CUDA_VISIBLE_DEVICES": GPUS}
    trained, head = ["--pretrained", tmp_path / "run" / "model.pt"], ["--output-folder", tmp_path / "head"]
    judge = ["classifier.py", "--dataset", "digits", "--arch", "patchy", *trained, "--label-fraction", "0.2"]
    for command in (
        ["run.py", "--dataset", "digits", *TINY, "--output-folder", tmp_path / "run"],
        ["run.py", "--resume", "--num-epochs", "2", "--output-folder", tmp_path / "run"],
        ["run.py", "--dataset", "digits", *TINY, "--arch", "vae", "--precision", "fp32", "--recon-mask", "edge",
         "--output-folder", tmp_path / "vae"],
        [*judge, "--freeze", "-1", "--standardise", "--lr", "0.01", "--epochs", "1", *head],
        [*judge, "--freeze", "conv1", "--lr", "0.01", "--epochs", "1", "--output-folder", tmp_path / "tuned"],
        [*judge, "--linear", "--knn", "--output-folder", tmp_path / "probes"],
        ["utils/parts.py", *trained],
    ):  # fmt: skip
        done = call(*command, env=env)
        assert done.returncode == 0, done.stderr
        assert "CUDA" in done.stdout or command[0].startswith("utils"), done.stdout
