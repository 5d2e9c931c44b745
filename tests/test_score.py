"""utils/score.py: 1 for the truth, nothing for chance, the same under other names; fitted elsewhere; masks as images."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image
from torch import nn

import modules
import run
from datasets import Drawings, Files
from utils import batches, options, score, shapes, trained, training

CELL, CLASSES = 4, len(shapes.GEOMETRY)
FEW = ["--train-images", "60", "--test-images", "100"]


@pytest.fixture(scope="module")
def truth():
    """The geometry of 300 drawn images to fit on and of as many others to score on: score.Labelled."""
    pixels = [np.stack([Drawings(300, seed).pixel_labels(k)["geometry"] for k in range(300)]) for seed in (0, 1)]
    everywhere, x = np.ones((300, 8, 8), bool), torch.zeros(300, 1, 32, 32)
    cells = [{"geometry": score.majority(labels, CELL)[0]} for labels in pixels]
    pixels = [{"geometry": labels[: score.PIXEL_IMAGES]} for labels in pixels]
    return [score.Labelled(x, cells[k], everywhere, pixels[k]) for k in (0, 1)]


def save_model(folder, *changes):
    """The path of the model.pt of a run that has not trained yet."""
    settings, _, _ = run.parse([*TINY, "--encoder-arch", "pyramid", "--scale", "4", *changes])
    described = options.describe_model(settings)
    content = {"kind": training.MODEL, "options": described, "args": vars(settings)}
    training.save(folder / "model.pt", {**content, "model": modules.build_model(described).state_dict()})
    return str(folder / "model.pt")


def maps_of(labels, parts=CLASSES, seed=0):
    """Maps that occur exactly at the labels, with any strength above one half, and weakly elsewhere: B×parts×h×w."""
    noise = torch.rand(*labels.shape, parts, generator=torch.Generator().manual_seed(seed)) / 2
    return (noise + F.one_hot(torch.from_numpy(labels), parts) / 2).movedim(-1, 1)


def cells_of(truth):
    return [split.cells["geometry"] for split in truth]


def scored(maps, truth):
    return score.score("geometry", *maps, *truth, CLASSES)


def test_the_true_masks_score_one(truth):
    figures = scored(map(maps_of, cells_of(truth)), truth)
    exact = [name for name in figures if not name.startswith(("bg_", "pixel_"))]
    assert {name: figures[name] for name in exact} == pytest.approx(dict.fromkeys(exact, 1.0))
    assert 0.3 < figures["pixel_nmi"] < 0.9  # what the grid allows


def test_shuffled_labels_score_chance(truth):
    figures = scored(map(maps_of, cells_of(truth)), [score.shuffled(split, seed) for seed, split in enumerate(truth)])
    for name in ("nmi", "ari", "fg_nmi", "fg_ari", "ap_gain"):
        assert abs(figures[name]) < 0.03, name
    assert figures["miou_matched"] < 0.15 and figures["purity_at_50"] < 0.9


def test_parts_may_have_any_names(truth):
    names = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(3))
    blurred = [maps_of(labels, seed=1) + torch.linspace(0, 0.9, CLASSES)[:, None, None] for labels in cells_of(truth)]
    figures = scored(blurred, truth)
    assert scored([maps[:, names] for maps in blurred], truth) == pytest.approx(figures, abs=1e-9)
    assert 0.1 < figures["nmi"] < 0.99  # the comparison is of figures that could differ


def test_a_label_without_a_part_counts_nothing(truth):
    figures = scored([maps_of(np.minimum(labels, 1), parts=2) for labels in cells_of(truth)], truth)
    assert figures["miou_matched"] < 2 / CLASSES < figures["miou_voted"] + 1 / CLASSES
    assert figures["fg_nmi"] < 1e-9 and 0.3 < figures["nmi"] < 0.9


def test_threshold_and_matchings_are_those_of_training_images(truth):
    train, test = (maps_of(labels) * torch.from_numpy(labels > 0)[:, None] for labels in cells_of(truth))
    plain, weak = scored([train, test], truth), scored([train, test / 100], truth)
    assert plain["bg_nmi"] > 0.99
    assert weak["bg_nmi"] == 0 and weak["nmi"] == plain["nmi"]  # all below the threshold, which did not follow
    renamed = [maps_of(labels) for labels in (cells_of(truth)[0], (cells_of(truth)[1] + 1) % CLASSES)]
    figures = scored(renamed, truth)
    assert figures["miou_matched"] == figures["miou_voted"] == 0 and figures["nmi"] == pytest.approx(1)
    assert figures["ap_gain"] < 0


def test_the_label_of_a_cell_is_its_commonest():
    pixels = np.array([[[0, 0, 3, 3], [0, 1, 3, 2], [1, 1, -1, 2], [2, 2, -1, -1]]])
    labels, share = score.majority(pixels, 2)
    assert labels.tolist() == [[[0, 3], [1, 2]]] and share.tolist() == [[[0.75, 0.75], [0.5, 0.25]]]


def test_contrast_does_not_see_brightness_colour_or_strength():
    patches = torch.rand(5, 3, 16)
    expected = score.contrast_normalised(patches)
    assert torch.allclose(score.contrast_normalised(0.3 * patches + torch.rand(5, 3, 1)), expected, atol=1e-5)
    assert torch.allclose(expected.square().sum(dim=(1, 2)), torch.ones(5))
    assert not score.contrast_normalised(torch.full((1, 3, 16), 0.1)).any()


def test_patches_lie_around_cells_row_by_row():
    x = torch.rand(2, 3, 8, 12)
    assert np.array_equal(score.patches(x, 4, 1, False)[6 + 3 + 1], x[1, :, 4:, 4:8].flatten())
    around = F.pad(x, [0, 0, 0, 2], "replicate")[1, :, 2:, 2:10]
    assert np.array_equal(score.patches(x, 4, 2, False)[6 + 3 + 1], around.flatten())
    assert np.array_equal(score.patches(x, 4, 3, True, [7, 2]), score.patches(x, 4, 3, True)[[7, 2]])


class Plain(nn.Module):
    """A decoder that shows every cell its own latents and nothing else."""

    pixel_std = torch.full((1, 1, 1), 0.5)

    def forward(self, latents):
        return latents.sum(1, keepdim=True).repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_a_swap_changes_only_the_part_itself(tmp_path):
    model, _ = trained.load_model(save_model(tmp_path, "--dataset", "shapes", "--categorical", "--hard"))
    model.decoder, x = Plain(), torch.rand(6, 3, 32, 32)
    found = score.swap_test(model, x, 4)
    assert found["outside"] == 0 and found["inside"] > 0 and found["ratio"] is None
    assert score.swap_test(model, x[:1], 4)["inside"] == 0  # with itself
    model.occurrence.convolution.bias.data[1] = 1e6
    assert score.swap_test(model, x, 4)["inside"] is None  # one part is all there is


def test_a_model_is_scored_beside_its_rivals(tmp_path, capsys):
    content = score.main(["--pretrained", save_model(tmp_path, "--dataset", "shapes"), *FEW])
    printed, scores = capsys.readouterr().out, content["scores"]
    assert json.loads((tmp_path / "scores.json").read_text()) == content
    rows = ["PatchVAE", "random weights", "k-means raw", "k-means contrast", "shuffled labels", "ceiling"]
    assert list(scores) == rows and all(name in printed for name in rows)
    assert "16 parts (K)" in printed and "100 test images" in printed and "seed 1" in printed
    ceiling = [scores["ceiling"][name] for name in ("geometry", "kind", "colour", "figure")]
    assert all(figures["nmi"] == pytest.approx(1) and 0.2 < figures["pixel_nmi"] < 1 for figures in ceiling)
    assert scores["k-means raw"]["colour"]["fg_nmi"] > 0.4  # colour is all that raw patches show
    boundaries = [scores[f"k-means {name}"]["geometry"]["boundary_nmi"] for name in ("raw", "contrast")]
    assert boundaries[1] > 1.2 * boundaries[0]
    assert abs(scores["shuffled labels"]["geometry"]["ari"]) < 0.03


def test_what_the_images_cannot_show_is_left_out(tmp_path, capsys):
    path = save_model(tmp_path, "--dataset", "bincircles")
    scores = score.main(["--pretrained", path, *FEW, "--output", str(tmp_path / "elsewhere/x.json")])["scores"]
    assert set(scores["PatchVAE"]) == {"geometry", "kind", "figure", "swap"}  # white figures have no colour
    assert scores["PatchVAE"]["kind"]["fg_nmi"] is None  # circles all
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("kind")] == ["-"]
    assert (tmp_path / "elsewhere/x.json").is_file() and not (tmp_path / "scores.json").exists()


@pytest.fixture
def scenes(tmp_path):
    """A folder of data/{train,test}/*.jpg, whose labels 3 and 7 are red and blue, and of masks like it; 255 is void."""
    for number in range(24):
        place, mix = f"{('train', 'test')[number % 2]}/{number}", np.random.default_rng(number)
        labels = np.kron(mix.choice([3, 7], (3, 4)), np.ones((10, 10))).astype(np.uint8)  # 30x40
        labels[:, :2] = 255
        pixels = np.where(labels[..., None] == 3, (200, 40, 40), (40, 40, 200)) + mix.integers(0, 30, (30, 40, 3))
        for path, array in ((f"data/{place}.jpg", pixels), (f"masks/{place}.png", labels)):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(tmp_path / path)
    model = save_model(tmp_path, "--dataset", "folder", "--data-folder", str(tmp_path / "data"), "--num-parts", "2",
                       "--size", "32")
    return tmp_path, ["--pretrained", model, "--workers", "0", "--masks", str(tmp_path / "masks"), "--ignore", "255"]


def test_label_maps_are_scored_beside_rivals(scenes, capsys):
    folder, command = scenes
    content = score.main(command)
    printed, scores = capsys.readouterr().out, content["scores"]
    assert "2 labels, ignored: 255; scored: cells with at least 12 of 16 pixels of one label" in printed
    assert scores["k-means raw"]["mask"]["nmi"] > 0.95 and scores["k-means raw"]["mask"]["miou_matched"] > 0.95
    assert scores["ceiling"]["mask"]["nmi"] == pytest.approx(1) and 0.5 < scores["ceiling"]["mask"]["pixel_ari"] < 1
    assert abs(scores["shuffled labels"]["mask"]["nmi"]) < 0.05 and "fg_nmi" not in scores["PatchVAE"]["mask"]
    assert score.main(command) == content and score.main([*command, "--seed", "2"]) != content


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
@pytest.mark.parametrize("shape", [(30, 44), (44, 30), (16, 16)])
def test_label_maps_are_cut_as_images_are(tmp_path, shape, mode):
    down, across = np.indices(shape)
    labels = (2 * down + 3 * across).astype(np.uint16 if mode == "I;16" else np.uint8)
    mask = Image.fromarray(labels)
    if mode == "P":
        mask.putpalette(bytes(range(256)) * 3)
    for place, image in (("data", Image.fromarray(labels.astype(np.uint8))), ("masks", mask)):
        (tmp_path / place).mkdir()
        image.save(tmp_path / place / "a.b.png")
    source = Files(tmp_path / "data", ["a.b.png"])
    settings = options.Settings(masks=tmp_path / "masks", data_folder=tmp_path / "data", size=16)
    found, pixels = score.read_mask(settings, source, 0), batches.Pixels(source, 16)
    assert np.abs(found - pixels.__getitems__([0])[0][0, 0].astype(int)).max() <= 5  # a pixel of the original at most


def test_label_maps_that_do_not_fit_are_one_line(scenes, line_of_error):
    folder, command = scenes
    mask = folder / "masks/test/5.png"
    grey = Image.open(mask).copy()
    faults = {
        "mode RGB": lambda: grey.convert("RGB").save(mask),
        "20x15 pixels, its image 40x30": lambda: grey.resize((20, 15)).save(mask),
        "cannot be decoded": lambda: mask.write_bytes(b"no picture"),
        "5.jpg; add it": mask.unlink,
    }
    for words, spoil in faults.items():
        spoil()
        status, line = line_of_error(score.main, command)
        assert status == 1 and str(mask) in line and words in line
    grey.save(mask)
    status, line = line_of_error(score.main, [*command, "7"])
    assert status == 1 and "fewer than two labels" in line and "--ignore" in line


def test_bad_input_is_one_line(finished, tmp_path, line_of_error):
    digits = str(finished[0] / "model.pt")
    shapes = save_model(tmp_path, "--dataset", "shapes")
    cases = {
        (digits,): (2, "--dataset digits", "binshapes"), (digits, "--train-images", "0"): (2, "--train-images"),
        (shapes, "--masks", "masks"): (2, "--masks", "--dataset folder"), (shapes, "--ignore", "3"): (2, "--ignore"),
        (str(tmp_path / "none.pt"),): (1, "none.pt"),
    }
    for options_, (expected, *words) in cases.items():
        status, line = line_of_error(score.main, ["--pretrained", *options_])
        assert status == expected and all(word in line for word in words)
    status, line = line_of_error(score.main, ["--pretrained", save_model(tmp_path, "--dataset", "shapes", "--arch", "vae")])
    assert status == 1 and "vae" in line and "--arch patchy" in line
