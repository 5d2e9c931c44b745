"""Every row of the table opens its documented layout, and batches are a pure function of (seed, step)."""

import pickle
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, paint, paint_classes
from PIL import Image

import datasets
from datasets import open_split
from utils import batches
from utils.batches import Batches, TrainingOrder
from utils.console import RunError

CPU = torch.device("cpu")


def sizes(name, root):
    return [len(open_split(name, root, split, 32)) for split in datasets.SPLITS]


def tiny_cifar(root, folder, files, meta, labels, classes):
    """CIFAR's own pickled layout with ten images per file, so that torchvision reads it."""
    place = root / folder
    place.mkdir(parents=True)
    for number, name in enumerate(files):
        pixels = np.random.default_rng(number).integers(0, 256, (10, 3072), np.uint8)
        (place / name).write_bytes(pickle.dumps({"data": pixels, labels: [i % len(classes) for i in range(10)]}))
    (place / meta[0]).write_bytes(pickle.dumps({meta[1]: classes}))


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    meta = ("meta", "fine_label_names")
    tiny_cifar(tmp_path, "cifar-100-python", ["train", "test"], meta, "fine_labels", list("abcde"))
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda self: True)  # not the real checksums
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    return tmp_path


def test_cifar_is_read_in_torchvisions_layout(cifar100):
    source = open_split("cifar100", cifar100, "train", 32)
    assert len(source) == 10 and source.classes == list("abcde") and source.image(3).size == (32, 32)
    assert source.labels.tolist() == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist"])
def test_a_failed_download_says_where_to_put_the_files(name, tmp_path, monkeypatch):
    def no_network(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("urllib.request.urlretrieve", no_network)
    with pytest.raises(RunError) as caught:
        open_split(name, tmp_path, "train", 32)
    message = str(caught.value)
    assert str(tmp_path) in message and "--dataset shapes" in message and "\n" not in message


def test_imagenet_layout(tmp_path):
    paint_classes(tmp_path / "train", images=3)
    paint_classes(tmp_path / "val", images=2)
    assert sizes("imagenet", tmp_path) == [6, 6, 4]


def test_indoor_trains_without_labels_on_allminustest(tmp_path):
    paint_classes(tmp_path / "allminustest", images=5)
    paint_classes(tmp_path / "train", images=3)
    paint_classes(tmp_path / "test", images=2)
    assert sizes("indoor", tmp_path) == [10, 6, 4]


def test_miniimagenet_holds_out_a_fifth(tmp_path):
    paint_classes(tmp_path / "train", images=100, side=(4, 4))
    train, test = (open_split("miniimagenet", tmp_path, split, 32) for split in ("train", "test"))
    assert np.bincount(test.labels).tolist() == [23, 23] and np.bincount(train.labels).tolist() == [77, 77]
    assert len(set(train.paths) | set(test.paths)) == len(train) + len(test) == 200


@pytest.mark.parametrize("images, tested", [(2, 6), (3, 14), (5, 21)])
def test_every_class_is_trained_on(tmp_path, images, tested):
    paint_classes(tmp_path / "train", classes="abcdefghijklmnopqrstuvwxyz", images=images, side=(4, 4))
    train, test = (open_split("miniimagenet", tmp_path, split, 32) for split in ("train", "test"))
    assert set(train.labels) == set(range(26)) and len(test) == tested


def test_two_images_are_enough_whatever_their_classes(tmp_path):
    paint_classes(tmp_path, images=1)
    assert sizes("folder", tmp_path) == [1, 1, 1]


@pytest.mark.parametrize("classes, images", [(2, 50), (26, 5)])
def test_what_is_held_out_stays_so_when_images_come_and_go(tmp_path, classes, images):
    names = "abcdefghijklmnopqrstuvwxyz"[:classes]
    paint_classes(tmp_path, names, images, side=(4, 4))
    before = [set(open_split("folder", tmp_path, split, 32).paths) for split in ("train", "test")]
    for name in names:
        (tmp_path / name / "1.jpg").unlink()
        paint(tmp_path / name / "new.jpg", side=(4, 4))
    after = [set(open_split("folder", tmp_path, split, 32).paths) for split in ("train", "test")]
    assert not before[0] & after[1] and not before[1] & after[0]


def test_places205_layout(tmp_path):
    lists = tmp_path / "trainvalsplit_places205"
    lists.mkdir()
    (lists / "train_places205.csv").write_text("/a/abbey/one.jpg 0\nb/big barn/two three.jpg 2\n")
    (lists / "val_places205.csv").write_text("a/abbey/four.jpg 0\n")
    images = tmp_path / "data/vision/torralba/deeplearning/images256"
    for name in ("a/abbey/one.jpg", "b/big barn/two three.jpg", "a/abbey/four.jpg"):
        paint(images / name)
    train = open_split("places205", tmp_path, "train", 32)
    assert train.labels.tolist() == [0, 2] and train.classes == ["a/abbey", "1", "b/big barn"]
    assert train.image(1).size == (40, 30) and len(open_split("places205", tmp_path, "test", 32)) == 1


def test_pixels_of_16_bits_keep_their_shades_and_of_32_are_refused(tmp_path):
    ramp = np.linspace(0, 65535, 256 * 4).reshape(4, 256)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "b.tif")
    header = b"P5 256 4 65535\n"
    (tmp_path / "c.pgm").write_bytes(header + ramp.astype(">u2").tobytes())
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "d.tif")
    found = datasets.flat_folder(tmp_path)
    for number in (0, 1, 2):
        shades = np.asarray(found.image(number))[..., 0]
        assert np.abs(shades - ramp / 257).max() <= 0.51
    with pytest.raises(RunError, match="d.tif.*mode F"):
        found.image(3)


def test_folder_takes_every_usual_layout(tmp_path, class_folder):
    for test in ("val", "test"):
        shutil.copytree(class_folder, tmp_path / f"with_{test}" / "train")
        paint_classes(tmp_path / f"with_{test}" / test, images=2)
        assert sizes("folder", tmp_path / f"with_{test}") == [12, 12, 4]
    assert sizes("folder", class_folder) == [9, 9, 3]
    flat = tmp_path / "flat"
    for number in range(7):
        paint(flat / ("deep" if number > 4 else ".") / f"{number}.png", seed=number)
    assert sizes("folder", flat) == [6, 6, 1] and open_split("folder", flat, "train", 32).labels is None


def test_what_is_hidden_or_ours_is_no_image(tmp_path, class_folder):
    for place in ("labelled", "flat", "flat/deep"):
        shutil.copytree(class_folder / ("ant" if "flat" in place else "."), tmp_path / place)
        for name in (".cache/1.jpg", "scratch/images/1.png"):
            paint(tmp_path / place / name)
        (tmp_path / place / "scratch" / "args.json").touch()
    paint(tmp_path / "labelled" / "ant" / "._1.jpg")
    paint(tmp_path / "labelled" / "ant" / ".ipynb_checkpoints" / "1.jpg")
    found = open_split("folder", tmp_path / "labelled", "train", 32)
    assert found.classes == ["ant", "bee"] and sum(sizes("folder", tmp_path / "labelled")[1:]) == 12
    assert sum(sizes("folder", tmp_path / "flat")[1:]) == 12


def test_images_behind_links_are_found(tmp_path, class_folder):
    paint(tmp_path / "0.jpg")
    (tmp_path / "more").symlink_to(class_folder)
    (tmp_path / "again").symlink_to(tmp_path)
    assert sum(sizes("folder", tmp_path)[1:]) == 13


def test_digits_hold_out_a_fifth():
    train, test = (open_split("digits", None, split, 32) for split in ("train", "test"))
    assert len(train) + len(test) == 1797 and len(test) == pytest.approx(1797 / 5, abs=6)
    assert len(train.classes) == 10 and min(np.bincount(test.labels)) >= 33


def test_pixels_are_resize_and_centre_crop(tmp_path):
    paint(tmp_path / "wide.png", side=(90, 40))
    paint(tmp_path / "tall.png", side=(20, 70))
    pixels, errors = batches.Pixels(open_split("folder", tmp_path, "test", 32), 32).__getitems__([0])
    assert pixels.dtype == torch.uint8 and pixels.shape == (1, 3, 32, 32) and not errors
    path = tmp_path / open_split("folder", tmp_path, "test", 32).paths[0].decode()
    image = Image.open(path)
    short = min(image.size)
    resized = image.resize([side * 32 // short for side in image.size], Image.Resampling.BILINEAR)
    left, top = round((resized.width - 32) / 2), round((resized.height - 32) / 2)
    expected = np.asarray(resized.crop((left, top, left + 32, top + 32)))
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), expected)


# ------------------------------------------------------------------------------------------------ batches


def test_training_order_shows_every_image_once_per_round_in_fresh_order():
    order = TrainingOrder(images=10, batch_size=4, seed=1, first_step=1, last_step=10)
    seen = [index for batch in order for index in batch]
    rounds = [seen[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(part) == list(range(10)) for part in rounds) and len({tuple(part) for part in rounds}) == 4


def test_training_order_depends_on_seed_and_step_alone():
    whole, rest, other = (np.stack([*TrainingOrder(100, 16, *of)]) for of in ((5, 1, 20), (5, 8, 20), (6, 1, 20)))
    assert np.array_equal(rest, whole[7:]) and not np.array_equal(other, whole)


def test_every_image_comes_once_in_each_round_whatever_the_batch():
    rounds = np.concatenate([*TrainingOrder(10, 25, 5, 1, 4)]).reshape(10, 10)
    assert (np.sort(rounds) == np.arange(10)).all() and not (rounds[0] == rounds[1]).all()


@pytest.mark.parametrize("name", ["digits", "shapes", "folder"])
def test_batches_are_the_same_for_every_number_of_workers(name, class_folder):
    def batches(workers):
        source = open_split(name, class_folder, "train", 32)
        mean, std = datasets.normalisation(datasets.DATA_SETS[name].channels, inet=True)
        stream = Batches(source, 32, mean, std, CPU, workers, flip=True).training(8, seed=2, first_step=1, last_step=4)
        return list(stream)

    for (x, labels), (other, other_labels) in zip(batches(0), batches(2), strict=True):
        assert torch.equal(x, other) and torch.equal(labels, other_labels)


def test_flips_mirror_about_half_and_normalisation_can_be_undone():
    source = open_split("shapes", None, "train", 32)
    mean, std = datasets.normalisation(3, inet=True)
    plain = next(Batches(source, 32, mean, std, CPU).training(64, 1, 1, 1))[0]
    flipped = next(Batches(source, 32, mean, std, CPU, flip=True).training(64, 1, 1, 1))[0]
    mirrored = torch.tensor([not torch.equal(a, b) for a, b in zip(plain, flipped)])
    assert torch.equal(mirrored, batches.flips(1, 1, 64)) and 16 < mirrored.sum() < 48
    assert torch.equal(flipped[mirrored], plain[mirrored].flip(-1))
    pixels = ((plain * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)) * 255).round()
    expected = batches.Pixels(source, 32).__getitems__(next(iter(TrainingOrder(50_000, 64, 1, 1, 1))))[0]
    assert torch.equal(pixels.to(torch.uint8), expected)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_test_images_come_once_each_in_order(batch_size):
    source = open_split("digits", None, "test", 32)
    labels = torch.cat([y for _, y in Batches(source, 32, [0.5], [0.5], CPU).in_order(batch_size)])
    assert torch.equal(labels, torch.from_numpy(source.labels))


def test_a_stream_left_open_does_not_keep_the_process_from_its_end():
    """Data-loading processes ignore SIGTERM, with which Python would end them, and wait for them, at its own end."""
    program = """
        import torch, datasets
        from utils.batches import Batches
        torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1  # torch's own patience with its workers
        source = datasets.open_split("digits", None, "train", 32)
        stream = Batches(source, 32, [0.5], [0.5], torch.device("cpu"), workers=1).training(8, 1, 1, 99)
        next(stream)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, timeout=60, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_broken_image_is_named_also_from_a_worker(tmp_path):
    paint_classes(tmp_path, images=5)
    (tmp_path / "ant" / "3.jpg").write_bytes(b"\xff\xd8 no jpeg")
    for workers in (0, 1):
        with pytest.raises(RunError, match="3.jpg.*cannot be decoded"):
            batches = Batches(open_split("folder", tmp_path, "train", 32), 32, [0.5] * 3, [0.5] * 3, CPU, workers)
            list(batches.training(8, 1, 1, 3))
