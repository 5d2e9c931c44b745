"""Every data set as one row of a table. Read the table first, from below: it is what the rest is for.

A data set opens as an image source for each split: `len()`, `image(index)` -> PIL image, `channels` (1 or 3), `labels`
(int64 array, or None) and `classes` (list of str). utils/batches.py turns sources into batches on the device.
"""

import functools
import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torchvision
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils import cache, shapes
from utils.console import RunError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD_OUT = 0.2  # the share that is held out of a data set without test images
OURS = ("args.json", "classifier_args.json")  # what a folder of run.py or classifier.py holds
SPLITS = ("unlabelled", "train", "test")  # what run.py trains on, what classifier.py trains on, what both test on


# ---------------------------------------------------------------------------------------------------- image sources


class Files:
    """Image files below `root`, or a `part` of them. The paths lie in one array: millions cost workers no memory."""

    channels = 3

    def __init__(self, root, paths, labels=None, classes=(), part=""):
        self.root, self.part = os.fspath(root), part
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels, self.classes = _label_array(labels), list(classes)

    def __len__(self):
        return len(self.paths)

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def image(self, index):
        path = self.path(index)
        try:
            with Image.open(path) as image:
                return _eight_bit(image).convert("RGB")
        except FileNotFoundError:
            raise RunError(f"{path}: the image is not there (any more); restore it and start again") from None
        except Exception as error:  # Pillow raises many kinds for a broken file
            raise RunError(f"{path}: cannot be decoded ({error}); repair or remove it") from None

    def lots(self):
        """A number from 0 to 1 for each image, as good as drawn, that depends on its path alone: N floats."""
        drawn = [int.from_bytes(hashlib.blake2b(path, digest_size=8).digest()) for path in self.paths.tolist()]
        return np.array(drawn) / 2**64

    def listing(self):
        """A cache.Listing: what tells whether a file changed; -1 for the size and time of one that is not there."""
        stamps = np.fromiter(map(_stamp, map(self.path, range(len(self)))), np.dtype((np.int64, 2)), len(self))
        return cache.Listing(self.paths, *stamps.T)

    def subset(self, chosen, part=""):
        """The images at the positions `chosen`, an int array; `part` names them for the cache on disk."""
        labels = None if self.labels is None else self.labels[chosen]
        part = part or f"{self.part}-{hashlib.sha256(chosen.tobytes()).hexdigest()[:8]}".strip("-")
        subset = Files(self.root, [], labels, self.classes, part)
        subset.paths = self.paths[chosen]
        return subset


def _eight_bit(image):
    """A PIL image as it is, or of 16 bits brought to 8. Raises ValueError where nobody knows what white is."""
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        return Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, whose white is not known; convert it to 8 or 16 bits")
    return image


def _stamp(path):
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


class Arrays:
    """Images that are in memory already: N×H×W (grey) or N×H×W×3, uint8."""

    def __init__(self, pixels, labels, classes):
        self.pixels, self.labels, self.classes = pixels, _label_array(labels), list(classes)
        self.channels = 1 if pixels.ndim == 3 else 3

    def __len__(self):
        return len(self.pixels)

    def lots(self):
        """A number from 0 to 1 for each image, of every class evenly spread, drawn once and for all: N floats."""
        order, lots = np.random.default_rng(0).permutation(len(self)), np.empty(len(self))
        order = order[np.argsort(self.labels[order], kind="stable")]  # class by class
        lots[order] = (np.arange(len(self)) - 1) % 5 / 5
        return lots

    def image(self, index):
        return Image.fromarray(self.pixels[index])

    def subset(self, chosen, part=""):
        """The images at the positions `chosen`, an int array."""
        return Arrays(self.pixels[chosen], self.labels[chosen], self.classes)


class Drawings:
    """Scenes of utils/shapes.py. `binary`: white on black. `pixel_labels(index)` tells the truth about each pixel."""

    def __init__(self, length, seed, kinds=shapes.KINDS, binary=False):
        self.seed, self.classes, self.binary = seed, list(kinds), binary
        self.numbers = np.arange(length)  # of the scenes in the endless sequence `seed`
        self.labels = self.numbers % len(kinds)  # the kind of the main figure, see shapes.scene
        self.channels = 1 if binary else 3
        self.size = 32  # pixels per side; open_split sets what is asked for, so that nothing is resized

    def __len__(self):
        return len(self.numbers)

    def subset(self, chosen, part=""):
        """The scenes at the positions `chosen`, an int array."""
        subset = Drawings(0, self.seed, tuple(self.classes), self.binary)
        subset.size, subset.numbers, subset.labels = self.size, self.numbers[chosen], self.labels[chosen]
        return subset

    def image(self, index):
        scene = self.scene(index)
        return scene.draw_binary(self.size) if self.binary else scene.draw(self.size)

    def scene(self, index):
        return shapes.scene(self.seed, int(self.numbers[index]), tuple(self.classes), overlap=not self.binary)

    def pixel_labels(self, index):
        """Exact labels of image `index`: a dict of size×size uint8 arrays, see shapes.Scene.labels."""
        return self.scene(index).labels(self.size)


def _label_array(labels):
    return None if labels is None else np.asarray(labels, dtype=np.int64)


# ---------------------------------------------------------------------------------------------------- opening them


def torchvision_set(name, folder):
    """A data set that torchvision knows and downloads into `root`/`folder`."""

    def open_split(root, split):
        load = functools.partial(getattr(torchvision.datasets, name), root, train=split != "test")
        try:
            found = load(download=False)
        except (RuntimeError, ValueError):  # torchvision's words for absent and for damaged files
            found = _download(load, name, Path(root, folder))
        return Arrays(np.asarray(found.data), found.targets, found.classes)

    return open_split


def _download(load, name, folder):
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
        if "test" in folder_of_split:
            return labelled_folder(Path(root, folder_of_split.get(split, "train")))
        return held_out(labelled_folder(Path(root, "train")), split)

    return open_split


def any_folder(root, split):
    """Anyone's images: train/ with val/ or test/, or CLASS/*, or images without labels. See the README."""
    root = Path(root)
    if not root.is_dir():
        raise RunError(f"{root}: no such folder; give --data-folder the folder that holds the images")
    if not (root / "train").is_dir():
        return held_out(_labelled_or_flat(root), split)
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if test is None:
        return held_out(_labelled_or_flat(root / "train"), split)
    return _labelled_or_flat(test if split == "test" else root / "train")


def _labelled_or_flat(folder):
    """Images directly in the folder mean that its subfolders are no classes."""
    entries = list(os.scandir(folder))
    is_flat = any(_is_image(entry.name) and entry.is_file() for entry in entries)
    has_classes = any(_is_class(entry) for entry in entries)
    return labelled_folder(folder) if has_classes and not is_flat else flat_folder(folder)


def labelled_folder(folder):
    """`folder`/CLASS/*, images at any depth below a class."""
    if not Path(folder).is_dir():
        raise RunError(f"{folder}: no such folder; expected {folder}/CLASS/* with the images of each class")
    try:
        found = _ClassFolder(folder, is_valid_file=lambda path: _is_image(path[len(os.fspath(folder)) :]))
    except FileNotFoundError as error:
        raise RunError(f"{folder}: {str(error).splitlines()[0]} Expected {folder}/CLASS/* with images") from None
    paths, labels = zip(*found.samples)
    return Files(folder, [os.path.relpath(path, folder) for path in paths], labels, found.classes)


class _ClassFolder(torchvision.datasets.ImageFolder):
    def find_classes(self, directory):
        classes = sorted(entry.name for entry in os.scandir(directory) if _is_class(entry))
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return classes, {name: label for label, name in enumerate(classes)}


def _is_class(entry):
    return entry.is_dir() and _is_open(entry.path)


def _is_open(folder):
    """Whether a folder's images are to learn from: it is not hidden, as our own CACHE_FOLDER, and no run wrote it."""
    is_hidden = os.path.basename(folder).startswith(".")
    return not is_hidden and not any(os.path.exists(os.path.join(folder, name)) for name in OURS)


def flat_folder(folder):
    """All images at any depth below `folder`, in the order of their paths, without labels."""
    paths, seen = [], set()
    for place, folders, names in os.walk(folder, onerror=_pass_over, followlinks=True):
        itself = os.stat(place)
        if (itself.st_dev, itself.st_ino) in seen:
            folders.clear()  # a link led here again
            continue
        seen.add((itself.st_dev, itself.st_ino))
        folders[:] = sorted(name for name in folders if _is_open(os.path.join(place, name)))
        paths += [os.path.relpath(os.path.join(place, name), folder) for name in names if _is_image(name)]
    if not paths:
        raise RunError(f"{folder}: no images in it; known endings are {' '.join(IMG_EXTENSIONS)}")
    return Files(folder, sorted(paths))


def _pass_over(error):
    print(f"{error.filename}: {error.strerror}; what is in it is left out")


def _is_image(path):
    """Whether the path, relative to the data folder, is that of an image, and nothing in it is hidden."""
    return path.lower().endswith(IMG_EXTENSIONS) and not any(name.startswith(".") for name in path.split(os.sep))


def held_out(source, split):
    """About a fifth of `source` for the split `test`, the rest for the others; the same whatever --seed is.

    Each image has a lot of its own, so that it stays where it is when others come or go. Where all of a class would be
    held out, one is not; where nothing would be, one is.
    """
    if len(source) < 2:
        raise RunError(f"{getattr(source, 'root', 'the data set')}: one image is too few; two or more are needed")
    lots = source.lots()
    chosen = lots < HELD_OUT
    labels = np.zeros(len(source), int) if source.labels is None else source.labels
    for label in np.setdiff1d(labels, labels[~chosen]):  # all of it would be held out
        members = np.flatnonzero(labels == label)
        chosen[members[lots[members].argmax()]] = False
    if not chosen.any():
        chosen[lots.argmin()] = True
    if split == "test":
        return source.subset(np.flatnonzero(chosen), "held-out")
    return source.subset(np.flatnonzero(~chosen), "rest")


def places205(root, split):
    """Places205 as its authors pack it: CSV lists of `path label` beside the images."""
    name = "val" if split == "test" else "train"
    table = Path(root, "trainvalsplit_places205", f"{name}_places205.csv")
    images = Path(root, "data/vision/torralba/deeplearning/images256")
    if not table.is_file():
        raise RunError(f"{table}: no such file; expected it beside {images}, as in the README's layouts")
    paths, labels = [], []
    for number, line in enumerate(table.read_text().splitlines(), start=1):
        path, _, label = line.strip().rpartition(" ")
        if not line.strip():
            continue
        if not path or not label.isdecimal():
            raise RunError(f"{table}: line {number} is not 'path label': {line[:60]!r}")
        paths.append(path.lstrip("/"))  # below `images`, also where the list says "/a/abbey/…"
        labels.append(int(label))
    if not paths:
        raise RunError(f"{table}: the list is empty")
    names = {label: os.path.dirname(path) for path, label in zip(paths, labels)}
    return Files(images, paths, labels, [names.get(label, str(label)) for label in range(max(labels) + 1)], name)


def drawings(**style):
    """Scenes drawn on the fly: 50,000 to train on and 2,000 others to test on."""

    def open_split(root, split):
        return Drawings(2_000, seed=1, **style) if split == "test" else Drawings(50_000, seed=0, **style)

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
