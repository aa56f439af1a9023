"""The page of `lowrank fl report`: whole, closed in itself, and safe from what users write."""

import re
from html import unescape
from html.parser import HTMLParser

import pytest
from made_runs import write_run

from lowrank_core import LowrankError
from lowrank_fl.reporting.compare import compare
from lowrank_fl.reporting.figures import draw_all
from lowrank_fl.reporting.groups import group_runs
from lowrank_fl.reporting.page import Report, check_writable, summarise, write_page
from lowrank_fl.reporting.read import find_runs

VOID = {"meta", "br", "img", "hr", "input", "link"}


class Elements(HTMLParser):
    """Checks that elements close in order, and keeps their attributes and the text of table cells."""

    def __init__(self, page):
        super().__init__()
        self.open, self.attributes, self.cells = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


@pytest.fixture
def groups_in(tmp_path):
    """`groups_in()` are those of the runs written to `tmp_path`."""
    return lambda: group_runs(find_runs([tmp_path]).runs)


@pytest.fixture
def page_of(tmp_path, groups_in):
    """`page_of()` is the page about the runs in `tmp_path`."""

    def page_of(empty=()):
        groups = groups_in()
        out = tmp_path / "page.html"
        write_page(out, Report(groups, compare(groups), (2.0, 10.0), list(empty)))
        return out.read_text()

    return page_of


@pytest.mark.slow
def test_the_page_parses_and_needs_nothing_beside_it(tmp_path, page_of):
    write_run(tmp_path / "a", "mnist-2class", worst=0.5)
    write_run(tmp_path / "b", "cifar10-iid", accuracies=(0.5, 0.6))
    write_run(tmp_path / "c", "cifar10-iid", "model.gamma=0.5", accuracies=(0.5, 0.6))
    page = page_of()
    elements = Elements(page)
    names = {name for _, name, _ in elements.attributes}
    assert "src" not in names
    links = [value for _, name, value in elements.attributes if name.endswith("href")]
    assert all(link.startswith("#") for link in links)
    assert not re.findall(r"<script|@import|url\((?!#)|<link", page)
    assert not re.findall(r"(?<!xmlns=\")(?<!xmlns:xlink=\")https?://", page)


@pytest.mark.slow
def test_ids_are_given_once(tmp_path, page_of):
    write_run(tmp_path / "a", "mnist-2class", worst=0.5)
    write_run(tmp_path / "b", "mnist")
    ids = [value for _, name, value in Elements(page_of()).attributes if name == "id"]
    assert len(set(ids)) == len(ids)


@pytest.mark.slow
def test_the_page_follows_the_readers_colours(tmp_path, page_of):
    write_run(tmp_path / "a")
    page = page_of()
    assert "color-scheme: light dark" in page
    assert "currentColor" in page
    assert "var(--series-0)" in page
    assert "#0a0b00" not in page
    assert "#010203" not in page


@pytest.mark.slow
def test_every_figure_says_in_words_what_it_shows(tmp_path, page_of):
    write_run(tmp_path / "a", accuracies=(0.5, 0.875))
    labels = [value for _, name, value in Elements(page_of()).attributes if name == "aria-label"]
    assert labels[0] == ("Accuracy against the megabytes sent, logarithmic. fedpara ends at 87.50 % after 20.0 MB.")
    assert labels[1] == "Seconds a round by megabits a second: fedpara 4.81 s at 2, 1.76 s at 10."


def test_names_and_values_cannot_break_the_page(tmp_path, page_of):
    write_run(tmp_path / "<i>run", "mnist", "data.path='</pre><b>\"<script>alert(1)</script>'")
    page = page_of([tmp_path / "<u>empty"])
    Elements(page)
    assert "<script" not in page
    assert "</pre><b>" not in page
    assert "<i>run" not in page
    assert "<u>empty" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


@pytest.mark.slow
def test_cells_hold_paper_ours_and_status(tmp_path, page_of):
    for seed, last in enumerate((0.82, 0.83)):
        write_run(tmp_path / f"{seed}", "cifar10-iid", accuracies=(*[0.1] * 199, last), seed=seed)
    cells = Elements(page_of()).cells
    assert cells[:8] == [
        "Tables 2, 3 and 9",
        "cifar10-iid",
        "fedpara",
        "accuracy, %",
        "82.88",
        "82.50 ± 6.35",
        "2",
        "pass",
    ]


@pytest.mark.slow
def test_a_run_that_repeats_another_is_named(tmp_path, page_of):
    write_run(tmp_path / "a", interrupted=True)
    write_run(tmp_path / "b")
    assert f"{tmp_path / 'a'} is left out: {tmp_path / 'b'} has the same configuration and seed 0." in unescape(
        page_of()
    )


@pytest.mark.slow
def test_a_page_without_a_run_of_the_papers_says_so(tmp_path, page_of):
    write_run(tmp_path / "a")
    assert "None of these runs is one of the paper's." in page_of()


@pytest.mark.slow
def test_figures_are_drawn_where_there_is_something_to_show(tmp_path, groups_in):
    write_run(tmp_path / "a")
    titles = [drawing.title for drawing in draw_all(groups_in(), (2,))]
    assert titles == ["mnist: accuracy against traffic", "mnist: seconds a round"]
    write_run(tmp_path / "b", "mnist", "model.gamma=0.5")
    write_run(tmp_path / "c", "mnist", "model.method=original", accuracies=(0.5, 0.8))
    drawn = {drawing.title: drawing for drawing in draw_all(groups_in(), (2,))}
    sweep = drawn["mnist: accuracy over γ"]
    assert sweep.alternative == "Final accuracy: 90.00 % at 0.1, 90.00 % at 0.5, the original 80.00 %."
    assert [key.label for key in sweep.keys] == ["fedpara", "original"]
    write_run(tmp_path / "d", "mnist-2class", worst=0.25)
    bars = {drawing.title: drawing for drawing in draw_all(groups_in(), ())}["mnist-2class: clients on their own data"]
    assert bars.alternative == "Mean over clients, and over the worst tenth of them: pfedpara 90.0 % and 25.0 %."


def test_a_run_that_sends_nothing_has_no_place_on_an_axis_of_bytes(tmp_path, groups_in):
    write_run(tmp_path / "a", client_bytes=0)
    assert [drawing.title for drawing in draw_all(groups_in(), (2,))] == ["mnist: seconds a round"]


@pytest.mark.slow
def test_fourteen_lines_can_be_told_apart(tmp_path, groups_in):
    for number in range(14):
        write_run(tmp_path / f"{number:02}", "mnist", f"model.gamma={number / 20}")
    keys = draw_all(groups_in(), ())[0].keys
    assert len({(key.colour, key.dash) for key in keys}) == 14


@pytest.mark.slow
def test_the_same_runs_give_the_same_page(tmp_path, page_of):
    write_run(tmp_path / "a", "mnist-2class", worst=0.5)
    assert page_of() == page_of()


def test_the_verdicts_are_counted(tmp_path, groups_in):
    write_run(tmp_path / "a", "cifar10-iid", accuracies=(0.5,), params=(1_546_000, 1_546_000, 15_245_000))
    rows = compare(groups_in())
    missing = sum(row.status == "not run" for row in rows)
    assert summarise(rows) == f"1 pass, 0 fail, 6 partial, {missing} not run"


@pytest.mark.slow
def test_a_file_of_somebody_elses_is_not_replaced(tmp_path, page_of):
    write_run(tmp_path / "a")
    page_of()
    check_writable(tmp_path / "page.html")
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(LowrankError, match=r"mine\.html exists and lowrank fl report did not write it; choose another"):
        check_writable(tmp_path / "mine.html")
    with pytest.raises(LowrankError, match=r"a is a folder; name a file with --out"):
        check_writable(tmp_path / "a")
    with pytest.raises(LowrankError, match=r"there is no folder .*none to write x\.html to; make it, or change --out"):
        check_writable(tmp_path / "none" / "x.html")
