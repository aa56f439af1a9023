"""Counts of classes by client, and their picture."""

import numpy as np
import pytest
from PIL import Image

from lowrank_fl.data.counts import label_counts, plot_label_counts


def test_counts_have_a_row_a_client_and_a_column_a_class(labelled):
    counts = label_counts(labelled([0, 2, 2, 0, 1]), [np.array([0, 1, 2]), np.array([3]), np.array([], dtype=np.int64)])
    assert counts.tolist() == [[1, 0, 2], [1, 0, 0], [0, 0, 0]]


@pytest.mark.slow
@pytest.mark.parametrize(("clients", "classes"), [(1, 1), (100, 10), (8, 62)])
def test_the_picture_of_the_counts_is_written(tmp_path, clients, classes):
    counts = np.arange(clients * classes).reshape(clients, classes)
    plot_label_counts(counts, [f"class {number}" for number in range(classes)], tmp_path / "counts.png")
    with Image.open(tmp_path / "counts.png") as picture:
        assert picture.size == (1200, 600)


@pytest.mark.slow
def test_drawing_opens_no_window(tmp_path):
    import matplotlib.pyplot

    plot_label_counts(np.ones((2, 2)), ["a", "b"], tmp_path / "counts.png")
    assert matplotlib.pyplot.get_fignums() == []
