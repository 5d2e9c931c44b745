"""Which GPU a process takes, with CUDA played by stand-ins; and, where there is a GPU, the scripts on it."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import GPUS, ROOT, TINY, call

from utils import runtime
from utils.runtime import UsageError

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
    monkeypatch.setattr(runtime, "_is_shared", names.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as it was, afterwards
    for own, gpus in enumerate(shown):
        monkeypatch.setattr(runtime, "local_rank", lambda own=own: own)
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_properties",
                            lambda gpu, gpus=gpus: SimpleNamespace(uuid=f"GPU-{gpus[gpu]}"))
        runtime.choose_device()
    assert taken == expected and (len(set(names)) < len(names)) == meet


@pytest.mark.parametrize("other, meet", [("this machine", True), ("that machine", False)])
def test_processes_with_one_name_are_noticed(monkeypatch, other, meet):
    said = []
    monkeypatch.setattr(runtime, "count", lambda: 2)
    monkeypatch.setattr(runtime, "total", lambda own: said.append(own) or sum(said))
    monkeypatch.setattr(runtime, "rank", lambda: len(said))
    assert [runtime._is_shared(name) for name in ("this machine", other)][1] == meet


@pytest.mark.parametrize("gpu, processes, words", [
    (None, 1, "two processes of this job have the same GPU"),
    (2, 1, "--gpu 2: this machine has the GPUs 0 to 1"),
    (0, 2, "--gpu 0: of several processes each has its own GPU"),
])
def test_a_gpu_that_cannot_be_taken_is_refused(gpu, processes, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid="GPU-0"))
    monkeypatch.setattr(runtime, "_is_shared", lambda name: True)
    monkeypatch.setattr(runtime, "count", lambda: processes)
    with pytest.raises(UsageError, match=words):
        runtime.choose_device(gpu=gpu)


@pytest.mark.parametrize("error, words", [
    (MemoryError(), "out of memory; try a smaller --batch-size or --size"),
    (RuntimeError("gloo: connection closed by peer\nat"), "lost the other processes of this job"),
    (OSError(24, "Too many open files", b"caf\xe9.jpg"), "ulimit -n"),
    (OSError(28, "No space left on device", "model.pt"), "model.pt: No space left on device; free some space"),
    (RuntimeError("can't start new thread"), "ulimit -u"), (runtime.RunError("a\rb\nc"), "a\\rb c"),
    (RuntimeError("Error(s) in loading state_dict for PatchVAE:\nMissing"), "is it damaged?"),
])
def test_what_the_machine_lacks_is_said_in_one_line(error, words, line_of_error):
    def main(argv):
        raise error

    status, line = line_of_error(main, [])
    assert status == 1 and words in line


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
    vae = ["--arch", "vae", "--precision", "fp32", "--recon-mask", "edge", "--output-folder", tmp_path / "vae"]
    for command in (
        ["run.py", "--dataset", "digits", *TINY, "--output-folder", tmp_path / "run"],
        ["run.py", "--resume", "--num-epochs", "2", "--output-folder", tmp_path / "run"],
        ["run.py", "--dataset", "digits", *TINY, *vae],
        [*judge, "--freeze", "-1", "--standardise", "--lr", "0.01", "--epochs", "1", *head],
        [*judge, "--freeze", "conv1", "--lr", "0.01", "--epochs", "1", "--output-folder", tmp_path / "tuned"],
        [*judge, "--linear", "--knn", "--output-folder", tmp_path / "probes"],
        ["utils/parts.py", *trained],
    ):
        done = call(*command, env=env)
        assert done.returncode == 0, done.stderr
        assert "CUDA" in done.stdout or command[0].startswith("utils"), done.stdout


def test_closed_streams_are_no_reason_to_fail(tmp_path):
    script = [sys.executable, ROOT / "run.py", "--dataset", "digits", *TINY, "--output-folder", tmp_path]
    assert subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *script]).returncode == 0
    assert (tmp_path / "model.pt").is_file()


@pytest.mark.parametrize("heard", [True, False], ids=["closed terminal", "nohup"])
def test_a_closed_terminal_saves_as_other_signals_do(heard):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL if heard else signal.SIG_IGN)
    with pytest.raises(SystemExit) as left:
        runtime.start(lambda: os.kill(os.getpid(), signal.SIGHUP))
    for number in (*runtime.STOPPING, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.signal(signal.SIGHUP, before)
    assert left.value.code == (143 if heard else 0)


@pytest.mark.parametrize("error, is_said", [(OSError(28, "No space left on device"), False), (KeyError("ours"), True)])
def test_a_thread_is_silent_of_a_full_disk_alone(error, is_said, capsys, monkeypatch):
    def failing():
        raise error

    monkeypatch.setattr(threading, "excepthook", runtime._say_of_thread)
    (thread := threading.Thread(target=failing)).start()
    thread.join()
    assert ("KeyError" in capsys.readouterr().err) == is_said
