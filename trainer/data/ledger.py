"""What was wrong with which sample: one JSON line each, and a budget that stops the run."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from trainer.addresses import without_secrets
from trainer.data.remote import write_file
from trainer.data.waiting_file import WaitingFile, drop_torn_line
from trainer.errors import DataError

MIN_READS = 100
"""The budget is a share; of fewer samples than this it says nothing."""
MOST_LINES = 10_000
"""A rank writes. Of what is rejected later the number in each shard is kept."""
_EXAMPLES = 3
_COUNTED_BETWEEN_WRITES = 1000


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
    that it had read before it was stopped. Lines wait while the disk is full. Behind 10,000 lines
    samples are counted by shard, in `rank-<rank>.counts.json`; those that are read anew after a
    stop count again there.
    """

    def __init__(self, workdir: Path | None, *, rank: int, budget: float) -> None:
        self.path = workdir / "ledger" / f"rank-{rank}.jsonl" if workdir else None
        self._file = WaitingFile(self.path, prepare=drop_torn_line) if self.path else None
        self.budget = budget
        self.num_read = self.num_rejected = 0
        self._examples: deque[Rejected] = deque(maxlen=_EXAMPLES)
        self._written: set[int] | None = None
        self._lines = 0
        self._counts: Counter[str] | None = None
        self._to_write = 0

    def put(self, *, num_read: int, rejected: Sequence[Rejected]) -> None:
        """Write the rejected ones; DataError where they are more than the budget's share."""
        self.num_read += num_read
        self.num_rejected += len(rejected)
        self._examples.extend(rejected)
        if rejected and self._file is not None:
            plain = [_shown(sample) for sample in rejected]
            lines = [(f"{json.dumps(sample._asdict())}\n".encode(), sample) for sample in plain]
            new = [(line, sample) for line, sample in lines if self._is_new(line)]
            room = max(0, MOST_LINES - self._lines)
            if written := b"".join(line for line, _ in new[:room]):
                self._file.append(written)
            self._lines += min(len(new), room)
            self._count([sample.shard for _, sample in new[room:]])

    def _is_new(self, line: bytes) -> bool:
        """Whether no rank had written the line before this process began, nor it since."""
        if self._written is None:
            assert self.path is not None
            self._written = set(map(hash, _lines_in(self.path.parent)))
            self._lines = sum(1 for _ in _lines_of(self.path))
        known = hash(line) in self._written
        if self._lines < MOST_LINES:
            self._written.add(hash(line))
        return not known

    def _count(self, shards: Sequence[str]) -> None:
        if not shards or self.path is None:
            return
        if self._counts is None:
            self._counts = _read_counts(self._counts_path)
        self._counts.update(shards)
        self._to_write += len(shards)
        if self._to_write >= _COUNTED_BETWEEN_WRITES:
            self._write_counts()

    @property
    def _counts_path(self) -> Path:
        assert self.path is not None
        return self.path.with_suffix(".counts.json")

    def _write_counts(self) -> None:
        """Whole, or as it was: a full disk must not stop the run."""
        with suppress(OSError):
            text = json.dumps(self._counts, sort_keys=True, indent=0)
            write_file(str(self._counts_path), text.encode())
            self._to_write = 0

    def close(self) -> None:
        if self._to_write:
            self._write_counts()
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


def _shown(sample: Rejected) -> Rejected:
    shard, reason = without_secrets(sample.shard), without_secrets(sample.reason)
    return sample._replace(shard=shard, reason=reason)


def _lines_in(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.glob("rank-*.jsonl")):
        yield from _lines_of(path)


def _lines_of(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as file:
            yield from file


def _read_counts(path: Path) -> Counter[str]:
    """Nothing where it can't be read: it is only a summary."""
    with suppress(OSError, ValueError):
        return Counter(json.loads(path.read_bytes()))
    return Counter()


def describe(rejected: Sequence[Rejected] | deque[Rejected]) -> str:
    return "; ".join(f"{line.shard} {line.key}: {line.reason}" for line in list(rejected)[-3:])
