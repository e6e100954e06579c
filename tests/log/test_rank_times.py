"""Which rank holds the others up, and by what."""

from __future__ import annotations

import time

import pytest

from tests.ranks import run_ranks
from trainer.comm import Comm, refuse_differing
from trainer.errors import DataError
from trainer.log.rank_times import RankTimes, Spread


def busy_and_waiting(comm: Comm) -> tuple[list[list[float]], list[str], str]:
    times = RankTimes(comm)
    times.begin(10)
    end = time.process_time() + (1.0 if comm.rank == 1 else 0.0)
    while time.process_time() < end:
        pass
    found = times.look(12, 3.0 if comm.rank == 0 else 0.5).tolist()
    refuse_differing(comm, ["a.tar 1", "b.tar 2"], what="shards")
    with pytest.raises(DataError) as caught:
        refuse_differing(comm, ["a.tar 1", f"b.tar {comm.rank}"], what="the shards")
    return found, times.hosts, str(caught.value)


def test_every_rank_knows_what_each_does_and_what_data_each_has():
    first, second = run_ranks(busy_and_waiting, 2)
    assert first == second
    times, hosts, said = first
    assert [row[0] for row in times] == [1.5, 0.25]
    assert times[1][1] >= 0.5
    assert len(hosts) == 2
    assert said.startswith("rank 1: the shards here and on rank 0 differ: b.tar 1 and b.tar 0")


def test_the_slowest_is_told_of_where_it_is_much_slower():
    hosts = ["a", "b", "c", "d"]
    even = Spread([0.1, 0.11, 0.1, 0.1], [1.0, 1.1, 1.2, 1.0])
    assert even.slow(hosts) == ""
    assert Spread([0.1, 0.1, 2.0, 0.1], even.work_seconds).slow(hosts) == (
        "rank 2 on c waits for data 2 s a step, half of the ranks at most 0.1 s"
    )
    assert "rank 1 on b computes 3 s a step, the other 1 s" in Spread([0, 0], [1, 3]).slow(hosts)
    curves = even.scalars()
    assert curves["ranks/data_seconds/1"] == 0.11
    assert curves["ranks/work_seconds_score"] == pytest.approx(1 / 1.2)
    assert "ranks/data_seconds/0" not in Spread([0.1] * 99, [1.0] * 99).scalars()
