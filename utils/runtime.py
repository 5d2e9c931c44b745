"""Where and with what a run computes: the device, the seeds, the versions."""

import os
import platform
import shlex
import signal
import sys
import time
from importlib.metadata import version

import numpy as np
import torch

from utils.console import Terminated, UsageError


def choose_device(no_cuda=False, gpu=0):
    """CUDA device number `gpu` if there is one and it is wanted, the CPU otherwise."""
    if no_cuda or not torch.cuda.is_available():
        return torch.device("cpu")
    if gpu >= torch.cuda.device_count():
        raise UsageError(f"--gpu {gpu}: this machine has the GPUs 0 to {torch.cuda.device_count() - 1}")
    return torch.device("cuda", gpu)


def describe(device):
    """One phrase for the console and the records: what the numbers were computed on."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    return f"CPU, {torch.get_num_threads()} threads"


def seed_step(seed, step):
    """Seed torch's generators for step `step`, so that its noise is a pure function of (seed, step)."""
    torch.manual_seed(int(np.random.SeedSequence([seed, 2, step]).generate_state(1, np.uint64)[0] >> 1))


def record():
    """What else a result depends on: a dict of str."""
    libraries = {name: version(name) for name in ("torchvision", "numpy", "Pillow", "scikit-learn")}
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    return {"command": command, "python": platform.python_version(), "torch": torch.__version__, **libraries}


class StopRequest:
    """Turns SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) into a wish that the training loop grants after its step.

    A second signal does not wait for that.
    """

    def __init__(self):
        self.requested = None  # the signal's number

    def __enter__(self):
        names = ("SIGINT", "SIGTERM", "SIGUSR1")  # not every system has the last
        self.before = {getattr(signal, name): None for name in names if hasattr(signal, name)}
        for number in self.before:
            self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *reason):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def obey(self, message):
        """Leave, with the exit status of the signal and `message` as last words, if a signal has come."""
        if self.requested is not None:
            raise KeyboardInterrupt(message) if self.requested == signal.SIGINT else Terminated(message)

    def _note(self, number, frame):
        if self.requested is not None:
            self.obey("stopped at once, without saving")
        self.requested = number


class Stopwatch:
    """Counts images and the seconds that they took."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.started, self.images = time.perf_counter(), 0

    @property
    def seconds(self):
        return time.perf_counter() - self.started
