"""Decoded once: the same batches from every cache, and a cache file that is complete and current, or not believed."""

import errno
import io
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
from utils import batches, cache
from utils.batches import Batches, TrainingOrder, choose_cache
from utils.console import RunError

CPU = torch.device("cpu")
MODES = ("none", "ram", "device", "disk")
fork = multiprocessing.get_context("fork")


def open_batches(source, mode, folder, workers=0, **options):
    return Batches(source, 32, [0.5] * 3, [0.5] * 3, CPU, workers, True, mode, folder, **options)


def everything(batches, first_step=1):
    """What a run sees: five rounds of training in batches that do not divide a round, then tests, then examples."""
    streams = batches.training(5, 3, first_step, 10), batches.in_order(4), batches.training(20, 3, 1, 2)
    return [*itertools.chain(*streams), (batches.examples(3), torch.zeros(3))]


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
    return datasets.flat_folder(tmp_path / "images"), tmp_path / "cache"


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize("mode", MODES)
def test_batches_are_the_same_in_every_mode(mode, class_folder, tmp_path):
    source = open_split("folder", class_folder, "train", 32)
    expected = everything(open_batches(source, "none", None))
    for indices, (_, labels) in zip(TrainingOrder(9, 5, 3, 1, 10), expected):
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
    assert len(asked) <= 5


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
    assert batches.store.is_filled.sum() == 2
    assert_same(everything(batches), everything(open_batches(flat[0], "none", None)))


def test_two_streams_at_once_do_not_disturb_each_other(flat):
    batches = open_batches(flat[0], "ram", None, workers=2)
    streams = zip(batches.training(3, 1, 1, 8), batches.training(3, 2, 1, 8))
    expected = zip(*(open_batches(flat[0], "none", None).training(3, seed, 1, 8) for seed in (1, 2)))
    for found, wanted in zip(streams, expected, strict=True):
        assert_same(found, wanted)


# ------------------------------------------------------------------------------------------------ the file


def rename(folder):
    (folder / "3.png").rename(folder / "33.png")


@pytest.mark.parametrize(
    "change, again",
    [
        (lambda folder: None, []),
        (lambda folder: paint(folder / "4.png", seed=99), ["4.png"]),
        (lambda folder: paint(folder / "45.png", seed=99), ["45.png"]),
        (lambda folder: (folder / "4.png").unlink(), []),
        (lambda folder: os.utime(folder / "4.png", ns=(0, 0)), ["4.png"]),
        (rename, ["33.png"]),
    ],
    ids=["nothing", "changed", "added", "removed", "touched", "renamed"],
)
def test_only_what_changed_is_decoded_again(change, again, flat, decoded, capsys):
    source, folder = flat
    open_batches(source, "disk", folder)
    change(folder.parent / "images")
    source = datasets.flat_folder(folder.parent / "images")
    decoded.clear()
    capsys.readouterr()
    found = everything(open_batches(source, "disk", folder))
    said = capsys.readouterr().out
    assert decoded == again
    is_as_before = len(source) == 10 and not again
    assert said == "" if is_as_before else f"decoding {len(again)} images" in said and said.count("\n") == 1
    assert_same(found, everything(open_batches(source, "none", None)))


def test_another_way_of_decoding_makes_the_file_stale(flat, decoded, monkeypatch, capsys):
    open_batches(flat[0], "disk", flat[1])
    monkeypatch.setitem(batches.DECODING, "version", -1)
    open_batches(flat[0], "disk", flat[1])
    assert len(decoded) == 20 and "other settings" in capsys.readouterr().out


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
        small = open_split("folder", class_folder, "test", 16)
        Batches(small, 16, [0.5] * 3, [0.5] * 3, CPU, mode="disk", folder=tmp_path)
    assert len(decoded) == 2 + 9 + 3 + 3 and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("cut", [0, 100, 9000, -1, -100])
def test_a_damaged_file_is_not_believed(cut, flat, decoded, capsys):
    open_batches(flat[0], "disk", flat[1])
    (path,) = flat[1].iterdir()
    path.write_bytes(path.read_bytes()[:cut])
    assert_same(everything(open_batches(flat[0], "disk", flat[1])), everything(open_batches(flat[0], "none", None)))
    assert decoded[10:20] == decoded[:10] and "damaged" in capsys.readouterr().out


def test_a_current_file_is_read_without_writing_anything(flat, monkeypatch):
    open_batches(flat[0], "disk", flat[1])
    monkeypatch.setattr(cache, "locked", None)
    assert_same(everything(open_batches(flat[0], "disk", flat[1])), everything(open_batches(flat[0], "none", None)))


def test_a_killed_build_leaves_nothing_that_is_believed_or_blocks(flat, monkeypatch, decoded):
    source, folder = flat
    monkeypatch.setattr(cache, "CHUNK", 2)
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
    assert len(decoded) >= 10 and [path.suffix for path in folder.iterdir()] == [".npy"]


def test_processes_that_start_at_once_build_once(flat, tmp_path, monkeypatch):
    source, folder = flat
    log, image = tmp_path / "log", Files.image

    def noted(source, index):
        with open(log, "a") as file:
            file.write(f"{index} ")
        time.sleep(0.02)
        return image(source, index)

    monkeypatch.setattr(Files, "image", noted)
    processes = [fork.Process(target=open_batches, args=(source, "disk", folder)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(log.read_text().split()) == sorted(str(number) for number in range(10))
    assert [path.suffix for path in folder.iterdir()] == [".npy"]


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("holder, name, stand_in", [
    (os, "fsync", full),
    (shutil, "disk_usage", lambda folder: SimpleNamespace(free=10 * 3 * 32 * 32 - 1)),
], ids=["late", "early"])  # fmt: skip
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(holder, name, stand_in, flat, monkeypatch):
    monkeypatch.setattr(holder, name, stand_in)
    with pytest.raises(RunError, match="--cache-folder") as caught:
        open_batches(flat[0], "disk", flat[1])
    assert "\n" not in str(caught.value) and not list(flat[1].iterdir())


def test_a_full_disk_keeps_the_old_file(flat, monkeypatch):
    open_batches(flat[0], "disk", flat[1])
    (path,) = flat[1].iterdir()
    before = path.read_bytes()
    paint(flat[1].parent / "images/4.png", seed=99)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError):
        open_batches(flat[0], "disk", flat[1])
    assert list(flat[1].iterdir()) == [path] and path.read_bytes() == before


def test_a_cache_folder_that_cannot_be_made_is_named(flat):
    (flat[1].parent / "file").write_text("")
    with pytest.raises(RunError, match="file/below.*--cache-folder"):
        open_batches(flat[0], "disk", flat[1].parent / "file" / "below")


# ------------------------------------------------------------------------------------------------ broken images


@pytest.fixture
def with_broken(tmp_path):
    """A folder of 240 images in two classes, two of them broken, and the folder for its cache."""
    images = paint_classes(tmp_path / "images", images=120, side=(34, 32))
    (images / "ant/7.jpg").write_bytes(b"no image")
    (images / "bee/9.jpg").write_bytes((images / "bee/8.jpg").read_bytes()[:300])
    return datasets.labelled_folder(images), tmp_path / "cache"


@pytest.mark.parametrize("mode", MODES)
def test_broken_images_are_left_out_and_listed(mode, with_broken, decoded, capsys):
    source, folder = with_broken
    good = [row for row in range(240) if os.fsdecode(source.paths[row]) not in ("ant/7.jpg", "bee/9.jpg")]
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
    assert sorted(decoded) == ["7.jpg", "9.jpg"] and not list(folder.glob("*.skipped.txt"))


def test_processes_may_leave_out_the_broken_at_the_same_time(tmp_path):
    """Each of them lists the broken images in the same file."""
    paint_classes(tmp_path / "images", images=60, side=(8, 8))
    (tmp_path / "images" / "ant" / "7.jpg").write_bytes(b"no image")
    source, start = datasets.labelled_folder(tmp_path / "images"), fork.Barrier(4)
    is_broken = source.paths == b"ant/7.jpg"

    def list_often():
        start.wait()
        for _ in range(20):
            batches._list_broken(source, is_broken, str(tmp_path / "cache" / "x.skipped.txt"))

    processes = [fork.Process(target=list_often) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert is_broken.sum() == 1 and [process.exitcode for process in processes] == [0] * 4
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["x.skipped.txt"]


def test_the_limit_of_a_job_counts_for_its_tasks(tmp_path, monkeypatch):
    """Slurm sets it a few control groups above that of the process."""
    for place, limit, used in (("", "max", 9), ("job_7", "1000", 300), ("job_7/step_0/task_0", "max", 100)):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "memory.max").write_text(f"{limit}\n")
        (tmp_path / place / "memory.stat").write_text(f"anon {used}\nfile 5\n")
    monkeypatch.setattr("builtins.open", lambda *of: io.StringIO("0::/job_7/step_0/task_0\n"))
    assert cache._free_in_group(str(tmp_path)) == 700


@pytest.mark.parametrize("mode", MODES)
def test_more_than_one_in_a_hundred_broken_is_refused(mode, flat):
    source, folder = flat
    (folder.parent / "images/4.png").unlink()
    with pytest.raises(RunError, match="1 of 10 .*more than one in a hundred.*skipped.txt"):
        open_batches(source, mode, folder, skip_broken=True)
    (listed,) = folder.glob("*.skipped.txt")
    assert listed.read_text() == source.path(4) + "\n"


# ------------------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize(
    "wanted, needed, room, chosen",
    [
        ("auto", 100, (400, 0, 0), "device"),
        ("auto", 101, (400, 202, 0), "ram"),
        ("auto", 100, (None, 200, 0), "ram"),
        ("auto", 101, (None, 200, 101), "disk"),
        ("auto", 101, (400, 200, 100), "none"),
        ("device", 400, (400, 0, 0), "device"),
        ("device", 100, (None, 100, 0), "ram"),
        ("ram", 100, (400, 100, 0), "ram"),
        ("disk", 100, (400, 200, 0), "disk"),
        ("none", 1, (400, 200, 100), "none"),
    ],
)
def test_the_choice_follows_the_free_room(wanted, needed, room, chosen):
    assert cache.choose(wanted, needed, cache.Room(*room)) == chosen


@pytest.mark.parametrize("wanted, room", [("device", (99, 500, 0)), ("device", (None, 99, 0)), ("ram", (500, 99, 0))])
def test_memory_that_is_too_small_is_said(wanted, room):
    with pytest.raises(RunError, match=f"--cache {wanted}.*--cache disk"):
        cache.choose(wanted, 100, cache.Room(*room))


def test_the_choice_counts_all_splits_and_says_so(class_folder, tmp_path, monkeypatch, capsys):
    sources = [open_split("folder", class_folder, split, 32) for split in ("train", "test")]
    needed = 12 * 3 * 32 * 32
    for host, disk, chosen in ((2 * needed, 0, "ram"), (2 * needed - 1, needed, "disk"), (0, needed - 1, "none")):
        monkeypatch.setattr(cache, "room", lambda *_: cache.Room(None, host, disk))
        assert choose_cache("auto", sources, 32, CPU, tmp_path) == chosen
    assert capsys.readouterr().out.count("cache: 0.0 MB") == 3
    for source in sources:
        open_batches(source, "disk", tmp_path)
    assert choose_cache("auto", sources, 32, CPU, tmp_path) == "disk"  # full by now, of the very files it asks for


def test_what_has_no_files_stays_in_memory(tmp_path, capsys):
    assert choose_cache("disk", [open_split("digits", None, "test", 32)], 32, CPU, tmp_path) == "ram"
    assert "--cache disk is for image files" in capsys.readouterr().out


def test_free_memory_is_part_of_the_machines():
    assert 0 < cache.free_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_free_disk_is_that_of_the_folder_to_be_made(tmp_path):
    assert cache.free_disk(tmp_path / "not/yet") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert cache.free_disk("/proc/nowhere") == 0
