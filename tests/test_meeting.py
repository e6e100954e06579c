"""Ranks find each other, or one sentence says what is wrong and for whom one waits."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest

from trainer import meeting
from trainer.errors import ConfigError
from trainer.meeting import Place, meeting_point, read_place

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_a_launchers_environment_is_read():
    assert read_place({**WHOLE, "LOCAL_RANK": "1"}) == Place(1, 2, 1, "localhost", 29500)
    assert read_place({}) == Place()
    assert read_place({"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1
    assert read_place({"RANK": "", "WORLD_SIZE": " "}) == Place()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"RANK": None}, "RANK is not set"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set for 2 ranks"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set for 2 ranks"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_PORT": "70000"}, "ports end at 65535"),
        ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
    ],
)
def test_a_half_given_or_wrong_environment_is_one_sentence(change, sentence):
    environment = {name: value for name, value in {**WHOLE, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=sentence):
        read_place(environment)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_several_tasks_without_a_rank_are_refused(name):
    with pytest.raises(ConfigError, match="8 runs would start"):
        read_place({name: "8"})
    assert read_place({name: "1"}) == Place()


def test_a_port_that_is_taken_is_named():
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} \(MASTER_PORT\) is taken"):
            meeting_point(Place(0, 2, 0, "127.0.0.1", port), timedelta(seconds=5))


@pytest.mark.heavy
def test_a_host_that_nobody_knows_is_named_at_once():
    with pytest.raises(ConfigError, match=r"'no-such-host\.invalid' is no known host"):
        meeting_point(Place(1, 2, 0, "no-such-host.invalid", 29500), timedelta(seconds=600))


@pytest.mark.heavy
def test_who_waits_says_for_whom(monkeypatch, capsys):
    monkeypatch.setattr(meeting, "SAY_EVERY_SECONDS", 0.3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(ConfigError, match="ranks 1, 2 of 3 did not come"):
        meeting_point(Place(0, 3, 0, "127.0.0.1", port), timedelta(seconds=1.2))
    assert "rank 0 waits for ranks 1, 2 of 3" in capsys.readouterr().err
