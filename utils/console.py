"""The command line of every script here: options that advise, errors in one line, honest exit codes.

Imports nothing heavy, so that `--help` and a mistyped option answer at once.
"""

import argparse
import contextlib
import errno
import math
import os
import signal
import sys

LOST = ("DistBackendError", "DistNetworkError", "DistStoreError", "gloo", "NCCL")  # a peer's end, as torch reports it
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # Slurm's last


class RunError(Exception):
    """Something in the data or the machine that the user can mend. One line, exit status 1."""

    status = 1


class UsageError(RunError):
    """An option that cannot be right. One line, exit status 2."""

    status = 2


class Terminated(BaseException):
    """SIGTERM or SIGUSR1 arrived. Not an Exception, so that no handler for ordinary errors swallows it."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError, keeps line breaks of its description, takes no abbreviations."""

    def __init__(self, **options):
        super().__init__(
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
            **options,
        )

    def error(self, message):
        raise UsageError(f"{message} (see --help)")

    def given(self, argv=None):
        """The destinations of the options that `argv` itself sets, defaults left out: a set of str."""
        unset = object()
        blank = argparse.Namespace(**dict.fromkeys(vars(self.parse_args(argv)), unset))
        return {name for name, value in vars(self.parse_args(argv, blank)).items() if value is not unset}


def whole(low, high=None):
    """An argparse type: a whole number from `low` to `high` (no upper bound if None)."""
    return _number(int, low, high)


def real(low, high=None):
    """An argparse type: a finite number from `low` to `high`."""
    return _number(float, low, high)


def above(low, high=None):
    """An argparse type: a finite number greater than `low`, at most `high`."""
    return _number(float, low, high, strictly=True)


def _number(kind, low, high, strictly=False):
    wanted = ("a whole number " if kind is int else "a number ") + (f"above {low}" if strictly else f"of {low} or more")
    wanted += "" if high is None else f", at most {high}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        fits = math.isfinite(value) and (value > low if strictly else value >= low) and (high is None or value <= high)
        if not fits:
            raise argparse.ArgumentTypeError(f"'{text}' is not {wanted}")
        return value

    return parse


seed = whole(0, 2**32 - 1)  # as large as scikit-learn takes them


def run(main):
    """Call `main()` and leave the process: 0, or one line on stderr and 1, 2, 130 (Ctrl-C) or 143 (SIGTERM, SIGUSR1).

    An error that is none of the user's doing, a bug of ours, keeps its traceback.
    """
    for number in STOPPING:  # SIGINT too: a shell's background jobs start with it ignored
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _terminate)
    status, line = _outcome(main)  # by now the error's frames are gone, and with them data-loading processes
    if line:
        rank = os.environ.get("RANK", "0")
        who = os.path.basename(sys.argv[0]) + (f", rank {rank}" if rank != "0" else "")
        print(f"{who}: {line}".replace("\n", " "), file=sys.stderr)
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():  # so it ends in an error, and not at the same time as the others:
        with contextlib.suppress(OSError):  # a connection that breaks while Python closes down would abort it
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


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
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error):
            return 1, "error: out of memory; try a smaller --batch-size or --size"
        if any(word in f"{type(error).__name__} {error}" for word in LOST):
            reason = str(error).splitlines()[0]
            return 1, f"error: lost the other processes of this job; one of them says why, or was killed ({reason})"
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return 1, f"error: --compile cannot compile here, leave it out ({str(error).splitlines()[0]})"
        raise


def explain(error):
    """One line for an OSError: the file, what is wrong, and what would help where that is known."""
    remedy = {
        errno.ENOSPC: "; free some space or choose another --output-folder",
        errno.EACCES: "; choose a place you may write to",
        errno.EROFS: "; choose a place you may write to",
    }.get(error.errno, "")
    place = f"{error.filename}: " if error.filename is not None else ""
    return f"{place}{error.strerror or error}{remedy}"


def _terminate(number, frame):
    raise Terminated
