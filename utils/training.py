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
from tqdm import tqdm

import modules
from utils import runtime
from utils.runtime import UNFINISHED, RunError, UsageError, write

# What files say they are. The number grows where a new version would compute something else from an old file.
MODEL, TRAINING, CLASSIFIER = "patchvae-model-2", "patchvae-training-2", "patchvae-classifier-2"
WORDS = {
    MODEL: "a model.pt of run.py",
    TRAINING: "a training checkpoint of run.py",
    CLASSIFIER: "a checkpoint of classifier.py",
} | {kind.removesuffix("-2"): "a file of an earlier version, whose model was another: train it again"
     for kind in (MODEL, TRAINING, CLASSIFIER)}
HOLDS = {MODEL: {"model", "options", "args"}}  # a file of each kind, beside its kind
HOLDS |= dict.fromkeys((TRAINING, CLASSIFIER), {"model", "optimizer", "args", "images", "progress"})
CHECKPOINTS_KEPT = 3
QUIET = 60.0  # seconds without a word, where there is no terminal for a progress bar
COPIES = 2.0  # seconds in which a second signal is a copy of the first: torchrun's, or a child's that was just forked


# ---------------------------------------------------------------------------------------------------- checkpoints


def save(path, content):
    """Write `content` (plain values and tensors) to `path`: the old file or the new one is there, never half of one."""

    def fill(file):
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch's writer reports a full disk
            raise RunError(f"{path}: could not be written ({runtime.first_line(error)}); is the disk full?") from None

    write(path, fill)


def load(path, kind):
    """The content that was saved to `path` as {"kind": kind, "model": weights, …}. Raises RunError with the reason."""
    if not os.path.isfile(path):
        raise RunError(f"{path}: no such file; train a model first, or give the path of one")
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # compares every part with its checksum
                raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, OSError, RuntimeError, ValueError, KeyError) as error:
        reason = runtime.first_line(error)
        raise RunError(f"{path}: not a file that this program wrote, or damaged ({reason})") from None
    found = content.get("kind") if isinstance(content, dict) else None
    if found != kind:
        raise RunError(f"{path}: expected {WORDS[kind]}, found {WORDS.get(found, 'something else')}; give another file")
    if missing := HOLDS[kind] - set(content):
        raise RunError(f"{path}: {', '.join(sorted(missing))} is missing in it; give another file")
    if not all(value.isfinite().all() for value in content["model"].values()):
        raise RunError(f"{path}: has weights that are no numbers; train the model again with a smaller --lr")
    if kind == MODEL:
        check_model(path, content)
    return content


def check_model(path, content):
    """Raises RunError unless the content of the model file `path` has the weights of what its options describe."""
    try:
        with torch.device("meta"):  # shapes alone; of a copy, as torch notes in it that tensors are to be assigned
            modules.build_model(content["options"]).load_state_dict(dict(content["model"]), assign=True)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = runtime.first_line(error)
        raise RunError(f"{path}: its weights and its options do not fit ({reason}); train the model again") from None


def load_model(path, device="cpu"):
    """The trained model in the file `path`, in evaluation mode on `device`, and all that the file holds: a dict.

    Raises RunError where the file is missing or damaged.
    """
    file = load(path, MODEL)
    model = modules.build_model(file["options"])
    model.load_state_dict(file["model"])
    return model.to(device).eval(), file


def numbered(folder):
    """The paths of the numbered checkpoints in `folder`, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(str(folder)), "step_*.pt")))


def newest(folder, kind):
    """The content of the newest checkpoint in `folder` that is whole. Raises RunError if there is none."""
    for path in reversed(numbered(folder)):
        try:
            return load(path, kind)
        except RunError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    raise RunError(f"{folder}: no checkpoint in it to go on from; start without --resume, or anew with --overwrite")


def find_run(settings, contents, kind):
    """The folder of the run that --resume means, and the content of its checkpoint. `settings`: a dict.

    `contents`: see check_folder; the second is the folder of the checkpoints. With "auto" both are None where there is
    nothing to go on with.
    """
    if settings["overwrite"]:
        raise UsageError("--overwrite and --resume exclude each other: replace the run or go on with it")
    options_file, checkpoints = contents[:2]
    is_auto = settings["resume"] == "auto"
    place = Path(settings["output_folder"] if is_auto else settings["resume"] or settings["output_folder"])
    inside = place.resolve().parent if place.is_file() else place
    folder = inside.parent if inside.name == checkpoints else inside  # best.pt lies in the run's folder itself
    with runtime.main_first():
        is_run = folder.is_dir() and (is_auto or numbered(folder / checkpoints))
        if runtime.is_main() and is_run and not settings["evaluate"]:
            hold(folder)  # before it is read: who held it may save once more at its end
        if is_auto and not numbered(folder / checkpoints):
            return None, None
        checkpoint = load(place, kind) if place.is_file() else newest(folder / checkpoints, kind)
    if place.is_file() and not (folder / options_file).is_file():
        raise UsageError(f"--resume {place}: goes on in the folder of its run, which {folder} is not; name that folder")
    typed = settings["typed"].get("output_folder", folder)
    if os.path.realpath(typed) != os.path.realpath(folder):
        raise UsageError(f"--resume goes on in the run's own folder, {folder}; leave out --output-folder")
    return str(folder), checkpoint


# ---------------------------------------------------------------------------------------------------- the folder


_locks = {}  # of the folders that this process writes into


def check_folder(folder, contents, overwrite=False, keep=False):
    """What a new run would have to remove from `folder`: a list of paths. Raises UsageError or RunError.

    `contents`: names that a run writes, the first of which tells that a folder is one of a run. A run with something to
    lose, weights or results, is replaced (`overwrite`) or gone on with (`keep`).
    """
    folder, flag = Path(folder), f"--output-folder {runtime.printable(str(folder))}"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{flag} is a file; give the name of a folder")
    if str(folder).encode(errors="replace").decode() != str(folder):  # TensorBoard wants text
        raise UsageError(f"{flag} is no text in UTF-8; choose another name")
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise RunError(f"{flag}: {above} may not be written to; choose another folder")
    found = [folder / name for name in contents if os.path.lexists(folder / name) and not keep]
    options = folder / contents[0]  # other programs, too, may keep theirs in a file of this name
    if found and not (options.is_file() and '"encoder_arch"' in options.read_text(encoding="utf-8", errors="replace")):
        raise UsageError(f"{flag} holds {found[0].name}, which no run made; choose another folder")
    to_lose = [path for path in found if path.suffix == ".pt" or path.name == "results.json" or any(path.glob("*.pt"))]
    if to_lose and not overwrite:
        raise UsageError(
            f"{flag} already holds a run ({to_lose[0].name}); choose another folder, or give --overwrite to replace it"
        )
    if to_lose and int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0):  # torchrun has started this very job again
        raise UsageError(f"--overwrite would delete what this job made in {folder}; --max-restarts wants --resume auto")
    return found


def prepare_folder(folder, contents, overwrite=False, keep=False):
    """Make `folder` ready for a run, see check_folder: from here to its end no other process may write into it."""
    folder = Path(folder)
    if runtime.is_main():
        check_folder(folder, contents, overwrite, keep)
        folder.mkdir(parents=True, exist_ok=True)
        hold(folder)
        found = check_folder(folder, contents, overwrite, keep)  # again: who held the lock may have saved meanwhile
        for path in reversed(found):  # what tells that it is a run goes last: a kill in between leaves it a run
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for leftover in [*folder.glob(f"*{UNFINISHED}"), *folder.glob(f"checkpoints/*{UNFINISHED}")]:
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
        sums = {name: vector.detach().sum(dtype=torch.float64) for name, vector in values.items()}
        self.take(Means(sums, len(next(iter(values.values())))))

    def take(self, other):
        """Add what `other` has summed."""
        self.sums |= {name: self.sums.get(name, 0) + value for name, value in other.sums.items()}
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

    As a context it turns signals such as SIGINT into a wish that is granted after the step at hand; a second signal
    leaves as soon as Python can hear it. In a job of several processes a signal to one stops all.
    """

    checkpoints, lines, logs, tag = "checkpoints", "metrics.jsonl", "logs", "loss/{split}/{name}"

    def __init__(self, folder, settings, content, checkpoint=None, *, batch_size, images, epochs, log_interval=50,
                 save_interval=1, epochs_done=0):
        """`content`: what a checkpoint holds beside the progress; its `model` and `optimizer` by their state.

        `checkpoint`: the content of the one to go on from. `images` of an epoch; `log_interval` in steps,
        `save_interval` in epochs; `epochs_done`: how many count as done without one.
        """
        self.folder, self.settings, self.content, self.batch_size = Path(folder), settings, content, batch_size
        self.log_interval, self.save_interval = log_interval, save_interval
        self.steps_per_epoch = math.ceil(images / batch_size)
        self.last_step = epochs * self.steps_per_epoch
        self.step, self.tested = epochs_done * self.steps_per_epoch, epochs_done  # steps and tests that are done
        self.first = self.best = self.last = None  # figures of the first, the best and the last test
        self.since_record, self.since_epoch = Means(), Means()
        self.speeds, self.state = [], {}  # images per second of the epoch's records, what else a record says
        if checkpoint:
            self._restore(checkpoint)
        self.recorded = self.step  # the last step that this process need not record any more
        self.launcher, self.saved_at = os.getppid(), time.monotonic()
        self.recorded_at = self.said_at = time.perf_counter()
        self.signal, self.signalled_at = 0, 0.0

    def __enter__(self):
        heard = [number for number in runtime.STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._note_signal) for number in heard}
        if runtime.is_main():
            logs = self.folder / self.logs
            if self.step:
                self._drop_later_lines()
            # TensorBoard reads event files in the order of their names, which hold whole seconds and then the process's
            # number: in another order it would drop a resumed run's figures for the older ones.
            while any(logs.glob(f"events.out.tfevents.{int(time.time())}.*")):
                time.sleep(0.01)
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
    def owes_test(self):
        """Whether the epoch's steps are done, and its test is not."""
        return self.step_in_epoch == self.steps_per_epoch and self.tested < self.epoch

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
            if self.owes_test or self.step_in_epoch % self.log_interval == 0:
                self._record()
            self._save_or_stop()
            if self.owes_test:
                self._finish_epoch(finish_epoch)

    def add(self, terms, **state):
        """Add a step's terms, a dict of vectors of this process's images, to the means; `state`: numbers to record."""
        self.since_record.add(terms)
        self.state = state

    def _record(self):
        """The means since the last record, as a JSON line and in TensorBoard; the epoch's means take them in."""
        means, seconds = self.since_record.read(), time.perf_counter() - self.recorded_at
        self.speeds.append((self.step - self.recorded) * self.batch_size / seconds)
        state = {**self.state, "images_per_second": self.speeds[-1]}
        self.event("train", epoch=self.epoch, step=self.step, **means, **state)
        self.scalars({self.tag.format(split="train", name=name): value for name, value in means.items()})
        self.scalars({f"run/{name}": value for name, value in state.items()})
        self.since_epoch.take(self.since_record)
        self.since_record, self.recorded, self.recorded_at = Means(), self.step, time.perf_counter()
        if not sys.stderr.isatty() and self.recorded_at > self.said_at + QUIET:  # a terminal has the progress bar
            progress = f"{self.step_in_epoch} of {self.steps_per_epoch} steps"
            print(f"epoch {self.epoch}: {progress}, {self.speeds[-1]:.0f} images/s", flush=True)
            self.said_at = self.recorded_at

    def _finish_epoch(self, finish_epoch):
        finish_epoch()
        self.tested, self.since_epoch, self.speeds = self.epoch, Means(), []
        self._save_or_stop()
        self.recorded_at = self.said_at = time.perf_counter()

    def note_test(self, figures, improved):
        """Record the figures of this epoch's test; `improved`: they are the best so far."""
        self.last = {**figures, "epoch": self.epoch}
        self.first = self.first or self.last
        self.best = self.last if improved else self.best
        self.event("test", epoch=self.epoch, step=self.step, **figures, train_mean=self.since_epoch.read())

    # ------------------------------------------------------------------------------------------------ checkpoints

    def checkpoint(self):
        """What a checkpoint holds now. Every process has to call it."""
        runtime.share_statistics(self.content["model"])
        progress = {name: getattr(self, name) for name in ("step", "tested", "first", "best", "last")}
        progress |= {"window": self.since_record.state(), "epoch_means": self.since_epoch.state()}
        states = {name: self.content[name].state_dict() for name in ("model", "optimizer")}
        return {**self.content, **states, "args": vars(self.settings), "progress": progress}

    def _restore(self, checkpoint):
        """Go on from the content of a checkpoint (the model has its weights), and remove those after it."""
        before, now = checkpoint["images"], self.content["images"]
        if before != now:  # a run whose broken image was removed has to be able to go on
            print(f"the run began with {before:,} training images and goes on with {now:,}")
        progress = dict(checkpoint["progress"])
        self.since_record, self.since_epoch = (Means.restored(progress.pop(of)) for of in ("window", "epoch_means"))
        vars(self).update(progress)
        if self.step > self.last_step:
            raise UsageError(f"--epochs: {self.epoch} are done; give that many or more, or leave it out")
        optimizer = self.content["optimizer"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        for parameter, state in optimizer.state.items():  # fused Adam on the CPU wants both laid out alike in memory
            for name, value in state.items():
                if value is not None and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter).copy_(value)
        runtime.check_same(self.step, "the step that they go on from")
        if runtime.is_main():
            for path in numbered(self.folder / self.checkpoints):
                if path > self._path():
                    os.remove(path)

    def _path(self):
        return str(self.folder / self.checkpoints / f"step_{self.step:09d}.pt")

    def _save_or_stop(self):
        """Save if it is time, was long ago or a signal has come, and then do what the signal wants.

        It is time at the end of an epoch, before its test, which then may be broken off, and after it.
        """
        if runtime.count() > 1 and os.getppid() != self.launcher:  # it was killed, and cannot end this process any more
            self.signal = self.signal or int(signal.SIGTERM)
        is_regular = self.epoch % self.save_interval == 0 or self.step == self.last_step or self.first is None
        is_due = self.step_in_epoch == self.steps_per_epoch and is_regular
        is_overdue = time.monotonic() > self.saved_at + self.settings.save_minutes * 60
        number, is_overdue = runtime.largest(torch.tensor([self.signal, is_overdue])).tolist()
        if is_due or is_overdue or number:
            self.since_record.read()  # stops the run before it would save what is no number
            content = self.checkpoint()
            if runtime.is_main():
                self.board.flush()  # a checkpoint must not know more than the records
                os.makedirs(self.folder / self.checkpoints, exist_ok=True)
                save(self._path(), content)
                for older in numbered(self.folder / self.checkpoints)[:-CHECKPOINTS_KEPT]:
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
        """The best figures as the last record."""
        self.event("end", **self.best)
        self.scalars({f"result/{name}": value for name, value in self.best.items()})

    def _drop_later_lines(self):
        """Remove from the records what will be done again."""
        path, kept = self.folder / self.lines, []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # cut by the end of the process
            is_owed = self.owes_test and (event["event"], event.get("step")) == ("test", self.step)
            if event["event"] != "end" and event["step"] <= self.step and not is_owed:
                kept.append(line)
        write(path, lambda file: file.write("".join(kept).encode()))


def progress_bar(batches, unit, total, initial=0):
    """A progress bar on a terminal; one for all processes."""
    return tqdm(batches, unit, total, initial=initial, leave=False, disable=None if runtime.is_main() else True)
