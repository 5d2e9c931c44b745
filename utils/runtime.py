"""Where and with what a run computes: the device, the seeds, the versions."""

import os
import platform
import sys

import numpy as np
import PIL
import sklearn
import torch
import torchvision

from utils.console import UsageError


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
    libraries = {module.__name__: module.__version__ for module in (torch, torchvision, np, PIL, sklearn)}
    command = " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    return {"command": command, "python": platform.python_version(), **libraries}
