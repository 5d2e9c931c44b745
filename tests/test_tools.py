"""The tools filters, edges and export show and write what the model or the loss has, and nothing else."""

import numpy as np
import pytest
import torch
from conftest import call, paint_classes
from PIL import Image

import modules
import run
from utils import edges, export, figures, filters, options, training
from utils.runtime import RunError


def save_model(path, typed="", plant=None):
    """The model.pt that run.py writes with the options `typed`, untrained but for its running statistics."""
    described = options.describe_model(run.parse(["--dataset", "shapes", "--ngf", "16", *typed.split()])[0])
    torch.manual_seed(0)
    model = modules.build_model(described)
    model.encoder(torch.randn(4, described["channels"], described["size"], described["size"]))  # in training mode
    if plant:
        plant(next(module for module in model.encoder.modules() if isinstance(module, torch.nn.Conv2d)).weight.data)
    training.save(path, {"kind": training.MODEL, "options": described, "args": {}, "model": model.state_dict()})
    return model.eval(), described


@pytest.fixture
def tiles(monkeypatch):
    """The tiles of all pictures, in the order of reading: a list of H×W×3 uint8."""
    found, grid = [], figures.grid
    monkeypatch.setattr(figures, "grid", lambda rows, *words: found.extend(sum(rows, [])) or grid(rows, *words))
    return found


@pytest.mark.parametrize("typed", ["", "--dataset digits", "--dataset digits --encoder-arch alexnet",
                                   "--encoder-arch pyramid --ngf 12", "--encoder-arch pyramid --ngf 10 --arch vae"])
def test_every_filter_has_a_tile_and_a_planted_one_shows(typed, tmp_path, tiles, capsys):
    def plant(weights):  # bright above, dark below, the strongest of all
        weights[5] = 9.0
        weights[5, :, weights.shape[2] // 2 :] = -9.0

    weights = next(save_model(tmp_path / "model.pt", typed, plant)[0].encoder.parameters())
    order, norms = filters.main(["--pretrained", str(tmp_path), "--output", str(tmp_path / "new" / "f.png")])
    assert len(tiles) == len(order) == len(weights) and sorted(order) == list(range(len(weights)))
    assert order[0] == 5 and (np.diff(norms[order]) <= 0).all()
    assert norms[5] == pytest.approx(9 * weights[0].numel() ** 0.5)
    assert (tiles[0][0] == 255).all() and (tiles[0][-1] == 0).all()
    assert f"{len(weights)} filters of {weights.shape[2]} x {weights.shape[2]} pixels" in capsys.readouterr().out
    assert Image.open(tmp_path / "new" / "f.png").width > 64 * len(tiles) ** 0.5  # pixels a tile, at least


def test_a_weak_filter_is_grey_on_the_common_scale_only(tmp_path, tiles):
    def plant(weights):
        weights *= 0.01
        weights[0], weights[1] = 0, 0
        weights[0, 0] = 1.0  # red

    save_model(tmp_path / "model.pt", plant=plant)
    command = ["--pretrained", str(tmp_path), "--output", str(tmp_path / "f.png"), "--unsorted"]
    for scale, least, most in (([], 100, 255), (["--common"], 0, 10)):
        order, _ = filters.main(command + scale)
        red, zero, weak, *_ = tiles[-64:]
        assert order.tolist() == list(range(64)) and (red == [255, 128, 128]).all() and (zero == 128).all()
        assert least <= np.ptp(weak.astype(int)) <= most


def test_smoothness_tells_noise_from_edges():
    noise = np.random.default_rng(0).normal(size=(64, 3, 7, 7))
    edge = np.where(np.arange(7) < 3, 1.0, -1.0) * np.ones((1, 3, 7, 7))
    assert abs(filters.smoothness(noise)) < 0.05
    assert filters.smoothness(edge) == pytest.approx((1 + 4 / 6) / 2)  # of 6 neighbours in a row one pair differs
    assert filters.smoothness(np.zeros((2, 1, 4, 4))) == 0


@pytest.mark.parametrize("has_edge", [True, False])
def test_weights_follow_the_edge_and_are_those_of_the_loss(has_edge, tmp_path, tiles, capsys):
    expected = np.ones((1, 32, 32))  # a fifth of three images is held out: one
    pixels = np.full((32, 32, 3), (90, 120, 140), np.uint8)
    if has_edge:
        pixels[:, 13:] = 220  # one vertical edge, between the columns 12 and 13
        expected[:], expected[:, :, 12:16] = 0, 8  # all weight in the cells where both its sides lie, an eighth of all
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    data = ["--dataset", "folder", "--data-folder", str(tmp_path / "images"), "--size", "32", "--workers", "0"]
    weights = edges.main([*data, "--scale", "4", "--output", str(tmp_path / "new" / "e.png")])
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    image, edge, weight = (tile[::4, ::4] for tile in tiles)  # four times as large as the image
    assert np.array_equal(image, pixels) and (edge == 255).all(axis=(0, 2)).nonzero()[0].tolist() == [12, 13] * has_edge
    yellow = (weight == [255, 255, 0]).all(axis=2)
    assert np.array_equal(yellow, expected[0] == 8) and (has_edge or weight[0, 0].any())
    heaviest = "from 0.00 to 8.00; the heaviest tenth of the pixels has 80% of the weight"
    assert (heaviest in capsys.readouterr().out) == has_edge and (tmp_path / "new" / "e.png").exists()


@pytest.mark.parametrize("typed", ["", "--inet --arch vae", "--dataset digits", "--encoder-arch resnet50 --size 64",
                                   "--encoder-arch alexnet --size 64", "--encoder-arch alexnet --dataset digits",
                                   "--encoder-arch pyramid", "--encoder-arch resnet18"])
def test_the_printed_lines_give_the_same_features(typed, tmp_path, capsys):
    model, described = save_model(tmp_path / "model.pt", typed)
    difference, code = export.main(["--pretrained", str(tmp_path), "--output", str(tmp_path / "new" / "encoder.pt")])
    printed = capsys.readouterr().out
    assert all(f"    {line}\n" in printed for line in code.splitlines())
    assert typed or "random until you train them: fc, layer3, layer4\n" in printed  # scale 8: two stages of four
    assert type(torch.load(tmp_path / "new" / "encoder.pt", weights_only=True)) is dict
    pixels, names = torch.rand(2, described["channels"], 64, 64), {}
    exec(code, names)
    mean, std = (torch.tensor(described[name]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        found = names["encoder"](names["normalise"](pixels))
        expected = model.encoder((pixels - mean) / std)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert difference <= 1e-6 and found.std() > 0.01  # there is something to compare
    assert ("torchvision.models." in code) == ("pyramid" not in typed)


def test_other_features_are_not_exported(tmp_path, monkeypatch):
    save_model(tmp_path / "model.pt", "--encoder-arch alexnet")
    monkeypatch.setattr(export, "BORDER", (16, 16, 16, 16))
    with pytest.raises(RunError, match="other features.*nothing was written"):
        export.main(["--pretrained", str(tmp_path), "--output", str(tmp_path / "encoder.pt")])
    assert not (tmp_path / "encoder.pt").exists()


@pytest.fixture(scope="module")
def place(tmp_path_factory, finished):
    """A folder with everything that can be wrong in it."""
    place = tmp_path_factory.mktemp("place")
    (place / "garbage.pt").write_bytes(b"no archive at all")
    content = training.load(finished[0] / "model.pt", training.MODEL)
    training.save(place / "other.pt", {**content, "kind": training.TRAINING})
    training.save(place / "misfit.pt", {**content, "options": {**content["options"], "encoder_arch": "resnet50"}})
    training.save(place / "bare.pt", {"kind": training.MODEL, "model": {}})
    training.save(place / "model.pt", content)
    (place / "folder.png").mkdir()
    (place / "folder.pt").mkdir()
    paint_classes(place / "images")
    return place


BAD_MODEL = [  # for both tools that open one
    ("", 2, "--pretrained"), ("--pretrained none.pt", 1, "none.pt|no such file"),
    ("--pretrained garbage.pt", 1, "garbage.pt|damaged"), ("--pretrained bare.pt", 1, "bare.pt|is missing"),
    ("--pretrained misfit.pt", 1, "misfit.pt|do not fit|train the model again"),
    ("--pretrained other.pt", 1, "other.pt|expected a model.pt|found a training checkpoint"),
]
BAD_INPUT = [(tool, *row) for row in BAD_MODEL for tool in (filters, export)] + [
    (filters, "--pretrained model.pt --output f.jpg", 2, "--output|'f.jpg'|.png"),
    (filters, "--pretrained model.pt --output folder.png", 2, "--output|folder"),
    (filters, "--pretrained model.pt --output model.pt/f.png", 1, "model.pt"),
    (export, "--pretrained model.pt --output e.onnx", 2, "--output e.onnx|.pt"),
    (export, "--pretrained model.pt --output folder.pt", 2, "--output|is a folder"),
    (export, "--pretrained model.pt --output model.pt", 2, "would replace --pretrained"),
    (export, "--pretrained model.pt --output /proc/nowhere/e.pt", 1, "/proc/nowhere"),
    (edges, "--dataset nothing", 2, "--dataset|shapes"),
    (edges, "--dataset shapes --scale 5", 2, "--size 32|--scale 5|--size 30"),
    (edges, "--dataset shapes --images 0", 2, "--images|1 or more"),
    (edges, "--dataset folder --data-folder none", 1, "none|--data-folder"),
    (edges, "--dataset folder --data-folder images --output folder.png", 2, "--output|folder"),
]


@pytest.mark.parametrize("tool, typed, status, words", BAD_INPUT)
def test_bad_input_is_one_line(tool, typed, status, words, place, line_of_error, monkeypatch):
    monkeypatch.chdir(place)
    before = {path: path.is_file() and path.read_bytes() for path in place.rglob("*")}
    found, line = line_of_error(tool.main, typed.split())
    assert found == status and all(word in line for word in words.split("|")), line
    assert {path: path.is_file() and path.read_bytes() for path in place.rglob("*")} == before


@pytest.mark.parametrize("tool, typed, output", [(filters, "--pretrained {}", "filters.png"),
                                                 (edges, "--dataset digits --images 3", "edges.png"),
                                                 (export, "--pretrained {}", "encoder.pt")])
def test_help_and_the_real_process(tool, typed, output, place, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        tool.main(["--help"])
    text, name = capsys.readouterr().out, tool.__name__.replace(".", "/") + ".py"
    assert left.value.code in (0, None) and f"    python {name}" in text and "--output FILE" in text and output in text
    done = call(name, *typed.format(place / "model.pt").split(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and output in done.stdout
    assert tool is not edges or "3 test images of digits" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [output]
