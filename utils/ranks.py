"""Several processes as one run: torchrun's, or Slurm's where torchrun's variables are absent.

Rank 0 writes and speaks for all. Everything here also works in a process that is alone.
"""

import contextlib
import datetime
import functools
import hashlib
import os
import re
import signal
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from utils.console import RunError

MEETING = datetime.timedelta(minutes=10)  # in which all processes of a job have to start
PATIENCE = datetime.timedelta(minutes=60)  # how long one process may be busy, with a download say, while others wait
SLURM_PORTS = range(20_000, 30_000)  # the first rank listens on one of these; the numbers of job and step say which


def together(main):
    """Decorates a script's main(): join the other processes of the job, if there are any, while it runs."""

    @functools.wraps(main)
    def joined(argv=None):
        if dist.is_initialized() or not _find_others():
            return main(argv)
        _meet()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if is_main() else nowhere):
            result = main(argv)
        dist.destroy_process_group()  # not after an error: the others may never answer
        return result

    return joined


def _meet():
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID")
    # torchrun's store outlives a failed attempt, and with it the addresses of processes that are gone.
    attempt = " ".join(os.environ.get(name, "") for name in names)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _mortal():
        try:
            store, own_rank, size = next(dist.rendezvous("env://", timeout=MEETING))
            store = dist.PrefixStore(attempt, store)
            dist.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=PATIENCE)
        except RuntimeError as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise RunError(
                f"the processes of this job do not find each other at {place} ({str(error).splitlines()[0]}); do all "
                "run, and do MASTER_ADDR and MASTER_PORT (--rdzv-endpoint) name the first machine and a free port?"
            ) from None


@contextlib.contextmanager
def _mortal():
    """Here signals end the process at once: Python would heed them only when the waiting is over."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _find_others():
    """Whether this process is one of several; sets the variables that torch.distributed reads, if Slurm has its own."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]) > 1
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:  # srun sets it; a batch script that runs by itself is alone
        return False
    slurm = {name: os.environ[f"SLURM_{name}"] for name in ("PROCID", "LOCALID", "STEP_NUM_TASKS", "JOB_ID", "STEP_ID")}
    port = SLURM_PORTS[(int(slurm["JOB_ID"]) * 101 + int(slurm["STEP_ID"])) % len(SLURM_PORTS)]
    os.environ |= {"RANK": slurm["PROCID"], "LOCAL_RANK": slurm["LOCALID"], "WORLD_SIZE": slurm["STEP_NUM_TASKS"]}
    os.environ.setdefault("LOCAL_WORLD_SIZE", re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))[0])
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
    os.environ.setdefault("MASTER_PORT", str(port))
    return True


def first_host(nodes):
    """The first of Slurm's list of nodes: "gpu[03-05,9],login" -> "gpu03"."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)[0])


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def count():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def local_rank():
    """The number of this process among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if dist.is_initialized() else 0


def local_count():
    """How many processes of the job share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def restarted():
    """Whether torchrun has started the job again after a failure (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def share(length, of=None):
    """The slice of 0 … length−1 that belongs to rank `of` (this one); all slices, in the order of ranks, make it up."""
    number = rank() if of is None else of
    return slice(length * number // count(), length * (number + 1) // count())


def total(values):
    """The sum of the tensor `values` over the processes, on all of them. Every process has to call it."""
    return _reduced(values, dist.ReduceOp.SUM)


def largest(values):
    """The largest of each of the tensor's `values` over the processes, on all of them. Every process has to call it."""
    return _reduced(values, dist.ReduceOp.MAX)


def _reduced(values, operation):
    if count() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values, operation)
    return values


def wait():
    """Wait until every process has come here."""
    total(torch.zeros(1))


def gather_rows(own, length):
    """This process's share of `length` rows -> all of them, in order, on every process: own×… -> length×…"""
    if count() == 1:
        return own
    rows = own.new_empty(length, *own.shape[1:])
    rows[share(length)] = own
    for number in range(count()):
        dist.broadcast(rows[share(length, number)], src=number)
    return rows


@contextlib.contextmanager
def main_first():
    """What lies within, rank 0 does first (a download, say), then the others."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def check_same(value, what):
    """Raises RunError on every process if not all have the same whole number `value`."""
    low, high = (int(found) for found in largest(torch.tensor([-value, value])))
    if -low != high:
        raise RunError(f"the processes of this job differ in {what}: {-low} and {high}; do they see the same files?")


def clash(name):
    """Whether two processes have the same str `name`, on all of them. Every process has to call it."""
    names = torch.zeros(count(), dtype=torch.int64)
    names[rank()] = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
    return len(total(names).unique()) < count()


def parallel(model):
    """The model to train: gradients become the mean over the processes. A batch is scaled by `batch_mean`."""
    if count() == 1:
        return model
    return DistributedDataParallel(model)


def batch_mean(values, batch_size):
    """The mean of a batch of `batch_size` values, of which this process has some: gradients then add up to it."""
    return values.sum() * count() / batch_size


def share_statistics(model):
    """Give every process rank 0's running statistics of BatchNorm: DistributedDataParallel normalises by process."""
    for statistic in model.buffers() if count() > 1 else ():
        dist.broadcast(statistic, src=0)
