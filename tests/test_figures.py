"""utils/figures.py puts every tile where it belongs, keeps an image's colours, and names the axes of its plots."""

import numpy as np
import pytest

from utils import figures
from utils.figures import BREAK, FRAME, GAP, LINE, Row


def flat(value, side=16):
    return np.full((side, side, 3), value, np.uint8)


@pytest.fixture
def figure(monkeypatch):
    """A list that receives the matplotlib Figure of each plot."""
    seen, drawn = [], figures.drawn
    monkeypatch.setattr(figures, "drawn", lambda figure: seen.append(figure) or drawn(figure))
    return seen


def words_of(axis):
    return [tick.get_text() for tick in axis.get_ticklabels()]


def test_grid_magnifies_small_tiles_below_title_and_captions():
    rows = [[flat(10, 32), flat(20, 32)], [flat(30, 32)]]
    for captions, title in ((None, ()), (["a", "b"], ()), (["a", "b"], ["what it shows", "and how"])):
        sheet = np.asarray(figures.grid(rows, captions, title))
        top = LINE * (len(title) + bool(captions)) + GAP
        for value, row, column in ((10, 0, 0), (20, 0, 1), (30, 1, 0)):
            y, x = top + row * (64 + GAP), GAP + column * (64 + GAP)
            assert (sheet[y : y + 64, x : x + 64] == value).all() and (sheet == value).all(axis=2).sum() == 64 * 64
        assert (sheet[:top] != 255).any() == bool(captions)


def test_table_places_every_tile_where_its_row_and_column_are():
    rows = [Row(["β = 2"], [flat(10)], ["below"]), Row([], [flat(20), None, flat(30)], (), ["a remark"])]
    sheet = np.asarray(figures.table(rows, ["a heading"], side=64))
    assert all((sheet == value).all(axis=2).sum() == 64 * 64 for value in (10, 20, 30))
    columns = [np.flatnonzero((sheet == value).all(axis=2).any(axis=0))[0] for value in (10, 20, 30)]
    assert columns[0] == columns[1] and columns[2] == columns[1] + 64 + GAP + BREAK
    large = figures.table([Row([], [flat(10, 224)])])  # is shrunk
    assert large.height < 140 and large.width < 200


def test_long_words_are_cut():
    short = figures.shortened("a class with a very long name", 64)
    assert "a class with a very long name".startswith(short[:-1]) and 40 < figures.font().getlength(short) <= 64


def test_stacked_pictures_stand_below_their_words():
    one, other = (figures.grid([[flat(value)]]) for value in (10, 20))
    sheet = np.asarray(figures.stacked({"PatchVAE": one, "β-VAE": other}))
    assert [np.flatnonzero((sheet == value).all(axis=2).any(axis=1))[0] for value in (10, 20)] == [20, 108]


def test_framed_draws_around_the_box_alone():
    framed = figures.framed(flat(90, 64), (24, 24, 40, 40))
    changed = np.flatnonzero((framed != 90).any(axis=(1, 2)))
    assert (changed[0], changed[-1]) == (23, 40) and (framed[26:38, 26:38] == 90).all()
    assert 0 < (figures.framed(flat(90, 64), (9, 9, 9, 9)) != 90).any(axis=2).sum() <= 12  # less than a pixel


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


@pytest.mark.parametrize("count", [2, 10, 67, 1000])
def test_confusion_names_its_axes_and_classes(count, figure):
    names = [f"class_{number} $x$" + "!" * (40 * (number == 0)) for number in range(count)]
    picture = figures.confusion_picture(np.eye(count), names)
    axes = figure[0].axes[0]
    assert axes.get_xlabel() and axes.get_ylabel() == "true class"
    assert len(words_of(axes.xaxis)) == min(count, 100) or count == 1000 and len(words_of(axes.xaxis)) == 100
    assert words_of(axes.xaxis)[1] == words_of(axes.yaxis)[1] == names[-(-count // 100)]
    assert len(words_of(axes.yaxis)[0]) == 24  # is cut
    assert len(axes.texts) == (count**2 if count <= 10 else 0)
    assert picture.mode == "RGB" and 400 < picture.width < 2500


def test_points_and_curves_draw_what_they_are_told(figure):
    rows = [("random", "PatchVAE"), ("recipe", "β-VAE"), ("recipe", "PatchVAE")]
    scores = {"head, %": [[50.0], [51.0, 53.0], [60.0, 62.0, 64.0]], "kNN, %": [[], [], [1.0]]}
    figures.points(rows, scores, {name: [None, 50, 50] for name in scores}, ["0.4", "C0", "C1"], "title", ["a note"])
    head, knn = figure[0].axes
    assert (head.get_xlabel(), knn.get_xlabel()) == ("head, %", "kNN, %")
    assert words_of(head.yaxis) == ["PatchVAE", "β-VAE", "PatchVAE", "random", "recipe"]
    assert list(head.get_yticks()) == [1, 3, 4, 0, 2]
    assert [text.get_text() for text in head.texts] == ["50.0", "52.0", "62.0"]
    dots = [line.get_xdata().tolist() for line in head.lines if line.get_marker() == "o"]
    assert dots == scores["head, %"]
    bars = [bar.get_segments()[0][:, 0].tolist() for bar in head.collections if len(bar.get_segments()[0]) == 2]
    assert pytest.approx([52 - 2**0.5, 52 + 2**0.5]) in bars and [60, 64] in bars and [50, 50] in bars
    figures.curves({"epoch": {"PatchVAE": [(1, 50, 1), (2, 60, 2)]}}, "top-1", "title", log=True)
    axes, = figure[1].axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("epoch", "top-1", "log")
    assert axes.lines[0].get_ydata().tolist() == [50, 60] and axes.get_legend().get_texts()[0].get_text() == "PatchVAE"
