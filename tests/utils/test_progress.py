"""Progress is a bar on a terminal and plain lines in a log."""

import pytest

import utils.progress
from utils.progress import LineProgress, progress


def test_short_work_prints_nothing_to_a_log(capfd):
    with progress(3, "scoring", "pair") as bar:
        bar.update(3)
    assert capfd.readouterr().err == ""


def test_long_work_prints_plain_lines(capfd):
    with LineProgress(4, "scoring", "pair", seconds=0) as bar:
        bar.set_postfix({"loss": "0.693"})
        bar.update(1)
        bar.update(3)
    err = capfd.readouterr().err
    assert "\r" not in err and "scoring: 1/4 pairs (25%)" in err and "scoring: 4/4 pairs (100%)" in err
    assert "loss 0.693" in err


def test_time_left_is_that_of_the_remaining_units(capfd, monkeypatch):
    """10 of 40 units were finished before; 10 more in 20 s leave 20, which take 40 s."""
    clock = iter([100.0, 120.0, 120.0])
    monkeypatch.setattr(utils.progress.time, "monotonic", lambda: next(clock))
    LineProgress(40, "training", "step", seconds=5, initial=10).update(10)
    assert capfd.readouterr().err == "training: 20/40 steps (50%) after 20 s, about 40 s left\n"


def test_last_line_is_printed_once(capfd):
    with LineProgress(2, "scoring", "pair", seconds=0) as bar:
        bar.update(2)
    assert capfd.readouterr().err.count("2/2") == 1
    with LineProgress(2, "scoring", "pair", seconds=0) as bar:
        bar.update(1)
        bar.seconds = 60
        bar.update(1)
    assert capfd.readouterr().err.splitlines()[-1].startswith("scoring: 2/2 pairs (100%)")


def test_other_ranks_show_nothing(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    with progress(1, "scoring") as bar:
        bar.update()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_bar_on_a_terminal_only(terminal, monkeypatch, capsys):
    monkeypatch.setattr(utils.progress.sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress(2, "scoring") as bar:
        bar.update(2)
    assert ("100%" in capsys.readouterr().err) == terminal
