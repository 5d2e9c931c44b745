"""Calls of run.py and classifier.py that are made once: what is finished stays, what was stopped goes on."""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import classifier
import run
from utils import checkpoints, options, runtime, tracking
from utils.console import RunError, UsageError

ROOT = Path(__file__).resolve().parent.parent


class Job(NamedTuple):
    """One call of run.py or classifier.py, and the folder that it fills."""

    part: str  # "training", or e.g. "conv1-head", "all-probes"
    folder: Path
    script: object  # the module run or classifier
    argv: list

    @property
    def record(self):
        """The file with its options: as long as it is missing, nothing has been begun."""
        return self.folder / self.script.CONTENTS[0]

    @property
    def saved(self):
        return self.folder / ("checkpoints" if self.script is run else classifier.CHECKPOINTS)


def figures_of(job):
    """What the call has found, as its own files say: a dict, or None if it has not finished."""
    path = job.folder / ("metrics.jsonl" if job.script is run else "results.json")
    if not (job.record.exists() and path.exists()):
        return None
    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text.splitlines()[-1] if job.script is run else text)
    except (ValueError, IndexError):  # cut by the end of the process
        return None
    if job.script is run:
        return found if found.pop("event") == "end" else None
    return {name: found[name] for name in ("last", "best", "linear", "knn") if name in found}


def check(job):
    """Raises UsageError if the folder of `job` holds a call with other options."""
    if not job.record.exists():
        return
    saved = json.loads(job.record.read_text(encoding="utf-8"))
    defaults = vars(job.script.build_parser().parse_args([]))  # what older code did not know, it did by default
    try:
        wanted = vars(job.script.parse(job.argv)[0])
    except UsageError:
        raise
    except RunError:  # its encoder's model.pt is lost: who needs it will hear of that, and what was typed is known
        typed = vars(job.script.build_parser().parse_args(job.argv))
        wanted = {name: value for name, value in typed.items() if name in saved["typed"]}
    saved = {**defaults, **saved, **saved["typed"]}
    free = {*job.script.FREE, *options.NEVER_SAVED, "typed", "pretrained"} - {"num_epochs", "epochs"}
    names = [name for name in saved if name in wanted and name not in free and saved[name] != wanted[name]]
    other = [f"--{name.replace('_', '-')} {saved[name]}, not {wanted[name]}" for name in names]
    own, here = (os.path.realpath(found["data_folder"]) for found in (saved, wanted))
    if wanted["dataset"] == "folder" and own != here:  # of the others, the name says which images
        other.append(f"--data-folder {own}, not {here}")
    if other:
        raise UsageError(
            f"{job.folder} was made with other options ({'; '.join(other)}): delete it, or choose another "
            "--output-folder"
        )


def fulfil(job, device):
    """Do what is left of `job`. Returns whether that was anything."""
    is_new = figures_of(job) is None
    if is_new:
        print(f"\n{tracking.relative(job.folder)}", flush=True)
        with accounted(job.folder, device):
            job.script.main(argv_from_here(job))
        tracking.release(job.folder)
    shutil.rmtree(job.saved, ignore_errors=True)  # of gigabytes, over a hundred calls, that nobody needs any more
    (job.folder / "checkpoint.pt").unlink(missing_ok=True)
    return is_new


def argv_from_here(job):
    """The options that begin `job`, or go on with it where something is saved."""
    if not job.record.exists():
        return job.argv
    if not checkpoints.numbered(str(job.saved)):
        return [*job.argv, "--overwrite"]
    argv = list(job.argv)
    if "--pretrained" in argv:  # the checkpoint has its weights, and the folder may have been moved
        place = argv.index("--pretrained")
        del argv[place : place + 2]
    return [*argv, "--resume"]


@contextlib.contextmanager
def accounted(folder, device):
    """Note in made.json of `folder` how many seconds the block took, over all calls, and what computed it.

    Of a call that is refused, because another process is at work in the folder, say, nothing is noted.
    """
    path, started = folder / "made.json", time.perf_counter()
    origin = {"device": runtime.describe(device), "commit": str(commit()), "torch": torch.__version__}
    try:
        yield
    finally:
        if folder.is_dir() and not isinstance(sys.exception(), RunError):
            before = json.loads(path.read_text()) if path.exists() else {"seconds": 0.0}
            seconds = round(before["seconds"] + time.perf_counter() - started, 1)
            origins = {name: list(dict.fromkeys([*before.get(name, []), value])) for name, value in origin.items()}
            tracking.write_json(path, {"seconds": seconds, **origins})


@functools.cache  # of the code that runs, not of what may be checked out meanwhile
def commit():
    """The commit of this code, with "-dirty" where its files differ from it, or None."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
