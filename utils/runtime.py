"""How a script runs: its exit, its files, the processes of its job, its device, precision and seeds.

Of several processes (torchrun starts them) rank 0 writes and speaks for all; everything here also works in a process
that is alone.
"""

import contextlib
import datetime
import errno
import functools
import hashlib
import json
import os
import platform
import shlex
import signal
import sys
import threading
from importlib.metadata import version

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.nn.parallel import DistributedDataParallel

STOPPING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]  # Ctrl-C, kill, a closed terminal, Slurm
MEETING = datetime.timedelta(minutes=10)  # in which all processes of a job have to start
PATIENCE = datetime.timedelta(minutes=60)  # how long one process may be busy, with a download say, while others wait
UNFINISHED = ".unfinished"  # ends the name of a file that is being written; a killed process leaves it behind
PRECISIONS = ("auto", "fp32", "bf16")  # of --precision
# Words by which errors are known that torch raises for the machine's sake, and what is said instead.
KNOWN = (
    (("MemoryError", "out of memory", "allocate memory"), "out of memory; try a smaller --batch-size or --size"),
    (("DistBackendError", "DistNetworkError", "DistStoreError", "gloo", "NCCL"),
     "lost the other processes of this job; one of them says why, or was killed ({})"),
    (("DataLoader worker",), "a data-loading process died ({}); try --workers 0"),
    (("torch._dynamo", "torch._inductor"), "--compile cannot compile here, leave it out ({})"),
    (("can't start new thread",), "no more threads may be started; raise `ulimit -u`, or use --workers 0"),
    (("Error(s) in loading state_dict",), "a file's weights are not those of the model; is it damaged? ({})"),
)
REMEDIES = {
    errno.ENOSPC: "; free some space or choose another --output-folder or --cache-folder",
    errno.EACCES: "; choose a place you may write to",
    errno.EROFS: "; choose a place you may write to",
    errno.EMFILE: "; raise `ulimit -n`, or use --workers 0",
}


# ---------------------------------------------------------------------------------------------------- exit


class RunError(Exception):
    """Something in the data or the machine that the user can mend. One line, exit status 1."""

    status = 1


class UsageError(RunError):
    """An option that cannot be right. One line, exit status 2."""

    status = 2


class Terminated(BaseException):
    """A signal but SIGINT arrived. Not an Exception, so that no handler for ordinary errors swallows it."""


def start(main):
    """Call `main()` and leave the process: 0, or one line on stderr and 1, 2, 130 (Ctrl-C) or 143 (other signals).

    An error that is none of the user's doing, a bug of ours, keeps its traceback.
    """
    for number in STOPPING:  # SIGINT too: a shell's background jobs start with it ignored
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # None if closed
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    threading.excepthook = _say_of_thread
    status, line = _outcome(main)  # by now the error's frames are gone, and with them data-loading processes
    if line:
        rank = os.environ.get("RANK", "0")
        who = os.path.basename(sys.argv[0]) + (f", rank {rank}" if rank not in ("0", "") else "")
        print(printable(f"{who}: {line}".replace("\n", " ")), file=sys.stderr)
    if dist.is_initialized():  # so it ends in an error, and not at the same time as the others:
        with contextlib.suppress(OSError):  # a connection that breaks while Python closes down would abort it
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _say_of_thread(failed):
    """What Python says of an error that ended a thread, but of a full disk: who waits for TensorBoard's raises it."""
    if not isinstance(failed.exc_value, OSError):
        threading.__excepthook__(failed)


def stop(number, frame=None, message=""):
    """Leave as signal `number` wants it, with `message` as last words; also the handler of signals."""
    for other in STOPPING:  # a second one ends also what cleans up
        signal.signal(other, lambda number, frame: os._exit(130 if number == signal.SIGINT else 143))
    raise KeyboardInterrupt(message) if number == signal.SIGINT else Terminated(message)


def _outcome(main):
    try:
        main()
        sys.stdout.flush()
        return 0, None
    except RunError as error:
        return error.status, f"error: {error}"
    except KeyboardInterrupt as error:
        return 130, str(error) or "interrupted"
    except Terminated as error:
        return 143, str(error) or "terminated"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: keep the exit silent
        return 1, None
    except OSError as error:
        return 1, f"error: {explain(error)}"
    except (MemoryError, RuntimeError) as error:
        words = f"{type(error).__module__}.{type(error).__name__}: {error}"
        for signs, line in KNOWN:
            if any(sign in words for sign in signs):
                return 1, f"error: {line.format(first_line(error))}"
        raise


def first_line(error):
    """The first line of an error's message, and what follows a colon at its end; of an empty one, its kind."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()[:200]}" if more and first.endswith(":") else first


def explain(error):
    """One line for an OSError: the file, what is wrong, and what would help where that is known."""
    place = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
    return f"{place}{error.strerror or error}{REMEDIES.get(error.errno, '')}"


# ---------------------------------------------------------------------------------------------------- files


def write(path, fill):
    """Call `fill` with a binary file under a temporary name, flush it to disk, and rename it to `path`."""
    temporary = f"{path}{UNFINISHED}"
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # a full disk does not name it
        raise
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path, content):
    """Write `content` as indented JSON, complete or not at all."""
    write(path, lambda file: file.write(f"{json.dumps(content, indent=2)}\n".encode()))


def read_lines(path):
    """The lines of a text file in UTF-8 or UTF-16 with their marks, or else Latin-1: a list of str. Raises OSError."""
    with open(path, "rb") as file:
        content = file.read()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return [line.removesuffix("\r") for line in text.split("\n")]  # splitlines() would break at more than line ends


def printable(name):
    """A file's name as a line of text: bytes that are none are escaped, and so is what would break the line."""
    text = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def relative(path):
    """`path` as the user would type it from here, if it lies below here."""
    path = os.path.relpath(path)
    return os.path.abspath(path) if path.startswith("..") else path


def locked(path, patience=None, otherwise=""):
    """A lock on the file `path`, held from now on until it is left as a context, or the process ends.

    `patience`: seconds to wait for another process before RunError(`otherwise`) is raised; None: for ever, saying so.
    """
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=1 if patience is None else patience)
    except Timeout:
        if patience is not None:
            raise RunError(otherwise) from None
        print(f"waiting for another process that holds {path}", flush=True)
        return lock.acquire()
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", None) in REMEDIES:
            raise
        warn_once(f"warning: files cannot be locked here ({error}): let no other run write to the same folders")
        return contextlib.nullcontext()


@functools.cache
def warn_once(words):
    print(words, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------- processes


def together(main):
    """Decorates a script's main(): join the other processes of the job, if there are any, while it runs."""

    @functools.wraps(main)
    def joined(argv=None):
        if dist.is_initialized() or not _is_one_of_several():
            return main(argv)
        _meet()
        with open(os.devnull, "w", errors="ignore") as nowhere:
            with contextlib.redirect_stdout(sys.stdout if is_main() else nowhere):
                result = main(argv)
        dist.destroy_process_group()  # not after an error: the others may never answer
        return result

    return joined


def _is_one_of_several():
    """Whether torchrun, or who sets the same variables, started this process beside others. Raises UsageError."""
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")}
    *numbers, address = found.values()
    if numbers[:2] == ["0", "1"] or not {"RANK", "WORLD_SIZE"} & set(os.environ):
        return False
    if not all(map(str.isdecimal, numbers)) or int(numbers[0]) >= int(numbers[1]) or not address:
        names = ", ".join(f"{name}={value}" for name, value in found.items())
        raise UsageError(f"the environment describes no whole job ({names}): start with torchrun, or unset them")
    return True


def _meet():
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    # torchrun's store outlives a failed attempt, and with it the addresses of processes that are gone.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    words = f"waiting for the other processes of this job at {place}, {MEETING.seconds // 60} minutes at most"
    impatience = threading.Timer(10, print, [words], {"file": sys.stderr, "flush": True})
    impatience.daemon = True
    impatience.start()
    # Signals end the process at once here: Python would act on them only when the waiting is over.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        store, own_rank, size = next(dist.rendezvous("env://", timeout=MEETING))
        store = dist.PrefixStore(attempt, store)
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=PATIENCE)
    except RuntimeError as error:
        raise RunError(
            f"the processes of this job do not find each other at {place} ({first_line(error)}); do all "
            "run, and do MASTER_ADDR and MASTER_PORT (--rdzv-endpoint) name the first machine and a free port?"
        ) from None
    finally:
        impatience.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def count():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def local_rank():
    """The number of this process among those on this machine."""
    return int(os.environ.get("LOCAL_RANK") or 0) if dist.is_initialized() else 0


def local_count():
    """How many processes of the job share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if dist.is_initialized() else 1


def share(length, of=None):
    """The slice of 0 … length−1 that belongs to rank `of` (this one); all slices, in the order of ranks, make it up."""
    number = rank() if of is None else of
    return slice(length * number // count(), length * (number + 1) // count())


def total(values):
    """The sum of the tensor `values` over the processes, on all of them. Every process has to call it."""
    return _reduced(values, dist.ReduceOp.SUM if count() > 1 else None)


def largest(values):
    """The largest of each of the tensor's `values` over the processes, on all of them. Every process has to call it."""
    return _reduced(values, dist.ReduceOp.MAX if count() > 1 else None)


def _reduced(values, operation):
    if operation is None:
        return values
    values = values.clone()
    dist.all_reduce(values, operation)
    return values


def wait():
    """Wait until every process has come here."""
    total(torch.zeros(1))


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


def parallel(model):
    """The model to train: gradients become the mean over the processes. A batch is scaled by `batch_mean`."""
    return DistributedDataParallel(model) if count() > 1 else model


def batch_mean(values, batch_size):
    """The mean of a batch of `batch_size` values, of which this process has some: gradients then add up to it."""
    return values.sum() * count() / batch_size


def share_statistics(model):
    """Give every process rank 0's running statistics of BatchNorm: DistributedDataParallel normalises by process."""
    if count() > 1:
        for statistic in model.buffers():
            dist.broadcast(statistic, src=0)


# ---------------------------------------------------------------------------------------------------- device


def choose_device(no_cuda=False, gpu=None):
    """A CUDA device if there is one and it is wanted, the CPU otherwise. `gpu`: its number, or None for the first.

    Of several processes on this machine each takes the GPU of its own number, or the only one that it is shown.
    """
    if no_cuda or gpu is None and not torch.cuda.is_available():
        return torch.device("cpu")
    if gpu is not None and count() > 1:
        raise UsageError(f"--gpu {gpu}: of several processes each has its own GPU; leave it out")
    shown = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not shown:
        raise UsageError(f"--gpu {gpu}: torch finds no GPU on this machine; leave it out")
    if gpu is not None and gpu >= shown:
        raise UsageError(f"--gpu {gpu}: this machine has the GPUs 0 to {shown - 1}")
    gpu = local_rank() % shown if gpu is None else gpu  # a scheduler may show every process one GPU only, its own
    if _is_shared(f"{platform.node()} {torch.cuda.get_device_properties(gpu).uuid}"):
        raise UsageError("two processes of this job have the same GPU: start no more on a machine than it has GPUs")
    torch.cuda.set_device(gpu)  # where NCCL and new tensors go
    torch.backends.cudnn.allow_tf32 = False  # fp32 means float32; bf16 is the fast way
    return torch.device("cuda", gpu)


def _is_shared(name):
    """Whether two processes have the same str `name`, on all of them. Every process has to call it."""
    names = torch.zeros(count(), dtype=torch.int64)
    names[rank()] = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
    return len(total(names).unique()) < count()


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
    graphs = next(network.parameters()).is_cuda and count() == 1  # pytorch#139207: not under DDP with BatchNorm
    return torch.compile(network, mode="reduce-overhead" if graphs else None) if wanted else network


def describe(device):
    """One phrase for the console and the records: what the numbers were computed on."""
    others = f", {count()} processes" if count() > 1 else ""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda}){others}"
    return f"CPU, {torch.get_num_threads()} threads{others}"


def seed_step(seed, step, device):
    """Seed the generator of `device` for step `step`: noise is a pure function of (seed, step) and the process's rank.

    torch.manual_seed would seed those of all kinds of devices, which takes longer than a small step's launch.
    """
    entropy = np.random.SeedSequence([seed, 2, step, rank()])
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))


def record():
    """What else a result depends on: a dict of str."""
    libraries = {name: version(name) for name in ("torchvision", "numpy", "Pillow", "scikit-learn")}
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    return {"command": command, "python": platform.python_version(), "torch": torch.__version__, **libraries}
