"""Files of plain values and tensors that are complete or absent, and never run code when they are read."""

import glob
import os
import pickle
import sys
import zipfile

import torch

from utils.console import RunError

# What files say they are. The number grows where a new version would compute something else from an old file.
MODEL, TRAINING, CLASSIFIER = "patchvae-model-2", "patchvae-training-2", "patchvae-classifier-2"
WORDS = {
    MODEL: "a model.pt of run.py",
    TRAINING: "a training checkpoint of run.py",
    CLASSIFIER: "a checkpoint of classifier.py",
}
KEPT = 3  # how many checkpoints of a run stay
UNFINISHED = ".unfinished"  # ends the name of a file that is being written; a killed process leaves it behind


def save(path, content):
    """Write `content` (plain values and tensors) to `path`: the old file or the new one is there, never half of one."""

    def fill(file):
        try:
            torch.save(content, file)
        except RuntimeError as error:  # how torch's writer reports a full disk
            raise RunError(f"{path}: could not be written ({str(error).splitlines()[0]}); is the disk full?") from None

    write(path, fill)


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


def save_numbered(folder, step, content, alias=None):
    """Save `content` as `folder`/step_STEP.pt and remove all but the newest KEPT of their kind.

    `alias`: the path of a link to the newest.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"step_{step:09d}.pt")
    save(path, content)
    for older in numbered(folder)[:-KEPT]:
        os.remove(older)
    if alias:
        os.symlink(os.path.relpath(path, os.path.dirname(alias)), f"{alias}{UNFINISHED}")
        os.replace(f"{alias}{UNFINISHED}", alias)


def numbered(folder):
    """The paths of the numbered checkpoints in `folder`, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), "step_*.pt")))


def drop_later(folder, step):
    """Remove the checkpoints after `step`: the run goes on from there, and they belong to what it does no more."""
    for path in numbered(folder):
        if path > os.path.join(folder, f"step_{step:09d}.pt"):
            os.remove(path)


def newest(folder, kind):
    """The content of the newest checkpoint in `folder` that is whole. Raises RunError if there is none."""
    for path in reversed(numbered(folder)):
        try:
            return load(path, kind)
        except RunError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr)
    raise RunError(f"{folder}: no checkpoint in it to go on from; start without --resume, or anew with --overwrite")


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
        what = WORDS.get(str(found), "something else")
        raise RunError(f"{path}: expected {WORDS[kind]}, found {what}; give another file")
    return content
