"""Prepare MIT Indoor 67: move the images that a list names out of the folder of all images.

    python utils/indoor.py --image-dir data/indoor/Images \\
        --split-file data/indoor/TestImages.txt --target-dir data/indoor/test

Each line CLASS/FILE of the list moves IMAGE_DIR/CLASS/FILE to TARGET_DIR/CLASS/FILE. Nothing moves unless the whole
list can; a run that was stopped, even by kill -9, is completed by the same command.
"""

import errno
import filecmp
import os
import re
import shutil
import sys
from collections import Counter
from os.path import commonpath, isdir, isfile, islink, lexists, realpath, samefile
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.options import Parser
from utils.runtime import RunError, UsageError, read_lines, start

CLASS_AND_FILE = re.compile(r"[^./\0][^/\0]*/[^./\0][^/\0]*")  # neither begins with a dot: no "..", nothing hidden
UNFINISHED = ".moving-"  # begins the name of a copy until it is complete


def main(argv=None):
    """Move the listed images, or with --dry only check them. Returns how many had to be moved."""
    parser = Parser(description=__doc__)
    parser.add_argument("--image-dir", type=Path, required=True, help="folder of all images; the listed ones leave it")
    parser.add_argument("--split-file", type=Path, required=True, help="TestImages.txt first, then TrainImages.txt")
    parser.add_argument("--target-dir", type=Path, required=True, help="made if missing; another disk will do")
    parser.add_argument("--dry", action="store_true", help="check everything, show the counts, and write nothing")
    options = parser.parse_args(argv)
    images, target = options.image_dir, options.target_dir
    names = [line for line in read_lines(options.split_file) if line.strip()]  # spaces around a name belong to it
    check(names, images, target)
    waiting = [name for name in names if isfile(images / name)]
    if not options.dry:
        try:
            move(waiting, images, target)
        except OSError as error:
            raise RunError(f"{error}; no image is lost: mend this and run the same command again") from error
    print(f"{len(waiting):,} images {'to move' if options.dry else 'moved'}, {len(names) - len(waiting):,} in place")
    return len(waiting)


def check(names, images, target):
    """Raise RunError or UsageError unless all `names` can be moved from the folder `images` to the folder `target`."""
    folders = [realpath(images), realpath(target)]
    if commonpath(folders) in folders:
        raise UsageError(f"--target-dir {target} and --image-dir {images} lie one inside the other; choose another")
    if not isdir(images):
        raise RunError(f"--image-dir {images} is not a folder; README.md shows how to download and unpack it")
    if lexists(target) and not isdir(target):
        raise RunError(f"--target-dir {target} is not a folder; remove it or choose another")
    if not names:
        raise RunError("--split-file lists no image; README.md shows where to download it")
    problems = [f"{name[:200]!r} is listed more than once" for name, count in Counter(names).items() if count > 1]
    problems += [f"{name[:200]!r} {problem}" for name in names if (problem := problem_of(name, images, target))]
    if problems:
        first = "; ".join(problems[:5])
        raise RunError(f"{len(problems):,} of {len(names):,} images cannot be moved, so none was; the first: {first}")


def problem_of(name, images, target):
    """What keeps the listed `name` from being moved, as the end of a sentence, or None. Raises OSError."""
    here, there = images / name, target / name
    if not CLASS_AND_FILE.fullmatch(name):
        return "is not CLASS/FILE"
    if any(islink(path) for path in (here.parent, here, there.parent, there)):
        return "is a symbolic link or lies in one; put there what it points to"
    if not isfile(here):
        return None if isfile(there) else f"is not a file in {images}"
    if lexists(there.parent) and (not isdir(there.parent) or samefile(here.parent, there.parent)):
        return f"cannot go to {there.parent}, which is a file or, by a bind mount, the folder it comes from"
    if lexists(there) and not filecmp.cmp(here, there, shallow=False):
        return f"is in {target} with other content; remove one of the two"


def move(names, images, target):
    """Move the files `names` from the folder `images` to the folder `target`. Raises OSError."""
    for leftover in target.glob(f"*/{UNFINISHED}*"):  # of a run that was stopped
        leftover.unlink(missing_ok=True)
    for name in tqdm(names, desc="moving", unit="image", disable=None):
        here, there = images / name, target / name
        there.parent.mkdir(parents=True, exist_ok=True)
        if not lexists(there):
            rename_or_copy(here, there)
        elif not filecmp.cmp(here, there, shallow=False):
            raise OSError(f"{there} appeared with other content than {here}")
    copied = [images / name for name in names if lexists(images / name)]
    if copied:
        os.sync()  # the copies have to survive a power cut before their originals go
    for original in copied:
        original.unlink(missing_ok=True)


def rename_or_copy(here, there):
    """Rename the file `here` to `there` or, if that lies on another disk, copy it. Raises OSError."""
    try:
        os.rename(here, there)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        unfinished = there.with_name(f"{UNFINISHED}{os.urandom(8).hex()}")  # two runs at once copy apart
        shutil.copy2(here, unfinished)
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        if not filecmp.cmp(here, unfinished, shallow=False):
            raise OSError(f"the copy of {here} to {there} differs from it; check both disks") from None
        os.rename(unfinished, there)


if __name__ == "__main__":
    start(main)
