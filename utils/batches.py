"""From an image source to normalised batches on the training device.

    PIL image → resized, centre-cropped uint8 pixels → kept by utils/cache.py → flipped, normalised batch

An image source has `len()`, `channels`, `image(index)` -> PIL image, `labels` (int64 array, or None) and, if it is made
of files, `listing()` and `path(index)`; see datasets.py.
"""

import atexit
import contextlib
import functools
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading

import numpy as np
import PIL
import torch
from torchvision.transforms import functional as transforms
from tqdm import tqdm

from utils import cache, checkpoints, console, ranks
from utils.console import RunError

CACHE_FOLDER = ".cache"  # below the data folder, unless --cache-folder says otherwise
DECODING = {"version": 2, "resize": "bilinear, antialiased, centre crop", "Pillow": PIL.__version__}  # of cached pixels


def resize_and_crop(image, size):
    """PIL image -> size×size: the shorter side resized (antialiased), the middle of the longer one kept."""
    if image.size != (size, size):
        image = transforms.center_crop(transforms.resize(image, size), size)
    return image


class Pixels(torch.utils.data.Dataset):
    """An image source as uint8 pixels.

    A batch of indices gives B×C×size×size, and a dict of index -> message of those that cannot be decoded.
    """

    def __init__(self, source, size):
        self.source, self.size, self.shape = source, size, (source.channels, size, size)

    def __len__(self):
        return len(self.source)

    def __getitems__(self, indices):
        # An error is returned, not raised: raised in a worker it would arrive wrapped in a traceback.
        pixels, errors = np.zeros((len(indices), *self.shape), np.uint8), {}
        for place, index in enumerate(indices):
            try:
                image = np.asarray(resize_and_crop(self.source.image(index), self.size))
                pixels[place] = image if image.ndim == 2 else image.transpose(2, 0, 1)
            except RunError as error:
                errors[int(index)] = str(error)
        return torch.from_numpy(pixels), errors


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
        """The images of step 1, 2, …: batch_size indices, an int array."""
        positions = np.arange((step - 1) * self.batch_size, step * self.batch_size)
        rounds, places = np.divmod(positions, self.images)
        shuffles = [_shuffle(self.seed, number, self.images)[places[rounds == number]] for number in np.unique(rounds)]
        return np.concatenate(shuffles)  # rounds ascend


@functools.lru_cache(maxsize=2)  # the current shuffle and the one before it
def _shuffle(seed, number, images):
    return np.random.default_rng([seed, 0, number]).permutation(images)


def flips(seed, step, batch_size):
    """Which images of step `step` are mirrored: batch_size booleans, a pure function of (seed, step)."""
    return torch.from_numpy(np.random.default_rng([seed, 1, step]).random(batch_size) < 0.5)


def choose_cache(wanted, sources, size, device, folder):
    """Where the decoded pixels of all `sources` go: the cache mode `wanted`, or for "auto" the first with room.

    `folder`: where "disk" keeps its files. Prints the choice. Raises RunError where the memory wanted is too small.
    """
    needed = sum(len(source) * source.channels for source in sources) * size**2
    room = cache.room(device, folder)
    if all(map(_has_files, sources)):
        paths = [_cache_path(source, size, folder) for source in sources]
        built = sum(os.path.getsize(path) for path in paths if os.path.exists(path))
        room = room._replace(disk=room.disk + built)
    else:
        room = room._replace(disk=0)
        if wanted == "disk":
            print("cache: --cache disk is for image files; what is drawn or bundled stays in memory")
            wanted = "ram"
    room = room._replace(host=room.host // ranks.local_count())  # each process keeps its own copy
    mode = cache.choose(wanted, needed, room)
    places = {"device": "on the GPU", "ram": "in memory", "disk": f"in {folder}", "none": "nowhere"}
    print(f"cache: {cache.amount(needed)} of decoded images are kept {places[mode]}")
    return mode


def _has_files(source):
    return hasattr(source, "listing")


def _cache_path(source, size, folder, ending=".npy"):
    """The path in the cache folder for what belongs to `source`, Files, at `size` pixels."""
    place = os.path.relpath(os.path.realpath(source.root), os.path.realpath(folder))  # both may move together
    digits = hashlib.sha256(os.fsencode(place)).hexdigest()[:8]
    parts = [os.path.basename(place).strip(".") or "images", source.part, f"{size}px", digits]
    return os.path.join(folder, "-".join(part for part in parts if part) + ending)


class Batches:
    """An image source as normalised float batches on `device`; the host sends uint8.

    `mode`, one of cache.MODES except "auto": where decoded pixels are kept; "disk" is for Files. `skip_broken`: decode
    everything at the start and leave out, here and in `source`, what cannot be. `folder`: where both keep their files.
    """

    def __init__(
        self, source, size, mean, std, device, workers=0, flip=False, mode="none", folder=None, skip_broken=False
    ):
        self.pixels, self.device, self.flip = Pixels(source, size), device, flip
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)
        self.workers = min(workers, -(-(os.cpu_count() or 1) // ranks.local_count()))
        self.pins = device.type == "cuda" and mode in ("none", "device")  # the other modes pin their own batches
        labels = np.zeros(len(source), np.int64) if source.labels is None else source.labels
        self.labels = torch.from_numpy(labels).to(device)
        self.source, self.rows = source, np.arange(len(source))  # what is in use; its rows in pixels, store, labels
        self.store = self._open_store(mode, folder, skip_broken)
        if skip_broken and _has_files(source):
            is_broken = self.store.broken if mode == "disk" else self._find_broken()
            _list_broken(source, is_broken, _cache_path(source, size, folder, ".skipped.txt"))
            self.rows = np.flatnonzero(~is_broken)
            self.source = source.subset(self.rows)

    def __len__(self):
        return len(self.rows)

    def training(self, batch_size, seed, first_step, last_step):
        """Yields (x: B×C×H×W, labels: B) for each step, in TrainingOrder, mirrored at random if the data allow it.

        Of several processes each gets its share of every batch.
        """
        order, own = TrainingOrder(len(self), batch_size, seed, first_step, last_step), ranks.share(batch_size)
        for step, (pixels, labels) in zip(order.steps, self._load(indices[own] for indices in order)):
            yield self._normalise(pixels, flips(seed, step, batch_size)[own] if self.flip else None), labels

    def in_order(self, batch_size):
        """Yields (x: B×C×H×W, labels: B): every image once, in the source's order; the last batch may be small.

        Of several processes each gets its share of the images (ranks.share) and of the batch size.
        """
        batch_size = max(1, batch_size // ranks.count())
        for pixels, labels in self._load(_slices(ranks.share(len(self)), batch_size)):
            yield self._normalise(pixels), labels

    def examples(self, count):
        """x: at most count×C×H×W, images spread evenly over the source."""
        return self.chosen(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int))

    def chosen(self, indices):
        """x: B×C×H×W, the images at the positions `indices`, an int array of B."""
        pixels, _ = next(self._load([indices], workers=0))
        return self._normalise(pixels)

    def _open_store(self, mode, folder, skip_broken):
        source, shape, is_cuda = self.source, self.pixels.shape, self.device.type == "cuda"
        if mode == "none":
            return cache.Nowhere()
        if mode == "disk":
            path = _cache_path(source, self.pixels.size, folder)
            content = cache.open_file(path, source.listing(), shape, DECODING, self._decode, skip_broken)
            return cache.Mapped(content, self.workers, pinned=is_cuda)
        place = self.device if mode == "device" else torch.device("cpu")
        return cache.Memory((len(source), *shape), place, pinned=is_cuda and mode == "ram")

    def _find_broken(self):
        """Decodes everything once, into the store. Returns which images cannot be decoded: N booleans."""
        broken = set()
        with tqdm(total=len(self), desc="check", unit="image", leave=False, disable=None) as bar:
            decode = functools.partial(self._decode, broken=broken)
            for pixels in self.store.batches(_slices(slice(0, len(self)), cache.CHUNK), decode):
                bar.update(len(pixels))
        return np.isin(self.rows, list(broken))

    def _load(self, order, workers=None):
        """Yields (pixels: B×C×S×S uint8, labels: B), both on the device, for all lists of indices in `order`."""
        order, ahead = itertools.tee(self.rows[indices] for indices in order)
        batches = self.store.batches(ahead, functools.partial(self._decode, workers=workers))
        for pixels, rows in zip(batches, order):
            labels = self.labels[torch.from_numpy(rows).to(self.device, non_blocking=True)]
            yield pixels.to(self.device, non_blocking=True), labels

    def _decode(self, order, broken=None, workers=None):
        """Yields B×C×S×S uint8 on the host for each int array of rows in `order`, read by worker processes.

        Raises RunError for the first that cannot be decoded, or adds it to the set `broken` if there is one.
        """
        loader = torch.utils.data.DataLoader(
            self.pixels,
            batch_sampler=order,
            num_workers=self.workers if workers is None else workers,
            collate_fn=_as_it_is,
            pin_memory=self.pins,
            worker_init_fn=_quiet_worker,
        )
        try:
            iterator = iter(loader)
            _let_die(loader.num_workers)
            for pixels, errors in iterator:
                if errors and broken is None:
                    raise RunError(next(iter(errors.values())))
                if errors:
                    broken.update(errors)
                yield pixels
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RunError(f"a data-loading process died ({str(error).splitlines()[0]}); try --workers 0") from None

    def _normalise(self, pixels, mirrored=None):
        if mirrored is not None:
            mirrored = mirrored.to(self.device, non_blocking=True)
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)  # in place: needs memory once


def _slices(whole, size):
    """The numbers of the slice `whole`, in order, as int arrays of `size` (the last may be smaller)."""
    return (np.arange(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size))


def _list_broken(source, is_broken, path):
    """Lists the broken images of `source` in the file `path`. Raises RunError for more than one in a hundred."""
    count = int(is_broken.sum())
    with cache.writing(path):
        if count:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            lines = [os.fsencode(source.path(row)) + b"\n" for row in np.flatnonzero(is_broken)]
            with cache.locked(path):  # other processes write the same
                checkpoints.write(path, lambda file: file.writelines(lines))
        else:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
    found = f"{count:,} of {len(source):,} images cannot be decoded"
    if count * 100 > len(source):
        raise RunError(f"{source.root}: {found}, more than one in a hundred; {path} lists them: repair or remove them")
    if count:
        print(f"{source.root}: {found} and are left out; {path} lists them")


def _as_it_is(batch):
    return batch


def _let_die(workers):
    """The loader notices a dead process by itself; torch's handler would raise wherever the program happens to be."""
    if workers and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _quiet_worker(worker):
    """Ctrl-C and its like reach the whole process group: the main process alone decides what they mean."""
    for number in console.STOPPING:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


@atexit.register
def _end_workers():
    """Python ends what is left of its child processes with SIGTERM and waits; ours do not heed that."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would complain of their end
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
