"""classifier.py: what is frozen stays, what is resumed continues, what is reported is true."""

import json
import os
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, paint, paint_classes
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import classifier
import datasets
import modules
import run
from utils import batches, features, training
from utils.runtime import UsageError

QUICK = ["--dataset", "digits", "--workers", "0", "--epochs", "2", "--ngf", "16"]


def train(folder, *options):
    """Results of a short classifier run on digits."""
    return classifier.main([*QUICK, *map(str, options), "--output-folder", str(folder)])


def opened(settings):
    """Batches of the training and of the test images, as main() opens them."""
    return batches.open_batches(settings, classifier.labelled_sources(settings), torch.device("cpu"))


def weights(path):
    """The weights in a model.pt, a best.pt, or the newest checkpoint of a folder."""
    if path.is_dir():
        return training.newest(str(path / classifier.CHECKPOINTS), training.CLASSIFIER)["model"]
    return training.load(path, training.MODEL if path.name == "model.pt" else training.CLASSIFIER)["model"]


def changed_children(before, after):
    """The children of the encoder whose weights differ."""
    names = [name for name in before if name.startswith("encoder.")]
    return {name.split(".")[1] for name in names if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """model.pt of a PatchVAE with all eight children of a ResNet (scale 32)."""
    folder = tmp_path_factory.mktemp("deep")
    run.main(["--dataset", "digits", *TINY, "--scale", "32", "--output-folder", str(folder)])
    return folder / "model.pt"


@pytest.fixture(scope="module")
def judged(tmp_path_factory, finished):
    """A finished classifier on the frozen encoder: its folder and its results."""
    folder = tmp_path_factory.mktemp("judged")
    return folder, train(folder, "--pretrained", finished[0], "--freeze", -1, "--lr", 0.01)


# ------------------------------------------------------------------------------------------------ freezing


@pytest.mark.parametrize("freeze, children", [("4", 4), ("-1", 8), ("conv1-3", 6), ("conv1-5", 8), ("no room", 8)])
def test_frozen_means_bitwise_frozen(freeze, children, deep, tmp_path, monkeypatch):
    if freeze == "no room":  # for stored features: every epoch encodes anew
        monkeypatch.setattr(features, "free_memory", lambda: 0)
        freeze = -1
    options = ["--arch", "patchy", "--pretrained", deep, "--label-fraction", "0.05", "--lr", "0.01", "--wd", "0.1"]
    train(tmp_path, *options, "--freeze", freeze)
    names = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    assert changed_children(weights(deep), weights(tmp_path)) == set(names[children:])


def test_scale_and_shift_of_a_pretrained_encoder_stay_and_train_from_scratch(deep, tmp_path):
    few = ["--arch", "patchy", "--label-fraction", "0.05", "--lr", "0.01"]
    train(tmp_path / "tuned", *few, "--pretrained", deep)
    train(tmp_path / "fresh", *few, "--scale", "32")
    name = "encoder.bn1.weight"
    assert torch.equal(weights(tmp_path / "tuned")[name], weights(deep)[name])
    assert not torch.equal(weights(tmp_path / "fresh")[name], torch.ones(64))


def test_stored_features_train_the_same_head_as_encoding_every_epoch(finished, tmp_path, monkeypatch):
    """Shapes, because they are mirrored: both views must be the right ones."""
    small = datasets.DATA_SETS["shapes"]._replace(open=lambda root, split: datasets.Drawings(96, seed=split == "test"))
    monkeypatch.setitem(datasets.DATA_SETS, "shapes", small)
    run.main(["--dataset", "shapes", *TINY, "--output-folder", str(tmp_path)])
    options = ["--dataset", "shapes", "--arch", "patchy", "--pretrained", tmp_path / "model.pt", "--freeze", -1]
    options += ["-b", 32, "--lr", 0.01, "--precision", "fp32"]  # stored features always are
    fast = train(tmp_path / "fast", *options)
    monkeypatch.setattr(features, "free_memory", lambda: 0)
    slow = train(tmp_path / "slow", *options)
    assert fast["last"]["loss"] == pytest.approx(slow["last"]["loss"], rel=1e-5)
    assert fast["last"]["top1"] == slow["last"]["top1"]
    torch.testing.assert_close(weights(tmp_path / "fast"), weights(tmp_path / "slow"), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ loading


def test_what_was_loaded_is_said(finished, tmp_path, capsys):
    train(tmp_path, "--arch", "patchy", "--pretrained", finished[0] / "model.pt", "--freeze", -1, "--knn")
    shown = capsys.readouterr().out
    assert "loaded 60 of 64 tensors" in shown and "fresh: head" in shown and "frozen: conv1 to layer2" in shown


def test_a_cut_encoder_fills_the_first_layers_of_resnet18(finished, tmp_path, capsys):
    options = ["--arch", "resnet18", "--pretrained", finished[0], "--label-fraction", "0.02", "--epochs", "1"]
    train(tmp_path, *options, "--freeze", "conv1-3")
    assert "fresh: layer3, layer4, head" in capsys.readouterr().out
    classifier.main(["--resume", "--epochs", "2", "--output-folder", str(tmp_path)])
    assert json.loads((tmp_path / "results.json").read_text())["last"]["epoch"] == 2
    with pytest.raises(UsageError, match="layer3.*--freeze 6"):
        train(tmp_path / "more", *options, "--freeze", "8")


def test_random_init_keeps_the_files_architecture_and_not_its_weights(finished, tmp_path):
    train(tmp_path, "--pretrained", finished[0], "--random-init", "--freeze", -1, "--label-fraction", 0.02)
    assert "conv1" in changed_children(weights(finished[0] / "model.pt"), weights(tmp_path / "best.pt"))


# ------------------------------------------------------------------------------------------------ results


def test_the_output_folder_tells_what_happened(judged):
    folder, results = judged
    saved = json.loads((folder / "results.json").read_text())
    assert saved["best"] == results["best"] and saved["last"] == results["last"]
    assert saved["best"]["top1"] >= saved["last"]["top1"]
    assert saved["options"]["freeze"] == -1 and saved["options"]["dataset"] == "digits"
    assert saved["options"]["seed"] == 1 and saved["torch"] and saved["test_images"] == 360
    shares, counts = ([one[name] for one in saved["per_class"]] for name in ("top1", "images"))
    share = np.average(shares, weights=counts)
    assert share == pytest.approx(results["best"]["top1"])  # pictures and tables are those of the best model
    assert min(Image.open(folder / "confusion.png").size) >= 400
    board = EventAccumulator(str(folder / "logs_classifier"))
    board.Reload()
    tags = {"loss/train", "loss/test", "top1/train", "top1/test", "top5/test", "run/learning_rate"}
    assert tags <= set(board.Tags()["scalars"])


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_evaluate_repeats_what_training_reported(judged, batch_size, capsys):
    folder, results = judged
    again = classifier.main(["--evaluate", "--resume", "auto", "--output-folder", str(folder), "--workers", "0"])
    assert again["top1"] == results["best"]["top1"]
    assert again["loss"] == pytest.approx(results["best"]["loss"], rel=1e-5)
    settings = classifier.parse(["--evaluate", "--output-folder", str(folder)])[0]
    model = classifier.build_model(settings, 10)
    model.load_state_dict(weights(folder / "best.pt"))
    test = opened(settings)[1]
    figures, _, labels = classifier.evaluate(model, test.in_order(batch_size), 360)
    assert figures["top1"] == results["best"]["top1"] and torch.equal(labels, torch.from_numpy(test.source.labels))


def test_resumed_equals_uninterrupted(finished, tmp_path):
    options = ["--arch", "patchy", "--label-fraction", 0.1, "--step", 2, "--lr", 0.01, "-b", 64]
    whole = train(tmp_path / "whole", *options, "--epochs", 3)
    train(tmp_path / "parts", *options, "--epochs", 1)
    resumed = classifier.main(["--resume", "--epochs", "3", "--output-folder", str(tmp_path / "parts")])
    assert resumed == whole
    both = [tmp_path / name for name in ("whole", "parts")]
    torch.testing.assert_close(*map(weights, both), rtol=0, atol=0)
    lines = [(folder / "classifier.jsonl").read_text().splitlines() for folder in both]
    whole, parts = ([line for line in some if '"train"' in line[:20] and '"epoch": 3' in line] for some in lines)
    speed = re.compile('"images_per_second": [^,}]*')
    assert whole and [speed.sub("", line) for line in whole] == [speed.sub("", line) for line in parts]


def test_learning_rate_falls_every_step_epochs():
    rates = [classifier.learning_rate_at(epoch, 0.1, 30) for epoch in (1, 30, 31, 60, 61, 90)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_accuracy_is_that_of_the_definition():
    scores = torch.tensor([[9.0, 1, 2, 3, 4, 5], [9.0, 1, 2, 3, 4, 5], [9.0, 1, 2, 3, 4, 5], [0.0, 1, 2, 3, 4, 5]])
    figures = features.accuracy(scores, torch.tensor([0, 1, 5, 5]))
    assert figures == {"top1": 50.0, "top5": 75.0}
    assert set(features.accuracy(scores[:, :3], torch.tensor([0, 0, 0, 2]))) == {"top1"}


def test_few_labels_are_stratified_and_seeded():
    labels = np.repeat([0, 1, 2], [100, 50, 200])
    chosen = classifier.few_labels(labels, 0.1, seed=3)
    assert np.bincount(labels[chosen]).tolist() == [10, 5, 20] and len(set(chosen)) == 35
    assert np.array_equal(chosen, classifier.few_labels(labels, 0.1, seed=3))
    assert not np.array_equal(chosen, classifier.few_labels(labels, 0.1, seed=4))


def test_probes_find_classes_that_are_there_and_chance_where_none_are():
    generator = np.random.default_rng(0)
    labels = np.arange(600) % 3
    clear = generator.normal(size=(600, 5)).astype(np.float32) + 4 * np.eye(3, 5)[labels]
    noise = generator.normal(size=(600, 5)).astype(np.float32)
    for probe in (features.linear_probe, features.neighbour_probe):
        for x, low, high in ((clear, 0.95, 1), (noise, 0.2, 0.47)):
            scores, _ = probe(x[:400], labels[:400], x[400:], 4, seed=1)  # of four classes, one never seen
            assert scores.shape == (200, 4) and low <= (scores.numpy().argmax(1) == labels[400:]).mean() <= high


@pytest.mark.parametrize("images", [1, 2])
def test_the_linear_probe_learns_classes_of_few_images(images):
    labels = np.repeat(np.arange(20), images)
    x = np.eye(20, dtype=np.float32)[labels]
    for seed in range(5):
        scores, _ = features.linear_probe(x, labels, np.eye(20, dtype=np.float32), 20, seed)
        assert (scores.numpy().argmax(1) == np.arange(20)).all()


@pytest.mark.parametrize("more", ["--linear", "--no-floor", "--random-init"])
def test_probes_take_the_architecture_from_the_file_and_stand_beside_floors(more, finished, tmp_path, capsys):
    options = ["--pretrained", finished[0], "--label-fraction", 0.1, "--knn"]
    results = train(tmp_path, *options, more)
    saved, shown = json.loads((tmp_path / "results.json").read_text()), capsys.readouterr().out
    commonest = 100 * np.bincount(datasets.open_split("digits", None, "test", 32).labels).max() / 360
    for name in ["linear"] * (more == "--linear") + ["knn"]:
        floors = results[name]["floors"]
        assert saved[name]["floors"] == floors and floors["commonest_class"] == pytest.approx(commonest)
        assert set(floors) == {"commonest_class", *["random_weights"] * (more == "--linear")}
        assert results[name]["top1"] > 50  # ten classes
        assert f"{name}  top-1 {results[name]['top1']:.2f}" in shown
    assert f"(floors: commonest class {commonest:.2f}{', random weights ' if more == '--linear' else ')'}" in shown
    if more == "--linear":
        random = train(tmp_path / "random", *options, "--random-init")
        assert random["knn"]["top1"] == results["knn"]["floors"]["random_weights"]


@pytest.mark.parametrize("largest, side", [(64 * 64, 8), (64 * 64 - 1, 7), (64 * 16, 4), (63, 1)])
def test_a_probe_reads_the_features_where_freezing_ends(finished, tmp_path, monkeypatch, largest, side):
    """The map of 64 channels on 8×8 cells itself, or, where that is too large, its averages over coarser cells."""
    seen = {}
    monkeypatch.setattr(features, "LARGEST", largest)
    monkeypatch.setattr(features, "neighbour_probe", lambda x, *rest: seen.update(x=x) or (torch.zeros(360, 10), {}))
    train(tmp_path, "--pretrained", finished[0], "--knn", "--no-floor", "--freeze", "conv1")
    model = training.load(finished[0] / "model.pt", training.MODEL)
    encoder = modules.build_model(model["options"]).eval().encoder
    encoder.load_state_dict({k[8:]: v for k, v in model["model"].items() if k.startswith("encoder.")})
    train_set = classifier.parse([*QUICK, "--arch", "patchy", "--random-init", "--ngf", "16"])[0]
    x, _ = next(opened(train_set)[0].in_order(5))
    with torch.no_grad():
        f = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(x))))
        expected = torch.nn.functional.adaptive_avg_pool2d(f, side).flatten(1)
    np.testing.assert_allclose(seen["x"][:5], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1e-2])
def test_features_of_a_frozen_encoder_are_standardised_from_the_first_steps_on(scale):
    """Whatever their scale: those of random weights are small, and must not seem worse for it."""
    model = features.Classifier(torch.nn.Sequential(torch.nn.Identity()), 8, 2, standardise=True)
    model.freeze(1)
    for _ in range(2):
        model(5 + scale * torch.randn(64, 8, 1, 1))
    found = model.eval().head[0](5 + scale * torch.randn(1000, 8))
    assert found.mean(0).abs().max() < 0.5 and 0.7 < found.std(0).min() and found.std(0).max() < 1.4


def test_the_head_sees_standardised_features(finished, tmp_path):
    options = ["--arch", "patchy", "--pretrained", finished[0] / "model.pt", "--freeze", -1, "--standardise", "-b", 32]
    train(tmp_path, *options)
    saved = weights(tmp_path)
    args = classifier.parse([*QUICK, "--arch", "patchy", "--random-init", "--ngf", "16", "--standardise"])[0]
    model = classifier.build_model(args, 10)
    model.load_state_dict(saved)
    seen = []
    model.head[1].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        model.eval()
        model(next(opened(args)[0].in_order(1437))[0])
    varies = saved["head.0.running_var"] > 0.001
    assert seen[0][:, varies].mean().abs() < 0.1 and 0.7 < seen[0][:, varies].var() < 1.5


def test_bfloat16_trains_what_float32_trains(tmp_path):
    whole = ["--arch", "patchy", "--encoder-arch", "pyramid", "--lr", 0.02, "--label-fraction", 0.3]
    losses = [train(tmp_path / name, *whole, "--precision", name)["last"]["loss"] for name in ("fp32", "bf16")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.2)


def test_classes_are_matched_by_name(tmp_path):
    paint_classes(tmp_path / "train", ("ant", "bee", "cat"), images=4)
    paint_classes(tmp_path / "val", ("bee", "cat"), images=2)
    data = ["--dataset", "folder", "--data-folder", str(tmp_path), "--arch", "resnet18", "--workers", "0"]
    _, test = opened(classifier.parse(data)[0])
    assert test.source.labels.tolist() == [1, 1, 2, 2]


def test_a_class_that_no_image_has_does_not_matter(monkeypatch):
    """As of Places205's lists, where a class is known by its number alone if it does not occur."""
    few = np.zeros((6, 8, 8), np.uint8)
    train = datasets.Arrays(few, [0, 0, 1, 1, 2, 2], ["abbey", "barn", "cave"])
    test = datasets.Arrays(few[:2], [0, 2], ["abbey", "1", "cave"])
    monkeypatch.setattr(classifier, "open_split", lambda name, root, split, size: train if split == "train" else test)
    args = classifier.parse(["--dataset", "digits", "--arch", "resnet18"])[0]
    assert classifier.labelled_sources(args)[1].labels.tolist() == [0, 2]


@pytest.mark.filterwarnings("error:Glyph")
def test_a_class_of_any_name_is_reported_where_there_are_no_links(tmp_path, monkeypatch):
    """No symbolic links, as on exFAT: there is nothing that would need one."""
    monkeypatch.setattr(os, "symlink", None)
    names = ["$\\ant$", os.fsdecode(b"caf\xe9"), "c\nd", "🐝"]
    paint_classes(tmp_path / "data", names, images=6)
    options = ["--dataset", "folder", "--data-folder", tmp_path / "data", "--size", 32, "--arch", "patchy"]
    train(tmp_path / "probe", *options, "--random-init", "--knn")
    named = json.loads((tmp_path / "probe/results.json").read_text())["per_class"]
    assert [one["class"] for one in named] == ["$\\ant$", "c\\nd", "caf\\xe9", "🐝"]
    train(tmp_path / "out", *options, "-b", 4)
    assert len(training.numbered(tmp_path / "out" / classifier.CHECKPOINTS)) == 2
    assert "top1" in classifier.main(["--evaluate", "--output-folder", str(tmp_path / "out")])
    assert (tmp_path / "out/results.json").exists() and min(Image.open(tmp_path / "out/confusion.png").size) >= 100


@pytest.mark.parametrize("test, fits", [(("ant", "bee"), True), (("ant",), True), (("ant", "cow"), False), ((), False)])
def test_run_recommends_a_classifier_only_where_it_works(test, fits, tmp_path, capsys):
    data = tmp_path / os.fsdecode(b"caf\xe9")  # no text, and yet no reason to fail
    paint_classes(data / "train", images=4)
    paint_classes(data / "val", test, images=2)
    if not test:
        paint(data / "val/0.jpg")
    sys.stdout.reconfigure(errors="backslashreplace")  # as runtime.start does
    run.main(["--dataset", "folder", "--data-folder", str(data), "--size", "32", *TINY, "--img-per-epoch", "8",
              "--batch-size", "4", "--output-folder", str(tmp_path / "out")])
    assert ("python classifier.py" in capsys.readouterr().out) == fits


@pytest.mark.parametrize("workers, words", [
    (0, ["1.jpg: cannot be decoded", "--skip-broken"]), (1, ["1.jpg: cannot be decoded", "--skip-broken"]),
    ("killed", ["a data-loading process died", "--workers 0"]),
])
def test_errors_of_workers_end_in_one_line(workers, words, tmp_path, line_of_error, monkeypatch):
    paint_classes(tmp_path / "data", images=4)
    for name in ("ant", "bee"):
        (tmp_path / "data" / name / "1.jpg").write_bytes(b"no image")
    if workers == "killed":
        monkeypatch.setattr(datasets.Files, "image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        workers = 1
    options = ["--dataset", "folder", "--data-folder", tmp_path / "data", "--size", 32, "--arch", "resnet18", "-b", 2]
    argv = [*map(str, [*options, "--workers", workers, "--output-folder", tmp_path / "out"])]
    status, line = line_of_error(classifier.main, argv)
    assert status == 1 and all(word in line for word in words)


# ------------------------------------------------------------------------------------------------ the seed's commands


def seed_commands():
    """The two classifier.py commands of the README, as lists of options."""
    blocks = [block for block in (ROOT / "README.md").read_text().split("```") if "--arch=resnet18" in block]
    return [block[block.index("classifier.py") + 13 :].replace("\\", " ").split() for block in blocks]


def test_seed_commands_run_as_written(tmp_path, monkeypatch):
    for split in ("train", "val"):
        paint_classes(tmp_path / "data" / split, images=3, side=(260, 240))
    monkeypatch.chdir(tmp_path)  # where ./scratch/model.pt is found
    common = "--dataset=imagenet --data-folder data --num-parts=64 --hidden-size=16 --inet --size=224 --scale=32"
    run.main([*common.split(), "--num-epochs", "1", "--img-per-epoch", "4", "--batch-size", "2"])
    supervised, tuned = seed_commands()
    assert tuned.count("--arch=resnet18") == 1 and "--arch=patchy" in tuned
    paths = {"/path/to/imagenet/dataset": "data"}
    for number, command in enumerate((supervised, tuned)):
        options = [paths.get(option, option).replace("/path/to/logs/directory", f"out{number}") for option in command]
        results = classifier.main([*options, "--epochs", "1"])
        assert 0 <= results["last"]["top1"] <= 100
    assert not changed_children(weights(tmp_path / "scratch/model.pt"), weights(tmp_path / "out1"))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def place(tmp_path_factory, finished, judged):
    place = tmp_path_factory.mktemp("wrong")
    for number in range(4):
        paint(place / "flat" / f"{number}.png")
    shutil.copy(finished[0] / "model.pt", place)
    shutil.copytree(judged[0], place / "judged", ignore=shutil.ignore_patterns(".lock"))
    (place / "empty").mkdir()
    paint_classes(place / "strange" / "train", ("ant", "bee"), images=2)
    paint_classes(place / "strange" / "val", ("ant", "cow"), images=2)
    best = training.load(place / "judged/best.pt", training.CLASSIFIER)
    seven = place / "judged" / classifier.CHECKPOINTS / "seven.pt"
    torch.save({**best, "class_names": best["class_names"][:7]}, seven)
    torch.save({**best, "class_names": ["zero", *best["class_names"][1:]]}, place / "names.pt")
    model = training.load(place / "model.pt", training.MODEL)
    torch.save({**model, "model": {"decoder.x": torch.zeros(1)}}, place / "decoder.pt")
    wrong = {name: value * float("nan") for name, value in model["model"].items()}
    torch.save({**model, "model": wrong}, place / "nan.pt")
    return place


BAD_INPUT = [
    ("--arch vgg", 2, ["--arch"]),
    ("--arch resnet18 --gpu 0 --no-cuda", 2, ["--no-cuda", "--gpu"]), ("--gpu 7", 2, ["--gpu 7", "no GPU"]),
    ("--freeze -2", 2, ["--freeze", "-1 or more"]),
    ("--freeze conv2", 2, ["--freeze", "conv1-3"]),
    ("--arch patchy --freeze 4", 2, ["--freeze", "--pretrained", "--random-init"]),
    ("--arch patchy --linear", 2, ["--linear", "--pretrained"]),
    ("--arch patchy --random-init --freeze 9", 2, ["--freeze 9", "child number 6", "layer2"]),
    ("--arch patchy --random-init --freeze conv1-5", 2, ["--freeze conv1-5", "layer2"]),
    ("--arch alexnet --size 16", 2, ["--size 16", "alexnet", "--size 28"]),
    ("--arch resnet18 -b 1", 2, ["--batch-size 1"]),
    ("--arch resnet18 --scale 8", 2, ["--scale 8", "32"]),
    ("--arch resnet18 --encoder-arch pyramid", 2, ["--encoder-arch pyramid", "--arch resnet18"]),
    ("--resume --overwrite --output-folder {place}/judged", 2, ["--overwrite", "--resume"]),
    ("--resume {place}/judged --output-folder {place}/empty", 2, ["--resume", "--output-folder"]),
    ("--arch resnet18 --label-fraction 0.001", 2, ["--label-fraction 0.001", "or more"]),
    ("--arch resnet18 --label-fraction 1.5", 2, ["--label-fraction"]),
    ("--arch resnet18 --start-epoch 2", 2, ["--start-epoch 2", "--epochs 2"]),
    ("--arch patchy --pretrained {place}/model.pt --num-parts 4", 2, ["--num-parts 4 (there: 16)"]),
    ("--arch vae --pretrained {place}/model.pt", 2, ["--arch vae (there: patchy)"]),
    ("--arch patchy --pretrained {place}/judged/best.pt", 1, ["best.pt", "expected a model.pt of run.py"]),
    ("--arch patchy --pretrained {place}/none.pt", 1, ["none.pt", "no such file"]),
    ("--arch patchy --pretrained {place}/decoder.pt", 1, ["decoder.pt", "do not fit"]),
    ("--arch alexnet --pretrained {place}/model.pt", 1, ["model.pt", "--arch"]),
    ("--resume {place}/model.pt", 1, ["model.pt", "expected a checkpoint of classifier.py"]),
    ("--resume {place}/judged/checkpoints_classifier/seven.pt --output-folder {place}/judged", 1, ["7 classes"]),
    ("--evaluate --resume {place}/names.pt", 1, ["10 classes", "zero there, 0 here"]),
    ("--resume --lr 0.7 --output-folder {place}/judged", 2, ["--lr 0.7 (there: 0.01)"]),
    ("--resume --output-folder {place}/empty", 1, ["empty", "no checkpoint", "--overwrite"]),
    ("--pretrained {place}/nan.pt --linear", 1, ["nan.pt", "no numbers", "--lr"]),
    ("--pretrained {place}/empty --linear", 1, ["empty/model.pt", "no such file"]),
    ("--output-folder caf\udce9", 2, ["--output-folder caf\\xe9", "no text in UTF-8"]),
    ("--epoch 3", 2, ["--epoch", "--epochs"]),
    ("--evaluate", 1, ["best.pt", "no such file"]),
    ("--arch resnet18 --dataset folder --data-folder {place}/flat", 1, ["flat", "train/CLASS/*"]),
    ("--arch resnet18 --dataset folder --data-folder {place}/strange", 1, ["cow", "no training images"]),
    ("--arch resnet18 --dataset bincircles", 1, ["bincircles", "single class"]),
    ("--arch resnet18 --output-folder {place}/judged", 2, ["judged", "--overwrite"]),
    ("--arch resnet18 --label-fraction 0.1 --lr 1e20", 1, ["--lr", "finite"]),
]


@pytest.mark.parametrize("options, status, words", BAD_INPUT, ids=[row[0] for row in BAD_INPUT])
def test_bad_input_is_one_line(options, status, words, place, tmp_path, line_of_error):
    quick = [option for option in QUICK if "--resume" not in options or option not in ("--ngf", "16")]
    arguments = ["--output-folder", str(tmp_path / "out"), *quick, *options.format(place=place).split()]
    found, line = line_of_error(classifier.main, arguments)
    assert found == status
    assert all(word in line for word in words), line


def test_help_is_grouped_and_advises_on_every_option():
    assert all(action.help for action in classifier.build_parser()._actions)
