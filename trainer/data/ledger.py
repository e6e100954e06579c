"""What was wrong with which sample: one JSON line each, and a budget that stops the run."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.data.waiting_file import WaitingFile, drop_torn_line
from trainer.errors import DataError

MIN_READS = 100
"""The budget is a share; of fewer samples than this it says nothing."""
_EXAMPLES = 3


class Rejected(NamedTuple):
    """One sample that could not be used."""

    shard: str
    key: str
    reason: str
    epoch: int
    position: int
    """Where in the run it was due; another sample of the epoch took its place."""


class Ledger:
    """Appends to `<workdir>/ledger/rank-<rank>.jsonl` and counts (in this process's lifetime).

    What stands in the folder already is not written again: a run that goes on reads samples anew
    that it had read before it was stopped. Lines wait while the disk is full.
    """

    def __init__(self, workdir: Path | None, *, rank: int, budget: float) -> None:
        self.path = workdir / "ledger" / f"rank-{rank}.jsonl" if workdir else None
        self._file = WaitingFile(self.path, prepare=drop_torn_line) if self.path else None
        self.budget = budget
        self.num_read = self.num_rejected = 0
        self._examples: deque[Rejected] = deque(maxlen=_EXAMPLES)
        self._written: set[int] | None = None

    def put(self, *, num_read: int, rejected: Sequence[Rejected]) -> None:
        """Write the rejected ones; DataError where they are more than the budget's share."""
        self.num_read += num_read
        self.num_rejected += len(rejected)
        self._examples.extend(rejected)
        if rejected and self._file is not None:
            lines = (f"{json.dumps(line._asdict())}\n".encode() for line in rejected)
            if new := b"".join(line for line in lines if self._is_new(line)):
                self._file.append(new)

    def _is_new(self, line: bytes) -> bool:
        """Whether no rank had written the line before this process began, nor it since."""
        if self._written is None:
            assert self.path is not None
            self._written = set(map(hash, _lines_in(self.path.parent)))
        known = hash(line) in self._written
        self._written.add(hash(line))
        return not known

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def check(self) -> None:
        """DataError where more than the budget's share of the samples read was rejected."""
        if self.num_read >= MIN_READS and self.num_rejected > self.budget * self.num_read:
            share = self.num_rejected / self.num_read
            raise DataError(
                f"{self.num_rejected} of {self.num_read} samples read ({share:.1%}) could not be "
                f"used, more than data.bad_sample_budget = {self.budget:g}: {self.examples()}"
                + (f"; all of them are in {self.path}" if self.path else "")
            )

    def examples(self) -> str:
        """The last few, in words."""
        return describe(self._examples)


def _lines_in(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.glob("rank-*.jsonl")):
        with path.open("rb") as file:
            yield from file


def describe(rejected: Sequence[Rejected] | deque[Rejected]) -> str:
    return "; ".join(f"{line.shard} {line.key}: {line.reason}" for line in list(rejected)[-3:])
