"""Every data set as one row of the table at the end of this file; above it, how they are opened.

A data set opens as an image source for each split: `len()`, `image(index)` -> PIL image, `channels` (1 or 3), `labels`
(int64 array, or None), `classes` (list of str, printable). utils/batches.py turns sources into batches on the device.
Splits: "unlabelled" is what run.py trains on, "train" what classifier.py trains on, "test" what both test on, and "all"
the images of a folder that has no splits.
"""

import contextlib
import copy
import errno
import functools
import hashlib
import os
import socket
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torchvision
from PIL import Image, ImageOps, PngImagePlugin

from utils import shapes
from utils.runtime import RunError, explain, printable, read_lines

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLACES = 205  # classes of Places205
HELD_OUT = 0.2  # the share that is held out of a data set without test images
SPLITS = ("unlabelled", "train", "test", "all")
TRAIN_NAMES = ("train", "training")  # of folders, in any case
TEST_NAMES = ("val", "valid", "validation", "test", "testing")
CLUTTER = ("__macosx", "@eadir")  # what archives and network disks leave beside images
OURS = ("args.json", "classifier_args.json", "parts.json", "evaluated")  # a folder that holds one of them is a run's
NO_PHOTOGRAPHS = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}  # that Pillow knows, but cannot draw
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # colour profiles and captions may be long
say_once, said_of_images = functools.cache(print), set()


# ---------------------------------------------------------------------------------------------------- image sources


class Source:
    """What all image sources share: `items`, an array of N, from each of which image() makes one; `labels`: of N."""

    channels = 3

    def __init__(self, items, labels=None, classes=()):
        self.items, self.classes = items, [printable(name) for name in classes]
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)

    def __len__(self):
        return len(self.items)

    def subset(self, chosen, part=""):
        """The images at the positions `chosen`, an int array; `part` names them for the cache of files on disk."""
        some = copy.copy(self)
        some.items, some.labels = self.items[chosen], None if self.labels is None else self.labels[chosen]
        return some


class Files(Source):
    """Image files below `root`, or a `part` of them. The paths lie in one array: millions cost workers no memory."""

    def __init__(self, root, paths, labels=None, classes=(), part=""):
        super().__init__(np.array([os.fsencode(path) for path in paths]), labels, classes)
        self.root, self.part = os.fspath(root), part

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(self.items[index]))

    def image(self, index):
        return read_image(self.path(index))

    def chances(self):
        """A number from 0 to 1 for each image, as good as drawn, that depends on its path alone: N floats."""
        drawn = [int.from_bytes(hashlib.blake2b(path, digest_size=8).digest()) for path in self.items.tolist()]
        return np.array(drawn) / 2**64

    def subset(self, chosen, part=""):
        """As of every source; what has no name is known by the positions."""
        some = super().subset(chosen)
        some.part = part or f"{self.part}-{hashlib.sha256(chosen.tobytes()).hexdigest()[:8]}".strip("-")
        return some


def read_image(path):
    """The image file `path` as it is seen: a PIL RGB image, upright, on white if transparent. Raises RunError."""
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # large, but read all the same
        picture = _decoded(path)
    for remark in {str(remark.message) for remark in remarks} - said_of_images:
        print(f"{path}: {remark} (said of the first such image only)", file=sys.stderr)
        said_of_images.add(remark)
    return picture


def _decoded(path):
    if not os.path.isfile(path):  # a pipe would never end
        raise RunError(f"{path}: the image is not there (any more); restore it and start again")
    try:
        with Image.open(path) as image:
            picture = _eight_bit(image)
            with contextlib.suppress(Exception):  # what cannot be read of the camera's notes spoils no picture
                picture = ImageOps.exif_transpose(picture)
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        raise RunError(f"{path}: has more than {limit:.0f} megapixels; scale it down, or use --skip-broken") from None
    except Exception as error:  # Pillow raises many kinds for a broken file
        if getattr(error, "errno", None) == errno.EMFILE:  # of the machine, not of the file
            raise RunError(explain(error)) from None
        raise RunError(
            f"{path}: cannot be decoded ({error}); repair or remove it, or leave such images out with --skip-broken"
        ) from None


def _eight_bit(image):
    """A PIL image as it is, or of 9 to 16 bits brought to 8. Raises ValueError where nobody knows what white is."""
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        tags = getattr(image, "tag_v2", {})
        bits, white = tags.get(258, (16,))[0], tags.get(281)  # BitsPerSample, MaxSampleValue
        white = white[0] if white else 2**bits - 1
        shades = np.asarray(image)
        eight = (shades * (255 / white) + 0.5).clip(0, 255).astype(np.uint8)
        eight[shades == image.info.get("transparency", -1)] = 255
        picture = Image.fromarray(eight)
        picture.info["exif"] = image.info.get("exif", b"")
        return picture
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, whose white is not known; convert it to 8 or 16 bits")
    return image


class Arrays(Source):
    """Images that are in memory already: N×H×W (grey) or N×H×W×3, uint8."""

    def __init__(self, pixels, labels, classes):
        super().__init__(pixels, labels, classes)
        self.channels = 1 if pixels.ndim == 3 else 3

    def chances(self):
        """A number from 0 to 1 for each image, of every class evenly spread, drawn once and for all: N floats."""
        order, chances = np.random.default_rng(0).permutation(len(self)), np.empty(len(self))
        order = order[np.argsort(self.labels[order], kind="stable")]  # class by class
        chances[order] = (np.arange(len(self)) - 1) % 5 / 5
        return chances

    def image(self, index):
        return Image.fromarray(self.items[index])


class Drawings(Source):
    """Scenes of utils/shapes.py, `items`: their numbers in the endless sequence `seed`. `binary`: white on black."""

    def __init__(self, length, seed, kinds=shapes.KINDS, binary=False):
        super().__init__(np.arange(length), np.arange(length) % len(kinds), kinds)  # of the main figure, see scene
        self.seed, self.binary, self.channels = seed, binary, 1 if binary else 3
        self.size = 32  # pixels per side; open_split sets what is asked for, so that nothing is resized

    def image(self, index):
        scene = self.scene(index)
        return scene.draw_binary(self.size) if self.binary else scene.draw(self.size)

    def scene(self, index):
        return shapes.scene(self.seed, int(self.items[index]), tuple(self.classes), overlap=not self.binary)


# ---------------------------------------------------------------------------------------------------- folders


@functools.cache
def readable_endings():
    """The endings of the files that Pillow reads here: a set of str such as ".jpg"."""
    Image.init()
    known = Image.registered_extensions().items()
    return {ending for ending, kind in known if kind in Image.OPEN and kind not in NO_PHOTOGRAPHS}


def scan(folder, passed_over):
    """The names of the folders and of the images in `folder`, in order: two lists of str.

    `passed_over`, a Counter, is told what else is there, but for what is hidden.
    """
    found = {"folder": [], "image": []}
    for name, kind in sorted((entry.name, _kind(entry)) for entry in os.scandir(folder) if entry.name[0] != "."):
        if kind in found:
            found[kind].append(name)
        else:
            passed_over[kind] += 1
    return found["folder"], found["image"]


def _kind(entry):
    """What an os.DirEntry is: folder, image, or why it is neither."""
    ending = os.path.splitext(entry.name)[1].lower()
    try:
        if entry.is_dir():
            is_run = any(os.path.exists(os.path.join(entry.path, name)) for name in OURS)
            return "folder of a run" if is_run else entry.name if entry.name.lower() in CLUTTER else "folder"
        if not entry.is_file():
            return "link to nothing or special file"
    except OSError as error:
        return error.strerror.lower()
    return "image" if ending in readable_endings() else printable(ending) or "without ending"


def find_images(folder, passed_over):
    """The images at any depth below `folder`, each real folder once: relative paths. Raises RunError.

    `passed_over`: see scan.
    """
    waiting, seen, paths = [""], {_identity(folder)}, []
    while waiting:
        place = waiting.pop()
        try:
            folders, images = scan(os.path.join(folder, place), passed_over)
            inside = [(os.path.join(place, name), _identity(os.path.join(folder, place, name))) for name in folders]
        except OSError as error:
            passed_over[error.strerror.lower()] += 1
            continue
        train, test = splits_among(folders)
        if train and test:
            part = os.path.join(folder, place).rstrip("/")
            raise RunError(f"{part} has {train[0]} and {test[0]}, a data set of its own: give --data-folder {part}")
        new = {identity: path for path, identity in reversed(inside) if identity not in seen}
        seen.update(new)
        waiting += new.values()
        paths += [os.path.join(place, name) for name in images]
        passed_over["link to a known folder"] += len(inside) - len(new)
        passed_over["empty folder"] += not (folders or images)
    return paths


def _identity(folder):
    found = os.stat(folder)
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(folder)  # not all disks number files


def splits_among(names):
    """Those of the folders `names` that are called as training images are, and as test images: two lists of str."""
    train, test = ([name for usual in known for name in names if name.lower() == usual]
                   for known in (TRAIN_NAMES, TEST_NAMES))
    return train, test


def check_apart(train, test):
    """Raises RunError where the folders of training and of test images are one, by a link."""
    if train.is_dir() and test.is_dir() and os.path.samefile(train, test):
        raise RunError(f"{train} and {test} are the same folder: there is nothing to test on; remove one")


def say_passed_over(folder, passed_over):
    """Say what was passed over in a Counter, once. Returns it in words."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in passed_over.most_common() if count)
    if reasons:
        say_once(f"{folder}: passed over {reasons}")
    return reasons


def image_folder(folder, classes=()):
    """The images of `folder`: CLASS/* at any depth below a class, or without labels where images lie beside folders.

    `classes`: the names of the labels 0, 1, … as another split has them; new ones follow. Raises RunError.
    """
    if not os.path.isdir(folder):
        raise RunError(f"{folder}: no such folder; expected {folder}/CLASS/* with images")
    if os.path.isfile(table := os.path.join(folder, "val_annotations.txt")):
        return annotated_folder(folder, table, classes)
    passed_over = Counter()
    paths = find_images(folder, passed_over)
    reasons = say_passed_over(folder, passed_over)
    if not paths:
        known = " ".join(sorted(readable_endings()))
        raise RunError(f"{folder}: no images in it (passed over: {reasons or 'nothing'}); convert others to {known}")
    loose = [path for path in paths if os.sep not in path]
    if loose:
        if len(loose) < len(paths):
            say_once(f"{folder}: {printable(min(loose))} lies beside folders, so all images are taken without classes")
        return Files(folder, sorted(paths))
    paths.sort(key=lambda path: (path.partition(os.sep)[0], *os.path.split(path)))
    owners = [path.partition(os.sep)[0] for path in paths]  # the class of each image
    # Of two spellings of an accent, macOS has its own: a class is the same in both.
    shown = {owner: unicodedata.normalize("NFC", printable(owner)) for owner in dict.fromkeys(owners)}
    names = list(dict.fromkeys([*classes, *shown.values()]))
    labels = {owner: names.index(name) for owner, name in shown.items()}
    return Files(folder, paths, [labels[owner] for owner in owners], names)


def annotated_folder(folder, table, classes):
    """Tiny-ImageNet's way: images/*, and their classes in the file `table`, FILE and CLASS in each line."""
    rows = [line.split("\t") for line in read_lines(table) if line.strip()]
    if not rows or min(map(len, rows)) < 2:
        raise RunError(f"{table}: expected the name of a file, a tab and its class in every line")
    names = [*classes, *sorted({row[1] for row in rows} - set(classes))]
    return Files(folder, [f"images/{row[0]}" for row in rows], [names.index(row[1]) for row in rows], names)


def held_out(source, split):
    """About a fifth of `source` for the split `test`, the rest for training, the same whatever --seed is; or all.

    Each image has a chance of its own, so that it stays where it is when others come or go. Where all of a class would
    be held out, one is not; where nothing would be, one is.
    """
    if split == "all":
        return source
    if len(source) < 2:
        raise RunError(f"{getattr(source, 'root', 'the data set')}: one image is too few; two or more are needed")
    chances = source.chances()
    chosen = chances < HELD_OUT
    labels = np.zeros(len(source), int) if source.labels is None else source.labels
    for label in np.setdiff1d(labels, labels[~chosen]):  # all of it would be held out
        members = np.flatnonzero(labels == label)
        chosen[members[chances[members].argmax()]] = False
    if not chosen.any():
        chosen[chances.argmin()] = True
    if split == "test":
        return source.subset(np.flatnonzero(chosen), "held-out")
    return source.subset(np.flatnonzero(~chosen), "rest")


# ---------------------------------------------------------------------------------------------------- opening them


def torchvision_set(name, folder):
    """One that torchvision opens with train=…, as CIFAR and MNIST, and downloads into `root`/`folder`."""

    def open_split(root, split):
        load = functools.partial(getattr(torchvision.datasets, name), root, train=split not in ("test", "all"))
        try:
            found = load(download=False)
        except (RuntimeError, ValueError):  # torchvision's words for absent and for damaged files
            found = _download(load, name, Path(root), Path(root, folder))
        return Arrays(np.asarray(found.data), found.targets, found.classes)

    return open_split


def _download(load, name, root, folder):
    inside, images = scan(root, Counter()) if root.is_dir() else ((), ())
    are_classes = inside and all(scan(root / one, Counter())[1] for one in inside)
    if images or are_classes or any(splits_among(inside)):
        raise RunError(f"{root} holds images, but not {name}; add --dataset folder to take them")
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        return load(download=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(
            f"{name}: not found in {folder} and not to be downloaded ({str(error).strip()}); put the extracted files "
            f"into {folder}, or try --dataset shapes, which needs none"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)


def class_folders(**folder_of_split):
    """Folders of CLASS/*, one per split; a split without a name trains on `train`; no `test`: a fifth is held out."""

    def open_split(root, split):
        train = Path(root, "train")
        name = folder_of_split.get("test" if split == "all" else split, "train")
        check_apart(train, Path(root, folder_of_split.get("test", "")))
        names = image_folder(train).classes if train.is_dir() and name != "train" else ()
        found = image_folder(Path(root, name), names)
        if found.labels is None:
            raise RunError(f"{found.root}: its images lie in no class folders; expected {found.root}/CLASS/* alone")
        return found if "test" in folder_of_split else held_out(found, split)

    return open_split


def any_folder(root, split):
    """Anyone's images: training and test images in folders of the usual names, or CLASS/*, or images without labels."""
    if not os.path.isdir(root):
        raise RunError(f"{root}: no such folder; give --data-folder the folder that holds the images")
    passed_over = Counter()
    names, images = scan(root, passed_over)
    train, test = splits_among(names)
    if not train and not test:
        return held_out(image_folder(root), split)
    others = sorted(set(names) - {*train[:1], *test[:1]})
    if len(train) != 1 or (others and not test):
        raise RunError(
            f"{root}: holds {', '.join(map(printable, names[:5]))}, and it is not clear what to train on; keep train "
            "and val, or give --data-folder the folder of the images"
        )
    passed_over.update({f"{name}/": 1 for name in others}, image=len(images))
    say_passed_over(root, passed_over)
    if not test:
        return held_out(image_folder(Path(root, train[0])), split)
    check_apart(Path(root, train[0]), Path(root, test[0]))
    if split in ("unlabelled", "train"):
        return image_folder(Path(root, train[0]))
    return image_folder(Path(root, test[0]), image_folder(Path(root, train[0])).classes)


def places205(root, split):
    """Places205 as its authors pack it: CSV lists of `path label` beside the images. The label is the class."""
    name = "train" if split in ("unlabelled", "train") else "val"
    table = Path(root, "trainvalsplit_places205", f"{name}_places205.csv")
    images = Path(root, "data/vision/torralba/deeplearning/images256")
    if not table.is_file():
        raise RunError(f"{table}: no such file; expected it beside {images}, as in the README's layouts")
    paths, labels = [], []
    for number, line in enumerate(read_lines(table), start=1):
        path, _, label = line.strip().rpartition(" ")
        if not line.strip():
            continue
        if not path or not (label.isascii() and label.isdecimal()):
            raise RunError(f"{table}: line {number} is not 'path label': {line[:60]!r}")
        if int(label) >= PLACES:
            raise RunError(f"{table}: line {number} has the label {label[:20]}; those of Places205 end at {PLACES - 1}")
        paths.append(path.lstrip("/"))  # below `images`, also where the list says "/a/abbey/…"
        labels.append(int(label))
    if not paths:
        raise RunError(f"{table}: the list is empty")
    names = {label: os.path.dirname(path) for path, label in zip(paths, labels)}  # to be shown, no more
    return Files(images, paths, labels, [names.get(label) or str(label) for label in range(max(labels) + 1)], name)


def drawings(**style):
    """Scenes drawn on the fly: 50,000 to train on and 2,000 others to test on."""

    def open_split(root, split):
        is_test = split in ("test", "all")
        return Drawings(2_000, seed=1, **style) if is_test else Drawings(50_000, seed=0, **style)

    return open_split


def digits(root, split):
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels; every fifth is held out."""
    import sklearn.datasets  # takes a second: only those who ask for digits wait

    bundled = sklearn.datasets.load_digits()
    pixels = np.round(bundled.images * (255 / 16)).astype(np.uint8)
    return held_out(Arrays(pixels, bundled.target, [str(name) for name in bundled.target_names]), split)


# ---------------------------------------------------------------------------------------------------- the table


class DataSet(NamedTuple):
    """One row of the table."""

    open: Callable  # (root, split) -> image source
    size: int = 64  # default of --size, pixels per side
    channels: int = 3
    flip: bool = True  # whether a mirrored image is an image of the same kind


DATA_SETS = {
    "cifar100": DataSet(torchvision_set("CIFAR100", "cifar-100-python"), size=32),
    "cifar10": DataSet(torchvision_set("CIFAR10", "cifar-10-batches-py"), size=32),
    "mnist": DataSet(torchvision_set("MNIST", "MNIST/raw"), size=32, channels=1, flip=False),
    "imagenet": DataSet(class_folders(train="train", test="val")),
    "places205": DataSet(places205),
    "indoor": DataSet(class_folders(unlabelled="allminustest", train="train", test="test")),
    "miniimagenet": DataSet(class_folders(train="train")),
    "folder": DataSet(any_folder),
    "shapes": DataSet(drawings(), size=32),
    "binshapes": DataSet(drawings(binary=True), size=32, channels=1),
    "bincircles": DataSet(drawings(kinds=("circle",), binary=True), size=32, channels=1),
    "digits": DataSet(digits, size=32, channels=1, flip=False),
}


def open_split(name, root, split, size):
    """The image source of data set `name` below the folder `root`. Raises RunError where files are missing."""
    source = DATA_SETS[name].open(root, split)
    if isinstance(source, Drawings):
        source.size = size
    return source


def normalisation(channels, inet):
    """Mean and standard deviation per channel of pixels in [0, 1]: two lists. Grey under `inet`: the channels' mean."""
    if not inet:
        return [0.5] * channels, [0.5] * channels
    if channels == 1:
        return [float(np.mean(IMAGENET_MEAN))], [float(np.mean(IMAGENET_STD))]
    return list(IMAGENET_MEAN), list(IMAGENET_STD)
