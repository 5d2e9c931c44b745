"""Decoded once: the same batches from every cache, and a cache file that is complete and current, or not believed."""

import errno
import itertools
import multiprocessing
import os
import shutil
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import paint, paint_classes

import datasets
from datasets import Files, open_split
from utils import batches, runtime
from utils.batches import Batches, Form, Loading, TrainingOrder, choose_cache
from utils.runtime import RunError

CPU = torch.device("cpu")
MODES = ("none", "ram", "device", "disk")
fork = multiprocessing.get_context("fork")


def open_batches(source, mode, folder, workers=0, skip_broken=False, size=32):
    form = Form(size, [0.5] * 3, [0.5] * 3, flip=True)
    return Batches(source, form, CPU, Loading(workers, mode, str(folder), skip_broken))


def tables(folder):
    """The cache files in `folder`."""
    return [path for path in folder.iterdir() if path.suffix == ".npy"]


def everything(batches, first_step=1):
    """What a run sees: five rounds of training in batches that do not divide a round, then tests, then examples."""
    streams = batches.training(5, 3, first_step, 10), batches.in_order(4), batches.training(20, 3, 1, 2)
    return [*itertools.chain(*streams), (batches.examples(3), torch.zeros(3))]


def at_once(function):
    """Call `function` in four processes."""
    processes = [fork.Process(target=function) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4


def assert_same(found, expected):
    for (x, labels), (other, other_labels) in zip(found, expected, strict=True):
        assert torch.equal(x, other) and torch.equal(labels, other_labels)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded, as they are."""
    names, image = [], Files.image

    def noted(source, index):
        names.append(os.path.basename(source.path(index)))
        return image(source, index)

    monkeypatch.setattr(Files, "image", noted)
    return names


@pytest.fixture
def flat(tmp_path):
    """A source of ten unlabelled images, and the folder for its cache."""
    for number in range(10):
        paint(tmp_path / "images" / f"{number}.png", seed=number)
    return datasets.image_folder(tmp_path / "images"), tmp_path / "cache"


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("mode", MODES)
def test_batches_are_the_same_in_every_mode(mode, class_folder, tmp_path):
    source = open_split("folder", class_folder, "train", 32)
    expected = everything(open_batches(source, "none", None))
    for indices, (_, labels) in zip(TrainingOrder(np.arange(9), 5, 3, 1, 10), expected):
        assert labels.tolist() == source.labels[indices].tolist()
    for workers in (0, 2):
        batches = open_batches(source, mode, tmp_path, workers)
        assert_same(everything(batches), expected)
        assert_same(everything(batches), expected)  # now that all is filled
        assert_same(everything(open_batches(source, mode, tmp_path, workers), first_step=4), expected[3:])


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_reads_no_more_than_a_little_ahead(mode, flat, monkeypatch):
    batches = open_batches(flat[0], mode, flat[1], workers=1)
    asked, indices = [], TrainingOrder.indices
    monkeypatch.setattr(TrainingOrder, "indices", lambda order, step: asked.append(step) or indices(order, step))
    stream = batches.training(2, 1, 1, 100)
    next(stream), next(stream)
    assert max(asked) <= 5


@pytest.mark.parametrize("mode, rounds", [("ram", 1), ("disk", 1), ("none", 5)])
def test_every_image_is_decoded_once(mode, rounds, flat, decoded):
    source, folder = flat
    batches = open_batches(source, mode, folder)
    list(batches.training(8, 1, 1, 5))
    list(batches.in_order(8))
    assert sorted(decoded) == sorted([f"{number}.png" for number in range(10)] * rounds)


def test_a_filled_memory_starts_no_loader(flat, monkeypatch):
    batches = open_batches(flat[0], "ram", None)
    expected = everything(batches)
    monkeypatch.delattr(torch.utils.data, "DataLoader")
    assert_same(everything(batches), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_abandoned_stream_leaves_no_image_believed_filled(workers, flat):
    batches = open_batches(flat[0], "ram", None, workers)
    stream = batches.training(2, 1, 1, 100)
    next(stream)  # by now the workers have been asked for more
    stream.close()
    assert batches.table.filled.sum() == 2
    assert_same(everything(batches), everything(open_batches(flat[0], "none", None)))


def test_two_streams_at_once_do_not_disturb_each_other(flat):
    opened, plain = open_batches(flat[0], "ram", None, workers=2), open_batches(flat[0], "none", None)
    streams = zip(opened.training(3, 1, 1, 8), opened.training(3, 2, 1, 8))
    for found, wanted in zip(streams, zip(plain.training(3, 1, 1, 8), plain.training(3, 2, 1, 8)), strict=True):
        assert_same(found, wanted)


# ------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize("change", [
    lambda folder: None,
    lambda folder: paint(folder / "4.png", seed=99),
    lambda folder: paint(folder / "45.png", seed=99),
    lambda folder: (folder / "4.png").unlink(),
    lambda folder: os.utime(folder / "4.png", ns=(0, 0)),
    lambda folder: (folder / "3.png").rename(folder / "33.png"),
], ids=["nothing", "changed", "added", "removed", "touched", "renamed"])
def test_other_images_are_another_file_and_the_old_one_goes(change, flat, decoded, capsys, request):
    source, folder = flat
    open_batches(source, "disk", folder)
    before = tables(folder)
    change(folder.parent / "images")
    source = datasets.image_folder(folder.parent / "images")
    decoded.clear()
    capsys.readouterr()
    found, after, said = everything(open_batches(source, "disk", folder)), tables(folder), capsys.readouterr().out
    is_as_before = "nothing" in request.node.name
    assert len(after) == 1 and (before == after) == is_as_before
    assert len(decoded) == (0 if is_as_before else len(source))
    assert said == "" if is_as_before else f"decoding {len(source)} images once" in said and said.count("\n") == 1
    assert_same(found, everything(open_batches(source, "none", None)))


def test_another_way_of_decoding_makes_the_file_stale(flat, decoded, monkeypatch):
    open_batches(flat[0], "disk", flat[1])
    monkeypatch.setitem(batches.DECODING, "version", -1)
    open_batches(flat[0], "disk", flat[1])
    assert len(decoded) == 20 and len(tables(flat[1])) == 1


def test_images_listed_twice_are_no_change(flat, decoded):
    source = flat[0].subset(np.array([0, 1, 1, 2]))
    for _ in range(2):
        open_batches(source, "disk", flat[1])
    assert len(decoded) == 4


def test_the_cache_moves_with_its_images(class_folder, tmp_path, decoded):
    for place in ("here", "there"):
        if place == "here":
            shutil.copytree(class_folder, tmp_path / place)
        else:
            (tmp_path / "here").rename(tmp_path / place)
        open_batches(open_split("folder", tmp_path / place, "train", 32), "disk", tmp_path / place / ".cache")
    assert len(decoded) == 9


def test_splits_subsets_and_sizes_do_not_share_a_file(class_folder, tmp_path, decoded):
    for _ in range(2):
        open_batches(open_split("folder", class_folder, "train", 32).subset(np.array([1, 2])), "disk", tmp_path)
        for split in ("unlabelled", "train", "test"):
            open_batches(open_split("folder", class_folder, split, 32), "disk", tmp_path)
        open_batches(open_split("folder", class_folder, "test", 16), "disk", tmp_path, size=16)
    assert len(decoded) == 2 + 9 + 3 + 3 and len(tables(tmp_path)) == 4


@pytest.mark.parametrize("name", [".npy", ".broken"])
@pytest.mark.parametrize("cut", [0, 5, -1])
def test_a_damaged_file_is_not_believed(cut, name, flat, decoded):
    open_batches(flat[0], "disk", flat[1])
    (path,) = (path for path in flat[1].iterdir() if path.suffix == name)
    path.write_bytes(path.read_bytes()[:cut])
    assert_same(everything(open_batches(flat[0], "disk", flat[1])), everything(open_batches(flat[0], "none", None)))
    assert decoded[10:20] == decoded[:10]


def test_a_current_file_is_read_without_writing_anything(flat, monkeypatch):
    open_batches(flat[0], "disk", flat[1])
    monkeypatch.setattr(runtime, "locked", None)
    assert_same(everything(open_batches(flat[0], "disk", flat[1])), everything(open_batches(flat[0], "none", None)))


def test_a_disk_that_knows_no_locks_will_do(flat, monkeypatch, capsys):
    def refuse(*_, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runtime.FileLock, "acquire", refuse)
    runtime.warn_once.cache_clear()
    assert_same(everything(open_batches(flat[0], "disk", flat[1])), everything(open_batches(flat[0], "none", None)))
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and "No locks available" in said and said.count("\n") == 1


def test_who_waits_for_another_process_says_so(flat, monkeypatch, capsys):
    path = batches.cache_path(flat[0], 32, str(flat[1]))
    flat[1].mkdir()
    other = runtime.locked(f"{path}.lock", 0, "")
    monkeypatch.setattr("builtins.print", lambda *words, say=print, **more: (say(*words, **more), other.lock.release()))
    open_batches(flat[0], "disk", flat[1])
    assert f"waiting for another process that holds {path}.lock" in capsys.readouterr().out


def test_a_killed_build_leaves_nothing_that_is_believed_or_blocks(flat, monkeypatch, decoded):
    source, folder = flat
    monkeypatch.setattr(batches, "CHUNK", 2)
    with monkeypatch.context() as slow:
        slow.setattr(Files, "image", lambda *_, image=Files.image: time.sleep(0.1) or image(*_))
        process = fork.Process(target=open_batches, args=(source, "disk", folder))
        process.start()
        while not list(folder.glob("*.unfinished")):
            time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert {path.suffix for path in folder.iterdir()} == {".unfinished", ".lock"}
    assert_same(everything(open_batches(source, "disk", folder)), everything(open_batches(source, "none", None)))
    assert len(decoded) >= 10 and len(tables(folder)) == 1 and not list(folder.glob("*.unfinished"))


def test_processes_that_start_at_once_build_once(flat, tmp_path, monkeypatch):
    source, folder = flat
    log, image = tmp_path / "log", Files.image

    def noted(source, index):
        with open(log, "a") as file:
            file.write(f"{index} ")
        time.sleep(0.02)
        return image(source, index)

    monkeypatch.setattr(Files, "image", noted)
    at_once(lambda: open_batches(source, "disk", folder))
    assert sorted(log.read_text().split()) == sorted(str(number) for number in range(10))
    assert len(tables(folder)) == 1 and not list(folder.glob("*.unfinished"))


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("holder, name, stand_in", [
    (os, "fsync", full), (shutil, "disk_usage", lambda folder: SimpleNamespace(free=10 * 3 * 32 * 32 - 1)),
], ids=["late", "early"])
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(holder, name, stand_in, flat, monkeypatch):
    monkeypatch.setattr(holder, name, stand_in)
    with pytest.raises((OSError, RunError)) as error:
        open_batches(flat[0], "disk", flat[1])
    line = runtime.explain(error.value) if isinstance(error.value, OSError) else str(error.value)
    assert str(flat[1]) in line and "--cache-folder" in line and "\n" not in line
    assert not tables(flat[1]) and not list(flat[1].glob("*.unfinished"))


def test_a_cache_folder_that_cannot_be_made_is_named(flat):
    (flat[1].parent / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file/below"):
        open_batches(flat[0], "disk", flat[1].parent / "file" / "below")


# ------------------------------------------------------------------------------------------------ broken images


@pytest.fixture
def with_broken(tmp_path):
    """A folder of 240 images in two classes, two of them broken, and the folder for its cache."""
    images = paint_classes(tmp_path / "images", images=120, side=(34, 32))
    (images / "ant/7.jpg").write_bytes(b"no image")
    (images / "bee/9.jpg").write_bytes((images / "bee/8.jpg").read_bytes()[:300])
    return datasets.image_folder(images), tmp_path / "cache"


@pytest.mark.parametrize("mode", MODES)
def test_broken_images_are_left_out_and_listed(mode, with_broken, decoded, capsys):
    source, folder = with_broken
    good = [row for row in range(240) if os.fsdecode(source.items[row]) not in ("ant/7.jpg", "bee/9.jpg")]
    expected = everything(open_batches(source.subset(np.array(good)), "none", None))
    decoded.clear()
    batches = open_batches(source, mode, folder, skip_broken=True)
    assert len(decoded) == 240 and len(batches) == 238
    assert_same(everything(batches), expected)
    assert batches.source.labels.tolist() == [0] * 119 + [1] * 119
    (listed,) = folder.glob("*.skipped.txt")
    said = capsys.readouterr().out
    assert listed.read_text().split() == [source.path(row) for row in sorted(set(range(240)) - set(good))]
    assert "2 of 240" in said and str(listed) in said


def test_the_file_remembers_the_broken(with_broken, decoded):
    source, folder = with_broken
    for _ in range(2):
        assert len(open_batches(source, "disk", folder, skip_broken=True)) == 238
    assert len(decoded) == 240
    with pytest.raises(RunError, match="ant/7.jpg.*cannot be decoded"):  # asked to leave nothing out
        open_batches(source, "disk", folder)
    for name, number in (("ant/7.jpg", 1), ("bee/9.jpg", 2)):
        paint(folder.parent / "images" / name, (34, 32), number)
    decoded.clear()
    assert len(open_batches(source, "disk", folder, skip_broken=True)) == 240
    assert len(decoded) == 240 and not list(folder.glob("*.skipped.txt"))


def test_processes_may_leave_out_the_broken_at_the_same_time(tmp_path):
    """Each of them lists the broken images in the same file."""
    paint_classes(tmp_path / "images", images=60, side=(8, 8))
    (tmp_path / "images" / "ant" / "7.jpg").write_bytes(b"no image")
    source, start = datasets.image_folder(tmp_path / "images"), fork.Barrier(4)
    is_broken = source.items == b"ant/7.jpg"

    def list_often():
        start.wait()
        for _ in range(20):
            batches.list_broken(source, is_broken, str(tmp_path / "cache" / "x.skipped.txt"))

    at_once(list_often)
    assert is_broken.sum() == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["x.skipped.txt"]


@pytest.mark.parametrize("mode", MODES)
def test_more_than_one_in_a_hundred_broken_is_refused(mode, flat):
    source, folder = flat
    (folder.parent / "images/4.png").unlink()
    with pytest.raises(RunError, match="1 of 10 .*more than one in a hundred.*skipped.txt"):
        open_batches(source, mode, folder, skip_broken=True)
    (listed,) = folder.glob("*.skipped.txt")
    assert listed.read_text() == source.path(4) + "\n"


# ------------------------------------------------------------------------------------------------ the choice


NEEDED = 12 * 3 * 32 * 32  # bytes of both splits of class_folder


@pytest.fixture
def choose(class_folder, tmp_path, monkeypatch):
    """A function: what choose_cache makes of a wish where so much is free on the GPU (None: there is none), …"""
    sources = [open_split("folder", class_folder, split, 32) for split in ("train", "test")]

    def choose(wanted, gpu, host, disk):
        monkeypatch.setattr(batches, "free_on", lambda device: gpu or 0)
        monkeypatch.setattr(batches, "free_memory", lambda: host)
        monkeypatch.setattr(batches, "free_disk", lambda folder: disk)
        device = torch.device("cpu" if gpu is None else "cuda")
        return choose_cache(wanted, sources, 32, device, str(tmp_path)), sources, tmp_path

    return choose


@pytest.mark.parametrize("wanted, room, chosen", [
    ("auto", (4, 0, 0), "device"), ("auto", (3.9, 2, 0), "ram"), ("auto", (None, 2, 0), "ram"),
    ("auto", (None, 1.9, 1), "disk"), ("auto", (3.9, 1.9, 0.9), "none"), ("device", (1, 0, 0), "device"),
    ("device", (None, 1, 0), "ram"), ("ram", (4, 1, 0), "ram"), ("disk", (4, 2, 0), "disk"),
    ("none", (4, 2, 1), "none"),
])
def test_the_choice_follows_the_free_room(wanted, room, chosen, choose, capsys):
    assert choose(wanted, *(part and NEEDED * part for part in room))[0] == chosen
    words = "not kept, but decoded" if chosen == "none" else "kept "
    assert capsys.readouterr().out.startswith(f"cache: 0.0 MB of decoded images are {words}")


@pytest.mark.parametrize("wanted, room", [("device", (0.9, 5, 0)), ("device", (None, 0.9, 0)), ("ram", (5, 0.9, 0))])
def test_memory_that_is_too_small_is_said(wanted, room, choose):
    with pytest.raises(RunError, match=f"--cache {wanted}.*--cache disk"):
        choose(wanted, *(part and NEEDED * part for part in room))


def test_a_disk_that_is_full_of_the_very_files_has_room(choose):
    for source in choose("auto", None, 0, 0)[1]:
        open_batches(source, "disk", choose("auto", None, 0, 0)[2])
    assert choose("auto", None, 0, 0)[0] == "disk"


def test_what_has_no_files_stays_in_memory(tmp_path, capsys):
    assert choose_cache("disk", [open_split("digits", None, "test", 32)], 32, CPU, tmp_path) == "ram"
    assert "are kept in memory" in capsys.readouterr().out


def test_free_memory_is_part_of_the_machines_the_containers_and_the_jobs(monkeypatch):
    assert 0 < batches.free_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    files = {
        "/proc/meminfo": "MemAvailable:  900 kB\n", "/proc/self/cgroup": "0::/job/step\n",
        "/sys/fs/cgroup/job/memory.max": "1000\n", "/sys/fs/cgroup/job/memory.stat": "anon 300\nfile 5\n",
        "/sys/fs/cgroup/job/step/memory.max": "max\n", "/sys/fs/cgroup/job/step/memory.stat": "anon 200\nfile 5\n",
    }

    def read_text(path):
        try:
            return files[str(path)]
        except KeyError:
            raise FileNotFoundError(path) from None

    monkeypatch.setattr(batches.Path, "read_text", read_text)
    assert batches.free_memory() == 700  # the job's limit holds for its step
    files["/sys/fs/cgroup/job/memory.max"] = "max\n"
    assert batches.free_memory() == 900 * 1024


def test_free_disk_is_that_of_the_folder_to_be_made(tmp_path):
    assert batches.free_disk(tmp_path / "not/yet") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert batches.free_disk("/proc/nowhere") == 0
