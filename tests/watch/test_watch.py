"""What happens to one rank is named by the others, and ends them, whatever they wait for."""

from __future__ import annotations

import json
import os
import signal
from ipaddress import ip_address

import pytest

from tests.watch.listening import addresses
from tests.watch.runs import Ranks, run_file, until_logged
from trainer.pulse import Pulse

HOST = os.uname().nodename
SOON = ("save_every=2 steps", "evals=[]", "hang_seconds=25")
LATE = (*SOON[:2], "hang_seconds=300")
WAITS = """
import os, time
def for_ever():
    time.sleep(1000)
"""
IN_DATA = (
    WAITS
    + """
import trainer.data.feed as feed
take, taken = feed.Feed.batch, [0]
def batch(self, plan, number):
    taken[0] += 1
    if os.environ["RANK"] == "1" and taken[0] == 12:
        for_ever()
    return take(self, plan, number)
feed.Feed.batch = batch
"""
)
IN_SETUP = (
    WAITS
    + """
from trainer.running import built
build = built.load_recipe
def load_recipe(*arguments):
    if os.environ["RANK"] == "1":
        for_ever()
    return build(*arguments)
built.load_recipe = load_recipe
"""
)
ALONE = """
import os
from trainer.running import built
from trainer.errors import DataError
build = built.load_recipe
def load_recipe(*arguments):
    if os.environ["RANK"] == "1":
        raise DataError("the folder of the model is not there")
    return build(*arguments)
built.load_recipe = load_recipe
"""


def test_a_killed_rank_is_named_and_the_run_goes_on_and_nothing_listens_to_other_hosts(tmp_path):
    path = run_file(tmp_path, steps=400)
    with Ranks(path, 2, *LATE) as ranks:
        until_logged(tmp_path / "run", 6)
        for process in ranks.processes:
            assert {a for a in addresses(process.pid) if not ip_address(a).is_loopback} == set()
        ranks.processes[1].kill()
        said = ranks.said(0)
    assert f"error: rank 1 on {HOST} ended without a word" in said
    assert "it was in " in said
    assert ranks.code(0) == 3, said
    with Ranks(path, 2, *LATE, "steps=8") as ranks:
        said = ranks.said(0)
    assert ranks.code(0) == 0, said
    assert "going on from step" in said
    assert "settings changed: steps 400 -> 8\n" in said
    events = (tmp_path / "run/events.jsonl").read_text().splitlines()
    assert [e["steps"] for e in map(json.loads, events) if e["event"] == "settings changed"] == [
        "400 -> 8"
    ]


def test_a_stopped_rank_is_named_and_the_others_leave_their_stacks(tmp_path):
    with Ranks(run_file(tmp_path, steps=100000), 2, *SOON) as ranks:
        until_logged(tmp_path / "run", 3)
        os.kill(ranks.processes[1].pid, signal.SIGSTOP)
        said = ranks.said(0)
    assert f"error: rank 1 on {HOST} ended without a word, stands still" in said
    assert ranks.code(0) == 3
    stacks = (tmp_path / "run/stacks/rank-00000.txt").read_text()
    assert "Thread" in stacks
    assert "loop.py" in stacks


@pytest.mark.slow
def test_the_first_rank_is_missed_too(tmp_path):
    with Ranks(run_file(tmp_path, steps=100000), 2, *SOON) as ranks:
        until_logged(tmp_path / "run", 3)
        os.kill(ranks.processes[0].pid, signal.SIGSTOP)
        said = ranks.said(1)
    assert "error: rank 0" in said
    assert ranks.code(1) == 3


@pytest.mark.parametrize(
    ("script", "phase"),
    [
        (IN_DATA, "data"),
        pytest.param(IN_SETUP, "building the model", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_alone_is_named_with_what_it_does(tmp_path, script, phase):
    """In no collective: the others wait in one, and nothing there tells for whom."""
    with Ranks(run_file(tmp_path, steps=100000), 2, *SOON, script=script) as ranks:
        said, other = ranks.said(0), ranks.said(1)
    assert f"error: rank 1 on {HOST} has got no further for " in said
    assert f"s, in {phase};" in said
    assert (ranks.code(0), ranks.code(1)) == (3, 3)
    assert "error" not in other
    for rank in range(2):
        text = (tmp_path / f"run/stacks/rank-0000{rank}.txt").read_text()
        assert ("for_ever" in text) == (rank == 1)
    assert "rank 1 on" in (tmp_path / "run/log.txt").read_text()


def test_a_mistake_that_one_rank_meets_alone_ends_the_others_with_its_sentence(tmp_path):
    with Ranks(run_file(tmp_path, steps=4), 2, *LATE, script=ALONE) as ranks:
        said, other = ranks.said(0), ranks.said(1)
    assert f"error: rank 1 on {HOST}: the folder of the model is not there\n" in said
    assert (ranks.code(0), ranks.code(1)) == (2, 2)
    assert "Traceback" not in said + other


def test_a_pulse_knows_the_innermost_phase_and_the_longest_wait():
    pulse = Pulse()
    with pulse.phase("step"):
        with pulse.phase("data"):
            assert pulse.read().phase == "data"
        pulse.beat()
        reading = pulse.read()
    assert reading.phase == "step"
    assert 0 < reading.usual < 1
    assert pulse.read().marks == 4
