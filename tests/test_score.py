"""utils/score.py: 1 for the truth, nothing for chance, the same under other names; label maps fit their images."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image

import modules
import run
from datasets import Files
from utils import batches, options, score, shapes, training

CLASSES = score.CLASSES["geometry"]
FEW = ["--train-images", "60", "--test-images", "100"]


def maps_of(labels, parts=CLASSES):
    """Maps that occur exactly at the labels, with any strength above one half, and weakly elsewhere: B×parts×h×w."""
    noise = torch.rand(*labels.shape, parts, generator=torch.Generator().manual_seed(0)) / 2
    return (noise + F.one_hot(torch.from_numpy(labels), parts) / 2).movedim(-1, 1)


@pytest.fixture(scope="module")
def scored():
    """A function: figures of the maps that `train` and `test` make of the true geometry of 300 drawn images each."""
    scenes = [[shapes.scene(seed, index) for index in range(300)] for seed in (0, 1)]
    pixels = [np.stack([score.label_geometry(scene, 32) for scene in some]) for some in scenes]
    cells, everywhere = [score.majority(labels, 4)[0] for labels in pixels], np.ones((300, 8, 8), bool)
    truths = [({"geometry": c}, everywhere, {"geometry": p[:250]}) for c, p in zip(cells, pixels)]
    truths = [score.Labelled(torch.zeros(1, 1, 32, 32), *truth) for truth in truths]

    def scored(train, test=None, change=lambda truth, seed: truth):
        changed = [change(truth, seed) for seed, truth in enumerate(truths)]
        return score.score("geometry", train(cells[0]), (test or train)(cells[1]), *changed, CLASSES)

    return scored


def save_model(folder, *changes):
    """The option that names the model.pt, in `folder`, of a run that has not trained yet."""
    settings, _, _ = run.parse([*TINY, "--encoder-arch", "pyramid", "--scale", "4", *map(str, changes)])
    content = {"kind": training.MODEL, "options": options.describe_model(settings), "args": vars(settings)}
    folder.mkdir(exist_ok=True)
    training.save(folder / "model.pt", {**content, "model": modules.build_model(content["options"]).state_dict()})
    return ["--pretrained", str(folder / "model.pt")]


def test_pixel_labels_agree_with_the_figures_and_the_picture():
    for index in range(30):
        scene = shapes.scene(0, index)
        labels, picture, owner = score.label_pixels(scene, 64), np.asarray(scene.draw(64)) / 255, scene.owner(64)
        assert set(labels) == {"figure", "kind", "colour", "geometry"} == set(score.CLASSES)
        for number, figure in enumerate(scene.figures, start=1):
            mine = owner == number
            assert (labels["kind"][mine] == 1 + shapes.KINDS.index(figure.kind)).all()
            assert (labels["colour"][mine] == 1 + figure.hue).all()
            inner = mine & (labels["geometry"] == score.INTERIOR)
            assert np.abs(picture[inner] - figure.rgb).max(initial=0) < 0.01
        assert np.array_equal(labels["figure"], owner > 0) and np.array_equal(labels["kind"] > 0, owner > 0)


def test_geometry_of_one_square_and_one_circle():
    square = shapes.Figure("square", 0.5, 0.5, 0.3, np.pi / 4, 0, (1, 0, 0))  # sides parallel to the image's
    geometry = score.label_geometry(shapes.Scene((square,), ((0, 0, 0),) * 2, "plain", 0), 64)
    side = 0.3 / np.sqrt(2)
    top = left = round((0.5 - side) * 64)
    assert geometry[top, 32] == score.EDGE and geometry[32, left] == score.EDGE + 4  # 0 and 90 degrees
    assert (geometry[top, left], geometry[32, 32], geometry[2, 2]) == (score.CORNER, score.INTERIOR, score.GROUND)
    circle = square._replace(kind="circle")
    geometry = score.label_geometry(shapes.Scene((circle,), ((0, 0, 0),) * 2, "plain", 0), 64)
    assert set(np.unique(geometry)) == {score.GROUND, score.INTERIOR, score.ARC}


def test_the_truth_scores_one_and_chance_nothing(scored):
    figures = scored(maps_of)
    assert 0.3 < figures["pixel_nmi"] < 0.9  # what the grid allows
    exact = [name for name in figures if not name.startswith(("bg_", "pixel_"))]
    assert {name: figures[name] for name in exact} == pytest.approx(dict.fromkeys(exact, 1.0))
    figures = scored(maps_of, change=score.shuffled)
    assert all(abs(figures[name]) < 0.03 for name in ("nmi", "ari", "fg_nmi", "fg_ari", "ap_gain", "pixel_nmi"))
    assert figures["miou_matched"] < 0.15 and figures["purity_at_50"] < 0.9


def test_parts_may_have_any_names_and_labels_no_part(scored):
    names, tilt = np.random.default_rng(3).permutation(CLASSES), torch.linspace(0, 0.9, CLASSES)[:, None, None]
    figures = scored(lambda labels: maps_of(labels) + tilt)
    assert 0.1 < figures["nmi"] < 0.99  # the comparison is of figures that could differ
    assert scored(lambda labels: (maps_of(labels) + tilt)[:, names]) == pytest.approx(figures, abs=1e-9)
    figures = scored(lambda labels: maps_of(np.minimum(labels, 1), parts=2))
    assert figures["miou_matched"] < 2 / CLASSES < figures["miou_voted"] + 1 / CLASSES
    assert figures["fg_nmi"] < 1e-9 and 0.3 < figures["nmi"] < 0.9


def test_thresholds_and_matchings_are_those_of_training_images(scored):
    def on_figures(labels):
        return maps_of(labels) * torch.from_numpy(labels > 0)[:, None]

    plain, weak = scored(on_figures), scored(on_figures, lambda labels: on_figures(labels) / 100)
    assert plain["bg_nmi"] > 0.99
    assert weak["bg_nmi"] == 0 and weak["nmi"] == plain["nmi"]  # all below the threshold, which did not follow
    renamed = scored(maps_of, lambda labels: maps_of((labels + 1) % CLASSES))
    assert renamed["miou_matched"] == renamed["miou_voted"] == 0 and renamed["nmi"] == pytest.approx(1)
    assert renamed["ap_gain"] < 0


def test_cells_and_the_patches_around_them():
    labels, share = score.majority(np.array([[[0, 0, 3, 3], [0, 1, 3, 2], [1, 1, -1, 2], [2, 2, -1, -1]]]), 2)
    assert labels.tolist() == [[[0, 3], [1, 2]]] and share.tolist() == [[[0.75, 0.75], [0.5, 0.25]]]
    x = torch.rand(2, 3, 8, 12)
    wide, normal = score.patches(x, 4, 2, False), score.patches(x, 4, 3, True)
    assert np.array_equal(score.patches(x, 4, 1, False)[6 + 3 + 1], x[1, :, 4:, 4:8].flatten())
    assert np.array_equal(wide[6 + 3 + 1], F.pad(x, [0, 0, 0, 2], "replicate")[1, :, 2:, 2:10].flatten())
    assert np.array_equal(score.patches(x, 4, 3, True, [7, 2]), normal[[7, 2]])
    assert np.allclose(score.patches(0.3 * x + torch.rand(3, 1, 1), 4, 3, True), normal, atol=1e-5)  # contrast alone
    assert np.allclose(np.square(normal).sum(axis=1), 1) and not score.patches(0 * x + 0.1, 4, 1, True).any()


def test_a_swap_changes_only_the_part_itself(tmp_path):
    model, _ = training.load_model(save_model(tmp_path, "--dataset", "shapes", "--categorical", "--hard")[1])
    model.decoder.forward = lambda latents: F.interpolate(latents.sum(1, keepdim=True), scale_factor=4)  # cell by cell
    x = torch.rand(6, 3, 32, 32)
    found = score.swap_test(model, x, 4)
    assert found["outside"] == 0 and found["inside"] > 0 and found["ratio"] is None
    assert score.swap_test(model, x[:1], 4)["inside"] == 0  # with itself
    model.occurrence.convolution.bias.data[1] = 1e6
    assert score.swap_test(model, x, 4)["inside"] is None  # one part is all there is


def test_a_model_is_scored_beside_its_rivals(tmp_path, capsys):
    content = score.main([*save_model(tmp_path, "--dataset", "shapes"), *FEW])
    printed, scores = capsys.readouterr().out, content["scores"]
    assert json.loads((tmp_path / "scores.json").read_text()) == content
    rivals = ["random weights", "k-means raw", "k-means contrast", "shuffled labels", "ceiling"]
    assert list(scores) == ["PatchVAE", *rivals] and all(name in printed for name in (*scores, "100 test", "seed 1"))
    ceiling = [scores["ceiling"][name] for name in ("geometry", "kind", "colour", "figure")]
    assert all(figures["nmi"] == pytest.approx(1) and 0.2 < figures["pixel_nmi"] < 1 for figures in ceiling)
    assert scores["k-means raw"]["colour"]["fg_nmi"] > 0.4  # colour is all that raw patches show
    raw, contrast = (scores[f"k-means {name}"]["geometry"]["boundary_nmi"] for name in ("raw", "contrast"))
    assert contrast > 1.2 * raw and abs(scores["shuffled labels"]["geometry"]["ari"]) < 0.03


def test_what_the_images_cannot_show_is_left_out(tmp_path, capsys):
    model, output = save_model(tmp_path, "--dataset", "bincircles"), tmp_path / "elsewhere/x.json"
    found = score.main([*model, *FEW, "--output", str(output)])["scores"]
    assert set(found["PatchVAE"]) == {"geometry", "kind", "figure", "swap"}  # white figures have no colour
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("kind")] == ["-"]
    assert output.is_file() and not (tmp_path / "scores.json").exists()


@pytest.fixture
def scenes(tmp_path):
    """The command for data/{train,test}/*.jpg and masks/{train,test}/*.png: label 3 is red, 7 blue, 255 void."""
    for number in range(24):
        name, mix = f"{('train', 'test')[number % 2]}/{number}", np.random.default_rng(number)
        labels = np.kron(mix.choice([3, 7], (3, 4)), np.ones((10, 10)))  # 30×40
        pixels = np.where(labels[..., None] == 3, (200, 40, 40), (40, 40, 200)) + mix.integers(0, 30, (30, 40, 3))
        labels[:, :2] = 255
        for path, array in ((tmp_path / f"data/{name}.jpg", pixels), (tmp_path / f"masks/{name}.png", labels)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(path)
    data = "--dataset", "folder", "--data-folder", tmp_path / "data", "--size", 32
    masks = "--masks", str(tmp_path / "masks"), "--ignore", "255"
    return [*save_model(tmp_path, *data, "--num-parts", 2), *masks, "--workers", "0"]


def test_label_maps_are_scored_beside_rivals(scenes, capsys):
    content = score.main(scenes)
    scores = {name: found["mask"] for name, found in content["scores"].items()}
    words = "2 labels, ignored: 255; scored: cells with at least 12 of 16 pixels of one label"
    assert words in capsys.readouterr().out
    assert scores["k-means raw"]["nmi"] > 0.95 and scores["k-means raw"]["miou_matched"] > 0.95
    assert scores["ceiling"]["nmi"] == pytest.approx(1) and 0.5 < scores["ceiling"]["pixel_ari"] < 1
    assert abs(scores["shuffled labels"]["nmi"]) < 0.05 and "fg_nmi" not in scores["PatchVAE"]
    assert score.main(scenes) == content != score.main([*scenes, "--seed", "2"])


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
@pytest.mark.parametrize("shape", [(30, 44), (44, 30), (16, 16)])
def test_label_maps_are_cut_as_images_are(tmp_path, shape, mode):
    image = Image.fromarray(np.tensordot([2, 3], np.indices(shape), 1).astype(np.uint8))
    image.save(tmp_path / "a.b.bmp")
    image.convert(mode).save(tmp_path / "a.b.png")
    source = Files(tmp_path, ["a.b.bmp"])
    found = score.read_mask(options.Settings(masks=tmp_path, data_folder=tmp_path, size=16), source, 0)
    pixels, _ = batches.Pixels(source, 16).__getitems__([0])
    assert np.abs(found - pixels[0, 0].astype(int)).max() <= 5  # a pixel of the original at most


def test_bad_input_is_one_line(finished, scenes, tmp_path, line_of_error):
    mask, grey = tmp_path / "masks/test/5.png", Image.open(tmp_path / "masks/test/7.png").copy()
    digits, none = (["--pretrained", str(path)] for path in (finished[0] / "model.pt", "none.pt"))
    drawn = save_model(tmp_path / "drawn", "--dataset", "shapes")
    vae = save_model(tmp_path / "vae", "--dataset", "shapes", "--arch", "vae")
    for command, spoil, expected, *words in (
        (scenes, lambda: grey.convert("RGB").save(mask), 1, str(mask), "mode RGB"),
        (scenes, lambda: grey.resize((20, 15)).save(mask), 1, str(mask), "20x15 pixels, its image 40x30"),
        (scenes, lambda: mask.write_bytes(b"no picture"), 1, str(mask), "cannot be decoded"),
        (scenes, mask.unlink, 1, str(mask), "5.jpg; --masks mirrors"),
        ([*scenes, "--ignore", "3", "255"], lambda: grey.save(mask), 1, "fewer than two labels", "--ignore"),
        (digits, list, 2, "--dataset digits", "binshapes"),
        ([*digits, "--train-images", "0"], list, 2, "--train-images"),
        ([*drawn, "--masks", "masks"], list, 2, "--masks", "--dataset folder"),
        ([*drawn, "--ignore", "3"], list, 2, "--ignore"),
        (vae, list, 1, "vae", "--arch patchy"),
        (none, list, 1, "none.pt"),
    ):
        spoil()
        status, line = line_of_error(score.main, command)
        assert status == expected and all(word in line for word in words)
