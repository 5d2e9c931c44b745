"""utils/parts.py finds what a look at all maps at once would find, and shows it for every kind of model and data."""

import base64
import csv
import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import paint
from PIL import Image
from sklearn.decomposition import PCA
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import modules
from utils import batches, parts, training
from utils.figures import GAP

FILES = sorted([*parts.CONTENTS, "logs_parts"])
QUICK = ["--workers", "0", "--shown", "3"]
SMALL = {"encoder_arch": "pyramid", "ngf": 8}  # options of a model that encodes quickly
COLOUR = {"channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(autouse=True, scope="module")
def few_images_are_decoded():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "DECODED", 0)
        yield


@pytest.fixture(scope="module")
def make(finished, tmp_path_factory):
    """A function that saves a model of random weights, once `change(model)` is done, and returns its path."""
    content = training.load(finished[0] / "model.pt", training.MODEL)

    def make(change=lambda model: None, trained_on=None, **described):
        described = {**content["options"], **SMALL, **described}
        torch.manual_seed(0)
        model = modules.build_model(described)
        if described["arch"] == "patchy":
            for head in (model.occurrence.convolution, model.appearance.mean):
                head.weight.data *= 20  # so that every part varies
        change(model)
        path = tmp_path_factory.mktemp("model") / "model.pt"
        args = {**content["args"], **(trained_on or {})}
        training.save(path, {**content, "options": described, "args": args, "model": model.state_dict()})
        return path

    return make


def look(model, *more):
    """What main returns, and the folder that it wrote: parts/ beside the model."""
    return parts.main(["--pretrained", str(model), *QUICK, *map(str, more)]), model.parent / "parts"


def facts(model, *more):
    """What main returns, without drawing."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write", "draw_parts", "draw_illustration", "draw_swap", "draw_traversal", "draw_page"):
            patch.setattr(parts, name, lambda *arguments: None)
        return look(model, *more)[0]


def by_cost(found):
    """The numbers of the parts, those first whose absence costs most."""
    return [part["part"] for part in sorted(found["parts"], key=lambda part: -part["error_rise_when_off"])]


def flat(value, side=16):
    return np.full((side, side, 3), value, np.uint8)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# ------------------------------------------------------------------------------------------------ looking


@pytest.mark.parametrize("steps", [None, 20], ids=["all different", "many equal"])
@pytest.mark.parametrize("batch", [7, 100])
def test_statistics_are_those_of_all_maps_at_once(batch, steps):
    generator = torch.Generator().manual_seed(1)
    occurrence = torch.rand(60, 5, 4, 4, generator=generator)
    if steps is None:
        occurrence[:, 2] = 0.9 * occurrence[:, 1] + 0.1 * occurrence[:, 3]
    else:
        occurrence = (occurrence * steps).floor() / steps
    occurrence[:, 4] = 0.3
    mean = torch.randn(60, 5, 3, generator=generator) * torch.tensor([1.0, 3.0, 2.0])
    model = SimpleNamespace(  # encodes the number of an image
        encode=lambda some: modules.Posterior(mean[some], mean[some], occurrence[some].logit(), occurrence[some]),
        occurrence=SimpleNamespace(categorical=False, mode=torch.sigmoid))
    found = parts.survey(model, [(some, None) for some in torch.arange(60).split(batch)])
    maps = occurrence.numpy().astype(np.float64)
    by_part, odds = maps.swapaxes(0, 1).reshape(5, -1), occurrence.logit().flatten(2).numpy()  # B×N×cells
    for part in range(5):
        best = odds[:, part].max(axis=1)
        assert found["order"][part].tolist() == sorted(range(60), key=lambda image: (-best[image], image))[:58]
        assert np.array_equal(odds[np.arange(60), part, found["cell"][:, part]], best)
    if steps is None:
        expected = np.corrcoef(by_part[:4])
        assert found["correlation"][:4, :4] == pytest.approx(expected, abs=1e-9)
        assert not found["correlation"][4].any()  # a constant part correlates with none
    assert found["rate"] == pytest.approx(by_part.mean(1))
    assert found["strongest_share"] == pytest.approx(np.bincount(by_part.argmax(0), minlength=5) / by_part.shape[1])
    latents = np.concatenate([mean.numpy(), maps.reshape(60, 5, 16)], axis=2)
    assert found["variance"] == pytest.approx(latents.var(axis=0).max(axis=1))
    for part in range(5):
        pca = PCA().fit(mean[:, part].numpy().astype(np.float64))
        assert found["deviations"][part] ** 2 * 60 / 59 == pytest.approx(pca.explained_variance_)
        assert np.abs(found["directions"][part] @ pca.components_.T) == pytest.approx(np.eye(3), abs=1e-5)


def test_log_odds_rank_what_rounds_to_probability_one():
    logits = torch.tensor([30.0, 50.0, 40.0, -200.0])
    assert (logits.sigmoid()[:3] == 1).all() and torch.equal(parts.log_odds(logits, categorical=False), logits)
    logits = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(parts.log_odds(logits, categorical=True), logits.softmax(dim=1).logit())
    found = parts.log_odds(100 * logits.float(), categorical=True).flatten(2)
    assert found.isfinite().all() and len(found.unique()) == 48
    assert parts.log_odds(logits[:, :1], categorical=True).gt(9e8).all()  # a single part is everywhere


def test_places_are_ranked_by_log_odds_and_show_the_probability(make):
    def change(model):
        model.occurrence.convolution.weight.data *= 100  # all that is sure rounds to 1.00

    places = facts(model := make(change))["parts"][4]["places"]
    source = parts.open_split("digits", "data", "test", 32)
    x = batches.Batches(source, batches.Form(32, [0.5], [0.5]), torch.device("cpu")).examples(360)
    with torch.no_grad():
        best, cells = training.load_model(model)[0].encode(x).logits[:, 4].flatten(1).max(dim=1)
    expected = best.argsort(descending=True, stable=True)[:12].tolist()
    assert [place["image"] for place in places] == expected
    assert [4 * place["cell"][0] + place["cell"][1] for place in places] == cells[expected].tolist()
    assert [place["probability"] for place in places] == pytest.approx([1.0] * 12)
    assert [place["class"] for place in places] == [str(source.labels[number]) for number in expected]


@pytest.mark.parametrize("name, scale, side", [("pyramid", 2, 16), ("pyramid", 4, 32), ("pyramid", 8, 64),
                                               ("resnet", 4, 64), ("resnet", 8, 128), ("alexnet", 32, 448)])
def test_receptive_field_is_where_gradients_come_from(name, scale, side):
    torch.manual_seed(0)
    encoder = modules.build_encoder(name, 1, scale, ngf=16)[0].eval()
    cell = side // scale // 2
    x = torch.rand(4, 1, side, side, requires_grad=True)
    gradient = torch.autograd.grad(encoder(x)[:, :, cell, cell - 1].sum(), x)[0].abs().sum((0, 1))
    for axis in (0, 1):
        pixels = torch.nonzero(gradient.sum(axis)).flatten()
        assert 0 < pixels[0] and pixels[-1] < side - 1, "the test's image is too small"
        assert pixels[-1] - pixels[0] + 1 == parts.receptive_field(encoder)


def test_switching_off_costs_what_two_decodings_differ_by(make):
    model, x = training.load_model(make())[0], torch.rand(10, 1, 32, 32)
    error, rises = parts.contributions(model, x, x, batch_size=4)
    with torch.no_grad():
        posterior = model.encode(x)
        without = posterior.occurrence.clone()
        without[:, 3] = 0
        both = [model.decoder(modules.place_parts(posterior.mean, maps)) for maps in (posterior.occurrence, without)]
        errors = [float((copy - x).square().sum() / 10) for copy in both]
    assert (error, rises[3]) == (pytest.approx(errors[0], rel=1e-5), pytest.approx(errors[1] - errors[0], rel=1e-2))


# ------------------------------------------------------------------------------------------------ findings


def part_three(bias=None, scale=1.0):
    """A change of a model: the occurrence of part 3 gets this bias, and weights times `scale`."""
    def change(model):
        head = model.occurrence.convolution
        head.weight.data[3] *= scale
        head.bias.data[3] = bias or 0
        if not scale and bias is None:  # says the same of every image
            model.appearance.mean.weight.data[3 * model.appearance_size : 4 * model.appearance_size] = 0

    return change


@pytest.mark.parametrize("change, described, dead", [
    (part_three(-1e4), {}, "never occurs"), (part_three(-1e4), {"hard": True}, "never occurs"),
    (part_three(-0.1, 0), {"hard": True}, "never occurs"),  # probability 0.48
    (part_three(-0.1, 0), {}, None), (part_three(None, 0), {}, "does not vary"),
])
def test_dead_parts_are_told(make, change, described, dead):
    found = facts(make(change, **described))["parts"]
    assert found[3]["dead"] == dead
    if dead == "never occurs":
        assert found[3]["error_rise_when_off"] == 0 and not found[3]["near_duplicates"]
    assert all(part["error_rise_when_off"] != 0 for part in found if part["dead"] is None)
    assert parts.remarks(found[3])[:1] == [f"not in use: {dead}"] or dead is None


@pytest.mark.parametrize("scale, bias, correlates", [(1, 0.01, True), (3, -25, False)])
def test_duplicates_are_found_by_their_places_even_if_their_maps_do_not_correlate(make, scale, bias, correlates):
    def change(model):  # part 5 is at the same places, and, in the second case, at the surest of them only
        head = model.occurrence.convolution
        head.weight.data[5], head.bias.data[5] = scale * head.weight[0], scale * head.bias[0] + bias

    found = facts(make(change))["parts"]
    for one, other in ((0, 5), (5, 0)):
        nearest = found[one]["near_duplicates"][0]
        assert nearest["part"] == other and nearest["shared_places"] == 1
        assert (nearest["correlation"] > parts.CORRELATED) == correlates
    listed = {(part["part"], near["part"]) for part in found for near in part["near_duplicates"]}
    assert listed == {(other, one) for one, other in listed} and len(listed) < 16
    assert parts.remarks(found[5])[0] == "like part 0"


def test_places_that_one_part_alone_shares_make_no_duplicate():
    found = {"shared": np.array([[1, 1, 0.6], [0.1, 1, 0], [0.5, 0, 1]]), "correlation": np.eye(3),
             "dead": np.array([None] * 3)}
    assert [[near["part"] for near in parts.near_duplicates(found, part)] for part in range(3)] == [[2], [], [0]]
    found["dead"][2] = "never occurs"
    assert not parts.near_duplicates(found, 0) and not parts.near_duplicates(found, 2)


def test_the_part_whose_absence_costs_most_is_drawn():
    def part(number, rise, highest=0.9, dead=None):
        return {"part": number, "error_rise_when_off": rise, "confidence": {"highest": highest}, "dead": dead}

    unsure, idle = [part(0, 9.0, 0.4), part(1, 1.0, 0.4)], [part(0, 9.0, dead="does not vary")]
    assert parts.choose_part([*unsure, part(2, 2.0), part(3, 3.0), part(4, 99.0, dead="does not vary")]) == 3
    assert parts.choose_part(unsure) == 0 and parts.choose_part(idle) == 0


@pytest.mark.parametrize("described", [{}, {"hard": True}, {"categorical": True}, {"independent": True, "ngf": 16}])
def test_swap_and_traversal_change_the_appearance_of_one_part_alone(make, described, monkeypatch):
    model, seen = training.load_model(make(**described))[0], []
    with torch.no_grad():
        mine = model.encode(torch.rand(4, 1, 32, 32))
    before, rest = mine.mean.clone(), [number for number in range(16) if number != 2]
    gallery = parts.Gallery(2, mine, [parts.Place({}, "", *[flat(0)] * 3, "")] * 4)
    vary = torch.eye(model.appearance_size).expand(16, -1, -1).numpy()  # the first latent most
    monkeypatch.setattr(parts, "table", lambda *arguments: None)
    monkeypatch.setattr(parts, "words_for", lambda part: [])
    monkeypatch.setattr(parts, "decoded", lambda *found: seen.append(found[-1]) or np.zeros((2, 16, 16, 3), np.uint8))
    parts.draw_swap(model, None, gallery, vary[2, 0])
    parts.draw_traversal(model, None, {"deviations": np.ones((16, 2)), "directions": vary}, [({}, gallery)])
    (a, b), order = (seen[0], seen[1]), mine.mean[:, 2, 0].argsort()
    assert torch.equal(a.mean, mine.mean[order[:2]]) and torch.equal(b.mean[:, 2], mine.mean[order[2:], 2])
    assert torch.equal(b.mean[:, rest], a.mean[:, rest]) and torch.equal(b.logits, mine.logits[order[:2]])
    for latent, moved in enumerate(seen[2:]):
        assert torch.equal(moved.mean[parts.STEPS.index(0)], mine.mean[0])
        torch.testing.assert_close(moved.mean[:, 2, latent] - mine.mean[0, 2, latent], torch.tensor(parts.STEPS))
        assert torch.equal(moved.mean[:, rest], mine.mean[:1, rest].expand(5, -1, -1)) and len(moved.logits) == 5
    assert torch.equal(mine.mean, before) and len(seen) == 4


def test_figures_do_not_depend_on_the_batch_size(make):
    model = make()
    one, other = (facts(model, "--batch-size", size) for size in (7, 400))
    for a, b in zip(one["parts"], other["parts"]):
        assert a["classes_of_top_places"] == b["classes_of_top_places"]
        assert a["rate"] == pytest.approx(b["rate"], rel=1e-5)
        assert a["error_rise_when_off"] == pytest.approx(b["error_rise_when_off"], rel=1e-3, abs=1e-2)


# ------------------------------------------------------------------------------------------------ places


@pytest.mark.parametrize("image_size", [(64, 64), (200, 150), (90, 301), (20, 20), (1000, 40), (7, 300)])
def test_boxes_are_where_the_models_pixels_come_from(image_size):
    across, down = (np.linspace(0, 255, side) for side in image_size)
    ramps = [np.broadcast_to(ramp, image_size[::-1]) for ramp in (across, down[:, None], across)]
    photograph = Image.fromarray(np.round(np.stack(ramps, axis=2)).astype(np.uint8))
    pixels = np.asarray(batches.resize_and_crop(photograph, 64)).astype(float)
    for row, column in ((4, 4), (20, 44), (36, 12), (60, 60)):
        seen, box = parts.boxes(image_size, 64, (row, column), 8)
        cut = np.asarray(photograph.crop(box)).astype(float)
        assert cut.shape[0] == cut.shape[1] == max(1, round(8 * min(image_size) / 64))
        assert 0 <= box[0] < box[2] <= image_size[0] and 0 <= box[1] < box[3] <= image_size[1]
        expected = pixels[row - 4 : row + 4, column - 4 : column + 4].mean(axis=(0, 1))
        one = 255 / (np.array([*image_size, image_size[0]]) - 1)  # what a pixel of the photograph differs by
        assert (np.abs(cut.mean(axis=(0, 1)) - expected) <= one + 0.5).all()
    assert np.abs(np.asarray(photograph.crop(seen).resize((64, 64), 2)).astype(float) - pixels).mean() < 3
    corner = parts.boxes(image_size, 64, (0, 0), 16)[1]
    assert min(corner) >= 0 and corner[2] - corner[0] == max(1, round(16 * min(image_size) / 64))  # moved inwards


def test_patches_are_as_large_as_what_the_encoder_sees_or_three_cells(make):
    for described, size in (({"scale": 8}, 22), ({"encoder_arch": "resnet", "scale": 4}, 12),
                            ({"encoder_arch": "resnet", "scale": 8}, 16), ({"scale": 32}, 32)):
        model = training.load_model(make(**described))[0]
        options = dict(arch="patchy", num_parts=16, size=32, scale=described["scale"], part=None)
        settings = parts.options.Settings(**options, output_folder="parts")
        assert parts.complete(settings, model).patch_size == size


@pytest.fixture(scope="module")
def photographs(make, tmp_path_factory):
    """A look at photographs of two classes, of another shape than the model's, with awkward names."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(30):
        paint(folder / ("ant", "<b>ee")[number % 2] / f"{number} & \"co\".jpg", (300, 200), seed=number)
    trained_on = {"dataset": "folder", "data_folder": str(folder)}
    found, place = look(make(trained_on=trained_on, **COLOUR), "--split", "all")
    return found, place, folder


def test_places_name_file_class_and_box_in_the_original(photographs):
    found, place, folder = photographs
    rows = list(csv.reader((place / "parts.csv").open(newline="")))
    assert rows[0] == ["image", "class", *(f"part {number}" for number in range(16))] and len(rows) == 31
    listed = {row[0]: row[2:] for row in rows[1:]}
    for part in found["parts"]:
        assert len(part["places"]) == 12
        for spot in part["places"]:
            assert (folder / spot["file"]).is_file() and spot["file"].split("/")[0] == spot["class"]
            assert spot["of"] == [300, 200] and listed[spot["file"]][part["part"]] == f"{spot['probability']:.4f}"
            left, top, right, bottom = spot["box"]
            assert right - left == bottom - top == round(22 * 200 / 32)
            centre = [50 + (spot["cell"][1] + 0.5) * 50, (spot["cell"][0] + 0.5) * 50]  # cells of 50 pixels
            assert left == np.clip(round(centre[0] - 69), 0, 162) and top == np.clip(round(centre[1] - 69), 0, 62)


def test_the_page_holds_everything_it_shows(photographs):
    found, place, folder = photographs
    page = (place / "parts.html").read_text()
    assert not re.search(r"(src|href|url|import)\s*[=(]\s*[\"']?(https?:|//|file:)", page) and "<b>ee" not in page
    order = [int(number) for number in re.findall(r'<section id="part-(\d+)"', page)]
    assert order == by_cost(found)
    assert page.count("<button") == 16 * 12
    kept = json.loads(re.search(r"const photographs = (\{.*?\}), at", page)[1])
    uris = [*kept.values(), *re.findall(r'src="(data:[^"]+)"', page), *re.findall(r'data-occurs="([^"]+)"', page)]
    sizes = [Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size for uri in uris]
    assert sizes == [(300, 200)] * len(kept) + [(128, 128)] * (2 * 16 * 12)
    first = found["parts"][order[0]]["places"][0]
    assert f'data-photograph="{first["image"]}"' in page and str(first["image"]) in kept
    frame = re.search(r'data-frame="\s*left: ([\d.]+)%; width: ([\d.]+)%;\s*top: ([\d.]+)%', page)
    left, top, right, _ = first["box"]
    assert [float(value) for value in frame.groups()] == pytest.approx([left / 3, (right - left) / 3, top / 2])


# ------------------------------------------------------------------------------------------------ drawing


def test_table_places_every_tile_where_its_row_and_column_are():
    rows = [(["β = 2"], [flat(10)], ["below"]), ([], [flat(20), None, flat(30)], [])]
    sheet = np.asarray(parts.table(rows, ["a heading"], side=64))
    assert all((sheet == value).all(axis=2).sum() == 64 * 64 for value in (10, 20, 30))
    columns = [np.flatnonzero((sheet == value).all(axis=2).any(axis=0))[0] for value in (10, 20, 30)]
    assert columns[0] == columns[1] and columns[2] == columns[1] + 64 + GAP + parts.BREAK
    large = np.asarray(parts.table([([], [flat(255, 224)], ["a class with a very long name, and more"])], []))
    written = np.flatnonzero((large < 255).any(axis=(0, 2))) - 2 * parts.BREAK
    assert written[0] >= 0 and 72 < written[-1] < 96  # the tile is shrunk, the caption cut to its width
    assert len(large) < 140 and large.shape[1] < 200


def test_framed_draws_around_the_box_alone():
    framed = parts.framed(flat(90, 64), (24, 24, 40, 40))
    changed = np.flatnonzero((framed != 90).any(axis=(1, 2)))
    assert (changed[0], changed[-1]) == (23, 40) and (framed[26:38, 26:38] == 90).all()
    assert 0 < (parts.framed(flat(90, 64), (9, 9, 9, 9)) != 90).any(axis=2).sum() <= 12  # less than a pixel


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def looked(finished, tmp_path_factory):
    """What main returns for a copy of the finished run, its parts/ folder, and the run's files before."""
    place = shutil.copytree(finished[0], tmp_path_factory.mktemp("looked") / "scratch")
    before = contents(place)
    found, folder = look(place / "model.pt")
    return found, folder, before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.parent.name != "parts"}


def test_all_files_are_beside_the_model_and_the_run_is_untouched(looked):
    found, folder, before = looked
    assert names_in(folder) == FILES
    assert {path: content for path, content in contents(folder.parent).items() if path in before} == before
    assert json.loads((folder / "parts.json").read_text()) == found
    assert (found["images"], found["dataset"], found["split"]) == (360, "digits", "test")
    assert [part["part"] for part in found["parts"]] == list(range(16))
    for part in found["parts"]:
        assert sum(part["classes_of_top_places"].values()) == 12 and part["places"][0]["file"] is None
        assert set(part["classes_of_top_places"]) <= set("0123456789")
        assert 0 < part["rate"] <= part["confidence"]["mean"] <= part["confidence"]["highest"] < 1
        assert part["error_rise_percent"] == 100 * part["error_rise_when_off"] / found["reconstruction_error"]
    assert sum(part["strongest_share"] for part in found["parts"]) == pytest.approx(1)


def test_again_gives_the_same_files_and_spares_those_of_others(looked, tmp_path):
    folder = looked[1]
    (folder / "notes.txt").write_text("mine")
    before = {name: (folder / name).read_bytes() for name in parts.CONTENTS}
    look(folder.parent / "model.pt")
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert (folder / "notes.txt").read_text() == "mine" and len(list((folder / "logs_parts").iterdir())) == 1
    board = EventAccumulator(str(folder / "logs_parts"))
    board.Reload()
    assert sorted(board.Tags()["images"]) == ["illustration", "parts", "swap", "traversal"]
    shown, picture = board.Images("parts")[0], Image.open(folder / "parts.png")
    assert (shown.width, shown.height) == picture.size and 3 * 110 < picture.height < 4 * 130
    look(folder.parent / "model.pt", "--patches", 20, "--output-folder", tmp_path)
    wide = Image.open(tmp_path / "parts.png")
    assert wide.width - picture.width == 8 * 100 and wide.height == picture.height
    (folder / "notes.txt").unlink()


def test_the_runs_own_folder_will_do(make, capsys):
    model = make()
    weights = model.read_bytes()
    found, _ = look(model, "--output-folder", model.parent, "--part", 9)
    assert model.read_bytes() == weights and set(FILES) < set(names_in(model.parent))
    said = capsys.readouterr().out
    assert f"360 images: {sum(part['sure_share'] > 0 for part in found['parts'])} of 16 parts are sure" in said
    assert "part 9 is in illustration.png and swap.png: without it the reconstruction error rises by " in said
    assert "a patch shows 22 of the 32 pixels across an image; " in said and "the whole image" in said
    assert "parts.html in a browser" in said


SHAPES = {"dataset": "shapes"}


@pytest.mark.parametrize("trained_on, described", [
    ({}, {"categorical": True}), ({}, {"hard": True, "categorical": True}), ({}, {"independent": True, "ngf": 16}),
    ({}, {"num_parts": 1, "hidden_size": 1}), (SHAPES, {**COLOUR, "hard": True}),
    (SHAPES, {**COLOUR, "encoder_arch": "resnet18", "scale": 32, "inet": True}), ({}, {"num_parts": 70}),
])
def test_every_kind_of_model(make, trained_on, described, monkeypatch):
    tables, table = [], parts.table
    monkeypatch.setattr(parts, "table", lambda rows, *rest: tables.append((rows, rest)) or table(rows, *rest))
    found, folder = look(make(trained_on=trained_on, **described), "--images", 40, "--patches", 2, "--part", 0)
    assert names_in(folder) == FILES and found["images"] == 40
    number = described.get("num_parts", 16)
    assert len(found["parts"]) == number and (folder / "parts.html").read_text().count("<section") == number
    rates = [part["rate"] for part in found["parts"]]
    assert not described.get("categorical") or sum(rates) == pytest.approx(1, rel=1e-4)
    for rows, (heading, *_) in (tables[0], tables[-1]):
        assert [words[0] for words, *_ in rows] == [f"part {part}" for part in by_cost(found)[:3]]
        assert f"Shown are {min(3, number)} of {number} parts" in heading[-1]


def test_images_without_classes_and_fewer_than_patches(make, tmp_path):
    for number in range(23):  # of which two are held out
        paint(tmp_path / "images" / f"{number}.png", seed=number)
    trained_on = {"dataset": "folder", "data_folder": str(tmp_path / "images")}
    found, folder = look(make(trained_on=trained_on, **COLOUR))
    assert found["images"] == 2 and found["parts"][0]["classes_of_top_places"] == {} and names_in(folder) == FILES
    assert look(make(trained_on=trained_on, **COLOUR), "--images", 1)[0]["images"] == 1
    assert facts(make(trained_on=trained_on, **COLOUR), "--split", "unlabelled")["images"] == 21


# ------------------------------------------------------------------------------------------------ bad input

BAD_INPUT = [
    ("--pretrained {vae}", 1, ["beta-VAE", "no parts"]),
    ("--pretrained {model} --part 16", 2, ["--part 16", "0 to 15"]),
    ("--pretrained {model} --part -1", 2, ["--part", "0 or more"]),
    ("--pretrained {model} --patches 0", 2, ["--patches", "1 or more"]),
    ("--pretrained {model} --images none", 2, ["--images", "'none'"]),
    ("--pretrained {model} --split val", 2, ["--split", "unlabelled"]),
    ("--pretrained {model} --output-folder {model}", 2, ["--output-folder", "is a file"]),
    ("--pretrained {model} --num-parts 3", 2, ["--num-parts"]),
    ("--pretrained {model} --dataset shapes", 1, ["channels"]),
    ("--pretrained {model} --size 64", 2, ["--size 64"]),
    ("--pretrained {model}.none", 1, ["no such file"]),
    ("--pretrained {model} --dataset folder --data-folder {model}.none", 1, ["channels"]),
    ("--pretrained {nan}", 1, ["no numbers"]),
    ("", 2, ["--pretrained"]),
]


@pytest.fixture(scope="module")
def bad(make):
    def spoil(model):
        model.occurrence.convolution.bias.data[0] = torch.nan

    return {"model": make(), "vae": make(lambda model: None, arch="vae"), "nan": make(spoil)}


@pytest.mark.parametrize("options, status, words", BAD_INPUT, ids=[row[0] for row in BAD_INPUT])
def test_bad_input_is_one_line(options, status, words, bad, line_of_error):
    found, line = line_of_error(parts.main, options.format(**bad).split())
    assert found == status and all(word in line for word in words), line
    assert not (bad["model"].parent / "parts").exists()


def test_help_advises_on_every_option():
    assert all(action.help for action in parts.build_parser()._actions)
