"""utils/score.py: 1 for the truth, nothing for chance, the same under other names; fitted elsewhere."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY
from sklearn.metrics import average_precision_score
from torch import nn

import modules
import run
from datasets import Drawings
from utils import checkpoints, options, part_scores, score, shapes

CELL, CLASSES = 4, len(shapes.GEOMETRY)
FEW = ["--train-images", "60", "--test-images", "100"]


@pytest.fixture(scope="module")
def truth():
    """The geometry of 19,200 cells of drawn images, to fit on, and of as many others, to score on."""
    pixels = [[Drawings(300, seed).pixel_labels(index)["geometry"] for index in range(300)] for seed in (0, 1)]
    return [part_scores.majority(np.stack(images), CELL, CLASSES).ravel() for images in pixels]


def save_model(folder, *changes):
    """The path of the model.pt of a run that has not trained yet."""
    args, _, _ = run.parse([*TINY, "--encoder-arch", "pyramid", "--scale", "4", *changes])
    described = options.describe_model(args)
    content = {"kind": checkpoints.MODEL, "options": described, "args": vars(args)}
    checkpoints.save(folder / "model.pt", {**content, "model": modules.build_model(described).state_dict()})
    return str(folder / "model.pt")


def maps_of(labels, parts=CLASSES, seed=0):
    """Maps that occur exactly at the labels, with any strength above one half, and weakly anywhere else: M×parts."""
    noise = np.random.default_rng(seed).uniform(0, 0.5, (len(labels), parts))
    return noise + 0.5 * (labels[:, None] == np.arange(parts))


def scored(train_maps, test_maps, train, test):
    return part_scores.score(test_maps, test, part_scores.fit(train_maps, train, CLASSES))


def test_the_true_masks_score_one(truth):
    figures = scored(*map(maps_of, truth), *truth)
    assert {name: value for name, value in figures.items() if not name.startswith("bg_")} == pytest.approx(
        dict.fromkeys([name for name in figures if not name.startswith("bg_")], 1.0)
    )


def test_shuffled_maps_score_chance(truth):
    mixed = [np.random.default_rng(7).permutation(labels) for labels in truth]
    figures = scored(*map(maps_of, mixed), *truth)
    for name in ("nmi", "ari", "fg_nmi", "fg_ari", "ap_above_chance"):
        assert abs(figures[name]) < 0.03, name
    assert figures["miou_matched"] < 0.15 and figures["purity_at_50"] < 0.9


def test_parts_may_have_any_names(truth):
    names = np.random.default_rng(3).permutation(CLASSES)
    blurred = [maps_of(labels, seed=1) + np.random.default_rng(2).normal(0, 0.3, (1, CLASSES)) for labels in truth]
    renamed = [maps[:, names] for maps in blurred]
    assert scored(*renamed, *truth) == pytest.approx(scored(*blurred, *truth), abs=1e-9)
    assert 0.1 < scored(*blurred, *truth)["nmi"] < 0.99  # the comparison is of figures that could differ


def test_a_label_without_a_part_counts_nothing(truth):
    halves = [np.where(labels == shapes.GROUND, 0, 1) for labels in truth]
    figures = scored(*(maps_of(half, parts=2) for half in halves), *truth)
    assert figures["miou_matched"] < 2 / CLASSES < figures["miou_voted"] + 1 / CLASSES
    assert figures["fg_nmi"] < 1e-9 and 0.3 < figures["nmi"] < 0.9


def test_the_threshold_is_that_of_training_images(truth):
    train, test = truth
    figure = [maps_of(labels) * (labels > 0)[:, None] for labels in truth]  # on the ground nothing occurs
    fitted = part_scores.fit(figure[0], train, CLASSES)
    assert 0 < fitted.threshold <= 0.5 + 0.5
    plain, weak = part_scores.score(figure[1], test, fitted), part_scores.score(figure[1] / 100, test, fitted)
    assert plain["bg_nmi"] > 0.99
    assert weak["bg_nmi"] == 0 and weak["nmi"] == plain["nmi"]  # all below the threshold, which did not follow


def test_matchings_are_those_of_training_images(truth):
    train, test = truth
    renamed = [maps_of(train), maps_of((test + 1) % CLASSES)]
    figures = scored(*renamed, train, test)
    assert figures["miou_matched"] == figures["miou_voted"] == 0 and figures["nmi"] == pytest.approx(1)


def test_average_precision_is_that_of_scikit_learn():
    mix = np.random.default_rng(5)
    labels, scores = mix.integers(0, 3, 500), mix.integers(0, 40, 500) / 40  # with many equal scores
    precision, chance = part_scores.average_precision(scores, labels, classes=4)
    assert precision[:3] == pytest.approx([average_precision_score(labels == label, scores) for label in range(3)])
    assert chance[:3] == pytest.approx(np.bincount(labels) / 500) and np.isnan(precision[3])


def test_the_label_of_a_cell_is_its_commonest():
    pixels = np.array([[[0, 0, 3, 3], [0, 1, 3, 2], [1, 1, 2, 2], [2, 2, 2, 2]]])
    assert part_scores.majority(pixels, 2, 4).tolist() == [[[0, 3], [1, 2]]]


def test_contrast_does_not_see_brightness_colour_or_strength():
    patches = torch.rand(5, 3, 16)
    changed = 0.3 * patches + torch.rand(5, 3, 1)
    expected = score.contrast_normalised(patches)
    assert torch.allclose(score.contrast_normalised(changed), expected, atol=1e-5)
    assert torch.allclose(expected.square().sum(dim=(1, 2)), torch.ones(5))
    assert not score.contrast_normalised(torch.full((1, 3, 16), 0.1)).any()


def test_patches_are_cells_row_by_row():
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    patches = score.cut(x, 2)
    assert patches.shape == (12, 3, 4)
    assert torch.equal(patches[6 + 3 + 1], x[1, :, 2:4, 2:4].flatten(1))


class Plain(nn.Module):
    """A decoder that shows every cell its own latents and nothing else."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.register_buffer("pixel_std", torch.full((1, 1, 1), 0.5))

    def forward(self, latents):
        return latents.sum(1, keepdim=True).repeat_interleave(self.cell, 2).repeat_interleave(self.cell, 3)


def test_a_swap_changes_only_the_part_itself():
    encoder, features = modules.build_encoder("pyramid", 3, 4, ngf=8)
    model = modules.PatchVAE(encoder, features, Plain(4), 3, 2, 8, 1 / 3, categorical=True, hard=True).eval()
    x = torch.rand(6, 3, 32, 32)
    found = score.swap_test(model, x, 4)
    assert found["outside"] == 0 and found["inside"] > 0 and found["ratio"] is None
    assert score.swap_test(model, x[:1], 4)["inside"] == 0  # with itself
    nn.init.constant_(model.occurrence.convolution.bias, 0)
    model.occurrence.convolution.bias.data[1] = 1e6
    assert score.swap_test(model, x, 4)["inside"] is None  # one part is all there is


def test_a_model_is_scored_beside_its_rivals(tmp_path, capsys):
    content = score.main(["--pretrained", save_model(tmp_path, "--dataset", "shapes"), *FEW])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "scores.json").read_text()) == content
    scores = content["scores"]
    assert list(scores) == [
        "PatchVAE", "random weights", "k-means raw", "k-means contrast", "shuffled labels", "ceiling"
    ]  # fmt: skip
    assert all(name in printed for name in scores) and "16 parts (K)" in printed and "100 test images" in printed
    ceiling = {label: scores["ceiling"][label] for label in ("geometry", "kind", "colour", "figure")}
    assert all(figures["nmi"] == pytest.approx(1) and 0.2 < figures["pixel_nmi"] < 1 for figures in ceiling.values())
    assert scores["k-means raw"]["colour"]["fg_nmi"] > 0.4  # colour is all that raw patches show
    raw, contrast = (scores[f"k-means {name}"]["geometry"]["boundary_nmi"] for name in ("raw", "contrast"))
    assert contrast > 1.2 * raw
    assert abs(scores["shuffled labels"]["geometry"]["ari"]) < 0.03


def test_what_the_images_cannot_show_is_left_out(tmp_path, capsys):
    path = save_model(tmp_path, "--dataset", "bincircles")
    content = score.main(["--pretrained", path, *FEW, "--output-folder", str(tmp_path / "elsewhere")])
    assert set(content["scores"]["PatchVAE"]) == {"geometry", "kind", "figure"}  # white figures have no colour
    assert content["scores"]["PatchVAE"]["kind"]["fg_nmi"] is None  # circles all
    assert [line.split()[-2] for line in capsys.readouterr().out.splitlines() if line.startswith("ceiling")][0] == "-"
    assert (tmp_path / "elsewhere/scores.json").is_file() and not (tmp_path / "scores.json").exists()


def test_bad_input_is_one_line(finished, tmp_path, line_of_error):
    digits = str(finished[0] / "model.pt")
    status, line = line_of_error(score.main, ["--pretrained", digits])
    assert status == 2 and "--dataset digits" in line and "binshapes" in line
    status, line = line_of_error(score.main, ["--pretrained", digits, "--train-images", "0"])
    assert status == 2 and "--train-images" in line
    status, line = line_of_error(score.main, ["--pretrained", str(tmp_path / "none.pt")])
    assert status == 1 and "none.pt" in line
    vae = save_model(tmp_path, "--dataset", "shapes", "--arch", "vae")
    status, line = line_of_error(score.main, ["--pretrained", vae])
    assert status == 1 and "vae" in line and "--arch patchy" in line
