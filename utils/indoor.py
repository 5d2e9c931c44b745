"""Prepare MIT Indoor 67: move the images that a split list names out of the folder of all images.

    python utils/indoor.py --image-dir data/indoor/Images \\
        --split-file data/indoor/TestImages.txt --target-dir data/indoor/test

    python utils/indoor.py --image-dir data/indoor/Images \\
        --split-file data/indoor/TrainImages.txt --target-dir data/indoor/train --dry

Each line CLASS/FILE of the list moves IMAGE_DIR/CLASS/FILE to TARGET_DIR/CLASS/FILE. Nothing moves unless the
whole list can; a run that was stopped, even by kill -9, is completed by the same command.
"""

import errno
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from os.path import isdir, isfile, islink, lexists, realpath, samefile
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils.console import Parser, RunError, UsageError, run  # noqa: E402

ARCHIVE = "http://groups.csail.mit.edu/vision/LabelMe/NewImages/indoorCVPR_09.tar"
LISTS = "http://web.mit.edu/torralba/www/TestImages.txt and .../TrainImages.txt"
LEFTOVER = ".moving-"  # how the name of a copy begins until it is complete
# Two names, none of them . or .., so that nothing leads out of the folders; nor may an image pass for a leftover.
CLASS_AND_FILE = re.compile(rf"(?!\.\.?/)[^/\0]+/(?!\.\.?$|{re.escape(LEFTOVER)})[^/\0]+")
PROBLEMS_SHOWN = 20


def main(argv=None):
    """Move the listed images; with --dry only check and count them. Returns {class: number of listed images}.

    Raises UsageError for options that cannot be right, RunError for what the user can mend in files and folders.
    """
    options = parse(argv)
    images, target = options.image_dir, options.target_dir
    check_folders(images, target)
    lines = read_list(options.split_file)
    check_lines(lines, images, target, options.split_file)

    waiting = [name for name in lines.values() if lexists(images / name)]
    if not options.dry:
        remove_leftovers({(target / name).parent for name in lines.values()})
        move_all(waiting, images, target)
    counts = Counter(name.split("/")[0] for name in lines.values())
    report(counts, len(waiting), target, options.dry)
    return dict(counts)


def parse(argv):
    """The command line `argv` as a namespace. Raises UsageError."""
    parser = Parser(description=__doc__)
    parser.add_argument("--image-dir", type=Path, required=True, metavar="DIR",
                        help="folder CLASS/FILE of all images, as unpacked; the listed ones are moved out of it")
    parser.add_argument("--split-file", type=Path, required=True, metavar="FILE",
                        help="list with one CLASS/FILE a line; give TestImages.txt first, then TrainImages.txt")
    parser.add_argument("--target-dir", type=Path, required=True, metavar="DIR",
                        help="folder to move them to, beside --image-dir; made if missing, another disk will do")
    parser.add_argument("--dry", action="store_true",
                        help="check everything, show the counts and write nothing; worth a try before the real run")
    return parser.parse_args(argv)


def check_folders(images, target):
    """Raise RunError or UsageError unless images can be moved from the folder `images` to the folder `target`."""
    if not isdir(images):
        raise RunError(f"--image-dir {images} is not a folder; download {ARCHIVE} and unpack it: "
                       f"tar -xf indoorCVPR_09.tar -C {images.parent}")
    if lexists(target) and not isdir(target):
        raise RunError(f"--target-dir {target} is a file or a broken link; remove it or choose another folder")
    real_images, real_target = Path(realpath(images)), Path(realpath(target))
    if real_images.is_relative_to(real_target) or real_target.is_relative_to(real_images):
        raise UsageError(f"--target-dir {target} and --image-dir {images} are one folder or one inside the other; "
                         f"choose a folder beside it, such as {images.parent / 'test'}")


def read_list(path):
    """The list at `path` as {line number: line}, blank lines left out. Raises RunError."""
    try:
        text = path.read_bytes().decode("utf-8-sig")  # the official lists are ASCII; editors may add a mark
    except UnicodeDecodeError:
        raise RunError(f"--split-file {path} is not UTF-8 text; download it again from {LISTS}") from None
    except OSError as error:
        raise RunError(f"--split-file {path}: {error.strerror}; the official lists are {LISTS}") from error
    # Not splitlines(), which also breaks at characters that a file name may hold; nor strip(), as it may hold spaces.
    lines = {number: line.removesuffix("\r") for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    if not lines:
        raise RunError(f"--split-file {path} lists no image; download it again from {LISTS}")
    return lines


def check_lines(lines, images, target, path):
    """Raise RunError, having shown every problem on stderr, unless each of the `lines` of `path` can be moved."""
    problems, first = [], {}
    for number, name in lines.items():
        repeats = first.setdefault(name, number) != number
        problem = f"repeats line {first[name]}" if repeats else problem_of(name, images, target)
        if problem:
            problems.append(f"line {number}: {name!r} {problem}")
    for problem in problems[:PROBLEMS_SHOWN]:
        print(problem, file=sys.stderr)
    if len(problems) > PROBLEMS_SHOWN:
        print(f"... and {len(problems) - PROBLEMS_SHOWN} more", file=sys.stderr)
    if problems:
        raise RunError(f"--split-file {path}: {len(problems)} of {len(lines)} lines cannot be moved, see above; "
                       "nothing was moved: mend them and run the same command again")


def problem_of(name, images, target):
    """What keeps the listed `name` from being moved, as the end of a sentence, or None."""
    if not CLASS_AND_FILE.fullmatch(name):
        return f"is not CLASS/FILE below {images}"
    here, there = images / name, target / name
    for path, fits, kind in ((here.parent, isdir, "folder"), (there.parent, isdir, "folder"),
                             (here, isfile, "file"), (there, isfile, "file")):
        if islink(path):  # moved, it may point nowhere; followed, it may lead out of the folder
            return f"needs a real {kind}, but {path} is a symbolic link; put there what it points to"
        if lexists(path) and not fits(path):
            return f"needs a {kind}, but {path} is none; move that out of the way"
    if not lexists(here):
        return None if lexists(there) else missing(name, images, target)
    if lexists(there) and samefile(here.parent, there.parent):
        return f"would move onto itself: {here.parent} and {there.parent} are the same folder"
    if lexists(there) and digest(here) != digest(there):
        return f"is in {target} already with other content; remove one of the two"
    return None


def missing(name, images, target):
    """The problem of a `name` that neither `images` nor `target` holds, with the folders beside that do."""
    others = [str(folder) for folder in sorted(target.parent.glob("*")) if isfile(folder / name)]
    if others:
        return f"is not in {images} but in {', '.join(others)}; was it moved there by another list?"
    return f"is not in {images}; look for it there or unpack the archive again"


def move_all(names, images, target):
    """Move each of `names` from `images` to `target`, with a bar on a terminal. Raises RunError."""
    with tqdm(names, desc="moving", unit="image", disable=None) as bar:
        for done, name in enumerate(bar):
            try:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                move(images / name, target / name)
            except OSError as error:
                raise RunError(f"{images / name} to {target}: {error.strerror or error}; {done} of {len(names)} "
                               "images are moved, none is lost: mend this and run the same command again") from error


def move(here, there):
    """Move the file `here` to `there`; killed at any point, it is completed by another call. Raises OSError.

    What stands at `there` is never replaced: it must have the content of `here`.
    """
    if not lexists(there):
        try:
            os.rename(here, there)
            return
        except OSError as error:
            if error.errno != errno.EXDEV:  # anything but "on another file system"
                raise
        copy(here, there)
    elif digest(here) != digest(there):
        raise FileExistsError(errno.EEXIST, "the target exists with other content")
    flush(there.parent)  # `there` must be found after a power cut before `here` may go
    os.unlink(here)


def copy(here, there):
    """Copy the file `here` to `there`, which comes into being whole or not at all. Raises OSError."""
    handle, temporary = tempfile.mkstemp(prefix=LEFTOVER, dir=there.parent)
    os.close(handle)
    try:
        shutil.copy2(here, temporary)
        flush(temporary)
        if digest(here) != digest(temporary):
            raise OSError(errno.EIO, "the copy differs from the original; check both disks")
        os.rename(temporary, there)
    finally:
        Path(temporary).unlink(missing_ok=True)


def flush(path):
    """Wait until the file or folder at `path` is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot flush a folder
            raise
    finally:
        os.close(handle)


def digest(path):
    """The SHA-256 of the content of the file at `path`. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def remove_leftovers(folders):
    """Remove the incomplete copies that killed runs left in `folders`."""
    for folder in folders:
        for leftover in folder.glob(f"{LEFTOVER}*"):
            leftover.unlink(missing_ok=True)


def report(counts, moved, target, dry):
    """Print the number of images of each class, then the total."""
    total = sum(counts.values())
    for name, count in sorted(counts.items()):
        print(f"{count:6,d} {name}")
    outcome = "would be moved, nothing was written" if dry else "moved"
    print(f"{total:6,d} images of {len(counts)} classes for {target}: "
          f"{moved:,d} {outcome}; {total - moved:,d} were there")


if __name__ == "__main__":
    run(main)
