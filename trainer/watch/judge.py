"""What rank 0 makes of the ranks' beats: who failed, who is gone, who hangs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from trainer.errors import LostRank
from trainer.together import in_one_sentence

LOOK_SECONDS = 1.0
SILENT_SECONDS = 6.0
"""A rank that has lost somebody takes for gone whom it has not heard of for so long."""
ODD_SECONDS, ODD_TIMES = 30.0, 5.0
"""Told once, without an end: a wait of over 30 s that is five times the longest so far."""


class Beat(NamedTuple):
    """What a rank says of itself."""

    number: int
    """Of the look; it stands still where the process does."""
    host: str
    pid: int
    marks: int
    phase: str
    seconds: float
    usual: float


class Verdict(NamedTuple):
    """How it ends, or (where `ends` is false) what is odd."""

    sentence: str
    ends: bool = True
    code: int = LostRank.exit_code
    silent: tuple[tuple[str, int, int], ...] = ()
    """Host, process and rank of those that do not run."""


class Judge:
    """Hears the ranks' beats; on rank 0 it finds the verdict."""

    def __init__(
        self, store: dist.Store, world_size: int, folder: Path, hang_seconds: float
    ) -> None:
        self._store, self._world_size = store, world_size
        self._folder, self._hang_seconds = folder, hang_seconds
        self._others: dict[int, tuple[Beat, float]] = {}
        self._failed_at: float | None = None

    def hear(self, rank: int) -> None:
        if not self._store.check([f"beat/{rank}"]):
            return
        beat = Beat(*json.loads(self._store.get(f"beat/{rank}").decode()))
        before = self._others.get(rank)
        if before is None or before[0].number != beat.number:
            self._others[rank] = (beat, time.monotonic())

    def pronounce(self) -> None:
        """Put the verdict into the store, where all look for it."""
        for rank in range(self._world_size):
            self.hear(rank)
        if self._store.check(["verdict"]):
            return
        verdict = self._of_failures() or self._of_hangs() or self._of_odd_waits()
        if verdict is not None:
            self._store.set("verdict" if verdict.ends else "odd", json.dumps(verdict))

    def _of_failures(self) -> Verdict | None:
        if not self._store.add("failures", 0):
            return None
        self._failed_at = self._failed_at or time.monotonic()
        waited = time.monotonic() - self._failed_at
        told = self._failures()
        own = [entry for entry in told if entry[3] != LostRank.exit_code]
        silent = self._silent(SILENT_SECONDS)
        if own and (len(told) == self._world_size or waited > 3 * LOOK_SECONDS):
            return self._told(own)
        if not own and silent:
            return Verdict("; ".join(map(self.gone, silent)))
        return self._told(told) if told and waited > 2 * SILENT_SECONDS else None

    def _failures(self) -> list[tuple[int, str, str, int]]:
        """(rank, host, text, exit code) of those that could not go on."""
        keys = [f"failure/{rank}" for rank in range(self._world_size)]
        return [
            tuple(json.loads(self._store.get(key).decode()))
            for key in keys
            if self._store.check([key])
        ]

    def _told(self, told: list[tuple[int, str, str, int]]) -> Verdict:
        sentence = in_one_sentence([entry[:3] for entry in told], self._world_size)
        return Verdict(sentence, code=max(code for *_, code in told))

    def _of_hangs(self) -> Verdict | None:
        now = time.monotonic()
        waits = {r: beat.seconds + now - at for r, (beat, at) in self._others.items()}
        if max(waits.values(), default=0.0) < self._hang_seconds:
            return None
        silent = self._silent(max(SILENT_SECONDS, self._hang_seconds / 2))
        guilty = silent or [self._slowest()]
        named = "; ".join(self.gone(rank) if silent else self._stuck(rank) for rank in guilty)
        where = tuple((self._others[r][0].host, self._others[r][0].pid, r) for r in silent)
        return Verdict(
            f"{named}; the others waited for {self._hang_seconds:.0f} s (hang_seconds), and the "
            f"stacks of all ranks that run are in {self._folder}; the same command goes on from "
            "the last checkpoint",
            silent=where,
        )

    def _of_odd_waits(self) -> Verdict | None:
        if len(self._others) < self._world_size:
            return None
        rank = self._slowest()
        beat = self._others[rank][0]
        if not beat.usual or beat.seconds < max(ODD_SECONDS, ODD_TIMES * beat.usual):
            return None
        return Verdict(
            f"{self._stuck(rank)}, where it took {beat.usual:.3g} s at most so far; stacks are in "
            f"{self._folder}",
            ends=False,
        )

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, (_, at) in self._others.items() if now - at > seconds]

    def _slowest(self) -> int:
        """Who got on least often; of equals, who has waited longest."""
        return min(
            self._others, key=lambda r: (self._others[r][0].marks, -self._others[r][0].seconds)
        )

    def _stuck(self, rank: int) -> str:
        beat = self._others[rank][0]
        where = f"rank {rank} on {beat.host}"
        return f"{where} has got no further for {beat.seconds:.0f} s, in {beat.phase}"

    def gone(self, rank: int) -> str:
        if rank not in self._others:
            return f"rank {rank} ended without a word, or can't be reached"
        beat = self._others[rank][0]
        return (
            f"rank {rank} on {beat.host} ended without a word, stands still, or can't be reached; "
            f"it was in {beat.phase}"
        )
