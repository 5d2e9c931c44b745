"""Every row of the table opens its documented layout, any folder is read or refused, batches depend on (seed, step)."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, paint, paint_classes
from PIL import Image, PngImagePlugin

import datasets
from datasets import open_split
from utils import batches
from utils.batches import Batches, Form, Loading, TrainingOrder
from utils.runtime import RunError

CPU = torch.device("cpu")


def sizes(name, root):
    return [len(open_split(name, root, split, 32)) for split in ("unlabelled", "train", "test")]


@pytest.fixture
def said(capsys):
    """A function: what was printed since the last call. Nothing is held back for having been said before."""
    datasets.say_once.cache_clear()
    datasets.said_of_images.clear()
    return lambda: "".join(capsys.readouterr())


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


@pytest.mark.parametrize("name, folders, expected", [
    ("imagenet", "train val", [10, 10, 6]), ("indoor", "allminustest train test", [10, 6, 4]),
])
def test_layouts_of_class_folders(name, folders, expected, tmp_path):
    for images, folder in zip((5, 3, 2), folders.split()):
        paint_classes(tmp_path / folder, images=images)
    assert sizes(name, tmp_path) == expected


def test_miniimagenet_holds_out_a_fifth(tmp_path):
    paint_classes(tmp_path / "train", images=100, side=(4, 4))
    train, test = (open_split("miniimagenet", tmp_path, split, 32) for split in ("train", "test"))
    assert np.bincount(test.labels).tolist() == [23, 23] and np.bincount(train.labels).tolist() == [77, 77]
    assert len(set(train.items) | set(test.items)) == len(train) + len(test) == 200


@pytest.mark.parametrize("images, tested", [(2, 6), (3, 14), (5, 21)])
def test_every_class_is_trained_on(tmp_path, images, tested):
    paint_classes(tmp_path / "train", classes="abcdefghijklmnopqrstuvwxyz", images=images, side=(4, 4))
    train, test = (open_split("miniimagenet", tmp_path, split, 32) for split in ("train", "test"))
    assert set(train.labels) == set(range(26)) and len(test) == tested


@pytest.mark.parametrize("classes, images", [(2, 50), (26, 5)])
def test_what_is_held_out_stays_so_when_images_come_and_go(tmp_path, classes, images):
    names = "abcdefghijklmnopqrstuvwxyz"[:classes]
    paint_classes(tmp_path, names, images, side=(4, 4))
    before = [set(open_split("folder", tmp_path, split, 32).items) for split in ("train", "test")]
    for name in names:
        (tmp_path / name / "1.jpg").unlink()
        paint(tmp_path / name / "new.jpg", side=(4, 4))
    after = [set(open_split("folder", tmp_path, split, 32).items) for split in ("train", "test")]
    assert not before[0] & after[1] and not before[1] & after[0]


# ------------------------------------------------------------------------------------------------ lists


@pytest.fixture
def places(tmp_path):
    """A function that writes Places205's two lists, bytes, and opens the split that is wanted."""
    lists = tmp_path / "trainvalsplit_places205"
    lists.mkdir()

    def places(train=b"a.jpg 0\n", val=b"a.jpg 0\n", split="train"):
        (lists / "train_places205.csv").write_bytes(train)
        (lists / "val_places205.csv").write_bytes(val)
        return open_split("places205", tmp_path, split, 32)

    return places


def test_places205_layout(places, tmp_path):
    lists = b"/a/abbey/one.jpg 0\nb/big barn/two three.jpg 2\n", b"a/abbey/four.jpg 0\n"
    paint(tmp_path / "data/vision/torralba/deeplearning/images256/b/big barn/two three.jpg")
    train = places(*lists)
    assert train.labels.tolist() == [0, 2] and train.classes == ["a/abbey", "1", "b/big barn"]
    assert train.image(1).size == (40, 30) and len(places(*lists, "test")) == 1


def test_the_number_in_the_list_is_the_class(places):
    lists = b"a.jpg 3\nb.jpg 0\nc.jpg 1\nd.jpg 2\n", b"e.jpg 1\nf.jpg 2\n"
    assert places(*lists).labels.tolist() == [3, 0, 1, 2] and places(*lists).classes == list("0123")
    assert places(*lists, "test").labels.tolist() == [1, 2]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\n\n  \n"])
def test_lists_of_every_usual_encoding_are_read(encoding, ends, places):
    found = places(f"c/café/é.jpg 1{ends}/a b/ü.jpg 0{ends}".encode(encoding))
    assert found.classes == ["a b", "c/café"] and found.labels.tolist() == [1, 0]
    assert [os.path.basename(found.path(row)) for row in (0, 1)] == ["é.jpg", "ü.jpg"]


@pytest.mark.parametrize("label", [" two", " ²", " -1", " 205", " 9999999999999", "", "\t1"])
def test_a_line_that_is_none_is_named(label, places):
    with pytest.raises(RunError, match="train_places205.csv: line 2 ") as caught:
        places(f"b.jpg 0\na.jpg{label}\n".encode())
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="the list is empty"):
        places(b"\n")


def tiny_imagenet(root, rows="0.JPEG\tbee\t0\t0\t9\t9\n1.JPEG\tant\t0\t0\t9\t9\n"):
    paint_classes(root / "train", images=2)
    for name in ("ant", "bee"):
        shutil.move(root / "train" / name, root / "train/images")
        shutil.move(root / "train/images", root / "train" / name / "images")
        (root / "train" / name / f"{name}_boxes.txt").touch()
    for number in range(2):
        paint(root / f"val/images/{number}.JPEG", seed=number)
        paint(root / f"test/images/{number}.JPEG", seed=number)
    (root / "val/val_annotations.txt").write_text(rows)
    return root


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_tiny_imagenet_is_read_as_packed(name, tmp_path, said):
    assert sizes(name, tiny_imagenet(tmp_path)) == [4, 4, 2]
    test = open_split(name, tmp_path, "test", 32)
    assert test.labels.tolist() == [1, 0] and test.classes == ["ant", "bee"] and test.image(0)
    assert "passed over 2 .txt" in said()


@pytest.mark.parametrize("rows", ["0.JPEG bee\n", "", "0.JPEG\n"])
def test_annotations_of_another_form_are_refused(rows, tmp_path):
    with pytest.raises(RunError, match="val_annotations.txt: expected"):
        open_split("folder", tiny_imagenet(tmp_path, rows), "test", 32)


# ------------------------------------------------------------------------------------------------ any folder


@pytest.mark.parametrize("names", ["train val", "train test", "training validation", "Train Val", "train valid",
                                   "TRAINING Testing"])
def test_the_usual_names_of_splits_in_any_case(names, tmp_path):
    train, test = names.split()
    paint_classes(tmp_path / train, images=3)
    paint_classes(tmp_path / test, ("bee",), images=2)
    assert sizes("folder", tmp_path) == [6, 6, 2]
    assert open_split("folder", tmp_path, "test", 32).labels.tolist() == [1, 1]  # bee, as in training


def test_folder_takes_classes_or_images_alone(tmp_path, class_folder, said):
    paint_classes(tmp_path / "two", images=1)
    assert sizes("folder", tmp_path / "two") == [1, 1, 1]  # whatever their classes
    shutil.rmtree(tmp_path / "two")
    assert sizes("folder", class_folder) == [9, 9, 3] and len(open_split("folder", class_folder, "all", 32)) == 12
    for number in range(7):
        paint(tmp_path / ("deep" if number > 4 else ".") / f"{number}.png", seed=number)
    assert sizes("folder", tmp_path) == [6, 6, 1] and open_split("folder", tmp_path, "train", 32).labels is None
    assert said().count("0.png lies beside folders, so all images are taken without classes") == 1
    paths = open_split("folder", tmp_path, "all", 32).items.tolist()
    assert paths == sorted(paths) and len(paths) == 7  # the order of the paths, as ever


def test_classes_of_training_and_test_may_differ(tmp_path):
    paint_classes(tmp_path / "train", ("bee", "cat"), images=1)
    paint_classes(tmp_path / "val", ("ant", "cat"), images=1)
    test = open_split("folder", tmp_path, "test", 32)
    assert test.labels.tolist() == [2, 1] and test.classes == ["bee", "cat", "ant"]
    shutil.rmtree(tmp_path / "val")
    paint(tmp_path / "val" / "flat.jpg")
    assert open_split("folder", tmp_path, "test", 32).labels is None


@pytest.mark.parametrize("folders, words", [
    (["train/a", "training/a"], "holds train, training, and it is not clear what to train on"),
    (["test/a"], "holds test, and it is not clear"),
    (["val/a", "a"], "holds a, val, and it is not clear"),
    (["bus", "car", "train"], "holds bus, car, train, and it is not clear"),
    (["mine/train/a", "mine/val/a"], "mine has train and val, a data set of its own: give --data-folder .*mine"),
    (["x/mine/Train/a", "x/mine/Test/a"], "x/mine has Train and Test, a data set"),
])
def test_where_a_guess_would_be_needed_nothing_is_read(folders, words, tmp_path):
    for folder in folders:
        paint(tmp_path / folder / "0.jpg")
    with pytest.raises(RunError, match=words) as caught:
        open_split("folder", tmp_path, "train", 32)
    assert "--data-folder" in str(caught.value) and "\n" not in str(caught.value)


def test_images_are_found_by_what_pillow_reads_and_the_rest_is_counted(tmp_path, said):
    paint_classes(tmp_path, images=2)
    for ending in ("gif", "avif", "webp", "BMP", "JPG", "tiff"):
        paint(tmp_path / "ant" / f"0.{ending}")
    (tmp_path / "ant/0.jpg").rename(tmp_path / "ant/0.jfif")
    for name in ("ant/a.heic", "ant/b.HEIC", "ant/Thumbs.db", "bee/desktop.ini", "bee/readme", "labels.csv", "bee/.x"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "ant/x.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "bee/gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "cat").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("empty", "bee/@eaDir", "__MACOSX"):
        (tmp_path / name).mkdir()
    paint(tmp_path / "bee/@eaDir/0.jpg")
    found = open_split("folder", tmp_path, "all", 32)
    assert len(found) == 10 and found.classes == ["ant", "bee"] and all(found.image(row) for row in range(10))
    line = said()
    assert line.startswith(f"{tmp_path}: passed over 4 link to nothing or special file, 2 .heic, ")
    assert line.count("\n") == 1
    for part in ("1 __MACOSX", "1 @eaDir", "1 .db", "1 .ini", "1 without ending", "1 empty folder", "1 .csv",
                 "1 too many levels of symbolic links"):
        assert part in line


def test_each_real_folder_is_read_once(tmp_path, class_folder, said):
    shutil.copytree(class_folder, tmp_path / "classes")
    for link, to in (("ant/self", "."), ("all", "."), ("ant/up", ".."), ("bee/ant", "../ant")):
        (tmp_path / "classes" / link).symlink_to(to)
    found = open_split("folder", tmp_path / "classes", "all", 32)
    assert len(found) == 12 and found.classes == ["ant", "bee"] and "link to a known folder" in said()
    paint(tmp_path / "flat/0.jpg")
    (tmp_path / "flat/more").symlink_to(class_folder)
    (tmp_path / "flat/again").symlink_to(tmp_path / "flat")
    assert len(open_split("folder", tmp_path / "flat", "all", 32)) == 13
    (tmp_path / "classes/copy").symlink_to("ant")
    assert open_split("folder", tmp_path / "classes", "all", 32).classes == ["ant", "bee"]


def test_what_is_hidden_or_ours_is_no_image(tmp_path, class_folder, said):
    for place in ("labelled", "flat", "flat/deep"):
        shutil.copytree(class_folder / ("ant" if "flat" in place else "."), tmp_path / place)
        for name in (".cache/1.jpg", "scratch/images/1.png"):
            paint(tmp_path / place / name)
        (tmp_path / place / "scratch" / "args.json").touch()
    paint(tmp_path / "labelled" / "ant" / "._1.jpg")
    paint(tmp_path / "labelled" / "ant" / ".ipynb_checkpoints" / "1.jpg")
    found = open_split("folder", tmp_path / "labelled", "all", 32)
    assert found.classes == ["ant", "bee"] and len(found) == 12
    assert len(open_split("folder", tmp_path / "flat", "all", 32)) == 12 and "folder of a run" in said()


def test_names_of_classes_are_lines_of_text(tmp_path):
    names = ["a b", "c\nd", "🐝", os.fsdecode(b"caf\xe9")]
    paint_classes(tmp_path, names, images=1, side=(8, 8))
    found = open_split("folder", tmp_path, "all", 32)
    assert found.classes == ["a b", "c\\nd", "caf\\xe9", "🐝"] and all(found.image(row) for row in range(4))


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_a_test_folder_that_is_the_training_folder_is_refused(name, tmp_path):
    paint_classes(tmp_path / "train", images=2)
    (tmp_path / "val").symlink_to("train")
    with pytest.raises(RunError, match="are the same folder"):
        open_split(name, tmp_path, "test", 32)


def test_a_class_is_the_same_in_either_spelling_of_an_accent(tmp_path):
    paint_classes(tmp_path / "train", ["bee", "caf\u00e9"], images=2)
    paint_classes(tmp_path / "val", ["cafe\u0301"], images=2)
    assert open_split("folder", tmp_path, "test", 32).labels.tolist() == [1, 1]


def test_what_a_run_and_parts_leave_is_no_class(tmp_path):
    paint_classes(tmp_path, images=3)
    paint(tmp_path / "tested/evaluated/samples.png")
    paint(tmp_path / "parts/parts.png")
    (tmp_path / "parts/parts.json").touch()
    assert open_split("folder", tmp_path, "all", 32).classes == ["ant", "bee"]


@pytest.mark.parametrize("name, folders, words", [
    ("folder", [], "no images in it"),
    ("folder", ["ant", "bee", "cow.heic"], "no images in it .passed over: .*1 .heic.*convert others to .* .jpg"),
    ("folder", None, "no such folder; give --data-folder"),
    ("imagenet", [], "train: no such folder; expected .*train/CLASS"),
    ("cifar100", ["train"], "holds images, but not CIFAR100; add --dataset folder"),
    ("mnist", ["train"], "holds images, but not MNIST; add --dataset folder"),
])
def test_a_folder_without_images_is_said(name, folders, words, tmp_path):
    for name_inside in folders or ():
        (tmp_path / name_inside).touch() if "." in name_inside else (tmp_path / name_inside).mkdir()
    with pytest.raises(RunError, match=words):
        open_split(name, tmp_path / "not there" if folders is None else tmp_path, "train", 32)


def test_imagenet_wants_classes(tmp_path):
    paint_classes(tmp_path / "train", images=1)
    paint(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(RunError, match="val: its images lie in no class folders"):
        open_split("imagenet", tmp_path, "test", 32)


# ------------------------------------------------------------------------------------------------ images


def test_pixels_of_9_to_16_bits_keep_their_shades_and_of_32_are_refused(tmp_path):
    ramp = np.linspace(0, 65535, 256 * 4).reshape(4, 256)
    sixteen = Image.fromarray(ramp.astype(np.uint16))
    sixteen.save(tmp_path / "a.png")
    sixteen.save(tmp_path / "b.tif")
    Image.fromarray((ramp / 65535 * 4095).astype(np.uint16)).save(tmp_path / "c.tif", tiffinfo={281: 4095})  # 12 bits
    (tmp_path / "d.pgm").write_bytes(b"P5 256 4 65535\n" + ramp.astype(">u2").tobytes())
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "e.tif")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "f.tif")
    found = open_split("folder", tmp_path, "all", 32)
    for number in range(4):
        assert np.abs(np.asarray(found.image(number))[..., 0] - ramp / 257).max() <= 0.57
    for number, mode in ((4, "F"), (5, "I")):
        with pytest.raises(RunError, match=f"mode {mode}"):
            found.image(number)
    sixteen.save(tmp_path / "a.png", transparency=int(ramp[0, 0]))  # black means transparent
    assert np.asarray(found.image(0))[0, 0].tolist() == [255] * 3


BLUE, WHITE = (0, 0, 255), (255, 255, 255)


@pytest.mark.parametrize("mode, pixel, save, expected", [
    ("RGBA", (9, 9, 9, 0), {}, WHITE),
    ("RGBA", (0, 0, 255, 255), {}, BLUE),
    ("RGBA", (0, 0, 0, 128), {}, (127, 127, 127)),
    ("LA", (9, 0), {}, WHITE),
    ("LA", (9, 255), {}, (9, 9, 9)),
    ("RGB", BLUE, {"transparency": BLUE}, WHITE),
    ("RGB", BLUE, {"transparency": (9, 9, 9)}, BLUE),
    ("L", 9, {"transparency": 9}, WHITE),
    ("P", 0, {}, BLUE),
    ("P", 0, {"transparency": b"\0"}, WHITE),
    ("P", 0, {"transparency": 0}, WHITE),
    ("1", 1, {}, WHITE),
    ("1", 0, {"transparency": 0}, WHITE),
    ("RGB", BLUE, {"icc_profile": os.urandom(2**21)}, BLUE),
    ("CMYK", (255, 255, 0, 0), {"format": "TIFF"}, BLUE),
    ("P", 0, {"format": "GIF", "save_all": True, "append_images": [Image.new("RGB", (2, 2))]}, BLUE),
    ("P", 0, {"format": "GIF", "transparency": 0}, WHITE),
    ("RGBA", (9, 9, 9, 0), {"format": "WEBP"}, WHITE),
], ids=str)
def test_images_look_as_they_are_seen(mode, pixel, save, expected, tmp_path):
    image = Image.new(mode, (2, 2), pixel)
    if mode == "P":
        image.putpalette(BLUE)
    image.save(tmp_path / "x.png", **{"format": "PNG", **save})
    found = datasets.read_image(tmp_path / "x.png")
    assert found.mode == "RGB" and np.allclose(np.asarray(found), expected, atol=1)


def test_photographs_stand_upright(tmp_path):
    wide, exif = Image.new("RGB", (40, 30)), Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    for name in ("a.jpg", "b.png", "c.webp"):
        wide.save(tmp_path / name, exif=exif)
    Image.fromarray(np.zeros((30, 40), np.uint16)).save(tmp_path / "d.png", exif=exif)
    wide.save(tmp_path / "e.jpg", exif=b"Exif\0\0 nonsense")
    found = open_split("folder", tmp_path, "all", 32)
    assert [found.image(row).size for row in range(5)] == [(30, 40)] * 4 + [(40, 30)]


@pytest.mark.parametrize("content, words", [
    (b"", "cannot be decoded"),
    (b"\xff\xd8 no jpeg", "cannot be decoded.*repair or remove.*--skip-broken"),
    (None, "is not there"),
    ("pipe", "is not there"),
    (b"P6 20000 10000 255\n", "more than 179 megapixels; scale it down"),
])
def test_what_is_no_image_is_said_with_its_remedy(content, words, tmp_path):
    if content == "pipe":
        os.mkfifo(tmp_path / "x.jpg")
    elif content is not None:
        (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(RunError, match=f"x.jpg: .*{words}") as caught:
        datasets.read_image(tmp_path / "x.jpg")
    assert "\n" not in str(caught.value)


def test_long_texts_and_warnings_do_not_matter(tmp_path, said):
    text = PngImagePlugin.PngInfo()
    text.add_text("caption", "x" * 2**21, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=text)
    assert datasets.read_image(tmp_path / "a.png").size == (4, 4)
    with open(tmp_path / "b.pgm", "wb") as file:
        file.write(b"P5 10000 9000 255\n")
        file.truncate(9 * 10**7 + 20)  # 90 megapixels, of which Pillow warns
    assert datasets.read_image(tmp_path / "b.pgm").size == (10000, 9000) and said() == ""
    exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\0\0\0\xff\xff\0\0\0\0\0\0"  # runs past its end
    Image.new("RGB", (4, 4)).save(tmp_path / "c.jpg", exif=b"Exif\0\0" + exif)
    for _ in range(2):
        datasets.read_image(tmp_path / "c.jpg")
    assert said().startswith(f"{tmp_path}/c.jpg: ")


@pytest.mark.parametrize("side", [(40000, 2), (2, 40000), (1, 1), (1, 300), (33, 32), (5, 4)])
def test_extreme_shapes_become_squares_in_little_memory(side, monkeypatch):
    resize, largest = batches.transforms.resize, []
    monkeypatch.setattr(batches.transforms, "resize", lambda *of: largest.append(resize(*of)) or largest[-1])
    found = batches.resize_and_crop(Image.new("RGB", side, "red"), 224)
    assert found.size == (224, 224) and found.getcolors() == [(224 * 224, (255, 0, 0))]
    assert max(largest[0].size) <= 16 * 224


def test_digits_hold_out_a_fifth():
    train, test = (open_split("digits", None, split, 32) for split in ("train", "test"))
    assert len(train) + len(test) == 1797 and len(test) == pytest.approx(1797 / 5, abs=6)
    assert len(train.classes) == 10 and min(np.bincount(test.labels)) >= 33


def test_pixels_are_resize_and_centre_crop(tmp_path):
    paint(tmp_path / "wide.png", side=(90, 40))
    paint(tmp_path / "tall.png", side=(20, 70))
    pixels, errors = batches.Pixels(open_split("folder", tmp_path, "test", 32), 32).__getitems__([0])
    assert pixels.dtype == np.uint8 and pixels.shape == (1, 3, 32, 32) and not errors
    path = tmp_path / open_split("folder", tmp_path, "test", 32).items[0].decode()
    image = Image.open(path)
    short = min(image.size)
    resized = image.resize([side * 32 // short for side in image.size], Image.Resampling.BILINEAR)
    left, top = round((resized.width - 32) / 2), round((resized.height - 32) / 2)
    expected = np.asarray(resized.crop((left, top, left + 32, top + 32)))
    assert np.array_equal(pixels[0].transpose(1, 2, 0), expected)


# ------------------------------------------------------------------------------------------------ batches


def test_training_order_depends_on_seed_and_step_alone():
    whole, rest, other = (np.stack([*TrainingOrder(np.arange(100), 16, seed, first, 20)])
                          for seed, first in ((5, 1), (5, 8), (6, 1)))
    assert np.array_equal(rest, whole[7:]) and not np.array_equal(other, whole)


@pytest.mark.parametrize("batch_size, steps", [(4, 10), (25, 4)])
def test_every_image_comes_once_in_each_round_in_fresh_order(batch_size, steps):
    rounds = np.concatenate([*TrainingOrder(np.arange(10), batch_size, 5, 1, steps)])[:40].reshape(4, 10)
    assert (np.sort(rounds) == np.arange(10)).all() and len({tuple(part) for part in rounds}) == 4


@pytest.mark.parametrize("name", ["digits", "shapes", "folder"])
def test_batches_are_the_same_for_every_number_of_workers(name, class_folder):
    def batches(workers):
        source = open_split(name, class_folder, "train", 32)
        mean, std = datasets.normalisation(datasets.DATA_SETS[name].channels, inet=True)
        opened = Batches(source, Form(32, mean, std, flip=True), CPU, Loading(workers))
        return list(opened.training(8, seed=2, first_step=1, last_step=4))

    for (x, labels), (other, other_labels) in zip(batches(0), batches(2), strict=True):
        assert torch.equal(x, other) and torch.equal(labels, other_labels)


def test_flips_mirror_about_half_and_normalisation_can_be_undone():
    source = open_split("shapes", None, "train", 32)
    mean, std = datasets.normalisation(3, inet=True)
    plain = next(Batches(source, Form(32, mean, std), CPU).training(64, 1, 1, 1))[0]
    flipped = next(Batches(source, Form(32, mean, std, True), CPU).training(64, 1, 1, 1))[0]
    mirrored = torch.tensor([not torch.equal(a, b) for a, b in zip(plain, flipped)])
    assert torch.equal(mirrored, batches.flips(1, 1, 64)) and 16 < mirrored.sum() < 48
    assert torch.equal(flipped[mirrored], plain[mirrored].flip(-1))
    pixels = ((plain * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)) * 255).round()
    expected = batches.Pixels(source, 32).__getitems__(next(iter(TrainingOrder(np.arange(50_000), 64, 1, 1, 1))))[0]
    assert np.array_equal(pixels.to(torch.uint8), expected)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_test_images_come_once_each_in_order(batch_size):
    source = open_split("digits", None, "test", 32)
    labels = torch.cat([y for _, y in Batches(source, Form(32, [0.5], [0.5]), CPU).in_order(batch_size)])
    assert torch.equal(labels, torch.from_numpy(source.labels))


def test_a_stream_left_open_does_not_keep_the_process_from_its_end():
    """Data-loading processes ignore SIGTERM, with which Python would end them, and wait for them, at its own end."""
    program = """
        import torch, datasets
        from utils.batches import Batches, Form, Loading
        torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1  # torch's own patience with its workers
        source = datasets.open_split("digits", None, "train", 32)
        stream = Batches(source, Form(32, [0.5], [0.5]), torch.device("cpu"), Loading(1)).training(8, 1, 1, 99)
        next(stream)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, timeout=60, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_death_of_a_worker_is_heard_even_if_its_signal_came_too_early(monkeypatch):
    """As when the main thread began to wait for the rest of a batch just after it: it is reminded."""
    source, heard = open_split("digits", None, "train", 32), []
    stream = Batches(source, Form(32, [0.5], [0.5]), CPU, Loading(1)).training(8, 1, 1, 99)
    next(stream)
    before = signal.signal(signal.SIGCHLD, lambda *_: heard.append(threading.current_thread()))
    time.sleep(2.5)
    assert len(heard) >= 2 and set(heard) == {threading.main_thread()}
    stream.close()
    heard.clear()
    time.sleep(1.5)
    signal.signal(signal.SIGCHLD, before)
    assert len(heard) <= 1  # of its end


def test_workers_need_no_socket(tmp_path, class_folder, monkeypatch):
    """Nor shared memory: a path of a socket may not be as long as TMPDIR."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 120)))
    opened = Batches(open_split("folder", class_folder, "all", 32), Form(32, [0.5] * 3, [0.5] * 3), CPU, Loading(1))
    assert sum(len(x) for x, _ in opened.in_order(5)) == 12


def test_a_broken_image_is_named_also_from_a_worker(tmp_path):
    paint_classes(tmp_path, images=5)
    (tmp_path / "ant" / "3.jpg").write_bytes(b"\xff\xd8 no jpeg")
    for workers in (0, 1):
        with pytest.raises(RunError, match="3.jpg.*cannot be decoded"):
            source, form = open_split("folder", tmp_path, "train", 32), Form(32, [0.5] * 3, [0.5] * 3)
            list(Batches(source, form, CPU, Loading(workers)).training(8, 1, 1, 3))
