"""Accuracy against traffic, as a picture."""

import dataclasses
from collections import Counter

import pytest
from matplotlib.figure import Figure
from PIL import Image

from lowrank_fl.reporting.plots import plot_accuracy_vs_bytes
from lowrank_fl.results import RoundRow


def rows(accuracies, megabytes_a_round=1.0):
    sent = int(megabytes_a_round * 1e6)
    return [
        RoundRow(number, accuracy, 1.0, 1.0, sent // 2, sent - sent // 2, sent, 1.0, [0])
        for number, accuracy in enumerate(accuracies, 1)
    ]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """`drawn(runs)` is the axes as they are when the picture is written."""
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))

    def drawn(runs):
        plot_accuracy_vs_bytes(runs, tmp_path / "picture.png", "made")
        return figures[-1].axes[0]

    return drawn


def test_a_point_lies_at_all_megabytes_so_far_and_its_accuracy_in_percent(drawn):
    (line,) = drawn([("fedpara", rows([0.25, 0.5, 0.75], 2))]).lines
    assert line.get_xydata().tolist() == [[2, 25], [4, 50], [6, 75]]


def test_megabytes_are_logarithmic_and_accuracy_is_not(drawn):
    axes = drawn([("fedpara", rows([0.5, 0.6]))])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")


@pytest.mark.slow
def test_the_axis_says_on_what_was_tested(drawn):
    held_out = [dataclasses.replace(row, worst_accuracy=0.25) for row in rows([0.5, 0.6])]
    assert drawn([("fedpara", rows([0.5]))]).get_ylabel() == "accuracy on the test set, %"
    assert drawn([("pfedpara", held_out)]).get_ylabel() == "mean accuracy of the clients on what they hold out, %"
    assert drawn([("pfedpara", held_out), ("fedpara", rows([0.5]))]).get_ylabel() == "accuracy, %"


def test_seeds_share_a_line_of_their_mean_with_a_band_from_worst_to_best(drawn):
    axes = drawn([("fedpara", rows([0.25, 0.5])), ("fedpara", rows([0.75, 0.75], 3))])
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[2, 50], [4, 62.5]]
    (band,) = axes.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices.tolist()} == {(2, 25), (2, 75), (4, 50), (4, 75)}
    assert axes.get_legend().get_texts()[0].get_text() == "fedpara (mean of 2 runs)"


@pytest.mark.slow
def test_a_mean_ends_where_the_shortest_seed_does(drawn):
    (line,) = drawn([("fedpara", rows([0.2, 0.4, 0.6])), ("fedpara", rows([0.4]))]).lines
    assert line.get_ydata().tolist() == pytest.approx([30])


@pytest.mark.slow
def test_fourteen_lines_can_be_told_apart(drawn):
    lines = drawn([(f"run {number}", rows([0.5, 0.6])) for number in range(14)]).lines
    assert max(Counter((line.get_color(), line.get_linestyle()) for line in lines).values()) == 1


@pytest.mark.slow
def test_a_run_without_rounds_is_left_out(drawn):
    assert [line.get_label() for line in drawn([("none", []), ("fedpara", rows([0.5]))]).lines] == ["fedpara"]
    assert list(drawn([("none", [])]).lines) == []


@pytest.mark.parametrize("rounds", [1, 2, 3, 1000])
def test_the_megabyte_axis_has_numbers_however_short_it_is(drawn, rounds):
    axes = drawn([("fedpara", rows([0.5] * rounds, 0.3))])
    left, right = axes.get_xlim()
    inside = [tick for tick in axes.xaxis.get_majorticklocs() if left <= tick <= right]
    assert len(inside) >= 2


@pytest.mark.slow
def test_the_picture_is_a_png_and_opens_no_window(tmp_path):
    import matplotlib.pyplot

    plot_accuracy_vs_bytes([("fedpara", rows([0.5]))], tmp_path / "picture.png", "made")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.format == "PNG"
    assert matplotlib.pyplot.get_fignums() == []
