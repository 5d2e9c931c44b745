"""Where and with what a run computes: the device, the seeds, the versions."""

import os
import platform
import shlex
import sys
from importlib.metadata import version

import numpy as np
import torch

from utils import ranks
from utils.console import UsageError

PRECISIONS = ("auto", "fp32", "bf16")  # of --precision


def choose_device(no_cuda=False, gpu=None):
    """A CUDA device if there is one and it is wanted, the CPU otherwise. `gpu`: its number, or None for the first.

    Of several processes on this machine each takes the GPU of its own number, or the only one that it is shown.
    """
    if no_cuda or not torch.cuda.is_available():
        return torch.device("cpu")
    if gpu is not None and ranks.count() > 1:
        raise UsageError(f"--gpu {gpu}: of several processes each has its own GPU; leave it out")
    shown = torch.cuda.device_count()
    if gpu is not None and gpu >= shown:
        raise UsageError(f"--gpu {gpu}: this machine has the GPUs 0 to {shown - 1}")
    gpu = ranks.local_rank() % shown if gpu is None else gpu  # Slurm may show every process one GPU only, its own
    if ranks.clash(f"{platform.node()} {torch.cuda.get_device_properties(gpu).uuid}"):
        raise UsageError("two processes of this job have the same GPU: start no more on a machine than it has GPUs")
    torch.cuda.set_device(gpu)  # where NCCL and new tensors go
    torch.backends.cudnn.allow_tf32 = False  # fp32 means float32; bf16 is the fast way
    return torch.device("cuda", gpu)


def choose_precision(wanted, device):
    """The precision `wanted`, or what "auto" means: "bf16" where `device` multiplies bfloat16 itself, else "fp32"."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Of older torch nothing is known; emulated, bfloat16 would be slower than float32.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def autocast(precision, device):
    """A context in which convolutions and matrix products run in `precision`; weights and gradients stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def channels_last(model):
    """The same model, its convolutions' weights laid out with the channels innermost, as fast convolutions want it."""
    return model.to(memory_format=torch.channels_last)


def compiled(network, wanted):
    """The network to train; if `wanted`, torch.compile makes kernels for it, and on a single GPU CUDA graphs of them.

    Weights and state stay those of `network`.
    """
    graphs = next(network.parameters()).is_cuda and ranks.count() == 1  # pytorch#139207: not under DDP with BatchNorm
    return torch.compile(network, mode="reduce-overhead" if graphs else None) if wanted else network


def match_layout(optimizer):
    """Lay the optimizer's state out in memory as its parameters are: fused Adam on the CPU does not look.

    A state saved when the parameters lay otherwise would meet the wrong weights.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def describe(device):
    """One phrase for the console and the records: what the numbers were computed on."""
    others = f", {ranks.count()} processes" if ranks.count() > 1 else ""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda}){others}"
    return f"CPU, {torch.get_num_threads()} threads{others}"


def seed_step(seed, step, device):
    """Seed the generator of `device` for step `step`: noise is a pure function of (seed, step) and the process's rank.

    torch.manual_seed would seed those of all kinds of devices, which takes longer than a small step's launch.
    """
    entropy = np.random.SeedSequence([seed, 2, step, ranks.rank()])
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))


def record():
    """What else a result depends on: a dict of str."""
    libraries = {name: version(name) for name in ("torchvision", "numpy", "Pillow", "scikit-learn")}
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    return {"command": command, "python": platform.python_version(), "torch": torch.__version__, **libraries}
