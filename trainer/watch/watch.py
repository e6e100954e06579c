"""Beside each rank, outside the collectives: who gets on, who hangs, who is gone.

Every rank says once a second in the ranks' store what it does and how often it got on (`PULSE`).
Rank 0 reads all of them. Where one gets on no more for too long, has failed by itself, or is gone,
it says so in one sentence; every rank writes the stacks of its threads and ends. Nothing here waits
for a collective, so it also sees hangs in which there is none: a disk, a data worker, a setup.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from trainer.errors import LostRank, TrainerError
from trainer.meeting import Place, side_channel
from trainer.pulse import PULSE
from trainer.together import say
from trainer.watch.judge import LOOK_SECONDS, SILENT_SECONDS, Beat, Judge, Verdict
from trainer.watch.stacks import dump_another, dump_on_request, write_stacks

PART_SECONDS = 20.0
"""After a failure each rank waits at most so long for the sentence that explains it."""


class Watch:
    """A thread that looks, and one that talks to the store; a context around all of a run."""

    def __init__(
        self,
        place: Place,
        workdir: Path,
        hang_seconds: float,
        *,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`note` takes what rank 0 says, for the run's log."""
        self._place, self._folder = place, workdir / "stacks"
        self._hang_seconds, self._note = hang_seconds, note
        self._store = side_channel(place)
        self._host = socket.gethostname()
        self._judge = Judge(self._store, place.world_size, self._folder, hang_seconds)
        self._closed, self._verdict_came = threading.Event(), threading.Event()
        self._verdict: Verdict | None = None
        self._heard_at = time.monotonic()
        self._parting = False
        self._told: set[str] = set()

    def __enter__(self) -> Watch:
        dump_on_request()
        PULSE.beat()
        for work in (self._talk, self._look):
            threading.Thread(target=work, daemon=True, name=f"watch {work.__name__}").start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """A failure of this rank alone becomes the sentence of all; a bug keeps its traceback."""
        alone = isinstance(error, Exception) and not getattr(error, "on_all_ranks", False)
        sentence = self._parted(error) if alone and self._place.world_size > 1 else None
        self._closed.set()
        if sentence is None:
            self._finished()
        faulthandler.cancel_dump_traceback_later()
        if sentence is not None and (isinstance(error, TrainerError) or _lost_contact(error)):
            raise self._as_error(sentence, error) from error

    def _finished(self) -> None:
        """Rank 0 holds the store, so it stays until the others no longer ask anything there."""
        try:
            self._store.add("finished", 1)
            if self._place.rank == 0:
                self._until(lambda: self._store.add("finished", 0) >= self._place.world_size)
        except (dist.DistNetworkError, dist.DistStoreError, RuntimeError):
            return

    def _as_error(self, sentence: str, error: BaseException | None) -> TrainerError:
        told = type(error) if isinstance(error, TrainerError) else LostRank
        ending = told(sentence)
        ending.is_said = True
        if self._verdict is not None:
            ending.exit_code = self._verdict.code  # that of whose mistake it was
        return ending

    def _parted(self, error: BaseException | None) -> str | None:
        """Tell the others; what rank 0 makes of all that is told, if it still can."""
        self._parting = True
        code = LostRank.exit_code if _lost_contact(error) else getattr(error, "exit_code", 1)
        text = str(error) if isinstance(error, TrainerError) else f"{type(error).__name__}: {error}"
        try:
            self._store.set(
                f"failure/{self._place.rank}",
                json.dumps([self._place.rank, self._host, text[:2000], code]),
            )
            self._store.add("failures", 1)
        except (dist.DistNetworkError, dist.DistStoreError):
            pass  # the verdict is then that nobody answers
        self._verdict_came.wait(PART_SECONDS)
        return self._verdict.sentence if self._verdict is not None else None

    # -- the thread that talks --------------------------------------------------------------------

    def _talk(self) -> None:
        number = 0
        try:
            while not self._closed.wait(LOOK_SECONDS if number else 0.0):
                number += 1
                self._say_beat(number)
                if self._place.rank == 0:
                    self._judge.pronounce()
                else:
                    self._judge.hear(0)
                self._heard_at = time.monotonic()
                for key in ("odd", "verdict"):
                    if self._store.check([key]):
                        self._follow(self._read(key))
        except (dist.DistNetworkError, dist.DistStoreError, RuntimeError):
            if not self._closed.wait(SILENT_SECONDS):
                self._conclude(Verdict(self._judge.gone(0)))

    def _say_beat(self, number: int) -> None:
        reading = PULSE.read()
        beat = Beat(number, self._host, os.getpid(), *reading)
        self._store.set(f"beat/{self._place.rank}", json.dumps(beat))

    def _read(self, key: str) -> Verdict:
        sentence, ends, code, silent = json.loads(self._store.get(key).decode())
        return Verdict(sentence, ends, code, tuple(tuple(each) for each in silent))

    # -- how it ends ------------------------------------------------------------------------------

    def _follow(self, verdict: Verdict) -> None:
        if verdict.ends:
            self._conclude(verdict)
        elif verdict.sentence not in self._told:
            self._told.add(verdict.sentence)
            self._write_stacks(verdict)
            if self._place.rank == 0:
                self._speak(f"note: {verdict.sentence}")

    def _conclude(self, verdict: Verdict) -> None:
        """Stacks, the sentence, and the end; a main thread that parts by itself ends by itself."""
        if self._closed.is_set():
            return
        self._verdict = verdict
        if not self._parting:
            self._write_stacks(verdict)
        self._say_and_leave(verdict)
        self._verdict_came.set()
        if not self._parting:
            self._closed.wait(LOOK_SECONDS)
            _end(verdict.code)

    def _say_and_leave(self, verdict: Verdict) -> None:
        """Rank 0 speaks before anybody leaves, for a launcher then kills the rest of its host. If
        rank 0 is gone, the first of each host speaks."""
        try:
            if self._place.rank == 0:
                self._speak(f"error: {verdict.sentence}")
                self._store.set("said", "")
                self._until(lambda: self._store.add("left", 0) >= self._place.world_size - 1)
            else:
                self._until(lambda: self._store.check(["said"]))
                self._store.add("left", 1)
        except (dist.DistNetworkError, dist.DistStoreError, RuntimeError):
            if self._place.local_rank == 0 and self._place.rank:
                say(verdict.sentence)

    def _until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 2 * LOOK_SECONDS + 1.0
        while time.monotonic() < end and not condition():
            time.sleep(0.05)

    def _speak(self, line: str) -> None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
        self._note(line)

    def _write_stacks(self, verdict: Verdict) -> None:
        try:
            write_stacks(
                self._folder / f"rank-{self._place.rank:05d}.txt",
                f"rank {self._place.rank} on {self._host}",
            )
            for host, pid, rank in verdict.silent:
                if host == self._host and self._place.local_rank < 2:
                    dump_another(pid, self._folder / f"rank-{rank:05d}.txt")
        except OSError as error:
            sys.stderr.write(f"can't write {self._folder}: {error.strerror}\n")

    # -- the thread that looks --------------------------------------------------------------------

    def _look(self) -> None:
        """Should this thread too be kept from running, by code that holds the interpreter, the
        stacks go to standard error and the process ends."""
        while not self._closed.wait(LOOK_SECONDS):
            faulthandler.dump_traceback_later(2 * self._hang_seconds + 60.0, exit=True)
            if time.monotonic() - self._heard_at > self._hang_seconds + 2 * SILENT_SECONDS:
                verdict = Verdict(self._judge.gone(0))
                self._write_stacks(verdict)
                say(verdict.sentence)
                _end(LostRank.exit_code)


def _lost_contact(error: BaseException | None) -> bool:
    """Whether an error says that others could not be reached, and not what is wrong here."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "nccl", "connection closed", "connection reset", "timed out waiting")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
