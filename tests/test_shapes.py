"""The drawn data: a pure function of (seed, index), with labels that agree with the pixels."""

import numpy as np
import pytest

from datasets import DATA_SETS, open_split
from utils import shapes


def test_a_scene_is_a_pure_function_of_seed_and_index():
    first, again = shapes.scene(3, 17), shapes.scene(3, 17)
    assert first == again and np.array_equal(first.draw(32), again.draw(32))
    assert not np.array_equal(first.draw(32), shapes.scene(3, 18).draw(32))
    assert not np.array_equal(first.draw(32), shapes.scene(4, 17).draw(32))


def test_scenes_vary_as_promised():
    scenes = [shapes.scene(0, index) for index in range(120)]
    assert {len(scene.figures) for scene in scenes} == {1, 2, 3}
    assert {scene.pattern for scene in scenes} == set(shapes.PATTERNS)
    assert {figure.kind for scene in scenes for figure in scene.figures} == set(shapes.KINDS)
    assert {figure.hue for scene in scenes for figure in scene.figures} == set(range(len(shapes.COLOURS)))
    assert sum(overlaps(scene) for scene in scenes) > 5


def overlaps(scene):
    return sum((figure.coverage(64) >= 128).sum() for figure in scene.figures) > (scene.owner(64) > 0).sum()


@pytest.mark.parametrize("size", [32, 64])
def test_label_is_the_kind_with_clearly_the_most_visible_pixels(size):
    source = open_split("shapes", None, "train", size)
    for index in range(60):
        scene, labels = source.scene(index), source.pixel_labels(index)
        visible = np.bincount(labels["instance"].ravel(), minlength=len(scene.figures) + 1)[1:]
        winner = scene.figures[visible.argmax()]
        assert source.classes[source.labels[index]] == winner.kind
        assert visible.max() > 1.3 * max([0, *np.delete(visible, visible.argmax())])


def test_pixel_labels_agree_with_the_figures_and_the_picture():
    for index in range(30):
        scene = shapes.scene(0, index)
        labels, picture = scene.labels(64), np.asarray(scene.draw(64)) / 255
        assert set(labels) == {"instance", "kind", "colour", "geometry"}
        for number, figure in enumerate(scene.figures, start=1):
            mine = labels["instance"] == number
            assert (labels["kind"][mine] == 1 + shapes.KINDS.index(figure.kind)).all()
            assert (labels["colour"][mine] == 1 + figure.hue).all()
            inner = mine & (labels["geometry"] == shapes.INTERIOR)
            assert np.abs(picture[inner] - figure.rgb).max(initial=0) < 0.01
        assert ((labels["kind"] == 0) == (labels["instance"] == 0)).all()


def test_geometry_of_one_square_and_one_circle():
    square = shapes.Figure("square", 0.5, 0.5, 0.3, np.pi / 4, 0, (1, 0, 0))  # sides parallel to the image's
    geometry = shapes.Scene((square,), ((0, 0, 0),) * 2, "plain", 0).labels(64)["geometry"]
    side = 0.3 / np.sqrt(2)
    top, left = round((0.5 - side) * 64), round((0.5 - side) * 64)
    assert shapes.GEOMETRY[geometry[top, 32]] == "edge 0 deg" and shapes.GEOMETRY[geometry[32, left]] == "edge 90 deg"
    assert (
        geometry[top, left] == shapes.CORNER and geometry[32, 32] == shapes.INTERIOR and geometry[2, 2] == shapes.GROUND
    )
    circle = square._replace(kind="circle")
    geometry = shapes.Scene((circle,), ((0, 0, 0),) * 2, "plain", 0).labels(64)["geometry"]
    assert set(np.unique(geometry)) == {shapes.GROUND, shapes.INTERIOR, shapes.ARC}


@pytest.mark.parametrize("name", ["binshapes", "bincircles"])
def test_binary_sets_are_white_on_black_and_grey(name):
    source = open_split(name, None, "test", 48)
    for index in range(5):
        image = source.image(index)
        assert image.mode == "L" and image.size == (48, 48) and set(np.unique(image)) == {0, 255}
        assert np.array_equal(np.asarray(image) > 0, source.pixel_labels(index)["instance"] > 0)
    assert DATA_SETS[name].channels == 1


def test_training_and_test_scenes_differ():
    train, test = open_split("shapes", None, "train", 32), open_split("shapes", None, "test", 32)
    assert train.scene(0) != test.scene(0) and len(train) == 50_000 and len(test) == 2_000
