"""The tools filters, edges, export and architecture show and write what the model or the loss has, and nothing else."""

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, call, paint_classes
from PIL import Image

import modules
from datasets import normalisation
from utils import architecture, checkpoints, console, edges, export, filters

OPTIONS = {
    "arch": "patchy", "encoder_arch": "resnet", "decoder_arch": "pyramid", "size": 32, "scale": 8, "ngf": 16,
    "num_parts": 4, "hidden_size": 2, "py": 0.25, "categorical": False, "hard": False, "independent": False,
    "inet": False,
}  # fmt: skip
TITLE = 32  # pixels that two lines of text over a picture take


def save_model(path, plant=None, channels=3, **changes):
    """A model.pt as run.py writes it, untrained but for running statistics that differ from fresh ones."""
    mean, std = normalisation(channels, changes.get("inet", False))
    described = {**OPTIONS, "channels": channels, "mean": mean, "std": std, **changes}
    torch.manual_seed(0)
    model = modules.build_model(described)
    model.encoder(torch.randn(4, channels, described["size"], described["size"]))  # in training mode
    if plant is not None:
        plant(next(module for module in model.encoder.modules() if isinstance(module, torch.nn.Conv2d)).weight.data)
    checkpoints.save(path, {"kind": checkpoints.MODEL, "options": described, "args": {}, "model": model.state_dict()})
    return model.eval()


def tiles_of(path, top):
    """What stands between white rows and columns in the picture at `path`, below `top` pixels: a list of H×W×3."""
    pixels = np.asarray(Image.open(path).convert("RGB"))[top:]
    inked = (pixels != 255).any(axis=2)
    rows, columns = runs(inked.any(axis=1)), runs(inked.any(axis=0))
    found = [pixels[row, column] for row in rows for column in columns]
    return [tile for tile in found if (tile != 255).any()]


def runs(flags):
    """The slices of consecutive True in a vector of booleans."""
    ends = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]])))
    return [slice(start, stop) for start, stop in ends.reshape(-1, 2)]


# ------------------------------------------------------------------------------------------------ filters


@pytest.mark.parametrize("encoder", [
    {}, {"channels": 1}, {"encoder_arch": "alexnet", "scale": 32, "channels": 1},
    {"encoder_arch": "pyramid", "ngf": 12}, {"encoder_arch": "pyramid", "ngf": 10, "arch": "vae"},
], ids=["resnet", "grey", "alexnet", "pyramid", "an unfinished row"])  # fmt: skip
def test_every_filter_has_a_tile_and_a_planted_one_shows(encoder, tmp_path, capsys):
    def plant(weights):  # bright above, dark below, the strongest of all
        weights[5] = 9.0
        weights[5, :, weights.shape[2] // 2 :] = -9.0

    weights = save_model(tmp_path / "model.pt", plant, **encoder).encoder.state_dict().popitem(last=False)[1]
    order, norms = filters.main(["--pretrained", str(tmp_path / "model.pt"), "--output", str(tmp_path / "f.png")])
    tiles = tiles_of(tmp_path / "f.png", TITLE)
    assert len(tiles) == len(order) == len(weights) and sorted(order) == list(range(len(weights)))
    assert order[0] == 5 and (np.diff(norms[order]) <= 0).all()
    assert norms[5] == pytest.approx(9 * weights[0].numel() ** 0.5)
    assert (tiles[0][:20] == 255).all() and (tiles[0][-20:] == 0).all()
    assert f"{len(weights)} filters of {weights.shape[2]} x {weights.shape[2]} pixels" in capsys.readouterr().out


def test_a_weak_filter_is_grey_on_the_common_scale_only(tmp_path):
    def plant(weights):
        weights *= 0.01
        weights[0], weights[1] = 0, 0
        weights[0, 0] = 1.0  # red

    save_model(tmp_path / "model.pt", plant)
    command = ["--pretrained", str(tmp_path / "model.pt"), "--output", str(tmp_path / "f.png"), "--unsorted"]
    order, _ = filters.main(command)
    own = tiles_of(tmp_path / "f.png", TITLE)
    filters.main([*command, "--common"])
    common = tiles_of(tmp_path / "f.png", TITLE)
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


def flat_images(folder, paint=None):
    """A data folder of three grey-blue images, all of one colour, or as `paint` changes their pixels."""
    folder.mkdir()
    for number in range(3):
        pixels = np.full((32, 32, 3), (90, 120, 140 + number), np.uint8)
        if paint:
            paint(pixels)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return ["--dataset", "folder", "--data-folder", str(folder), "--size", "32", "--workers", "0"]


def trio_of(path):
    """The tiles of the first image in the picture at `path`: the image, its edges, its weights, 128×128×3 each."""
    pixels = np.asarray(Image.open(path).convert("RGB"))[TITLE + 14 + 2 :][:128]
    return [pixels[:, left : left + 128] for left in (2, 132, 262)]


def test_without_an_edge_every_pixel_weighs_one(tmp_path):
    options = flat_images(tmp_path / "flat")
    weights = edges.main([*options, "--output", str(tmp_path / "e.png")])
    assert weights.shape == (1, 32, 32) and (weights == 1).all()  # a fifth of three images is held out: one
    image, edge, weight = trio_of(tmp_path / "e.png")
    assert not edge.any()
    assert (image == image[0, 0]).all() and image[0, 0].max() in (140, 141, 142)
    assert (weight == weight[0, 0]).all() and weight[0, 0].any()


def test_weights_follow_the_edge_and_are_those_of_the_loss(tmp_path, capsys):
    def paint(pixels):
        pixels[:, 13:] = 220  # one vertical edge, between the columns 12 and 13

    options = flat_images(tmp_path / "edge", paint)
    weights = edges.main([*options, "--scale", "4", "--output", str(tmp_path / "new" / "e.png")])
    expected = np.zeros((1, 32, 32), np.float32)
    expected[:, :, 12:16] = 8  # all weight in one of eight columns of cells: both sides of the edge lie in it
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    _, edge, weight = trio_of(tmp_path / "new" / "e.png")
    bright = np.flatnonzero((edge == 255).all(axis=(0, 2))) // 4  # tiles are four times as large as the images
    assert set(bright) == {12, 13}
    yellow = (weight == [255, 255, 0]).all(axis=2)
    assert yellow[:, 48:64].all() and not yellow[:, :48].any() and not yellow[:, 64:].any()
    assert "from 0.00 to 8.00; the heaviest tenth of the pixels has 80% of the weight" in capsys.readouterr().out


def test_edges_of_grey_and_of_few_images(tmp_path):
    weights = edges.main(["--dataset", "digits", "--images", "3", "--output", str(tmp_path / "e.png")])
    assert weights.shape == (3, 32, 32)
    np.testing.assert_allclose(weights.mean(axis=(1, 2)), 1, rtol=1e-5)
    assert len(tiles_of(tmp_path / "e.png", TITLE + 14)) == 9


# ------------------------------------------------------------------------------------------------ export


def exported(model, output):
    """What export.main returns, for the model.pt at `model`."""
    return export.main(["--pretrained", str(model), "--output", str(output)])


def test_a_trained_encoder_loads_into_plain_torchvision(finished, tmp_path):
    done = exported(finished[0] / "model.pt", tmp_path / "encoder.pt")
    weights = torch.load(tmp_path / "encoder.pt", weights_only=True)
    assert type(weights) is dict and len(weights) == done["tensors"]
    plain = torchvision.models.resnet18()
    plain.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)  # digits are grey
    parameters = dict(plain.named_parameters())
    missing, unknown = plain.load_state_dict(weights, strict=False)
    assert unknown == []
    later = {name for name in parameters if name.startswith(("layer3.", "layer4.", "fc."))}
    assert {name for name in missing if name in parameters} == later  # scale 8: all but the last two stages
    assert all(name.startswith(("layer3.", "layer4.")) for name in set(missing) - later)  # their running statistics


ENCODERS = [
    {}, {"inet": True, "arch": "vae"}, {"channels": 1}, {"scale": 32, "encoder_arch": "resnet50", "size": 64},
    {"scale": 32, "encoder_arch": "alexnet", "size": 64}, {"scale": 32, "encoder_arch": "alexnet", "channels": 1},
    {"encoder_arch": "pyramid"}, {"scale": 32, "encoder_arch": "resnet18"},
]  # fmt: skip


@pytest.mark.parametrize("changes", ENCODERS, ids=str)
def test_the_printed_lines_give_the_same_features(changes, tmp_path, capsys):
    model = save_model(tmp_path / "model.pt", **changes)
    done = exported(tmp_path / "model.pt", tmp_path / "encoder.pt")
    printed = capsys.readouterr().out
    assert all(f"    {line}\n" in printed for line in done["code"])
    pixels = torch.rand(2, changes.get("channels", 3), 64, 64)
    names = {}
    exec("\n".join(done["code"]), names)
    mean, std = (torch.tensor(values).view(-1, 1, 1)
                 for values in normalisation(pixels.shape[1], changes.get("inet", False)))
    with torch.no_grad():
        found = names["encoder"](names["normalise"](pixels))
        expected = model.encoder((pixels - mean) / std)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert done["difference"] <= 1e-6
    assert found.std() > 0.01  # there is something to compare


def test_other_features_are_not_exported(tmp_path, monkeypatch):
    save_model(tmp_path / "model.pt", scale=32, encoder_arch="alexnet")
    monkeypatch.setattr(export, "BORDER", (16, 16, 16, 16))
    with pytest.raises(console.RunError, match="other features.*nothing was written"):
        exported(tmp_path / "model.pt", tmp_path / "encoder.pt")
    assert not (tmp_path / "encoder.pt").exists()


def test_safetensors_hold_the_same_weights(finished, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    exported(finished[0] / "model.pt", tmp_path / "encoder.pt")
    done = exported(finished[0] / "model.pt", tmp_path / "encoder.safetensors")
    expected = torch.load(tmp_path / "encoder.pt", weights_only=True)
    found = safetensors.load_file(tmp_path / "encoder.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    exec("\n".join(done["code"]), {})


# ------------------------------------------------------------------------------------------------ architecture


def test_the_architecture_is_the_one_of_the_readme(tmp_path):
    picture = architecture.main(["--output", str(tmp_path / "a.png")])
    assert picture.tobytes() == architecture.draw().tobytes()
    kept, fresh = (Image.open(path).convert("RGB") for path in (ROOT / "imgs/architecture.png", tmp_path / "a.png"))
    assert kept.size == fresh.size == (architecture.WIDTH, architecture.HEIGHT)
    differs = np.abs(np.asarray(kept, int) - np.asarray(fresh, int)).max(axis=2) > 64
    assert differs.mean() < 1e-4  # one word is more; Pillow 11 and 13 differ by one grey level in six pixels
    assert (tmp_path / "a.png").stat().st_size < 200_000


def test_nothing_in_the_picture_touches_its_border():
    inked = (np.asarray(architecture.draw()) != 255).any(axis=2)
    assert inked.any() and inked.sum() == inked[8:-8, 8:-8].sum()


# ------------------------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def place(tmp_path_factory, finished):
    """A folder with everything that can be wrong in it."""
    place = tmp_path_factory.mktemp("place")
    (place / "garbage.pt").write_bytes(b"no archive at all")
    content = checkpoints.load(finished[0] / "model.pt", checkpoints.MODEL)
    checkpoints.save(place / "other.pt", {**content, "kind": checkpoints.TRAINING})
    checkpoints.save(place / "misfit.pt", {**content, "options": {**content["options"], "encoder_arch": "resnet50"}})
    checkpoints.save(place / "bare.pt", {"kind": checkpoints.MODEL})
    checkpoints.save(place / "model.pt", content)
    (place / "folder.png").mkdir()
    (place / "folder.pt").mkdir()
    paint_classes(place / "images")
    return place


# tool, options, exit status, what the line must say
BAD_INPUT = [
    (filters, "", 2, ["--pretrained"]),
    (filters, "--pretrained {place}/none.pt", 1, ["none.pt", "no such file"]),
    (filters, "--pretrained {place}/garbage.pt", 1, ["garbage.pt", "damaged"]),
    (filters, "--pretrained {place}/misfit.pt", 1, ["misfit.pt", "do not fit", "train the model again"]),
    (filters, "--pretrained {place}/model.pt --output f.jpg", 2, ["--output", "'f.jpg'", ".png"]),
    (filters, "--pretrained {place}/model.pt --output {place}/folder.png", 2, ["--output", "folder"]),
    (filters, "--pretrained {place}/model.pt --output {place}/model.pt/f.png", 1, ["model.pt"]),
    (export, "", 2, ["--pretrained"]),
    (export, "--pretrained {place}/none.pt", 1, ["none.pt", "no such file"]),
    (export, "--pretrained {place}/garbage.pt", 1, ["garbage.pt", "damaged"]),
    (export, "--pretrained {place}/other.pt", 1, ["other.pt", "expected a model.pt", "found a training checkpoint"]),
    (export, "--pretrained {place}/bare.pt", 1, ["bare.pt", "do not fit"]),
    (export, "--pretrained {place}/model.pt --output e.onnx", 2, ["--output e.onnx", ".pt", ".safetensors"]),
    (export, "--pretrained {place}/model.pt --output {place}/folder.pt", 2, ["--output", "is a folder"]),
    (export, "--pretrained {place}/model.pt --output {place}/model.pt", 2, ["would replace --pretrained"]),
    (export, "--pretrained {place}/model.pt --output e.safetensors", 1, ["pip install safetensors", ".pt"]),
    (export, "--pretrained {place}/model.pt --output /proc/nowhere/e.pt", 1, ["/proc/nowhere"]),
    (edges, "--dataset nothing", 2, ["--dataset", "shapes"]),
    (edges, "--dataset shapes --scale 5", 2, ["--size 32", "--scale 5", "--size 30"]),
    (edges, "--dataset shapes --images 0", 2, ["--images", "1 or more"]),
    (edges, "--dataset folder --data-folder {place}/none", 1, ["none", "--data-folder"]),
    (edges, "--dataset folder --data-folder {place}/images --output {place}/folder.png", 2, ["--output", "folder"]),
    (architecture, "--output a.gif", 2, ["--output", ".png"]),
    (architecture, "--output /proc/nowhere/a.png", 1, ["/proc/nowhere"]),
]


@pytest.mark.parametrize("tool, options, status, words", BAD_INPUT,
                         ids=[f"{row[0].__name__.split('.')[-1]} {row[1]}" for row in BAD_INPUT])  # fmt: skip
def test_bad_input_is_one_line(tool, options, status, words, place, tmp_path, line_of_error, monkeypatch):
    monkeypatch.setattr(export, "safetensors", None)  # as where it is not installed
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    found, line = line_of_error(tool.main, options.format(place=place).split())
    assert found == status
    assert all(word in line for word in words), line
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tool", [filters, edges, export, architecture])
def test_help_shows_commands_and_defaults(tool, capsys):
    with pytest.raises(SystemExit) as left:
        tool.main(["--help"])
    text = capsys.readouterr().out
    name = tool.__name__.removeprefix("utils.")
    assert left.value.code in (0, None) and f"    python utils/{name}.py" in text and "--output FILE" in text


@pytest.mark.parametrize("tool, output", [("architecture", "a.png"), ("export", "e.pt")])
def test_the_real_process_behaves_alike(tool, output, place, tmp_path):
    options = ["--pretrained", place / "model.pt"] if tool == "export" else []
    done = call(f"utils/{tool}.py", *options, "--output", output, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and output in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [output]
