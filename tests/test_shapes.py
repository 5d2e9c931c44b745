"""The drawn data: scenes are a pure function of (seed, index), and the main figure is the one that is seen most."""

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
        scene = source.scene(index)
        visible = np.bincount(scene.owner(size).ravel(), minlength=len(scene.figures) + 1)[1:]
        winner = scene.figures[visible.argmax()]
        assert source.classes[source.labels[index]] == winner.kind
        assert visible.max() > 1.3 * max([0, *np.delete(visible, visible.argmax())])


@pytest.mark.parametrize("name", ["binshapes", "bincircles"])
def test_binary_sets_are_white_on_black_and_grey(name):
    source = open_split(name, None, "test", 48)
    for index in range(5):
        image = source.image(index)
        assert image.mode == "L" and image.size == (48, 48) and set(np.unique(image)) == {0, 255}
        assert np.array_equal(np.asarray(image) > 0, source.scene(index).owner(48) > 0)
    assert DATA_SETS[name].channels == 1


def test_training_and_test_scenes_differ():
    train, test = open_split("shapes", None, "train", 32), open_split("shapes", None, "test", 32)
    assert train.scene(0) != test.scene(0) and len(train) == 50_000 and len(test) == 2_000
