"""Real signals to real processes: every rank stops at the same step, handlers come back."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest

from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.stop import SIGNALS, StopRequest


def stop_on_ranks(comm: Comm) -> list[tuple[int, str | None]]:
    """For each signal, one rank gets it in its step 5; at which call each rank hears of it."""
    heard = []
    for receiver, number in enumerate(SIGNALS):
        with StopRequest() as stop:
            step = 0
            while not stop.agreed(comm):
                step += 1
                if step == 5 and comm.rank == receiver % comm.world_size:
                    os.kill(os.getpid(), number)
            heard.append((step, stop.signal_name))
    return heard


def test_all_ranks_stop_at_the_same_step() -> None:
    first, second = run_ranks(stop_on_ranks, 2)
    assert [step for step, _ in first] == [step for step, _ in second] == [6, 6, 6]
    assert [name for _, name in first] == ["SIGTERM", None, "SIGINT"]
    assert [name for _, name in second] == [None, "SIGUSR1", None]


def test_nobody_stops_without_a_signal() -> None:
    with StopRequest() as stop:
        assert not any(stop.agreed(Comm.solo()) for _ in range(10))
        assert not stop.requested


def test_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest():
        assert all(signal.getsignal(n) not in before for n in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def wait_for_signal(pipe: Connection, same_request_seconds: float, seconds_to_save: float) -> None:
    stop = StopRequest(same_request_seconds=same_request_seconds)
    pipe.send("ready")
    while not stop.requested:
        time.sleep(0.01)
    pipe.send(stop.signal_name)
    time.sleep(seconds_to_save)
    pipe.send("saved")


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[BaseProcess, Connection]]]:
    """Starts a process that says what it hears through a pipe."""
    context, processes = multiprocessing.get_context("forkserver"), []

    def begin(*arguments: float) -> tuple[BaseProcess, Connection]:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=wait_for_signal, args=(there, *arguments))
        process.start()
        there.close()
        processes.append(process)
        assert here.recv() == "ready"
        return process, here

    yield begin
    for process in processes:
        process.kill()
        process.join()


def send(process: BaseProcess, number: signal.Signals) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_ends_the_process_at_once(
    second: signal.Signals, start: Callable[..., tuple[BaseProcess, Connection]]
) -> None:
    process, pipe = start(0.0, 60.0)
    send(process, signal.SIGUSR1)
    assert pipe.recv() == "SIGUSR1"
    send(process, second)
    process.join(timeout=30)
    assert process.exitcode == -second


def test_a_signal_that_the_launcher_repeats_is_the_same_request(
    start: Callable[..., tuple[BaseProcess, Connection]],
) -> None:
    """Ctrl-C reaches ranks from the terminal, and again as SIGTERM from their launcher."""
    process, pipe = start(1e9, 0.5)
    send(process, signal.SIGINT)
    assert pipe.recv() == "SIGINT"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        send(process, number)
    assert pipe.recv() == "saved"
    process.join(timeout=30)
    assert process.exitcode == 0
