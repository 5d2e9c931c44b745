"""Where and with what a run computes: the device, the seeds, the versions."""

import os
import platform
import sys

import numpy as np
import PIL
import sklearn
import torch
import torchvision


def choose_device(no_cuda=False):
    """The first CUDA device if there is one and it is wanted, the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() and not no_cuda else "cpu")


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
