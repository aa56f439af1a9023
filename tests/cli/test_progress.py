"""What stands on stderr while a command works."""

import io
import logging
import sys

import pytest
from rich.console import Console

from lowrank_cli.progress import _bar, _Live, watch
from lowrank_fl.results import RunStart

START = RunStart("made", 1, 3, "fedpara", 2, 100, 1000, {"model.method": "fedpara", "model.gamma": 0.1})


def test_on_a_terminal_the_bar_shows_run_round_accuracy_traffic_and_time_left(row):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    with _bar(console) as bar:
        live = _Live(bar)
        live.run_started(START)
        live.round_ended(row(round=1, accuracy=0.5, total_bytes=1_000_000, seconds=60.0))
        bar._progress.refresh()
        shown = screen.getvalue().splitlines()[-1]
    for part in ["run 2/3 made: fedpara, gamma 0.1", "round 1/2", "50.0%", "1.00 MB", "0:01:00 left"]:
        assert part in shown


def test_the_bar_shows_the_worst_tenth_where_clients_test(row):
    screen = io.StringIO()
    with _bar(Console(file=screen, force_terminal=True, width=120, color_system=None)) as bar:
        live = _Live(bar)
        live.run_started(START)
        live.round_ended(row(round=1, accuracy=0.5, worst_accuracy=0.25))
        bar._progress.refresh()
        assert "50.0% (worst tenth 25.0%)" in screen.getvalue().splitlines()[-1]


def test_traffic_and_time_start_anew_with_each_run(row):
    screen = io.StringIO()
    with _bar(Console(file=screen, force_terminal=True, width=120, color_system=None)) as bar:
        live = _Live(bar)
        for _ in range(2):
            live.run_started(START)
            live.round_ended(row(total_bytes=1_000_000))
        bar._progress.refresh()
        assert "1.00 MB" in screen.getvalue().splitlines()[-1]


def test_notes_stand_above_the_bar_as_they_are(row):
    screen = io.StringIO()
    with _bar(Console(file=screen, force_terminal=True, width=120, color_system=None, markup=False)) as bar:
        live = _Live(bar)
        live.note("head [0] stays")
    assert "head [0] stays" in screen.getvalue()


@pytest.mark.parametrize(("quiet", "expected"), [(False, "2 classes are held by nobody\n"), (True, "")])
def test_what_the_library_logs_is_a_note(capsys, quiet, expected):
    with watch(quiet=quiet):
        logging.getLogger("lowrank_fl").info("%d classes are held by nobody", 2)
    assert capsys.readouterr().err == expected


def test_afterwards_the_logger_is_as_it_was():
    logger = logging.getLogger("lowrank_fl")
    before = logger.handlers.copy(), logger.level, logger.propagate
    with watch(quiet=False):
        assert logger.handlers != before[0]
    assert (logger.handlers, logger.level, logger.propagate) == before


def test_a_terminal_that_is_none_gets_no_control_characters(capsys, monkeypatch, summary, row):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not sys.stderr.isatty()
    with watch(quiet=False) as observer:
        observer.run_started(START)
        observer.round_ended(row())
        observer.run_ended(summary())
    assert "\x1b" not in capsys.readouterr().err
