"""progress.py: the line on a terminal and in a log file, durations."""

from __future__ import annotations

import io
import os
from types import SimpleNamespace

import pytest

from support import progress as shown


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch) -> Screen:
    """A terminal in place of stderr."""
    terminal = Screen()
    monkeypatch.setattr(shown, "sys", SimpleNamespace(stderr=terminal))
    return terminal


@pytest.fixture
def tick(monkeypatch):
    """Set the seconds that pass between two looks at the clock."""

    def every(seconds: float) -> None:
        clock = iter(k * seconds for k in range(10**6))
        monkeypatch.setattr(shown.time, "monotonic", lambda: next(clock))

    return every


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.9, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations(seconds, text):
    assert shown.duration(seconds) == text


# --- items ---------------------------------------------------------------------------------------


def test_progress_on_a_terminal_rewrites_one_line(screen, tick):
    tick(0.5)
    assert list(shown.progress("abcd", 4, "reading")) == list("abcd")
    lines = screen.getvalue().split("\r\x1b[K")  # to the start of the line, and clear it
    assert lines == [
        "",
        "reading 1/4, 2 s left",
        "reading 2/4, 1 s left",
        "reading 3/4, 0 s left",
        "reading 4/4 in 2 s\n",
    ]


def test_a_terminal_is_not_flooded(screen, tick):
    tick(0.01)
    list(shown.progress(range(100), 100, "reading"))
    assert screen.getvalue().count("\r") == 1 + 9  # ten a second for almost a second, and the last


def test_progress_elsewhere_prints_lines_at_intervals(monkeypatch, capsys, tick):
    tick(60)
    monkeypatch.setattr(shown, "LINE_EVERY", 3000)
    list(shown.progress(range(100), 100, "reading"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["reading 50/100, 50 min 00 s left", "reading 100/100 in 1 h 40 min"]


def test_progress_is_silent_when_short_and_in_a_file(capsys):
    list(shown.progress(range(3), 3, "reading"))
    assert capsys.readouterr().err == ""


def test_progress_says_how_far_it_came_when_it_is_stopped(screen, tick):
    tick(1)
    steps = shown.progress(range(4), 4, "reading")
    next(steps), next(steps)
    steps.close()
    assert screen.getvalue().endswith("reading 1/4 in 2 s\n")


# --- trainings -----------------------------------------------------------------------------------


def train(total: int, epoch: int) -> shown.Meter:
    """A training on a CPU with steps of 16 images."""
    meter = shown.Meter(0, total, 16)
    for step in range(1, total + 1):
        meter.show(step, f"epoch {-(-step // epoch)}", {"aug": 1.5}, last=step % epoch == 0)
    return meter


def test_a_training_on_a_terminal_rewrites_one_line(screen, tick):
    tick(2)
    assert train(6, 3).rate == 8
    lines = screen.getvalue().split("\r\x1b[K")
    assert lines == [
        "",
        "epoch 1  aug 1.5  8 images/s  8 s left",  # the first step sets the clock
        "epoch 1  aug 1.5  8 images/s  6 s left",
        "6 steps, about 4 s\n",
        "epoch 2  aug 1.5  8 images/s  4 s left",
        "epoch 2  aug 1.5  8 images/s  2 s left",
        "epoch 2  aug 1.5  8 images/s  0 s left\n",
    ]


def test_a_training_elsewhere_prints_epochs_and_a_line_now_and_then(capsys, tick):
    tick(10)
    train(9, 8)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[-1] for line in lines] == [
        "1 min 00 s left",  # LINE_EVERY after the start
        "9 steps, about 50 s",
        "30 s left",
        "10 s left",  # the end of the first epoch
        "0 s left",
    ]


def test_a_message_replaces_the_line_of_progress(screen, tick):
    tick(1)
    meter = shown.Meter(0, 9, 16)
    for step in (1, 2):
        meter.show(step, "epoch 1", {}, last=True)
    shown.notify("collapse")
    assert screen.getvalue().endswith("left\r\x1b[Kcollapse\n")


def test_only_the_first_process_speaks(screen, tick, monkeypatch):
    monkeypatch.setattr(shown, "ranks", lambda: (1, 2))
    tick(10)
    train(9, 8)
    list(shown.progress(range(100), 100, "reading"))
    shown.notify("hello")
    assert screen.getvalue() == ""


def test_results_that_a_full_disk_has_no_room_for_are_an_error_at_the_end(monkeypatch, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no full disk on this system")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(shown.sys, "stdout", full)
        monkeypatch.setattr(shown.sys, "argv", ["/a/eval.py"])
        monkeypatch.setattr(shown, "unwritten", [])
        done = []

        def main() -> int:
            shown.show("a line")
            shown.show("another, which nobody sees")
            done.append("all else")
            return 0

        assert shown.as_program(main) == 2 and done
    assert capsys.readouterr().err == "eval.py: stdout: No space left on device\n"
