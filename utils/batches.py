"""From image sources to normalised batches on the training device.

    PIL image → resized, centre-cropped uint8 pixels → table of pixels → mirrored, normalised batch

Each image is decoded once, by worker processes, when it is first asked for: into a table N×C×S×S on the device, in
memory, or in a file that later runs share.
"""

import atexit
import contextlib
import functools
import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
from torchvision.transforms import functional as transforms
from tqdm import tqdm

from datasets import DATA_SETS, normalisation
from utils import runtime
from utils.runtime import RunError

CACHES = ("auto", "device", "ram", "disk", "none")  # of --cache
CACHE_FOLDER = ".cache"  # below the data folder, unless --cache-folder says otherwise
DECODING = {"version": 3, "resize": "bilinear, antialiased, centre crop", "Pillow": PIL.__version__}  # of a cache file
CHUNK = 64  # images that are decoded at once while all are
LONGEST = 16  # times its width may an image be high, or the reverse, before its ends are cut off unseen


# ---------------------------------------------------------------------------------------------------- pixels


def resize_and_crop(image, size, how=transforms.InterpolationMode.BILINEAR):
    """PIL image -> size×size: the shorter side resized (antialiased), the middle of the longer one kept."""
    if image.size == (size, size):
        return image
    longest = LONGEST * min(image.size)
    if max(image.size) > longest:  # resizing all of it could take gigabytes
        image = transforms.center_crop(image, [min(image.height, longest), min(image.width, longest)])
    return transforms.center_crop(transforms.resize(image, size, how), size)


class Pixels(torch.utils.data.Dataset):
    """An image source as uint8 pixels.

    A batch of rows gives a numpy array B×C×size×size, and a dict of row -> message of those that cannot be decoded.
    """

    def __init__(self, source, size):
        self.source, self.size, self.shape = source, size, (source.channels, size, size)

    def __len__(self):
        return len(self.source)

    def __getitems__(self, rows):
        # Errors are returned: raised in a worker they would arrive wrapped in a traceback. And numpy arrays come
        # through a pipe, where tensors would need shared memory and a socket, which containers are short of.
        pixels, errors = np.zeros((len(rows), *self.shape), np.uint8), {}
        for place, row in enumerate(rows):
            try:
                image = np.asarray(resize_and_crop(self.source.image(row), self.size))
                pixels[place] = image if image.ndim == 2 else image.transpose(2, 0, 1)
            except RunError as error:
                errors[int(row)] = str(error)
        return pixels, errors


class TrainingOrder:
    """Which of the images `rows`, an int array, each optimiser step sees: a pure function of (seed, step).

    The steps cut an endless stream, one fresh shuffle of the data set after another, into batches of equal size. Of
    several processes each gets its share of every batch.
    """

    def __init__(self, rows, batch_size, seed, first_step, last_step):
        self.rows, self.images, self.batch_size, self.seed = rows, len(rows), batch_size, seed
        self.steps = range(first_step, last_step + 1)  # counted from 1
        self.own = runtime.share(batch_size)

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        return (self.indices(step)[self.own] for step in self.steps)

    def indices(self, step):
        """The images of step 1, 2, … in all processes: batch_size indices, an int array."""
        positions = np.arange((step - 1) * self.batch_size, step * self.batch_size)
        rounds, places = np.divmod(positions, self.images)
        shuffles = [_shuffle(self.seed, number, self.images)[places[rounds == number]] for number in np.unique(rounds)]
        return self.rows[np.concatenate(shuffles)]  # rounds ascend


@functools.lru_cache(maxsize=2)  # the current shuffle and the one before it
def _shuffle(seed, number, images):
    return np.random.default_rng([seed, 0, number]).permutation(images)


def flips(seed, step, batch_size):
    """Which images of step `step` are mirrored: batch_size booleans, a pure function of (seed, step)."""
    return torch.from_numpy(np.random.default_rng([seed, 1, step]).random(batch_size) < 0.5)


def slices(whole, size):
    """The numbers of the slice `whole`, in order, as a list of int arrays of `size` (the last may be smaller)."""
    return [np.arange(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size)]


# ---------------------------------------------------------------------------------------------------- batches


class Form(NamedTuple):
    """What a batch looks like."""

    size: int
    mean: list  # a number per channel, of pixels in [0, 1]
    std: list
    flip: bool = False  # whether training mirrors images


class Loading(NamedTuple):
    """How images are decoded, and where their pixels stay."""

    workers: int = 0
    cache: str = "none"  # one of CACHES but "auto"
    folder: str | None = None  # of cache files, and of lists of broken images
    skip_broken: bool = False


def open_batches(settings, sources, device):
    """Batches for each of the image sources, as the data options say: a list. Raises RunError."""
    if min(map(len, sources)) < runtime.count():
        raise RunError(f"{runtime.count()} processes share {min(map(len, sources))} images; start fewer")
    for source in sources:
        runtime.check_same(len(source), "the number of images")
    row = DATA_SETS[settings.dataset]
    form = Form(settings.size, *normalisation(row.channels, settings.inet), row.flip)
    folder = settings.cache_folder or os.path.join(settings.data_folder, CACHE_FOLDER)
    cache = choose_cache(settings.cache, sources, settings.size, device, folder)
    loading = Loading(settings.workers, cache, folder, settings.skip_broken)
    return [Batches(source, form, device, loading) for source in sources]


class Batches:
    """An image source as normalised float batches on `device`; the host sends uint8."""

    def __init__(self, source, form, device, loading=None):
        loading = loading or Loading()
        self.pixels, self.device, self.flip = Pixels(source, form.size), device, form.flip
        self.mean, self.std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (form.mean, form.std))
        self.workers = min(loading.workers, -(-(os.cpu_count() or 1) // runtime.local_count()))
        labels = np.zeros(len(source), np.int64) if source.labels is None else source.labels
        self.labels = torch.from_numpy(labels).to(device)
        self.source, self.rows = source, np.arange(len(source))  # what is in use; its rows in pixels, table, labels
        self.table = self._open_table(loading)
        if loading.skip_broken and is_files(source):
            is_broken = self._find_broken() if self.table is None or self.table.broken is None else self.table.broken
            list_broken(source, is_broken, cache_path(source, form.size, loading.folder, ".skipped.txt"))
            self.rows = np.flatnonzero(~is_broken)
            self.source = source.subset(self.rows)

    def __len__(self):
        return len(self.rows)

    def training(self, batch_size, seed, first_step, last_step):
        """Yields (x: B×C×H×W, labels: B) for each step, in TrainingOrder, mirrored at random if the data allow it."""
        order = TrainingOrder(self.rows, batch_size, seed, first_step, last_step)
        for step, (pixels, labels) in zip(order.steps, self._load(order)):
            yield self._normalise(pixels, flips(seed, step, batch_size)[order.own] if self.flip else None), labels

    def in_order(self, batch_size):
        """Yields (x: B×C×H×W, labels: B): every image once, in the source's order; the last batch may be small.

        Of several processes each gets its share of the images (runtime.share) and of the batch size.
        """
        batch_size = max(1, batch_size // runtime.count())
        order = [self.rows[positions] for positions in slices(runtime.share(len(self)), batch_size)]
        for pixels, labels in self._load(order):
            yield self._normalise(pixels), labels

    def examples(self, count):
        """x: at most count×C×H×W, images spread evenly over the source."""
        return self.chosen(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int))

    def chosen(self, indices):
        """x: B×C×H×W, the images at the positions `indices`, an int array of B."""
        pixels, _ = next(self._load([self.rows[indices]], workers=0))
        return self._normalise(pixels)

    def _open_table(self, loading):
        source, shape, is_cuda = self.source, self.pixels.shape, self.device.type == "cuda"
        if loading.cache == "none":
            return None
        if loading.cache == "disk":
            path = cache_path(source, self.pixels.size, loading.folder)
            return open_table(path, source, shape, self._decode, loading.skip_broken, pinned=is_cuda)
        place = self.device if loading.cache == "device" else torch.device("cpu")
        pixels = torch.empty((len(source), *shape), dtype=torch.uint8, device=place)
        return Table(pixels, np.zeros(len(source), bool), pinned=is_cuda and place.type == "cpu")

    def _find_broken(self):
        """Decodes everything once, into the table. Returns which images cannot be decoded: N booleans."""
        broken, order = set(), slices(slice(0, len(self)), CHUNK)
        decode = functools.partial(self._decode, broken=broken)
        stream = self.table.batches(order, decode) if self.table else decode(order)
        for _ in tqdm(stream, "check", len(order), leave=False, disable=None):
            pass
        return np.isin(self.rows, list(broken))

    def _load(self, order, workers=None):
        """Yields (pixels: B×C×S×S uint8, labels: B), both on the device, for all int arrays of rows in `order`."""
        decode = functools.partial(self._decode, workers=workers)
        for rows, pixels in zip(order, self.table.batches(order, decode) if self.table else decode(order)):
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
            pin_memory=self.device.type == "cuda",  # arrays stay unpinned, but a thread fetches them
            worker_init_fn=_quiet_worker,
        )
        ended = threading.Event()
        try:
            batches = iter(loader)  # starts the processes
            if loader.num_workers:
                threading.Thread(target=_hear_of_children, args=[ended], daemon=True).start()
            for pixels, errors in batches:
                if errors and broken is None:
                    raise RunError(next(iter(errors.values())))
                if errors:
                    broken.update(errors)
                yield torch.from_numpy(pixels)
        except (KeyboardInterrupt, runtime.Terminated):
            _end_workers()  # they would first finish the images at hand
            raise
        except OSError as error:
            sys.unraisablehook = lambda _: None  # torch's half-made iterator would complain when it goes
            raise RunError(
                f"the data-loading processes do not start ({error.strerror or error}): use --workers 0, or raise "
                "`ulimit -n` (open files), `ulimit -u` (processes) or the size of /dev/shm"
            ) from None
        finally:
            ended.set()

    def _normalise(self, pixels, mirrored=None):
        if mirrored is not None:
            mirrored = mirrored.to(self.device, non_blocking=True)
            pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return pixels.float().div_(255).sub_(self.mean).div_(self.std)  # in place: needs memory once


def _hear_of_children(ended):
    """Remind the main thread every second of children that have died, until `ended`, an Event.

    It may wait for the rest of a batch whose process was killed: a signal that came just before would never be heard.
    """
    while not ended.wait(1):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGCHLD)


def _as_it_is(batch):
    return batch


def _quiet_worker(worker):
    """Ctrl-C and its like reach the whole process group: the main process alone decides what they mean."""
    for number in runtime.STOPPING:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process().pid], daemon=True).start()


def _end_with(parent):
    """End this process soon after its parent: it could wait for ever to hand over a batch that nobody takes."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


@atexit.register
def _end_workers():
    """Python ends what is left of its child processes with SIGTERM and waits; ours do not act on that."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would complain of their end
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


# ---------------------------------------------------------------------------------------------------- tables


class Table:
    """Decoded pixels, N×C×S×S uint8, and which rows of it are filled.

    `pinned`: batches come in page-locked memory, from where a GPU fetches them by itself. `broken`: rows that cannot be
    decoded, N booleans, if that is known. `ahead`: a thread reads the next batch meanwhile, as a file's table wants.
    """

    def __init__(self, pixels, filled, pinned=False, broken=None, ahead=False):
        self.pixels, self.filled, self.pinned, self.broken, self.ahead = pixels, filled, pinned, broken, ahead

    def batches(self, order, decode):
        """Yields B×C×S×S uint8, on the table's device, for each int array of rows in `order`, iterable more than once.

        What is not filled is decoded (`decode(order)`: arrays of rows -> pixels), written, and then read.
        """
        if self.ahead:
            yield from _one_ahead(self._take, order)
            return
        missing, decoded = self._missing(order), decode(self._missing(order))
        for rows in order:
            new = next(missing, None)
            if new is not None:
                self._fill(new, next(decoded))
            yield self._take(rows)

    def _missing(self, order):
        """Yields the rows of each batch that no batch before it has filled; ends when none can be missing any more."""
        known = self.filled.copy()  # not shared: a batch that is never reached fills nothing
        batches = iter(order)
        while not known.all() and (rows := next(batches, None)) is not None:
            missing = np.array([row for row in dict.fromkeys(rows.tolist()) if not known[row]], np.int64)
            known[missing] = True
            yield missing

    def _fill(self, rows, pixels):
        device = self.pixels.device
        self.pixels[torch.from_numpy(rows).to(device, non_blocking=True)] = pixels.to(device, non_blocking=True)
        self.filled[rows] = True

    def _take(self, rows):
        device, shape = self.pixels.device, (len(rows), *self.pixels.shape[1:])
        pixels = torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=self.pinned)
        return torch.index_select(self.pixels, 0, torch.from_numpy(rows).to(device, non_blocking=True), out=pixels)


def _one_ahead(function, items):
    """Yields function(item) for all items; a thread is one item ahead."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = None
        for item in items:
            before, upcoming = upcoming, pool.submit(function, item)
            if before:
                yield before.result()
        if upcoming:
            yield upcoming.result()


def is_files(source):
    return hasattr(source, "path")


def cache_path(source, size, folder, ending=""):
    """The path in the cache folder for what belongs to `source`, Files, at `size` pixels."""
    place = os.path.relpath(os.path.realpath(source.root), os.path.realpath(folder))  # both may move together
    digits = hashlib.sha256(os.fsencode(place)).hexdigest()[:8]
    parts = [os.path.basename(place).strip(".") or "images", source.part, f"{size}px", digits]
    return os.path.join(folder, "-".join(part for part in parts if part) + ending)


def open_table(path, source, shape, decode, skip_broken, pinned):
    """The Table in the file `path`-HASH.npy, where HASH stands for the images and the way they are decoded.

    It is made if need be, and those of other images or ways are removed. Raises RunError or OSError.
    """
    stamps = np.array([_stamp(source.path(row)) for row in range(len(source))], np.int64)
    facts = json.dumps({**DECODING, "shape": shape}).encode(), source.items.tobytes(), stamps.tobytes()
    file = f"{path}-{hashlib.sha256(b'|'.join(facts)).hexdigest()[:12]}.npy"
    table = _read(file, len(source))
    if table is None:  # without the lock so far: a shared cache may be read-only
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with runtime.locked(f"{path}.lock"):
            table = _read(file, len(source)) or _build(file, path, (len(source), *shape), decode, skip_broken)
    if table is None:
        raise RunError(f"{file} was written, but cannot be mapped into memory; use --cache ram or none")
    pixels, broken = table
    if broken.any() and not skip_broken:
        source.image(int(broken.argmax()))  # raises the reason
    return Table(torch.from_numpy(pixels), np.ones(len(source), bool), pinned, broken, ahead=True)


def _stamp(path):
    """Size in bytes and time of last change in ns of a file; -1 where it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _read(file, rows):
    """The pixels (mapped into memory) and the broken rows of a cache file; None where it is absent or damaged."""
    try:
        pixels, broken = np.load(file, mmap_mode="c"), np.fromfile(f"{file}.broken", bool)
        return (pixels, broken) if len(pixels) == len(broken) == rows else None
    except (OSError, ValueError, EOFError):
        return None


def _build(file, path, shape, decode, skip_broken):
    for other in glob.glob(f"{glob.escape(path)}-*.npy*"):
        os.remove(other)
    needed, free = int(np.prod(shape)), shutil.disk_usage(os.path.dirname(file)).free
    if needed > free:
        raise RunError(
            f"{file}: {amount(needed)} of decoded images do not fit into {amount(free)} of free disk; free some space, "
            "choose another --cache-folder, or use --cache none"
        )
    print(f"cache: {file}: decoding {shape[0]:,} images once ({amount(needed)})", flush=True)
    broken, order = set() if skip_broken else None, slices(slice(0, shape[0]), CHUNK)

    def fill(opened):
        np.lib.format.write_array_header_1_0(opened, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for pixels in tqdm(decode(order, broken), "decode", len(order), leave=False, disable=None):
            opened.write(pixels.numpy())

    runtime.write(file, fill)
    is_broken = np.isin(np.arange(shape[0]), list(broken or ()))
    runtime.write(f"{file}.broken", lambda opened: opened.write(is_broken.tobytes()))
    return _read(file, shape[0])


def list_broken(source, is_broken, path):
    """Lists the broken images of `source` in the file `path`. Raises RunError for more than one in a hundred."""
    count = int(is_broken.sum())
    if runtime.is_main() and count:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        lines = [os.fsencode(source.path(row)) + b"\n" for row in np.flatnonzero(is_broken)]
        with contextlib.suppress(FileNotFoundError):  # another process that lists the same has renamed the file
            runtime.write(path, lambda file: file.writelines(lines))
    elif runtime.is_main():
        Path(path).unlink(missing_ok=True)
    found = f"{source.root}: {count:,} of {len(source):,} images cannot be decoded"
    if count * 100 > len(source):
        raise RunError(f"{found}, more than one in a hundred; {path} lists them: repair or remove them")
    if count:
        print(f"{found} and are left out; {path} lists them")


# ---------------------------------------------------------------------------------------------------- memory


def count_images(train, test):
    """How many images the Batches of training (or None) and of test have, in words."""
    return f"{f'{len(train):,} training and ' if train else ''}{len(test):,} test images"


def choose_cache(wanted, sources, size, device, folder):
    """Where the decoded pixels of all `sources` go: `wanted`, one of CACHES, or for "auto" the first with room.

    `folder`: where "disk" keeps its files. Prints the choice. Raises RunError where the memory wanted is too small.
    """
    needed = sum(len(source) * source.channels for source in sources) * size**2
    free = {"device": free_on(device), "ram": free_memory() // runtime.local_count(), "disk": 0}
    if all(map(is_files, sources)):
        starts = [glob.escape(cache_path(source, size, folder)) for source in sources]
        built = [path for start in starts for path in glob.glob(f"{start}-*.npy")]
        free["disk"] = free_disk(folder) + sum(map(os.path.getsize, built))
    elif wanted == "disk":
        wanted = "ram"  # only image files have a place to be known by
    mode = "ram" if wanted == "device" and device.type != "cuda" else wanted
    if mode == "auto":  # the model wants most of the device, and the system some memory
        room = {"device": free["device"] // 4, "ram": free["ram"] // 2, "disk": free["disk"]}
        mode = next((mode for mode, size in room.items() if needed <= size), "none")
    elif mode in ("device", "ram") and needed > free[mode]:
        raise RunError(
            f"--cache {wanted}: {amount(needed)} of decoded images do not fit into {amount(free[mode])} of free "
            "memory; use --cache disk or none"
        )
    places = {"device": "kept on the GPU", "ram": "kept in memory", "disk": f"kept in {folder}",
              "none": "not kept, but decoded whenever they are needed"}
    print(f"cache: {amount(needed)} of decoded images are {places[mode]}")
    return mode


def free_on(device):
    """Bytes of the GPU `device` that are free, or kept by torch without being used; 0 of the CPU."""
    if device.type != "cuda":
        return 0
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def free_memory():
    """Bytes of memory that are free or can be freed, and that a container or job may use; 0 if nobody tells."""
    try:
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return min(int(facts["MemAvailable"].split()[0]) * 1024, _free_in_groups())
    except (OSError, KeyError, ValueError):
        pass
    try:  # other systems: half of all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return 0


def _free_in_groups():
    """Bytes that the limits of this process's control groups (v2) leave, as of a container; infinity without one."""
    own, free = "", float("inf")
    with contextlib.suppress(OSError):
        own = Path("/proc/self/cgroup").read_text().split("::")[-1].strip()
    for group in (place := Path(f"/sys/fs/cgroup{own}"), *place.parents):
        with contextlib.suppress(OSError, KeyError, ValueError):  # "max", the word for no limit, is a ValueError
            used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            free = min(free, int((group / "memory.max").read_text()) - int(used["anon"]))  # files make room when asked
    return max(0, free)


def free_disk(folder):
    """Free bytes on the disk where `folder` is or would be made; 0 if it may not be written to."""
    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else 0


def amount(size):
    """`size` bytes in words."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
