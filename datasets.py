"""Every data set as one row of a table, and its images as normalised batches on the training device.

    files or drawing code → PIL image → resized, centre-cropped uint8 pixels → flipped, normalised batch on the device

An image source has `len()`, `image(index)` -> PIL image, `labels` (int64 array, or None) and `classes` (list of str).
"""

import functools
import os
import signal
import socket
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as transforms

from utils import shapes
from utils.console import RunError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD_OUT = 5  # where a data set has no test images, a fixed shuffle's every fifth is held out
SPLITS = ("unlabelled", "train", "test")  # what run.py trains on, what classifier.py trains on, what both test on


# ---------------------------------------------------------------------------------------------------- image sources


class Files:
    """Image files below `root`. The paths lie in one array, so that millions of them cost workers no memory."""

    def __init__(self, root, paths, labels=None, classes=()):
        self.root = os.fspath(root)
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels, self.classes = _label_array(labels), list(classes)

    def __len__(self):
        return len(self.paths)

    def image(self, index):
        path = os.path.join(self.root, os.fsdecode(self.paths[index]))
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except FileNotFoundError:
            raise RunError(f"{path}: the image is not there (any more); restore it and start again") from None
        except Exception as error:  # Pillow raises many kinds for a broken file
            raise RunError(f"{path}: cannot be decoded ({error}); repair or remove it") from None

    def subset(self, chosen):
        """The images at the positions `chosen`, an int array."""
        part = Files(self.root, [], None if self.labels is None else self.labels[chosen], self.classes)
        part.paths = self.paths[chosen]
        return part


class Arrays:
    """Images that are in memory already: N×H×W (grey) or N×H×W×3, uint8."""

    def __init__(self, pixels, labels, classes):
        self.pixels, self.labels, self.classes = pixels, _label_array(labels), list(classes)

    def __len__(self):
        return len(self.pixels)

    def image(self, index):
        return Image.fromarray(self.pixels[index])

    def subset(self, chosen):
        """The images at the positions `chosen`, an int array."""
        return Arrays(self.pixels[chosen], self.labels[chosen], self.classes)


class Drawings:
    """Scenes of utils/shapes.py. `binary`: white on black. `pixel_labels(index, size)` tells the truth per pixel."""

    def __init__(self, length, seed, kinds=shapes.KINDS, binary=False):
        self.length, self.seed, self.classes, self.binary = length, seed, list(kinds), binary
        self.labels = np.arange(length) % len(kinds)  # the kind of the main figure, see shapes.scene
        self.size = 32  # pixels per side; open_split sets what is asked for, so that nothing is resized

    def __len__(self):
        return self.length

    def image(self, index):
        scene = self.scene(index)
        return scene.draw_binary(self.size) if self.binary else scene.draw(self.size)

    def scene(self, index):
        return shapes.scene(self.seed, index, tuple(self.classes), overlap=not self.binary)

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
        except RuntimeError:  # torchvision's word for absent or damaged files
            found = _download(load, name, Path(root, folder))
        return Arrays(np.asarray(found.data), found.targets, found.classes)

    return open_split


def _download(load, name, folder):
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        return load(download=True)
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"{name}: not found in {folder} and not to be downloaded ({str(error).strip()}); put the extracted files "
            f"into {folder}, or try --dataset shapes, which needs none"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)


def class_folders(**folder_of_split):
    """Folders of CLASS/*, one per split; a split that is not named trains on `train`; no `test`: a fifth is held out."""

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
    return flat_folder(folder) if is_flat or not any(entry.is_dir() for entry in entries) else labelled_folder(folder)


def labelled_folder(folder):
    """`folder`/CLASS/*, images at any depth below a class."""
    if not Path(folder).is_dir():
        raise RunError(f"{folder}: no such folder; expected {folder}/CLASS/* with the images of each class")
    try:
        found = torchvision.datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise RunError(f"{folder}: {str(error).splitlines()[0]} Expected {folder}/CLASS/* with images") from None
    paths, labels = zip(*found.samples)
    return Files(folder, [os.path.relpath(path, folder) for path in paths], labels, found.classes)


def flat_folder(folder):
    """All images at any depth below `folder`, in the order of their paths, without labels."""
    paths = []
    for place, _, names in os.walk(folder):
        paths += [os.path.relpath(os.path.join(place, name), folder) for name in names if _is_image(name)]
    if not paths:
        raise RunError(f"{folder}: no images in it; known endings are {' '.join(IMG_EXTENSIONS)}")
    return Files(folder, sorted(paths))


def _is_image(name):
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def held_out(source, split):
    """The held-out fifth of `source` for the split `test`, the rest for the others; the same whatever --seed is."""
    order = np.random.default_rng(0).permutation(len(source))
    if source.labels is not None:
        order = order[np.argsort(source.labels[order], kind="stable")]  # class by class: a fifth of each
    chosen = np.zeros(len(source), bool)
    chosen[order[1::HELD_OUT]] = True
    if not chosen.any():
        raise RunError(f"{getattr(source, 'root', 'the data set')}: one image is too few; two or more are needed")
    return source.subset(np.flatnonzero(chosen if split == "test" else ~chosen))


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
        paths.append(path)
        labels.append(int(label))
    if not paths:
        raise RunError(f"{table}: the list is empty")
    names = {label: os.path.dirname(path).lstrip("/") for path, label in zip(paths, labels)}
    return Files(images, paths, labels, [names.get(label, str(label)) for label in range(max(labels) + 1)])


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


# ---------------------------------------------------------------------------------------------------- batches


def resize_and_crop(image, size):
    """PIL image -> size×size: the shorter side resized (antialiased), the middle of the longer one kept."""
    if image.size != (size, size):
        image = transforms.center_crop(transforms.resize(image, size), size)
    return image


class Pixels(torch.utils.data.Dataset):
    """An image source as uint8 tensors. A batch of indices gives (B×C×H×W, B labels), or the RunError that it met."""

    def __init__(self, source, size):
        self.source, self.size = source, size

    def __len__(self):
        return len(self.source)

    def __getitems__(self, indices):
        # An error is returned, not raised: raised in a worker it would arrive wrapped in a traceback.
        try:
            pixels = np.stack([self._pixels(index) for index in indices])
        except RunError as error:
            return error
        labels = np.zeros(len(indices), np.int64) if self.source.labels is None else self.source.labels[indices]
        return torch.from_numpy(pixels), torch.from_numpy(labels)

    def _pixels(self, index):
        pixels = np.asarray(resize_and_crop(self.source.image(index), self.size))
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


class TrainingOrder:
    """Which images each optimiser step sees: a pure function of (seed, step), whatever the data set's size.

    The steps cut an endless stream, one fresh shuffle of the data set after another, into batches of equal size.
    """

    def __init__(self, images, batch_size, seed, first_step, last_step):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.steps = range(first_step, last_step + 1)  # counted from 1

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        return (self.indices(step) for step in self.steps)

    def indices(self, step):
        """The images of step 1, 2, …: a list of batch_size indices."""
        positions = np.arange((step - 1) * self.batch_size, step * self.batch_size)
        rounds, places = np.divmod(positions, self.images)
        return [int(_shuffle(self.seed, int(number), self.images)[place]) for number, place in zip(rounds, places)]


@functools.lru_cache(maxsize=2)  # the current shuffle and the one before it
def _shuffle(seed, number, images):
    return np.random.default_rng([seed, 0, number]).permutation(images)


def flips(seed, step, batch_size):
    """Which images of step `step` are mirrored: batch_size booleans, a pure function of (seed, step)."""
    return torch.from_numpy(np.random.default_rng([seed, 1, step]).random(batch_size) < 0.5)


class Batches:
    """An image source as normalised float batches on `device`; the host sends uint8."""

    def __init__(self, source, size, mean, std, device, workers=0, flip=False):
        self.source, self.pixels, self.device, self.flip = source, Pixels(source, size), device, flip
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)
        self.workers = min(workers, os.cpu_count() or 1)

    def __len__(self):
        return len(self.source)

    def training(self, batch_size, seed, first_step, last_step):
        """Yields (x: B×C×H×W, labels: B) for each step, in TrainingOrder, mirrored at random if the data allow it."""
        order = TrainingOrder(len(self.source), batch_size, seed, first_step, last_step)
        for step, (pixels, labels) in zip(order.steps, self._load(order)):
            mirrored = flips(seed, step, batch_size) if self.flip else None
            yield self._to_device(pixels, mirrored), labels.to(self.device, non_blocking=True)

    def in_order(self, batch_size):
        """Yields (x: B×C×H×W, labels: B): every image once, in the source's order; the last batch may be small."""
        everything = list(range(len(self.source)))
        order = [everything[start : start + batch_size] for start in range(0, len(everything), batch_size)]
        for pixels, labels in self._load(order):
            yield self._to_device(pixels), labels.to(self.device, non_blocking=True)

    def examples(self, count):
        """x: at most count×C×H×W, images spread evenly over the source."""
        spread = np.linspace(0, len(self.source) - 1, min(count, len(self.source))).round().astype(int)
        loaded = self.pixels.__getitems__(spread.tolist())
        if isinstance(loaded, RunError):
            raise loaded
        return self._to_device(loaded[0])

    def _load(self, order):
        loader = torch.utils.data.DataLoader(
            self.pixels,
            batch_sampler=order,
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_quiet_worker,
        )
        try:
            for loaded in loader:
                if isinstance(loaded, RunError):
                    raise loaded
                yield loaded
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunError(f"a data-loading process died ({str(error).splitlines()[0]}); try --workers 0") from None

    def _to_device(self, pixels, mirrored=None):
        x = pixels.to(self.device, non_blocking=True)  # B×C×H×W uint8
        if mirrored is not None:
            x = torch.where(mirrored.to(self.device, non_blocking=True)[:, None, None, None], x.flip(-1), x)
        return (x.float() / 255 - self.mean) / self.std


def _as_it_is(batch):
    return batch


def _quiet_worker(worker):
    """Ctrl-C and SIGTERM reach the whole process group: the main process alone decides what they mean."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
