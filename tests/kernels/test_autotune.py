"""Which sizes a kernel runs with."""

from __future__ import annotations

import time

import pytest
import torch

from trainer.kernels.autotune import ROUNDS, chosen, size_class

CPU = torch.device("cpu")


def test_fixed_sizes_are_the_first_and_nothing_is_run() -> None:
    ran: list[str] = []
    found = chosen(("one", "two"), ran.append, sizes="fixed", problem="fixed", device=CPU)
    assert (found, ran) == ("one", [])


@pytest.mark.heavy
def test_timed_sizes_are_the_fastest_and_are_remembered() -> None:
    ran: list[float] = []

    def run(seconds: float) -> None:
        ran.append(seconds)
        time.sleep(seconds)

    candidates = (0.3, 0.0, 0.2)
    found = [chosen(candidates, run, sizes="timed", problem="p", device=CPU) for _ in range(2)]
    assert found == [0.0, 0.0]
    assert sorted(ran) == sorted(candidates * (1 + ROUNDS))
    assert chosen((0.1, 0.0), run, sizes="timed", problem="other", device=CPU) == 0.0


def test_sizes_between_the_same_powers_of_two_are_of_one_class() -> None:
    assert size_class(1024, 100_000) == size_class(1500, 70_000) != size_class(2048, 100_000)
