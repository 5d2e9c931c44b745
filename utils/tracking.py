"""What a run leaves behind while it goes: console lines, metrics.jsonl, TensorBoard, pictures."""

import fcntl
import json
import math
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from utils import checkpoints, ranks
from utils.console import RunError, UsageError


def prepare_folder(folder, contents, overwrite=False, keep=False):
    """Make `folder` ready for a new run that will write `contents`, a tuple of names; the first tells that it is a run.

    A folder that holds a run is refused, cleared of it (`overwrite`), or used as it is (`keep`, to go on). Nothing else
    in it is touched. From here to its end, this process is the only one that may write into it; in a job of several
    processes that is rank 0.
    """
    folder = Path(folder)
    if not ranks.is_main():
        ranks.wait()
        return folder
    found = check_folder(folder, contents, overwrite, keep)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder)
    for path in reversed(found):  # what tells that it is a run goes last: a kill in between leaves it a run
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for place in (folder, *(folder / name for name in contents)):
        for leftover in place.glob(f"*{checkpoints.UNFINISHED}"):
            leftover.unlink()
    ranks.wait()
    return folder


def check_folder(folder, contents, overwrite=False, keep=False):
    """Raises UsageError where prepare_folder() would. Returns what it would remove: a list of paths."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output-folder {folder} is a file; give the name of a folder")
    found = [folder / name for name in contents if os.path.lexists(folder / name) and not keep]
    if found and not (folder / contents[0]).exists():
        raise UsageError(f"--output-folder {folder} holds {found[0].name}, which no run made; choose another folder")
    if found and not overwrite:
        raise UsageError(
            f"--output-folder {folder} already holds a run ({found[0].name}); choose another folder, or give "
            "--overwrite to replace that run"
        )
    return found


_claims = {}  # open lock files by folder; the system releases a lock with its process, however that ends


def _claim(folder):
    folder = folder.resolve()
    if folder in _claims:
        return
    lock = open(folder / ".lock", "a+", encoding="utf-8")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by data-loading processes
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        raise RunError(
            f"{folder} is in use by {lock.readline().strip()}; wait for it, or choose another --output-folder"
        ) from None
    except OSError as error:
        print(f"warning: {folder} cannot be locked ({error.strerror}): let no other run write into it", file=sys.stderr)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n{_launcher()}\n")
    lock.flush()
    _claims[folder] = lock


def release(folder):
    """Let others use `folder`, as the end of the process would."""
    lock = _claims.pop(folder.resolve(), None)
    if lock:
        lock.close()


def _launcher():
    """The process that started this one, as no other is called: torchrun's stays when it starts a failed job again."""
    born = Path(f"/proc/{os.getppid()}/stat")  # numbers come again, in containers above all; the time does not
    boot = Path("/proc/sys/kernel/random/boot_id")
    time = born.read_text().rsplit(")", 1)[1].split()[19] + boot.read_text().strip() if born.is_file() else ""
    return f"started by process {os.getppid()} {os.environ.get('TORCHELASTIC_RUN_ID', '')} {time}"


def held_before(folder):
    """Whether the last run in `folder` was this very job, before its launcher started it again."""
    path = Path(folder, ".lock")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return lines[1:] == [_launcher()] and lines[0].endswith(f" on {socket.gethostname()}")


class Means:
    """Means over images of named values, summed where they are computed, so that the device is not waited for."""

    def __init__(self, sums=(), images=0):
        self.sums, self.images = dict(sums), images

    def add(self, values):
        """Add a batch: a dict of vectors, one value per image."""
        for name, vector in values.items():
            self.sums[name] = self.sums.get(name, 0) + vector.detach().sum(dtype=torch.float64)
        self.images += len(vector)

    def take(self, other):
        """Add what `other` has summed."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.images += other.images

    def state(self):
        """What restored() takes, of all processes together: plain numbers. Every process has to call it."""
        sums, images = self._over_processes()
        return {"sums": sums, "images": images}

    @classmethod
    def restored(cls, state):
        """Goes on from state(). In a job of several processes the first takes all that was summed."""
        if ranks.is_main():
            return cls(**state)
        return cls(dict.fromkeys(state["sums"], 0.0))

    def read(self):
        """The means over all processes: a dict of floats. Every process has to call it.

        Raises RunError where one is not finite.
        """
        sums, images = self._over_processes()
        means = {name: value / images for name, value in sums.items()}
        for name, value in means.items():
            if not math.isfinite(value):
                raise RunError(f"the loss is no finite number ({name}: {value}); start again with a smaller --lr")
        return means

    def _over_processes(self):
        sums = [torch.as_tensor(value, dtype=torch.float64) for value in self.sums.values()]
        sums = torch.stack(sums).tolist() if sums else []  # the device is waited for once
        own = torch.tensor([*sums, self.images], dtype=torch.float64)
        *sums, images = ranks.total(own).tolist()
        return dict(zip(self.sums, sums)), int(images)


class Tracker:
    """Writes a run's figures and pictures into its folder, each at the step it belongs to; on rank 0 only."""

    def __init__(self, folder, lines="metrics.jsonl", logs="logs", step=0, owes_test=False):
        """`step`: the run goes on after this step; what was recorded later is dropped, as it will come again.

        `owes_test`: so will the test of this step.
        """
        self.folder, self.lines, self.board = Path(folder), None, None
        if not ranks.is_main():
            return
        if step:
            _drop_later_lines(self.folder / lines, step, owes_test)
        self.lines = open(self.folder / lines, "a", encoding="utf-8")
        _let_the_clock_pass(self.folder / logs)
        self.board = SummaryWriter(self.folder / logs, purge_step=step + 1 if step else None)

    def __enter__(self):
        return self

    def __exit__(self, *reason):
        if self.board:
            self.board.close()
            self.lines.close()

    def event(self, event, **values):
        """Append one JSON line: the kind of event and its values, floats with six digits."""
        if not self.lines:
            return
        tidy = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()}
        self.lines.write(json.dumps({"event": event, **tidy}) + "\n")
        self.lines.flush()

    def scalars(self, step, values):
        """Send a dict of TensorBoard tags and numbers."""
        for tag, value in values.items() if self.board else ():
            self.board.add_scalar(tag, value, step)

    def flush(self):
        """Hand all over to the system: to be called before a checkpoint, which must not know more than the records."""
        self.board.flush()

    def picture(self, tag, step, image, path):
        """Keep a PIL image as the file `path` in the folder and under `tag` in TensorBoard."""
        if not self.board:
            return
        (self.folder / path).parent.mkdir(exist_ok=True)
        image.save(self.folder / path)
        self.board.add_image(tag, np.asarray(image), step, dataformats="HWC")

    def options(self, options, result):
        """Send the run's options and its final figures to TensorBoard's hparams."""
        if not self.board:
            return
        plain = {name: "" if value is None else value for name, value in options.items() if not isinstance(value, dict)}
        for summary in hparams(plain, result):  # three records; add_hparams would open a folder of its own
            self.board.file_writer.add_summary(summary)
        for name, value in result.items():
            self.board.add_scalar(name, value)


def _let_the_clock_pass(logs):
    """Wait, for a second at most, until a new event file's name will sort behind those in the folder `logs`.

    TensorBoard reads the files in the order of their names, which hold whole seconds and then the process's number. In
    another order than they were written, it would drop a resumed run's figures for the older ones.
    """
    while any(logs.glob(f"events.out.tfevents.{int(time.time())}.*")):
        time.sleep(0.01)


def _drop_later_lines(path, step, owes_test):
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            event = json.loads(line)
        except ValueError:
            continue  # cut by the end of the process
        comes_again = event["event"] == "end" or owes_test and (event["event"], event["step"]) == ("test", step)
        if event.get("step", 0) <= step and not comes_again:
            kept.append(line)
    checkpoints.write(path, lambda file: file.write("".join(kept).encode()))


def write_json(path, content):
    """Write `content` as indented JSON, complete or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    checkpoints.write(path, lambda file: file.write(text.encode()))


def relative(path):
    """`path` as the user would type it from here, if it lies below here."""
    path = os.path.relpath(path)
    return os.path.abspath(path) if path.startswith("..") else path
