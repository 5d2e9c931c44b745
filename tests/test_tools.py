"""The tools filters, edges and export show and write what the model or the loss has, and nothing else."""

import numpy as np
import pytest
import torch
import torchvision
from conftest import call, paint_classes
from PIL import Image

import modules
from datasets import normalisation
from utils import edges, export, filters, training
from utils.runtime import RunError

OPTIONS = {
    "arch": "patchy", "encoder_arch": "resnet", "decoder_arch": "pyramid", "size": 32, "scale": 8, "ngf": 16,
    "num_parts": 4, "hidden_size": 2, "py": 0.25, "categorical": False, "hard": False, "independent": False,
    "inet": False,
}


def save_model(path, plant=None, channels=3, **changes):
    """A model.pt as run.py writes it, untrained but for running statistics that differ from fresh ones."""
    mean, std = normalisation(channels, changes.get("inet", False))
    described = {**OPTIONS, "channels": channels, "mean": mean, "std": std, **changes}
    torch.manual_seed(0)
    model = modules.build_model(described)
    model.encoder(torch.randn(4, channels, described["size"], described["size"]))  # in training mode
    if plant is not None:
        plant(next(module for module in model.encoder.modules() if isinstance(module, torch.nn.Conv2d)).weight.data)
    training.save(path, {"kind": training.MODEL, "options": described, "args": {}, "model": model.state_dict()})
    return model.eval()


# ------------------------------------------------------------------------------------------------ filters


def tiles_of(path):
    """What stands between white rows and columns in the picture at `path`: a list of H×W×3."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    inked = (pixels != 255).any(axis=2)
    rows, columns = (stretches(inked.any(axis=axis)) for axis in (1, 0))
    tiles = [pixels[row, column] for row in rows for column in columns]
    return [tile for tile in tiles if (tile != 255).any()]


def stretches(flags):
    """The slices of consecutive True in a vector of booleans."""
    ends = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]])))
    return [slice(start, stop) for start, stop in ends.reshape(-1, 2)]


@pytest.mark.parametrize("encoder", [
    {}, {"channels": 1}, {"encoder_arch": "alexnet", "scale": 32, "channels": 1},
    {"encoder_arch": "pyramid", "ngf": 12}, {"encoder_arch": "pyramid", "ngf": 10, "arch": "vae"},
], ids=["resnet", "grey", "alexnet", "pyramid", "an unfinished row"])
def test_every_filter_has_a_tile_and_a_planted_one_shows(encoder, tmp_path, capsys):
    def plant(weights):  # bright above, dark below, the strongest of all
        weights[5] = 9.0
        weights[5, :, weights.shape[2] // 2 :] = -9.0

    weights = save_model(tmp_path / "model.pt", plant, **encoder).encoder.state_dict().popitem(last=False)[1]
    order, norms = filters.main(["--pretrained", str(tmp_path), "--output", str(tmp_path / "new" / "f.png")])
    tiles = tiles_of(tmp_path / "new" / "f.png")
    assert len(tiles) == len(order) == len(weights) and sorted(order) == list(range(len(weights)))
    assert order[0] == 5 and (np.diff(norms[order]) <= 0).all()
    assert norms[5] == pytest.approx(9 * weights[0].numel() ** 0.5)
    third = len(tiles[0]) // 3
    assert (tiles[0][:third] == 255).all() and (tiles[0][-third:] == 0).all()
    printed = capsys.readouterr().out
    assert f"{len(weights)} filters of {weights.shape[2]} x {weights.shape[2]} pixels" in printed
    assert "largest norm first" in printed and "each on its own scale" in printed


def test_a_weak_filter_is_grey_on_the_common_scale_only(tmp_path):
    def plant(weights):
        weights *= 0.01
        weights[0], weights[1] = 0, 0
        weights[0, 0] = 1.0  # red

    save_model(tmp_path / "model.pt", plant)
    command = ["--pretrained", str(tmp_path / "model.pt"), "--output", str(tmp_path / "f.png"), "--unsorted"]
    order, _ = filters.main(command)
    own = tiles_of(tmp_path / "f.png")
    filters.main([*command, "--common"])
    common = tiles_of(tmp_path / "f.png")
    assert order.tolist() == list(range(64))
    for tiles in (own, common):
        assert (tiles[0] == [255, 128, 128]).all() and (tiles[1] == 128).all()  # in the colour of its channel; zero
    assert np.ptp(own[2].astype(int)) > 100 and np.ptp(common[2].astype(int)) < 10


def test_smoothness_tells_noise_from_edges():
    noise = np.random.default_rng(0).normal(size=(64, 3, 7, 7))
    edge = np.where(np.arange(7) < 3, 1.0, -1.0) * np.ones((1, 3, 7, 7))
    assert abs(filters.smoothness(noise)) < 0.05
    assert filters.smoothness(edge) == pytest.approx((1 + 4 / 6) / 2)  # of 6 neighbours in a row one pair differs
    assert filters.smoothness(np.zeros((2, 1, 4, 4))) == 0


# ------------------------------------------------------------------------------------------------ edges


def test_the_laplacian_of_a_point_is_its_kernel():
    x = torch.zeros(1, 1, 5, 5)
    x[..., 2, 2] = 1.0
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])
    assert torch.equal(modules.laplacian(x)[0, 0, 1:4, 1:4], kernel)
    assert modules.laplacian(x).abs().sum() == 8
    assert not modules.laplacian(x[..., 3:, :]).any()  # borders replicated: no edge at the border


@pytest.mark.parametrize("has_edge", [True, False])
def test_weights_follow_the_edge_and_are_those_of_the_loss(has_edge, tmp_path, capsys, monkeypatch):
    draw, drawn = edges.draw, []
    monkeypatch.setattr(edges, "draw", lambda *maps: drawn.append(draw(*maps)) or drawn[-1])
    (tmp_path / "images").mkdir()
    for number in range(3):
        pixels = np.full((32, 32, 3), (90, 120, 140 + number), np.uint8)
        if has_edge:
            pixels[:, 13:] = 220  # one vertical edge, between the columns 12 and 13
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    data = ["--dataset", "folder", "--data-folder", str(tmp_path / "images"), "--size", "32", "--workers", "0"]
    weights = edges.main([*data, "--scale", "4", "--output", str(tmp_path / "new" / "e.png")])
    expected = np.ones((1, 32, 32))  # a fifth of three images is held out: one
    if has_edge:
        expected[:] = 0
        expected[:, :, 12:16] = 8  # all weight in one of eight columns of cells: both sides of the edge lie in it
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    image, edge, weight = (np.asarray(panel.images[0].get_array()) for panel in drawn[0].axes[:3])
    assert image[0, 0].max() in (140, 141, 142) and (image[:, :13] == image[0, 0]).all()
    assert set(np.flatnonzero(edge.any(axis=0))) == ({12, 13} if has_edge else set())
    assert np.array_equal(weight, weights[0])
    assert Image.open(tmp_path / "new" / "e.png").width > 600
    heaviest = "from 0.00 to 8.00; the heaviest tenth of the pixels has 80% of the weight"
    assert (heaviest in capsys.readouterr().out) == has_edge


def test_edges_of_grey_and_of_few_images(tmp_path):
    weights = edges.main(["--dataset", "digits", "--images", "3", "--output", str(tmp_path / "e.png")])
    assert weights.shape == (3, 32, 32)
    np.testing.assert_allclose(weights.mean(axis=(1, 2)), 1, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ export


def exported(model, output):
    """What export.main returns, for the model.pt at `model`."""
    return export.main(["--pretrained", str(model), "--output", str(output)])


def test_a_trained_encoder_loads_into_plain_torchvision(finished, tmp_path):
    done = exported(finished[0], tmp_path / "new" / "encoder.pt")
    weights = torch.load(tmp_path / "new" / "encoder.pt", weights_only=True)
    assert type(weights) is dict and len(weights) == done["tensors"]
    plain = torchvision.models.resnet18()
    plain.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)  # digits are grey
    missing, unknown = plain.load_state_dict(weights, strict=False)
    assert unknown == [] and sorted(missing) == done["absent"]
    blocks = {name.split(".")[0] for name in missing}  # scale 8: all but the last two stages
    assert blocks == {"layer3", "layer4", "fc"}


@pytest.mark.parametrize("changes", [
    {}, {"inet": True, "arch": "vae"}, {"channels": 1}, {"scale": 32, "encoder_arch": "resnet50", "size": 64},
    {"scale": 32, "encoder_arch": "alexnet", "size": 64}, {"scale": 32, "encoder_arch": "alexnet", "channels": 1},
    {"encoder_arch": "pyramid"}, {"scale": 32, "encoder_arch": "resnet18"},
], ids=str)
def test_the_printed_lines_give_the_same_features(changes, tmp_path, capsys):
    model = save_model(tmp_path / "model.pt", **changes)
    done = exported(tmp_path / "model.pt", tmp_path / "encoder.pt")
    printed = capsys.readouterr().out
    assert all(f"    {line}\n" in printed for line in done["code"].splitlines())
    pixels, names = torch.rand(2, changes.get("channels", 3), 64, 64), {}
    exec(done["code"], names)
    mean, std = (torch.tensor(values).view(-1, 1, 1)
                 for values in normalisation(pixels.shape[1], changes.get("inet", False)))
    with torch.no_grad():
        found = names["encoder"](names["normalise"](pixels))
        expected = model.encoder((pixels - mean) / std)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert done["difference"] <= 1e-6 and found.std() > 0.01  # there is something to compare


def test_other_features_are_not_exported(tmp_path, monkeypatch):
    save_model(tmp_path / "model.pt", scale=32, encoder_arch="alexnet")
    monkeypatch.setattr(export, "BORDER", (16, 16, 16, 16))
    with pytest.raises(RunError, match="other features.*nothing was written"):
        exported(tmp_path / "model.pt", tmp_path / "encoder.pt")
    assert not (tmp_path / "encoder.pt").exists()


# ------------------------------------------------------------------------------------------------ all of them


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


# tools, options, exit status, what the line must say
BAD_INPUT = [
    ([filters, export], "", 2, ["--pretrained"]),
    ([filters, export], "--pretrained {place}/none.pt", 1, ["none.pt", "no such file"]),
    ([filters, export], "--pretrained {place}/garbage.pt", 1, ["garbage.pt", "damaged"]),
    ([filters, export], "--pretrained {place}/misfit.pt", 1, ["misfit.pt", "do not fit", "train the model again"]),
    ([filters, export], "--pretrained {place}/bare.pt", 1, ["bare.pt", "do not fit"]),
    ([filters, export], "--pretrained {place}/other.pt", 1, ["other.pt", "expected a model.pt", "a training checkpoint"]),
    ([filters], "--pretrained {place}/model.pt --output f.jpg", 2, ["--output", "'f.jpg'", ".png"]),
    ([filters], "--pretrained {place}/model.pt --output {place}/folder.png", 2, ["--output", "folder"]),
    ([filters], "--pretrained {place}/model.pt --output {place}/model.pt/f.png", 1, ["model.pt"]),
    ([export], "--pretrained {place}/model.pt --output e.onnx", 2, ["--output e.onnx", ".pt"]),
    ([export], "--pretrained {place}/model.pt --output {place}/folder.pt", 2, ["--output", "is a folder"]),
    ([export], "--pretrained {place}/model.pt --output {place}/model.pt", 2, ["would replace --pretrained"]),
    ([export], "--pretrained {place}/model.pt --output /proc/nowhere/e.pt", 1, ["/proc/nowhere"]),
    ([edges], "--dataset nothing", 2, ["--dataset", "shapes"]),
    ([edges], "--dataset shapes --scale 5", 2, ["--size 32", "--scale 5", "--size 30"]),
    ([edges], "--dataset shapes --images 0", 2, ["--images", "1 or more"]),
    ([edges], "--dataset folder --data-folder {place}/none", 1, ["none", "--data-folder"]),
    ([edges], "--dataset folder --data-folder {place}/images --output {place}/folder.png", 2, ["--output", "folder"]),
]
BAD_INPUT = [(tool, *row) for tools, *row in BAD_INPUT for tool in tools]


@pytest.mark.parametrize("tool, options, status, words", BAD_INPUT, ids=[f"{row[0].__name__} {row[1]}" for row in BAD_INPUT])
def test_bad_input_is_one_line(tool, options, status, words, place, tmp_path, line_of_error, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    found, line = line_of_error(tool.main, options.format(place=place).split())
    assert found == status
    assert all(word in line for word in words), line
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tool", [filters, edges, export])
def test_help_shows_commands_and_defaults(tool, capsys):
    with pytest.raises(SystemExit) as left:
        tool.main(["--help"])
    text = capsys.readouterr().out
    name = tool.__name__.removeprefix("utils.")
    assert left.value.code in (0, None) and f"    python utils/{name}.py" in text and "--output FILE" in text


@pytest.mark.parametrize("tool", [filters, edges, export])
def test_the_real_process_behaves_alike(tool, place, tmp_path):
    name = tool.__name__.removeprefix("utils.")
    output = {"export": "encoder.pt"}.get(name, f"{name}.png")  # the default
    options = ["--dataset", "digits"] if tool is edges else ["--pretrained", place / "model.pt"]
    done = call(f"utils/{name}.py", *options, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and output in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [output]
