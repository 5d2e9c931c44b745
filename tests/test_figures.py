"""utils/figures.py puts every tile where it belongs, and keeps an image's colours."""

import numpy as np

from utils import figures
from utils.figures import FRAME, GAP, LINE


def flat(value, side=16):
    return np.full((side, side, 3), value, np.uint8)


def test_grid_magnifies_small_tiles_below_title_and_captions():
    rows = [[flat(10, 32), flat(20, 32)], [flat(30, 32)]]
    for captions, title in ((None, ()), (["a", "b"], ()), (["a", "b"], ["what it shows", "and how"])):
        sheet = np.asarray(figures.grid(rows, captions, title))
        top = LINE * (len(title) + bool(captions)) + GAP
        for value, row, column in ((10, 0, 0), (20, 0, 1), (30, 1, 0)):
            y, x = top + row * (64 + GAP), GAP + column * (64 + GAP)
            assert (sheet[y : y + 64, x : x + 64] == value).all() and (sheet == value).all(axis=2).sum() == 64 * 64
        assert (sheet[:top] != 255).any() == bool(captions)


def test_highlight_keeps_colours_where_the_part_is_and_encloses_what_is_above_one_half():
    tile = np.random.default_rng(0).integers(0, 200, (64, 64, 3), np.uint8)
    occurrence = np.zeros((4, 4))
    occurrence[1:3, 1:3], occurrence[3, 3] = 1.0, 0.4
    found = figures.highlight(tile, occurrence)
    inner, line = found[17:47, 17:47], (found == FRAME).all(axis=2)
    assert np.array_equal(inner, tile[17:47, 17:47])
    assert line.sum() == 4 * 31 and line[16, 16:48].all()
    assert (np.ptp(found[:16], axis=2) == 0).all()  # grey
    half = figures.highlight(tile, np.full((4, 4), 0.4), strongest=0.4)
    assert np.array_equal(half, tile)  # no line around what is not sure


def test_occurrence_grid_shows_the_parts_that_vary_most_and_their_highest_probability(monkeypatch):
    seen = []
    monkeypatch.setattr(figures, "grid", lambda rows, captions: seen.append((rows, captions)))
    occurrence = np.zeros((2, 5, 4, 4))
    occurrence[0, 3, 0, 0], occurrence[1, 1, 0, 0] = 0.9, 0.3
    tiles = np.stack([flat(100), flat(200)])
    figures.occurrence_grid(tiles, tiles, occurrence, most=2)
    (rows, captions), = seen
    assert captions == ["image", "copy", "1: 0.30", "3: 0.90"]
    assert [len(row) for row in rows] == [4, 4] and rows[0][0].shape == (64, 64, 3)
    assert (rows[0][3][4, 4] == 100).all() and (rows[0][3][40, 40] == 110).all()  # as it is, and dull
    assert (rows[1][2][4, 4] == np.round(0.6 * 200 + 0.4 * 150)).all()  # unsure: up to one half
