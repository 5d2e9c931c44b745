"""utils/parts.py finds what a look at all maps at once would find, and draws it for every kind of model and data."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import paint
from PIL import Image, ImageFont
from sklearn.decomposition import PCA
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import modules
from utils import checkpoints, parts, survey, tables

FILES = ["illustration.png", "logs_parts", "parts.json", "parts.png", "swap.png", "traversal.png"]
QUICK = ["--workers", "0", "--ablation-images", "20"]
SMALL = {"encoder_arch": "pyramid", "ngf": 8}  # one of the options of a model that encodes quickly


@pytest.fixture(scope="module")
def make(finished, tmp_path_factory):
    """A function that saves a model of random weights, once `change(model)` is done, and returns its path."""
    content = checkpoints.load(finished[0] / "model.pt", checkpoints.MODEL)

    def make(change=lambda model: None, training=None, **described):
        described = {**content["options"], **SMALL, **described}
        torch.manual_seed(0)
        model = modules.build_model(described)
        if described["arch"] == "patchy":
            for head in (model.occurrence.convolution, model.appearance.mean):
                head.weight.data *= 20  # so that every part varies
        change(model)
        path = tmp_path_factory.mktemp("model") / "model.pt"
        args = {**content["args"], **(training or {})}
        checkpoints.save(path, {**content, "options": described, "args": args, "model": model.state_dict()})
        return path

    return make


def look(model, *more):
    """What main returns, and the folder that it wrote: parts/ beside the model."""
    return parts.main(["--pretrained", str(model), *QUICK, *map(str, more)]), model.parent / "parts"


def facts(model, *more):
    """What main returns, without drawing."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write", "draw_parts", "draw_illustration", "draw_swap", "draw_traversal"):
            patch.setattr(parts, name, lambda *arguments: None)
        return look(model, *more)[0]


@torch.no_grad()
def random_posterior(images=60, number=5, side=4, steps=None):
    """A Posterior of random numbers; `steps`: so few different probabilities that many are equal."""
    generator = torch.Generator().manual_seed(1)
    occurrence = torch.rand(images, number, side, side, generator=generator)
    occurrence = occurrence if steps is None else (occurrence * steps).floor() / steps
    mean = torch.randn(images, number, 3, generator=generator) * torch.tensor([1.0, 3.0, 2.0])
    return modules.Posterior(mean, mean, occurrence.logit(), occurrence)


def figures_of(posterior, batch, kept=7):
    statistics = survey.Statistics(kept)
    for start in range(0, len(posterior.mean), batch):
        some = modules.Posterior(*(values[start : start + batch] for values in posterior))
        statistics.add(some, some.occurrence)
    return statistics.read()


# ------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize("steps", [None, 20], ids=["all different", "many equal"])
@pytest.mark.parametrize("batch", [7, 100])
def test_the_surest_places_are_those_of_a_sort_of_all_maps(batch, steps):
    posterior = random_posterior(steps=steps)
    figures = figures_of(posterior, batch)
    for part, maps in enumerate(posterior.occurrence.flatten(2).transpose(0, 1).numpy()):  # images×cells
        best = maps.max(axis=1)
        expected = sorted(range(len(best)), key=lambda image: (-best[image], image))[:7]
        found = figures["top_images"][part]
        assert found.tolist() == expected and len(set(found)) == 7
        assert np.array_equal(figures["top"][part], best[expected])
        assert np.array_equal(maps[found, figures["top_cells"][part]], best[expected])


@pytest.mark.parametrize("batch", [7, 100])
def test_running_sums_give_the_figures_of_all_maps(batch):
    posterior = random_posterior()
    posterior.occurrence[:, 2] = 0.9 * posterior.occurrence[:, 1] + 0.1 * posterior.occurrence[:, 3]
    figures, maps = figures_of(posterior, batch), posterior.occurrence.numpy().astype(np.float64)
    by_part = maps.swapaxes(0, 1).reshape(5, -1)
    assert figures["correlation"] == pytest.approx(np.corrcoef(by_part), abs=1e-9)
    assert figures["rate"] == pytest.approx(by_part.mean(1))
    assert figures["mean_best"] == pytest.approx(maps.max(axis=(2, 3)).mean(0))
    assert figures["strongest"] == pytest.approx(np.bincount(by_part.argmax(0), minlength=5) / by_part.shape[1])
    latents = np.concatenate([posterior.mean.numpy(), maps.reshape(60, 5, 16)], axis=2)
    assert figures["variance"] == pytest.approx(latents.var(axis=0).max(axis=1)) and (figures["variance"] > 0.5).all()


def test_directions_are_the_principal_components_of_the_appearance():
    posterior = random_posterior()
    figures = figures_of(posterior, 7)
    for part in range(5):
        pca = PCA().fit(posterior.mean[:, part].numpy().astype(np.float64))
        assert figures["deviations"][part] ** 2 * 60 / 59 == pytest.approx(pca.explained_variance_)
        overlap = np.abs(figures["directions"][part] @ pca.components_.T)
        assert overlap == pytest.approx(np.eye(3), abs=1e-5)


def test_a_constant_part_correlates_with_none():
    posterior = random_posterior()
    posterior.occurrence[:, 2] = 0.3
    found = figures_of(posterior, 7)["correlation"]
    assert np.isfinite(found).all() and not found[2].any()


@pytest.mark.parametrize(
    "name, scale, side",
    [("pyramid", 2, 16), ("pyramid", 4, 32), ("pyramid", 8, 64), ("resnet", 4, 64), ("resnet", 8, 128),
     ("alexnet", 32, 448)],
)  # fmt: skip
def test_receptive_field_is_where_gradients_come_from(name, scale, side):
    torch.manual_seed(0)
    encoder = modules.build_encoder(name, 1, scale, ngf=16)[0].eval()
    cell = side // scale // 2
    x = torch.rand(4, 1, side, side, requires_grad=True)
    gradient = torch.autograd.grad(encoder(x)[:, :, cell, cell - 1].sum(), x)[0].abs().sum((0, 1))
    for axis in (0, 1):
        pixels = torch.nonzero(gradient.sum(axis)).flatten()
        assert 0 < pixels[0] and pixels[-1] < side - 1, "the test's image is too small"
        assert pixels[-1] - pixels[0] + 1 == survey.receptive_field(encoder)


def test_patches_are_as_large_as_the_help_says(make):
    for described, size in (({"scale": 8}, 22), ({"encoder_arch": "resnet", "scale": 4}, 12),
                            ({"encoder_arch": "resnet", "scale": 8}, 16), ({"scale": 32}, 32)):  # fmt: skip
        assert facts(make(**described), "--images", 2)["patch_size"] == size
    assert facts(make(), "--images", 2, "--patch-size", 5)["patch_size"] == 5


def test_switching_off_costs_what_two_decodings_differ_by(make):
    model = modules.build_model(checkpoints.load(make(), checkpoints.MODEL)["options"]).eval()
    x = torch.rand(10, 1, 32, 32)
    error, rises = survey.contributions(model, x, x, batch_size=4)
    with torch.no_grad():
        posterior = model.encode(x)
        without = posterior.occurrence.clone()
        without[:, 3] = 0
        errors = [
            (model.decoder(modules.place_parts(posterior.mean, occurrence)) - x).square().sum() / 10
            for occurrence in (posterior.occurrence, without)
        ]
    assert error == pytest.approx(float(errors[0]), rel=1e-5)
    assert rises[3] == pytest.approx(float(errors[1] - errors[0]), rel=1e-2)


def silence(part):
    def change(model):
        model.occurrence.convolution.bias.data[part] = -1e4

    return change


def freeze(part):
    def change(model):
        size = model.appearance_size
        for layer, rows in (
            (model.occurrence.convolution, slice(part, part + 1)),
            (model.appearance.mean, slice(part * size, (part + 1) * size)),
        ):
            layer.weight.data[rows] = 0

    return change


@pytest.mark.parametrize("hard", [False, True])
def test_a_part_that_never_occurs_is_dead_and_costs_nothing(make, hard):
    found = facts(make(silence(3), hard=hard))
    part = found["parts"][3]
    assert (part["dead"], part["error_rise_when_off"], part["rate"]) == ("never occurs", 0.0, 0.0)
    assert all(other["error_rise_when_off"] != 0 for other in found["parts"] if other["dead"] is None)


def test_a_hard_part_below_one_half_never_occurs(make):
    def change(model):
        model.occurrence.convolution.weight.data[3] = 0
        model.occurrence.convolution.bias.data[3] = -0.1  # probability 0.48

    assert facts(make(change, hard=True))["parts"][3]["dead"] == "never occurs"
    assert facts(make(change))["parts"][3]["dead"] is None  # its appearance varies


def test_a_part_that_says_the_same_of_every_image_is_dead(make):
    found = facts(make(freeze(3)))
    assert found["parts"][3]["dead"] == "does not vary" and found["parts"][3]["rate"] > 0.1
    assert [part["part"] for part in found["parts"] if part["dead"]] == [3]


def test_a_copied_part_is_a_duplicate(make):
    def change(model):
        head = model.occurrence.convolution
        head.weight.data[5], head.bias.data[5] = head.weight[0], head.bias[0] + 0.01

    found = facts(make(change))
    for one, other in ((0, 5), (5, 0)):
        nearest = found["parts"][one]["near_duplicates"][0]
        assert nearest["part"] == other and nearest["correlation"] > 0.999
    listed = {(part["part"], near["part"]) for part in found["parts"] for near in part["near_duplicates"]}
    assert listed == {(other, one) for one, other in listed} and len(listed) < 16 * 15


def test_the_part_whose_absence_costs_most_is_drawn():
    def part(number, rise, highest=0.9, dead=None):
        return {"part": number, "error_rise_when_off": rise, "confidence": {"highest": highest}, "dead": dead}

    unsure, idle = [part(0, 9.0, 0.4), part(1, 1.0, 0.4)], [part(0, 9.0, dead="does not vary")]
    assert parts.choose_part([*unsure, part(2, 2.0), part(3, 3.0), part(4, 99.0, dead="does not vary")]) == 3
    assert parts.choose_part(unsure) == 0 and parts.choose_part(idle) == 0


@pytest.mark.parametrize("described", [{}, {"hard": True}, {"categorical": True}, {"independent": True, "ngf": 16}])
def test_swap_takes_the_appearance_of_one_part_and_the_places_of_the_other_image(make, described):
    model = modules.build_model(checkpoints.load(make(**described), checkpoints.MODEL)["options"]).eval()
    a, b = torch.rand(2, 3, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(parts.swapped(model, a, a, 2), model(a).reconstruction)
        mine, other = model.encode(a), model.encode(b)
        appearance = torch.cat([mine.mean[:, :2], other.mean[:, 2:3], mine.mean[:, 3:]], dim=1)
        expected = model.decoder(modules.place_parts(appearance, model.occurrence.mode(mine.logits)))
    assert torch.equal(parts.swapped(model, a, b, 2), expected)
    assert not torch.equal(expected, model(a).reconstruction)


def test_traversal_passes_through_the_image_as_it_is(make):
    model = modules.build_model(checkpoints.load(make(), checkpoints.MODEL)["options"]).eval()
    x = torch.rand(1, 1, 32, 32)
    found = parts.moved(model, x, 2, np.ones(model.appearance_size))
    middle = parts.STEPS.index(0)
    torch.testing.assert_close(found[middle : middle + 1], model(x).reconstruction)
    assert all(not torch.allclose(found[middle], found[step]) for step in range(len(found)) if step != middle)


def test_figures_do_not_depend_on_the_batch_size(make):
    model = make()
    one, other = (facts(model, "--batch-size", size) for size in (7, 400))
    for a, b in zip(one["parts"], other["parts"]):
        assert a["classes_of_top_places"] == b["classes_of_top_places"]
        assert a["rate"] == pytest.approx(b["rate"], rel=1e-5)
        assert a["error_rise_when_off"] == pytest.approx(b["error_rise_when_off"], rel=1e-3, abs=1e-2)


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def looked(finished, tmp_path_factory):
    """What main returns for a copy of the finished run, its parts/ folder, and the run's files before."""
    place = shutil.copytree(finished[0], tmp_path_factory.mktemp("looked") / "scratch")
    before = contents(place)
    found, folder = look(place / "model.pt")
    return found, folder, before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "parts" not in path.parts}


def test_all_files_are_beside_the_model_and_the_run_is_untouched(looked):
    found, folder, before = looked
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == FILES
    assert contents(folder.parent) == before
    assert json.loads((folder / "parts.json").read_text()) == found


def test_json_has_the_figures_of_every_part(looked):
    found = looked[0]
    assert (found["images"], found["dataset"], found["split"]) == (360, "digits", "test")
    assert [part["part"] for part in found["parts"]] == list(range(16))
    for part in found["parts"]:
        assert sum(part["classes_of_top_places"].values()) == 12
        assert set(part["classes_of_top_places"]) <= set("0123456789")
        assert 0 < part["rate"] <= part["confidence"]["mean"] <= part["confidence"]["highest"] < 1
    assert sum(part["strongest_share"] for part in found["parts"]) == pytest.approx(1)


def test_pictures_have_a_row_for_each_part_and_a_column_for_each_patch(looked, tmp_path):
    folder = looked[1]
    look(folder.parent / "model.pt", "--patches", 20, "--output-folder", tmp_path)
    picture, wide = (Image.open(place / "parts.png") for place in (folder, tmp_path))
    assert wide.width - picture.width == 8 * 82 and wide.height == picture.height > 16 * 80
    assert Image.open(folder / "traversal.png").height > 16 * 66
    swap, illustration = (Image.open(folder / f"{name}.png") for name in ("swap", "illustration"))
    assert swap.width > 8 * 98 < illustration.width and swap.height > 6 * 98 and illustration.height > 4 * 98
    for picture in (picture, wide, swap, illustration):
        assert len(np.unique(np.asarray(picture))) > 20


def test_tensorboard_has_the_same_pictures_and_only_those_of_the_last_call(looked):
    look(looked[1].parent / "model.pt")
    assert len(list((looked[1] / "logs_parts").iterdir())) == 1
    board = EventAccumulator(str(looked[1] / "logs_parts"))
    board.Reload()
    assert sorted(board.Tags()["images"]) == ["illustration", "parts", "swap", "traversal"]
    shown = board.Images("parts")[0]
    assert (shown.width, shown.height) == Image.open(looked[1] / "parts.png").size


def test_again_gives_the_same_files_and_spares_those_of_others(make):
    model = make()
    folder = look(model)[1]
    (folder / "notes.txt").write_text("mine")
    before = {name: (folder / name).read_bytes() for name in FILES if name != "logs_parts"}
    look(model)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert (folder / "notes.txt").read_text() == "mine"


def test_the_runs_own_folder_will_do(make, capsys):
    model = make()
    weights = model.read_bytes()
    look(model, "--output-folder", model.parent, "--part", 9)
    assert model.read_bytes() == weights and set(FILES) < {path.name for path in model.parent.iterdir()}
    assert "part 9 is drawn" in capsys.readouterr().out


SHAPES = {"dataset": "shapes"}


@pytest.mark.parametrize(
    "training, described",
    [
        ({}, {"categorical": True}), ({}, {"hard": True}), ({}, {"hard": True, "categorical": True}),
        ({}, {"independent": True, "ngf": 16}), ({}, {"num_parts": 1, "hidden_size": 1}), (SHAPES, {"channels": 3}),
        (SHAPES, {"channels": 3, "encoder_arch": "resnet18", "scale": 32, "inet": True}),
    ],
    ids=["categorical", "hard", "hard categorical", "independent", "one part of size 1", "colour", "one cell"],
)  # fmt: skip
def test_every_kind_of_model(make, training, described):
    channels = described.get("channels", 1)
    model = make(training=training, **described, mean=[0.5] * channels, std=[0.5] * channels)
    found, folder = look(model, "--images", 40)
    assert sorted(path.name for path in folder.iterdir() if path.name != ".lock") == FILES
    assert len(found["parts"]) == described.get("num_parts", 16) and found["images"] == 40
    rates = [part["rate"] for part in found["parts"]]
    assert not described.get("categorical") or sum(rates) == pytest.approx(1, rel=1e-4)


def test_more_parts_than_fit_are_left_out_and_counted(make, monkeypatch):
    drawn = {}
    monkeypatch.setattr(parts, "write", lambda folder, findings, pictures: drawn.update(pictures))
    drawn_tables = []
    monkeypatch.setattr(tables, "table", lambda rows, heading=(), *rest: drawn_tables.append((rows, " ".join(heading))))
    found, _ = look(make(num_parts=70, hidden_size=2), "--images", 30, "--patches", 2)
    (rows, heading), (moved, words) = drawn_tables[0], drawn_tables[-1]
    assert len(found["parts"]) == 70 and len(rows) == len(moved) == 64
    assert "the 64 of 70 parts" in heading and "the 64 of 70 parts" in words
    costs = [part["error_rise_when_off"] for part in found["parts"]]
    left_out = set(range(70)) - {int(row.label[0].split()[1]) for row in rows}
    assert max(costs[part] for part in left_out) <= sorted(costs)[6]


def test_images_without_classes_and_fewer_than_patches(make, tmp_path):
    for number in range(23):  # of which two are held out
        paint(tmp_path / "images" / f"{number}.png", seed=number)
    training = {"dataset": "folder", "data_folder": str(tmp_path / "images")}
    colour = {"channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    found, folder = look(make(training=training, **colour))
    assert found["images"] == 2 and found["parts"][0]["classes_of_top_places"] == {}
    assert {path.name for path in folder.iterdir()} >= set(FILES)
    assert look(make(training=training, **colour), "--images", 1)[0]["images"] == 1
    assert facts(make(training=training, **colour), "--split", "unlabelled")["images"] == 21


# ------------------------------------------------------------------------------------------------ drawing


def test_cut_keeps_the_centre_in_the_middle_and_pads_with_grey():
    image = np.zeros((8, 8, 3), np.uint8)
    image[2, 5] = 255
    patch = tables.cut(image, (2, 5), 7)
    assert patch.shape == (7, 7, 3) and (patch[3, 3] == 255).all()
    assert (patch[0] == tables.NEUTRAL).all() and (patch[:, 6] == tables.NEUTRAL).all()  # above and right of the image
    assert patch[1:, :6].sum() == 3 * 255
    assert np.array_equal(tables.cut(image, (3.5, 3.5), 8), image)
    assert (tables.cut(image, (-9, 30), 4) == tables.NEUTRAL).all()


def test_view_shows_the_images_that_were_watched(make, monkeypatch):
    seen = []
    monkeypatch.setattr(parts, "draw_parts", lambda view, ranks, words: seen.append(view))
    monkeypatch.setattr(parts, "write", lambda *arguments: None)
    look(make())
    view, everything = seen[0], seen[0].batches.examples(360)
    with torch.no_grad():
        best, cells = view.model.encode(everything).occurrence[:, 4].flatten(1).max(dim=1)
    ranks = slice(2, 6)
    numbers = best.argsort(descending=True, stable=True)[ranks]
    torch.testing.assert_close(view.images(4, ranks), everything[numbers])
    row, column = divmod(int(cells[numbers[0]]), 4)
    expected = tables.cut(view.rgb(everything[numbers[:1]])[0], (8 * row + 3.5, 8 * column + 3.5), 22)
    assert np.array_equal(view.around(4, ranks)[0], expected)
    label = view.batches.source.labels[int(numbers[0])]
    assert view.captions(4, ranks)[0] == f"{best[numbers[0]]:.2f} {label}"


def test_framed_draws_around_what_is_cut():
    image = np.full((32, 32, 3), 90, np.uint8)
    framed = tables.framed(image, (15.5, 15.5), 8, smallest=64)  # pixels 12 to 19, drawn twice as large
    changed = np.flatnonzero((framed != 90).any(axis=(1, 2)))
    assert framed.shape == (64, 64, 3) and (changed[0], changed[-1]) == (23, 40)
    assert (framed[27:37, 27:37] == 90).all()


def test_a_frame_around_less_than_a_pixel_is_still_one():
    image = np.full((224, 224, 3), 90, np.uint8)
    assert 0 < (tables.framed(image, (100, 100), 1) != 90).any(axis=2).sum() <= 25


def test_table_places_every_tile_where_its_row_and_column_are():
    tiles = [np.full((16, 16, 3), value, np.uint8) for value in (10, 20, 30)]
    rows = [tables.Row([], tiles[:1]), tables.Row([], [tiles[1], None, tiles[2]])]
    sheet = np.asarray(tables.table(rows, smallest=64))
    for value in (10, 20, 30):
        assert (sheet == value).all(axis=2).sum() == 64 * 64
    columns = [np.flatnonzero((sheet == value).all(axis=(2)).any(axis=0))[0] for value in (10, 20, 30)]
    assert columns[0] == columns[1] and columns[2] == columns[1] + 66 + tables.BREAK


def test_large_images_are_shrunk_and_long_words_cut():
    tile = np.zeros((224, 224, 3), np.uint8)
    assert tables.table([tables.Row([], [tile])]).height < 140
    font = ImageFont.load_default(size=11)
    short = tables.shortened("a class with a very long name", 64, font)
    assert "a class with a very long name".startswith(short) and 50 < font.getlength(short) <= 64


# ------------------------------------------------------------------------------------------------ bad input

BAD_INPUT = [
    ("--pretrained {vae}", 1, ["beta-VAE", "no parts"]),
    ("--pretrained {model} --part 16", 2, ["--part 16", "0 to 15"]),
    ("--pretrained {model} --part -1", 2, ["--part", "0 or more"]),
    ("--pretrained {model} --patch-size 33", 2, ["--patch-size 33", "32 pixels"]),
    ("--pretrained {model} --patches 0", 2, ["--patches", "1 or more"]),
    ("--pretrained {model} --images none", 2, ["--images", "'none'"]),
    ("--pretrained {model} --split val", 2, ["--split", "unlabelled"]),
    ("--pretrained {model} --output-folder {model}", 2, ["--output-folder", "is a file"]),
    ("--pretrained {model} --num-parts 3", 2, ["--num-parts"]),
    ("--pretrained {model} --dataset shapes", 1, ["channels"]),
    ("--pretrained {model} --size 64", 2, ["--size 64"]),
    ("--pretrained {model}.none", 1, ["no such file"]),
    ("--pretrained {model} --dataset folder --data-folder {model}.none", 1, ["channels"]),
    ("", 2, ["--pretrained"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def bad(make):
    return {"model": make(), "vae": make(lambda model: None, arch="vae")}


@pytest.mark.parametrize("options, status, words", BAD_INPUT, ids=[row[0] for row in BAD_INPUT])
def test_bad_input_is_one_line(options, status, words, bad, line_of_error):
    found, line = line_of_error(parts.main, options.format(**bad).split())
    assert found == status
    assert all(word in line for word in words), line
    assert not (bad["model"].parent / "parts").exists()


def test_help_advises_on_every_option():
    assert all(action.help for action in parts.build_parser()._actions)
