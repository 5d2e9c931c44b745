"""Decoded images, kept where they are reached quickest: on the training device, in memory, or in one file.

All three are a table of N×C×S×S uint8 pixels, and `batches(order, decode)` yields the rows that each int array in
`order` asks for. What the table lacks comes from `decode(order)`: it turns an iterable of int arrays of rows into an
iterator of B×C×S×S uint8 tensors, one for each array and in the same order, however far it reads ahead.
"""

import collections
import contextlib
import fcntl
import io
import itertools
import json
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from utils import checkpoints
from utils.console import RunError

MODES = ("auto", "device", "ram", "disk", "none")
CHUNK = 64  # rows that are decoded and written at once while a file is built


# ---------------------------------------------------------------------------------------------------- where to keep it


class Room(NamedTuple):
    """Free bytes on the training device (None: it is the CPU), in the machine's memory, and on the disk."""

    device: int | None
    host: int
    disk: int


def room(device, folder):
    """What is free now on the torch.device `device`, and on the disk of `folder`: 0 if it may not be written to."""
    return Room(free_on(device) if device.type == "cuda" else None, free_memory(), free_disk(folder))


def free_on(device):
    """Bytes of the GPU `device` that are free, or kept by torch without being used."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def choose(wanted, needed, room):
    """The mode for `needed` bytes of pixels: `wanted`, or what "auto" means. Raises RunError where they do not fit."""
    if wanted == "auto":
        if room.device is not None and needed <= room.device / 4:  # the model wants the rest
            return "device"
        if needed <= room.host / 2:
            return "ram"
        return "disk" if needed <= room.disk else "none"
    mode = "ram" if wanted == "device" and room.device is None else wanted
    free = {"device": room.device, "ram": room.host}.get(mode, needed)
    if needed > free:
        raise RunError(
            f"--cache {wanted}: {amount(needed)} of decoded images do not fit into {amount(free)} of free memory; "
            "use --cache disk or none"
        )
    return mode


def free_memory():
    """Bytes of memory that are free or can be freed; 0 if the system does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            facts = dict(line.split(":") for line in lines)
        return min(int(facts["MemAvailable"].split()[0]) * 1024, _free_in_group())
    except (OSError, KeyError, ValueError):
        pass
    try:  # other systems: half of all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return 0


def _free_in_group(root="/sys/fs/cgroup"):
    """Bytes that the limits of a container or batch job (control groups v2) leave; infinity without one."""
    try:
        with open("/proc/self/cgroup") as lines:
            group = Path(next(line[3:].strip() for line in lines if line.startswith("0::")))
    except (OSError, StopIteration):
        return float("inf")
    return min(_free_below(Path(root, *place.parts[1:])) for place in (group, *group.parents))  # Slurm limits the job


def _free_below(group):
    """Bytes that the limit of this control group by itself leaves."""
    try:
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["anon"]
        return max(0, int((group / "memory.max").read_text()) - int(used))  # file pages make room when asked
    except (OSError, KeyError, ValueError):  # "max", the word for no limit, is a ValueError
        return float("inf")


def free_disk(folder):
    """Free bytes on the disk where `folder` is or would be made; 0 if it may not be written to."""
    folder = os.path.abspath(folder)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else 0


def amount(size):
    """`size` bytes in words."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


# ---------------------------------------------------------------------------------------------------- tables


class Nowhere:
    """Keeps nothing: every image is decoded whenever it is asked for."""

    def batches(self, order, decode):
        """Yields B×C×S×S uint8, on the host."""
        return decode(order)


class Memory:
    """A table in the memory of `device`, where each image is decoded when it is first asked for.

    `pinned`: batches come in page-locked memory, from where a GPU fetches them by itself.
    """

    def __init__(self, shape, device, pinned=False):
        self.table, self.pinned = torch.empty(shape, dtype=torch.uint8, device=device), pinned
        self.is_filled = np.zeros(len(self.table), bool)

    def batches(self, order, decode):
        """Yields B×C×S×S uint8, on the table's device."""
        order, ahead = itertools.tee(order)
        requests = collections.deque()
        if not self.is_filled.all():
            for pixels in decode(self._request(ahead, requests)):
                self._fill(requests.popleft(), pixels)
                yield self._take(next(order))
        del ahead  # tee keeps what only one of the two has read
        for rows in order:
            yield self._take(rows)

    def _request(self, order, requests):
        """Yields, and notes in `requests`, the rows of each batch that are new; ends when none can be new any more."""
        is_known = self.is_filled.copy()  # not shared: a request that is abandoned fills nothing
        unknown = len(is_known) - np.count_nonzero(is_known)
        while unknown and (rows := next(order, None)) is not None:
            missing = np.array([row for row in dict.fromkeys(rows.tolist()) if not is_known[row]], np.int64)
            is_known[missing] = True
            unknown -= len(missing)
            requests.append(missing)
            yield missing

    def _fill(self, rows, pixels):
        device = self.table.device
        self.table[torch.from_numpy(rows).to(device, non_blocking=True)] = pixels.to(device, non_blocking=True)
        self.is_filled[rows] = True

    def _take(self, rows):
        device, shape = self.table.device, (len(rows), *self.table.shape[1:])
        pixels = torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=self.pinned)
        return torch.index_select(self.table, 0, torch.from_numpy(rows).to(device, non_blocking=True), out=pixels)


class Mapped:
    """The table of a file's Content, read by `threads` threads a little ahead. `pinned` as for Memory."""

    def __init__(self, content, threads, pinned=False):
        self.table, self.broken, self.threads, self.pinned = content.table, content.broken, threads, pinned

    def batches(self, order, decode):
        """Yields B×C×S×S uint8, on the host; nothing is left to decode."""
        if not self.threads:
            yield from map(self._take, order)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            waiting = collections.deque()
            for rows in order:
                waiting.append(pool.submit(self._take, rows))
                if len(waiting) > self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _take(self, rows):
        pixels = torch.empty((len(rows), *self.table.shape[1:]), dtype=torch.uint8, pin_memory=self.pinned)
        np.take(self.table, rows, axis=0, out=pixels.numpy(), mode="clip")  # mode "raise" would copy once more
        return pixels


# ---------------------------------------------------------------------------------------------------- the file


class Listing(NamedTuple):
    """What a file's rows were decoded from: paths (bytes), sizes in bytes and times of last change in ns, N each."""

    paths: np.ndarray
    sizes: np.ndarray
    times: np.ndarray


class Content(NamedTuple):
    """What a complete cache file holds: its table (N×C×S×S uint8, mapped), and which rows could not be decoded."""

    table: np.ndarray
    listing: Listing
    broken: np.ndarray


def open_file(path, listing, shape, settings, decode, skip_broken=False):
    """The Content of the cache file `path` with a C×S×S row for each file of `listing`; built or renewed where needed.

    `settings`, a dict of plain values, says how images become pixels: under others, nothing in the file is believed.
    `decode(order, broken)`: as above; with `skip_broken` it adds the rows that cannot be decoded to the set `broken`.
    Raises RunError if the file cannot be written.
    """
    settings = json.dumps({**settings, "shape": shape}, sort_keys=True)
    content = _read(path, settings)
    if _is_current(content, listing, skip_broken):  # without the lock: a shared cache may be read-only
        return content
    with writing(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with locked(path):
            content = _read(path, settings)  # another process may have been faster
            if not _is_current(content, listing, skip_broken):
                _build(path, listing, shape, settings, content, decode, skip_broken)
                content = _read(path, settings)
    return content


@contextlib.contextmanager
def writing(path):
    """Turn an OSError into the RunError that names `path` and the remedy."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}; free some space or choose another --cache-folder") from None


def _is_current(content, listing, skip_broken):
    if content is None or content.broken.any() and not skip_broken:
        return False
    return all(map(np.array_equal, content.listing, listing))


def _known_rows(content, listing, skip_broken):
    """For each file of `listing` its row in `content`; -1 if it has none, or changed since, or is to be tried again."""
    if content is None:
        return np.full(len(listing.paths), -1)
    order = np.argsort(content.listing.paths, kind="stable")
    places = np.searchsorted(content.listing.paths, listing.paths, sorter=order)
    rows = order[places.clip(max=len(order) - 1)]
    is_same = np.logical_and.reduce([old[rows] == new for old, new in zip(content.listing, listing)])
    if not skip_broken:
        is_same &= ~content.broken[rows]
    return np.where(is_same, rows, -1)


def _build(path, listing, shape, settings, old, decode, skip_broken):
    """Write the file from what `old`, Content or None, has of it, and decode the rest."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(f"{path}{checkpoints.UNFINISHED}")  # of a process that was killed; it takes the room that we need
    known = _known_rows(old, listing, skip_broken)
    needed = len(known) * int(np.prod(shape))
    _check_space(path, needed)
    print(f"cache: {_reason(path, old, known)} ({amount(needed)})", flush=True)
    broken = set() if skip_broken else None

    def fill(file):
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(known), *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        with tqdm(total=len(known), desc="cache", unit="image", leave=False, disable=None) as bar:
            for pixels in _rows(shape, known, old, decode, broken):
                file.write(pixels)
                bar.update(len(pixels))
        manifest = io.BytesIO()
        np.savez(manifest, settings=settings, broken=_broken_rows(known, old, broken), **listing._asdict())
        file.write(manifest.getbuffer())

    checkpoints.write(path, fill)


def _check_space(path, needed):
    free = shutil.disk_usage(os.path.dirname(path)).free
    if needed > free:
        raise RunError(
            f"{path}: {amount(needed)} of decoded images do not fit into {amount(free)} of free disk; free some space, "
            "choose another --cache-folder, or use --cache none"
        )


def _reason(path, old, known):
    total, missing = len(known), np.count_nonzero(known < 0)
    if old is not None:
        return f"{path}: decoding {missing:,} images that are new, changed or broken, copying {total - missing:,}"
    again = ", as the file there is damaged or made with other settings" if os.path.exists(path) else ""
    return f"{path}: decoding {total:,} images once{again}"


def _broken_rows(known, old, broken):
    """N booleans: the rows of the set `broken` (or None), and those copied from `old` that were broken there."""
    is_broken = np.isin(np.arange(len(known)), list(broken or ()))
    if old is not None:
        is_broken |= (known >= 0) & old.broken[known]
    return is_broken


def _rows(shape, known, old, decode, broken):
    """Yields all rows in order, CHUNK×C×S×S uint8 at a time: copied from `old` where known, else decoded."""
    chunks = [np.arange(start, min(start + CHUNK, len(known))) for start in range(0, len(known), CHUNK)]
    decoded = decode((chunk[known[chunk] < 0] for chunk in chunks), broken)
    for chunk, fresh in zip(chunks, decoded):
        rows, pixels = known[chunk], np.empty((len(chunk), *shape), np.uint8)
        pixels[rows < 0] = fresh
        if old is not None:
            pixels[rows >= 0] = old.table[rows[rows >= 0]]
        yield pixels


def _read(path, settings):
    """The file's Content; None if it is absent, damaged, or made under other settings.

    It is a .npy of the pixels with an .npz of the manifest behind it: one file, so that one rename makes both.
    """
    try:
        with open(path, "rb") as file:  # once, as another process may replace it at any moment
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            table = np.memmap(file, dtype, "r", offset=file.tell(), shape=shape)
            file.seek(table.offset + table.nbytes)
            manifest = np.load(io.BytesIO(file.read()))
        found = {name: manifest[name] for name in manifest.files}
        if found["settings"].item() != settings or len(found["broken"]) != len(table):
            return None
        return Content(table, Listing(*(found[name] for name in Listing._fields)), found["broken"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


@contextlib.contextmanager
def locked(path):
    """Hold `path`.lock: one process at a time. The lock ends with its process, however that ends."""
    name, is_held = f"{path}.lock", False
    while not is_held:
        with open(name, "wb") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                print(f"cache: waiting for another process that writes {path}", flush=True)
                fcntl.lockf(file, fcntl.LOCK_EX)
            is_held = _is_still(file, name)
            if is_held:
                try:
                    yield
                finally:
                    os.remove(name)


def _is_still(file, name):
    """Whether the open file is still the one called `name`: whoever held it before us has removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(name))
    except FileNotFoundError:
        return False
