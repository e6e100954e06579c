"""What long work tells, on a terminal and in a file, by a clock that the test winds."""

from __future__ import annotations

import io
import multiprocessing
import sys

import pytest

from trainer import long_work
from trainer.long_work import LongWork, counted, speaking_to, tell


class Lines:
    """Keeps what it is told; `moving` as a terminal shows it."""

    def __init__(self, *, is_live: bool) -> None:
        self.is_live = is_live
        self.lines: list[str] = []
        self.moving: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def live(self, text: str) -> None:
        self.moving.append(text)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(long_work.time, "monotonic", lambda: now[0])
    return now


def work_of(clock: list[float], *, seconds_each: float, count: int) -> None:
    for _ in counted(range(count), "indexing", total=count, unit="shards"):
        clock[0] += seconds_each


def test_a_file_gets_a_line_now_and_then_with_rate_and_time_left(clock: list[float]) -> None:
    lines = Lines(is_live=False)
    with speaking_to(lines):
        work_of(clock, seconds_each=4.0, count=10)
    assert lines.lines == [
        "indexing: 4 of 10 shards, 0.25 a second, 24 s left",
        "indexing: 8 of 10 shards, 0.25 a second, 8 s left",
        "indexing: 10 of 10 shards in 40 s",
    ]


def test_short_work_says_nothing_in_a_file(clock: list[float]) -> None:
    lines = Lines(is_live=False)
    with speaking_to(lines):
        work_of(clock, seconds_each=0.1, count=10)
    assert lines.lines == []


def test_a_terminal_has_one_line_that_moves_and_is_taken_away(clock: list[float]) -> None:
    lines = Lines(is_live=True)
    with speaking_to(lines):
        work_of(clock, seconds_each=0.2, count=4)
    assert lines.lines == []
    assert lines.moving == [
        "indexing: 2 of 4 shards, 5 a second, 0 s left",
        "indexing: 4 of 4 shards, 5 a second, 0 s left",
        "",
    ]


def test_what_an_error_cuts_short_is_not_called_done(clock: list[float]) -> None:
    lines = Lines(is_live=False)

    def cut_short() -> None:
        with LongWork("embedding", total=None, unit="samples") as work:
            clock[0] = 20.0
            work.done(3000)
            raise OSError("gone")

    with speaking_to(lines), pytest.raises(OSError, match="gone"):
        cut_short()
    assert lines.lines == ["embedding: 3,000 samples, 150 a second"]


def test_other_ranks_and_child_processes_are_silent(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, heard = Lines(is_live=False), []
    with speaking_to(lines, heard.append):
        monkeypatch.setenv("RANK", "1")
        tell("one")
        monkeypatch.setenv("RANK", "0")
        tell("two")
        monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
        tell("three")
    assert lines.lines == heard == ["two"]


def test_a_pipe_is_no_terminal_and_gets_no_control_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    tell("opening shards")
    assert pipe.getvalue() == "opening shards\n"
