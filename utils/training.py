"""What run.py and classifier.py share while they train: steps, means, records, checkpoints, signals.

    with Run(folder, settings, …) as run:
        for step, batch in run.steps(batches, finish_epoch):
            run.add(train_step(…))

A run can be stopped at any moment, by Ctrl-C or kill -9, and goes on from its newest checkpoint as if nothing had been.
"""

import contextlib
import glob
import json
import math
import os
import pickle
import shutil
import signal
import statistics
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from utils import runtime
from utils.runtime import UNFINISHED, RunError, UsageError, write

# What files say they are. The number grows where a new version would compute something else from an old file.
MODEL, TRAINING, CLASSIFIER = "patchvae-model-2", "patchvae-training-2", "patchvae-classifier-2"
WORDS = {
    MODEL: "a model.pt of run.py",
    TRAINING: "a training checkpoint of run.py",
    CLASSIFIER: "a checkpoint of classifier.py",
}
KEPT = 3  # how many checkpoints of a run stay
QUIET = 60.0  # seconds without a word, where there is no terminal for a progress bar
COPIES = 2.0  # seconds in which a second signal is a copy of the first: torchrun's, or a child's that was just forked


# ---------------------------------------------------------------------------------------------------- checkpoints


def save(path, content):
    """Write `content` (plain values and tensors) to `path`: the old file or the new one is there, never half of one."""

    def fill(file):
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch's writer reports a full disk
            raise RunError(f"{path}: could not be written ({str(error).splitlines()[0]}); is the disk full?") from None

    write(path, fill)


def load(path, kind):
    """The content that was saved to `path` as {"kind": kind, …}. Raises RunError with the reason otherwise."""
    if not os.path.isfile(path):
        raise RunError(f"{path}: no such file; train a model first, or give the path of one")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares every part with its checksum
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{path}: not a file that this program wrote, or damaged ({reason})") from None
    found = content.get("kind") if isinstance(content, dict) else None
    if f"{found}-2" == kind:
        raise RunError(
            f"{path}: written by an earlier version, whose model was another (the variance of the appearance, the "
            "first layer of pyramid); train it again"
        )
    if found != kind:
        raise RunError(f"{path}: expected {WORDS[kind]}, found {WORDS.get(found, 'something else')}; give another file")
    if not all(value.isfinite().all() for value in content["model"].values()):
        raise RunError(f"{path}: has weights that are no numbers; train the model again with a smaller --lr")
    return content


def numbered(folder):
    """The paths of the numbered checkpoints in `folder`, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), "step_*.pt")))


def newest(folder, kind):
    """The content of the newest checkpoint in `folder` that is whole. Raises RunError if there is none."""
    for path in reversed(numbered(folder)):
        try:
            return load(path, kind)
        except RunError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    raise RunError(f"{folder}: no checkpoint in it to go on from; start without --resume, or anew with --overwrite")


def find_run(settings, folder_name, kind):
    """The folder of the run that --resume means, and the content of its checkpoint. `settings`: a dict.

    `folder_name`: of the checkpoints in it. With "auto" both are None where there is nothing to go on with.
    """
    if settings["overwrite"]:
        raise UsageError("--overwrite and --resume exclude each other: replace the run or go on with it")
    is_auto = settings["resume"] == "auto"
    place = Path(settings["output_folder"] if is_auto else settings["resume"] or settings["output_folder"])
    inside = place.resolve().parent if place.is_file() else place
    folder = inside.parent if inside.name == folder_name else inside  # best.pt lies in the run's folder itself
    with runtime.main_first():
        is_run = folder.is_dir() and (is_auto or numbered(str(folder / folder_name)))
        if runtime.is_main() and is_run and not settings["evaluate"]:
            hold(folder)  # before it is read: who held it may save once more at its end
        if is_auto and not numbered(str(folder / folder_name)):
            return None, None
        checkpoint = load(place, kind) if place.is_file() else newest(str(folder / folder_name), kind)
    typed = settings["typed"].get("output_folder", folder)
    if os.path.realpath(typed) != os.path.realpath(folder):
        raise UsageError(f"--resume goes on in the run's own folder, {folder}; leave out --output-folder")
    return str(folder), checkpoint


# ---------------------------------------------------------------------------------------------------- the folder


_locks = {}  # of the folders that this process writes into


def check_folder(folder, contents, kept, overwrite=False, keep=False):
    """What a new run would have to remove from `folder`: a list of paths. Raises UsageError or RunError.

    `contents`: names that a run writes, the first of which tells that a folder is one of a run; `kept`: patterns of
    files without which it holds nothing to lose. A run is replaced (`overwrite`) or gone on with (`keep`).
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output-folder {folder} is a file; give the name of a folder")
    if os.fspath(folder).encode(errors="replace").decode() != os.fspath(folder):  # TensorBoard wants text
        raise UsageError(f"--output-folder {ascii(os.fspath(folder))} is no text in UTF-8; choose another name")
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise RunError(f"--output-folder {folder}: {above} may not be written to; choose another folder")
    found, ours = [folder / name for name in contents if os.path.lexists(folder / name) and not keep], '"encoder_arch"'
    options = folder / contents[0]  # other programs, too, may keep theirs in a file of this name
    if found and not (options.is_file() and ours in options.read_text(encoding="utf-8", errors="replace")):
        raise UsageError(f"--output-folder {folder} holds {found[0].name}, which no run made; choose another folder")
    is_run = found and any(any(folder.glob(pattern)) for pattern in kept)
    if is_run and overwrite and int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0):
        raise UsageError(
            f"--overwrite would delete what {folder} holds of this very job before torchrun started it again; with "
            "--max-restarts use --resume auto"
        )
    if is_run and not overwrite:
        raise UsageError(
            f"--output-folder {folder} already holds a run ({found[0].name}); choose another folder, or give "
            "--overwrite to replace that run"
        )
    return found


def prepare_folder(folder, contents, kept, overwrite=False, keep=False):
    """Make `folder` ready for a run, see check_folder: from here to its end no other process may write into it."""
    folder = Path(folder)
    if not runtime.is_main():
        runtime.wait()
        return folder
    check_folder(folder, contents, kept, overwrite, keep)
    folder.mkdir(parents=True, exist_ok=True)
    hold(folder)
    found = check_folder(folder, contents, kept, overwrite, keep)  # again: who held the lock may have saved meanwhile
    for path in reversed(found):  # what tells that it is a run goes last: a kill in between leaves it a run
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for leftover in [path for place in (folder, folder / "checkpoints") for path in place.glob(f"*{UNFINISHED}")]:
        leftover.unlink()
    runtime.wait()
    return folder


def hold(folder):
    """Let no other process write into `folder`, until this one ends or releases it. Raises RunError."""
    if folder.resolve() not in _locks:
        busy = f"{folder} is in use by another run; wait for it, or choose another --output-folder"
        _locks[folder.resolve()] = runtime.locked(folder / ".lock", 10, busy)  # processes of a killed run end by then


def release(folder):
    """Let others use `folder`, as the end of the process would."""
    with _locks.pop(Path(folder).resolve(), contextlib.nullcontext()):
        pass


# ---------------------------------------------------------------------------------------------------- means


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
        sums = [torch.as_tensor(value, dtype=torch.float64) for value in self.sums.values()]
        own = torch.tensor([*(torch.stack(sums).tolist() if sums else []), self.images], dtype=torch.float64)
        *sums, images = runtime.total(own).tolist()
        return {"sums": dict(zip(self.sums, sums)), "images": int(images)}

    @classmethod
    def restored(cls, state):
        """Goes on from state(). In a job of several processes the first takes all that was summed."""
        return cls(**state) if runtime.is_main() else cls(dict.fromkeys(state["sums"], 0.0))

    def read(self):
        """The means over all processes: a dict of floats. Every process has to call it.

        Raises RunError where one is not finite.
        """
        found = self.state()
        means = {name: value / found["images"] for name, value in found["sums"].items()}
        for name, value in means.items():
            if not math.isfinite(value):
                raise RunError(f"the loss is no finite number ({name}: {value}); start again with a smaller --lr")
        return means


@contextlib.contextmanager
def evaluating(model):
    """Here `model` is in evaluation mode, and nothing has gradients."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)


# ---------------------------------------------------------------------------------------------------- the run


class Run:
    """One training, from its first step or from a checkpoint to its end, and what it leaves in its folder.

    As a context it turns SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) into a wish that is granted after the step at
    hand; a second signal leaves as soon as Python can hear it. In a job of several processes a signal to one stops all.
    """

    checkpoints, lines, logs, tag = "checkpoints", "metrics.jsonl", "logs", "loss/{split}/{name}"

    def __init__(self, folder, settings, content, batch_size, images_per_epoch, num_epochs, checkpoint=None,
                 log_interval=50, save_interval=1, first_epoch=0):
        """`content`: what a checkpoint holds beside the progress; its `model` and `optimizer` by their state.

        `checkpoint`: the content of the one to go on from. `log_interval` in steps, `save_interval` in epochs;
        `first_epoch`: how many count as done.
        """
        self.folder, self.settings, self.content, self.batch_size = Path(folder), settings, content, batch_size
        self.log_interval, self.save_interval = log_interval, save_interval
        self.steps_per_epoch = math.ceil(images_per_epoch / batch_size)
        self.last_step = num_epochs * self.steps_per_epoch
        self.step, self.tested = first_epoch * self.steps_per_epoch, first_epoch  # steps and tests that are done
        self.first = self.best = self.last = None  # figures of the first, the best and the last test
        self.window, self.epoch_means = Means(), Means()  # since the last record, since the epoch began
        self.speeds, self.state = [], {}  # images per second of the epoch's records, what else a record says
        if checkpoint:
            self._restore(checkpoint)
        self.recorded = self.step  # the last step that this process need not record any more
        self.launcher, self.saved_at = os.getppid(), time.monotonic()
        self.recorded_at = self.said_at = time.perf_counter()
        self.signal, self.signalled_at = 0, 0.0

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note_signal) for number in runtime.STOPPING}
        if runtime.is_main():
            logs = self.folder / self.logs
            if self.step:
                _drop_later_lines(self.folder / self.lines, self.step, self.owes_test)
            _let_the_clock_pass(logs)
            self.records = open(self.folder / self.lines, "a", encoding="utf-8")
            self.board = SummaryWriter(logs, purge_step=self.step + 1 if self.step else None)
        return self

    def __exit__(self, *reason):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if runtime.is_main():
            self.board.close()
            self.records.close()

    def _note_signal(self, number, frame):
        if self.signal and time.monotonic() > self.signalled_at + COPIES:
            os.write(2, b"stopped at once, without saving\n")
            os._exit(130 if number == signal.SIGINT else 143)
        if not self.signal:
            self.signal, self.signalled_at = int(number), time.monotonic()

    @property
    def epoch(self):
        return (self.step - 1) // self.steps_per_epoch + 1

    @property
    def step_in_epoch(self):
        return (self.step - 1) % self.steps_per_epoch + 1

    @property
    def epoch_ends(self):
        return self.step_in_epoch == self.steps_per_epoch

    @property
    def owes_test(self):
        """Whether the epoch is over but for its test: a signal came in the middle of it."""
        return self.epoch_ends and self.tested < self.epoch

    @property
    def speed(self):
        """Images per second in the epoch so far; 0 if that is not known, as this process has only resumed it."""
        return statistics.harmonic_mean(self.speeds) if self.speeds else 0.0

    # ------------------------------------------------------------------------------------------------ the loop

    def steps(self, batches, finish_epoch):
        """Yields (step, batch) for each batch, and does between them what is due: records, tests, checkpoints.

        `finish_epoch()` tests, reports, and calls note_test().
        """
        if self.owes_test:
            self._finish_epoch(finish_epoch)
        for batch in progress_bar(batches, "steps", self.last_step, self.step):
            self.step += 1
            yield self.step, batch
            if self.epoch_ends or self.step_in_epoch % self.log_interval == 0:
                self._record()
            if self.epoch_ends:
                self._finish_epoch(finish_epoch)
            else:
                self._save_or_stop()

    def add(self, terms, **state):
        """Add a step's terms, a dict of vectors of this process's images, to the means; `state`: numbers to record."""
        self.window.add(terms)
        self.state = state

    def _record(self):
        """The means since the last record, as a JSON line and in TensorBoard; the epoch's means take them in."""
        means, seconds = self.window.read(), time.perf_counter() - self.recorded_at
        self.speeds.append((self.step - self.recorded) * self.batch_size / seconds)
        state = {**self.state, "images_per_second": self.speeds[-1]}
        self.event("train", epoch=self.epoch, step=self.step, **means, **state)
        self.scalars({self.tag.format(split="train", name=name): value for name, value in means.items()})
        self.scalars({f"run/{name}": value for name, value in state.items()})
        self.epoch_means.take(self.window)
        self.window, self.recorded, self.recorded_at = Means(), self.step, time.perf_counter()
        if not sys.stderr.isatty() and self.recorded_at > self.said_at + QUIET:  # a terminal has the progress bar
            progress = f"{self.step_in_epoch} of {self.steps_per_epoch} steps"
            print(f"epoch {self.epoch}: {progress}, {self.speeds[-1]:.0f} images/s", flush=True)
            self.said_at = self.recorded_at

    def _finish_epoch(self, finish_epoch):
        finish_epoch()
        self.tested, self.epoch_means, self.speeds = self.epoch, Means(), []
        self._save_or_stop(regular=self.epoch % self.save_interval == 0 or self.step == self.last_step)
        self.recorded_at = self.said_at = time.perf_counter()

    def interruptible(self, batches):
        """The same batches, of a test; where a signal comes in between, the run is saved and stopped, to test again."""
        iterator = iter(batches)
        while True:
            batch = next(iterator, None)  # one process of several may have a batch less; it waits with the others
            number, goes_on = runtime.largest(torch.tensor([self.signal, batch is not None])).tolist()
            if number:
                self._save_or_stop()
            if not goes_on:
                return
            if batch is not None:
                yield batch

    def note_test(self, figures, improved):
        """Record the figures of this epoch's test; `improved`: they are the best so far."""
        if self.first is None:  # the best model alone, without a checkpoint, could not be gone on with
            self._save_or_stop(regular=True)
        self.last = {**figures, "epoch": self.epoch}
        self.first = self.first or self.last
        self.best = self.last if improved else self.best
        self.event("test", epoch=self.epoch, step=self.step, **figures, train_mean=self.epoch_means.read())

    # ------------------------------------------------------------------------------------------------ checkpoints

    def checkpoint(self):
        """What a checkpoint holds now. Every process has to call it."""
        runtime.share_statistics(self.content["model"])
        progress = {name: getattr(self, name) for name in ("step", "tested", "first", "best", "last")}
        progress |= {"window": self.window.state(), "epoch_means": self.epoch_means.state()}
        states = {name: self.content[name].state_dict() for name in ("model", "optimizer")}
        return {**self.content, **states, "args": vars(self.settings), "progress": progress}

    def _restore(self, checkpoint):
        """Go on from the content of a checkpoint (the model has its weights), and remove those after it."""
        before, now = checkpoint["images"], self.content["images"]
        if before != now:  # a run whose broken image was removed has to be able to go on
            print(f"the run began with {before:,} training images and goes on with {now:,}")
        for name, value in checkpoint["progress"].items():
            setattr(self, name, Means.restored(value) if name in ("window", "epoch_means") else value)
        optimizer = self.content["optimizer"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, state in optimizer.state.items():  # fused Adam on the CPU wants both laid out alike in memory
            for name, value in state.items():
                if value is not None and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter).copy_(value)
        runtime.check_same(self.step, "the step that they go on from")
        if runtime.is_main():
            for path in numbered(str(self.folder / self.checkpoints)):
                if path > self._path():
                    os.remove(path)

    def _path(self):
        return str(self.folder / self.checkpoints / f"step_{self.step:09d}.pt")

    def _save_or_stop(self, regular=False):
        """Save if it is time (`regular`), was long ago or a signal has come, and then do what the signal wants."""
        if runtime.count() > 1 and os.getppid() != self.launcher:  # it was killed, and cannot end this process any more
            self.signal = self.signal or int(signal.SIGTERM)
        overdue = time.monotonic() > self.saved_at + self.settings.save_minutes * 60
        number, overdue = runtime.largest(torch.tensor([self.signal, overdue])).tolist()
        if regular or overdue or number:
            self.window.read()  # stops the run before it would save what is no number
            content = self.checkpoint()
            if runtime.is_main():
                self.board.flush()  # a checkpoint must not know more than the records
                os.makedirs(self.folder / self.checkpoints, exist_ok=True)
                save(self._path(), content)
                for older in numbered(str(self.folder / self.checkpoints))[:-KEPT]:
                    os.remove(older)
            runtime.wait()  # a process that leaves early would have the launcher end the one that still writes
            self.saved_at = time.monotonic()
        if number:
            runtime.stop(number, message=f"stopped and saved after step {self.step}; --resume goes on from there")

    # ------------------------------------------------------------------------------------------------ records

    def event(self, event, **values):
        """Append one JSON line: the kind of event and its values, floats with six digits."""
        tidy = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in values.items()}
        if runtime.is_main():
            self.records.write(json.dumps({"event": event, **tidy}) + "\n")
            self.records.flush()

    def scalars(self, values):
        """Send a dict of TensorBoard tags and numbers."""
        if runtime.is_main():
            for tag, value in values.items():
                self.board.add_scalar(tag, value, self.step)

    def picture(self, tag, image, path):
        """Keep a PIL image as the file `path` in the folder and under `tag` in TensorBoard."""
        if runtime.is_main():
            (self.folder / path).parent.mkdir(exist_ok=True)
            image.save(self.folder / path)
            self.board.add_image(tag, np.asarray(image), self.step, dataformats="HWC")

    def conclude(self):
        """The best figures as the last record, and with the options among TensorBoard's hparams."""
        self.event("end", **self.best)
        if runtime.is_main():
            plain = dict(vars(self.settings))
            del plain["typed"]
            for name, value in plain.items():
                if not isinstance(value, int | float):  # a path need not be text
                    plain[name] = str(value).encode(errors="backslashreplace").decode()
            figures = {f"result/{name}": value for name, value in self.best.items()}
            for summary in hparams(plain, figures):  # three records; add_hparams would open a folder of its own
                self.board.file_writer.add_summary(summary)
            self.scalars(figures)


def progress_bar(batches, unit, total, initial=0):
    """A progress bar on a terminal; one for all processes."""
    return tqdm(batches, unit, total, initial=initial, leave=False, disable=None if runtime.is_main() else True)


def _let_the_clock_pass(logs):
    """Wait, for a second at most, until a new event file's name will sort behind those in the folder `logs`.

    TensorBoard reads the files in the order of their names, which hold whole seconds and then the process's number. In
    another order than they were written, it would drop a resumed run's figures for the older ones.
    """
    while any(logs.glob(f"events.out.tfevents.{int(time.time())}.*")):
        time.sleep(0.01)


def _drop_later_lines(path, step, owes_test):
    """Remove from a run's records what it will do again after `step`; `owes_test`: the test of that step, too."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # cut by the end of the process
        comes_again = event["event"] == "end" or owes_test and (event["event"], event["step"]) == ("test", step)
        if event.get("step", 0) <= step and not comes_again:
            kept.append(line)
    write(path, lambda file: file.write("".join(kept).encode()))
