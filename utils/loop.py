"""What both training loops share: where they are, when they save, and how they stop."""

import os
import signal
import socket
import statistics
import sys
import threading
import time

import torch
from tqdm import tqdm

from utils import checkpoints, console, ranks, runtime, tracking
from utils.console import RunError, Terminated

COPIES = 2.0  # seconds in which a second signal is a copy of the first: torchrun's, or a child's that was just forked


class Progress:
    """How far a training has come, and what it has found: everything beside the weights that a checkpoint holds."""

    def __init__(self, steps_per_epoch):
        self.steps_per_epoch = steps_per_epoch
        self.step, self.tested = 0, 0  # steps done; the last epoch whose test is done
        self.first = self.best = self.last = None  # figures of the first, the best and the last test
        self.epoch_means, self.window_means = tracking.Means(), tracking.Means()
        self.watch, self.speeds = Stopwatch(), []  # of the window, and of the windows of the epoch

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

    def close_window(self):
        """The means since the last call, and images per second; the epoch's means take them in."""
        means, self.speeds = self.window_means.read(), [*self.speeds, self.watch.images / self.watch.seconds]
        self.epoch_means.take(self.window_means)
        self.window_means = tracking.Means()
        self.watch.restart()
        return means, self.speeds[-1]

    @property
    def speed(self):
        """Images per second in the epoch so far; 0 if that is not known, as this process has only resumed it."""
        return statistics.harmonic_mean(self.speeds) if self.speeds else 0.0

    def close_epoch(self):
        """What the next epoch finds empty."""
        self.tested = self.epoch
        self.epoch_means, self.speeds = tracking.Means(), []
        self.watch.restart()

    def state(self):
        means = {"epoch_means": self.epoch_means.state(), "window_means": self.window_means.state()}
        found = {"first": self.first, "best": self.best, "last": self.last}
        return {"step": self.step, "tested": self.tested, **found, **means}

    def restore(self, state):
        for name in ("step", "tested", "first", "best", "last"):
            setattr(self, name, state[name])
        self.epoch_means, self.window_means = (
            tracking.Means.restored(state[f"{name}_means"]) for name in ("epoch", "window")
        )


class Keeper:
    """Keeps a training from getting lost: saves it when that is due, and stops it on a signal without losing a step.

    As a context it turns SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) into a wish that after_step() grants. A second
    signal does not wait for that. In a job of several processes a signal to one stops all after the same step.
    """

    def __init__(self, folder, args, progress, tracker, alias=None, **content):
        """`folder`: of the checkpoints, `alias`: see checkpoints.save_numbered.

        `content`: what else a checkpoint holds, `model` and `optimizer` by their state.
        """
        self.folder, self.args, self.progress, self.tracker, self.fixed = folder, args, progress, tracker, content
        self.alias, self.launcher = alias, os.getppid()
        self.since_save, self.requested = Stopwatch(), None  # the signal's number

    def content(self):
        """What a checkpoint holds now. Every process has to call it."""
        ranks.share_statistics(self.fixed["model"])
        states = {name: self.fixed[name].state_dict() for name in ("model", "optimizer")}
        return {**self.fixed, **states, "args": vars(self.args), "progress": self.progress.state()}

    def after_step(self, regular):
        """Save if it is time (`regular`), was long ago or a signal has come, and grant the signal's wish."""
        if ranks.count() > 1 and os.getppid() != self.launcher:  # it was killed, and cannot end this process any more
            self.requested = self.requested or int(signal.SIGTERM)
        overdue = self.since_save.seconds > self.args.save_minutes * 60
        number, overdue = ranks.largest(torch.tensor([self.requested or 0, overdue])).tolist()
        if regular or overdue or number:
            self.progress.window_means.read()  # stops the run before it would save what is no number
            content = self.content()
            if ranks.is_main():
                self.tracker.flush()
                checkpoints.save_numbered(self.folder, self.progress.step, content, self.alias)
            ranks.wait()  # a process that leaves early would have the launcher end the one that still writes
            self.since_save.restart()
        if number:
            obey(number, f"stopped and saved after step {self.progress.step}; --resume goes on from there")

    def test(self, evaluate, *arguments):
        """evaluate(*arguments, heed), or None if a signal came in between: the run that goes on tests again.

        `evaluate` draws its batches through `heed`.
        """
        try:
            return evaluate(*arguments, self._heed)
        except Interrupted:
            return None

    def _heed(self, batches):
        iterator = iter(batches)
        while True:
            batch = next(iterator, None)  # one process of several may have a batch less; it waits with the others
            number, goes_on = ranks.largest(torch.tensor([self.requested or 0, batch is not None])).tolist()
            if number:
                raise Interrupted
            if not goes_on:
                return
            if batch is not None:
                yield batch

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in console.STOPPING}
        self.ears, mouth = socket.socketpair()
        mouth.setblocking(False)
        self.before_fd, self.mouth = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False), mouth
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *reason):
        signal.set_wakeup_fd(self.before_fd)
        self.mouth.close()  # ends the thread
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.requested = self.requested or int(number)

    def _listen(self):
        """Leave at a second signal, from a thread of its own: Python heeds none before a long backward pass ends."""
        came = None
        while received := self.ears.recv(1):
            number = received[0]
            if number not in self.before:
                continue
            if came is None:
                came = time.monotonic()
            elif time.monotonic() > came + COPIES:
                print("stopped at once, without saving", file=sys.stderr, flush=True)
                os._exit(130 if number == signal.SIGINT else 143)


class Interrupted(Exception):
    """A signal came in the middle of a test."""


def obey(number, message):
    """Leave, with the exit status of signal `number` and `message` as last words."""
    raise KeyboardInterrupt(message) if number == signal.SIGINT else Terminated(message)


def restore(checkpoint, optimizer, progress, folder, images):
    """Go on from the content of a checkpoint in `folder` (the model has its weights), and remove those after it.

    `images`: how many there are to train on by now; a run whose broken image was removed has to be able to go on.
    """
    if checkpoint.get("images", images) != images:
        print(f"the run began with {checkpoint['images']:,} training images and goes on with {images:,}")
    try:
        progress.restore(checkpoint["progress"])
    except KeyError as error:
        raise RunError(f"{folder}: an older version wrote the checkpoint (no {error}); start anew") from None
    optimizer.load_state_dict(checkpoint["optimizer"])
    runtime.match_layout(optimizer)
    ranks.check_same(progress.step, "the step that they go on from")
    if ranks.is_main():
        checkpoints.drop_later(folder, progress.step)


def bar(stream, unit, total, initial=0):
    """A progress bar on a terminal; one for all processes."""
    return tqdm(stream, unit, total, initial=initial, leave=False, disable=None if ranks.is_main() else True)


class Stopwatch:
    """Counts images and the seconds that they took."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.started, self.images = time.perf_counter(), 0

    @property
    def seconds(self):
        return time.perf_counter() - self.started
