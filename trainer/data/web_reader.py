"""`data.reader: webdataset`: shards without an index, as an endless stream of random shards.

Weaker than the indexed reader, by the nature of streams:
- Every worker of every rank draws shards with replacement, so a sample may come twice in an epoch
  or not at all; an epoch is `data.epoch_samples` samples, whatever the shards hold.
- Batches depend on the number of workers and ranks. `seek` opens shards anew, drawn by a seed
  that contains the position: a resumed run sees other samples than an uninterrupted one.
- `view` shows other samples than training will, under their right ids.
- Contents have no checksum: a flipped bit of a text is not noticed. What gzip, bzip2 and xz have
  compressed is expanded. A shard that can't be opened, or not read on, is one bad sample,
  whatever it holds: a line in the ledger, and against `data.bad_sample_budget`.
- `pipe:` runs a shell command and is refused unless `data.allow_pipe` is true.
"""

from __future__ import annotations

import lzma
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import webdataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trainer.config import DataConfig
from trainer.data import feed
from trainer.data.columnar import is_columnar
from trainer.data.decode import BadSample
from trainer.data.expanded import expanded
from trainer.data.feed import (
    MAX_REJECTS,
    Failure,
    Plan,
    Prepare,
    RawBatch,
    next_batch,
    nothing_usable,
)
from trainer.data.index import MAX_MEMBER_BYTES, MAX_SAMPLE_BYTES, split_name
from trainer.data.ledger import Rejected
from trainer.data.remote import expand_sets, is_remote, open_for_scan
from trainer.data.sets import named_shard, refuse_other_shards
from trainer.data.shards import RawSample, sample_id
from trainer.data.tables import is_table
from trainer.data.tar import BLOCK, Bytes, read_tar
from trainer.data.workers import loader_options
from trainer.errors import ConfigError, DataError
from trainer.hashing import key_of, permutation

Shard = tuple[str, str]
"""Set, '' where it has no name, and path, URL or command."""


class WebFeed:
    """Batches of plans, of which only the number of rows, the purpose and the start count."""

    def __init__(
        self,
        config: DataConfig,
        prepare: Prepare,
        *,
        pin_memory: bool,
        before: Sequence[str] | None = None,
    ) -> None:
        """`before` are the `lines` of the run that is gone on with."""
        if config.epoch_samples is None:
            raise ConfigError(
                "data.reader: webdataset needs data.epoch_samples, the number of samples that "
                "count as an epoch (without an index nobody can know it)"
            )
        self.epoch_size = config.epoch_samples
        self._shards = _expand(config)
        _refuse_missing(self._shards)
        if before is not None:
            self._shards = _in_order_of(before, self._shards)
        self.lines = [_line(shard) for shard in self._shards]
        self._config, self._prepare, self._pin_memory = config, prepare, pin_memory
        self._next: tuple[Plan, int] | None = None
        self._batches: Iterator[RawBatch | Failure] | None = None

    def batch(self, plan: Plan, number: int) -> RawBatch | Failure:
        if self._batches is None or self._next != (plan, number):
            self.close()
            samples = WebSamples(self._shards, self._config, self._prepare, plan, number)
            self._batches = iter(
                DataLoader(
                    samples,
                    batch_size=None,
                    pin_memory=self._pin_memory,
                    **loader_options(self._config.workers, preload=feed.__name__),
                )
            )
        self._next = plan, number + 1
        return next_batch(self._batches, workers=self._config.workers)

    def close(self) -> None:
        iterator: Any = self._batches
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        self._batches = None


class Broken(NamedTuple):
    """A shard that can't be read, or not to its end."""

    shard: str
    reason: str


class WebSamples(IterableDataset[RawBatch | Failure]):
    """Raw batches of one plan from a number on, without end."""

    def __init__(
        self, shards: list[Shard], config: DataConfig, prepare: Prepare, plan: Plan, number: int
    ) -> None:
        super().__init__()
        self.shards, self.config, self.prepare = shards, config, prepare
        self.plan, self.number = plan, number

    def __iter__(self) -> Iterator[RawBatch | Failure]:
        worker = get_worker_info()
        position, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        samples = self._raw_samples(position)
        number = self.number + position
        while (task := self.plan.task(number)) is not None:
            rejected: list[Rejected] = []
            try:
                yield self._batch(samples, task.positions, rejected)
            except DataError as error:
                yield Failure(str(error), tuple(rejected))
                return
            number += workers

    def _batch(
        self,
        samples: Iterator[RawSample | Broken],
        positions: tuple[int, ...],
        rejected: list[Rejected],
    ) -> RawBatch:
        rows = [self._usable(samples, position, rejected) for position in positions]
        return self.prepare.batch(
            [sample for sample, _ in rows],
            ids=[sample_id for _, sample_id in rows],
            # Not the epoch: a sample that comes twice in one is to be seen in two views.
            epochs=positions,
            rejected=rejected,
            task=self.plan,
        )

    def _usable(
        self, samples: Iterator[RawSample | Broken], position: int, rejected: list[Rejected]
    ) -> tuple[Any, int]:
        epoch = position // cast(int, self.config.epoch_samples)
        for _ in range(MAX_REJECTS):
            raw = next(samples)
            if isinstance(raw, Broken):
                rejected.append(Rejected(raw.shard, "", raw.reason, epoch, position))
                continue
            try:
                return self.prepare.sample(raw, position, self.plan), raw.sample_id
            except BadSample as error:
                reason = f"{error} (members: {', '.join(sorted(raw.fields))})"
                rejected.append(Rejected(raw.shard, raw.key, reason, epoch, position))
        raise nothing_usable(rejected)

    def _raw_samples(self, worker: int) -> Iterator[RawSample | Broken]:
        """An endless stream of samples of shards drawn with replacement."""
        # Nothing of webdataset's decoding or opening is used except, where allowed, its pipes.
        webdataset.utils.enforce_security = not self.config.allow_pipe
        start = self.plan.first + self.number * self.plan.rows
        rank = self.plan.share.rank
        seed = key_of(self.prepare.seed, self.plan.purpose, self.plan.base, start, rank, worker)
        places = {path: (name, path) for name, path in self.shards}
        urls = webdataset.ResampledShards(
            list(places), seed=seed, worker_seed=lambda: worker, deterministic=True
        )
        without_sample = 0
        for entry in urls:
            without_sample += 1
            for sample in _samples_of(places[entry["url"]]):
                without_sample = 0
                yield sample
            if without_sample > MAX_REJECTS:
                raise DataError(f"{MAX_REJECTS} shards in a row held no sample: {entry['url']}")


def read_once(config: DataConfig, *, seed: int) -> Iterator[RawSample]:
    """Every sample of every shard once, in an order of the shards that follows from the seed.

    What can't be read of a shard is left out; DataError where no shard can be read.
    """
    webdataset.utils.enforce_security = not config.allow_pipe
    shards = _expand(config)
    broken: list[Broken] = []
    for row in permutation(len(shards), key_of(seed, "read once")).tolist():
        for sample in _samples_of(shards[row]):
            if isinstance(sample, RawSample):
                yield sample
            else:
                broken.append(sample)
    if len(broken) == len(shards):
        raise DataError(f"none of {len(shards)} shards can be read: {broken[0].reason}")


def _samples_of(shard: Shard) -> Iterator[RawSample | Broken]:
    """The samples of one shard; where it can't be read on, that at last."""
    name, url = shard
    try:
        with _open(url) as stream:
            files = read_tar(expanded(stream), shard=url, max_member_bytes=MAX_MEMBER_BYTES)
            for key, fields in _grouped(files):
                yield RawSample(sample_id(url, key, name), url, key, fields)
    except (DataError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        yield Broken(url, f"can't be read on: {said.removeprefix(f'{url}: ')}")


def _grouped(files: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of samples whose files follow each other; others belong to none."""
    key, fields, held = "", dict[str, bytes](), 0
    for name, data in files:
        parts = split_name(name)
        if parts is None:
            continue
        if parts[0] != key and fields:
            yield key, fields
            fields, held = {}, 0
        key, suffix = parts
        if suffix in fields:
            raise DataError(f"key {key!r} has two members {suffix!r}")
        fields[suffix] = data
        held += BLOCK + len(data)
        if held > MAX_SAMPLE_BYTES:
            raise DataError(f"the members of key {key!r} have more than {MAX_SAMPLE_BYTES} bytes")
    if fields:
        yield key, fields


def _expand(config: DataConfig) -> list[Shard]:
    """The shards of the list; `pipe:` commands only where they are allowed."""
    shards = expand_sets(config.train, pipes=True)
    command = next((path for _, path in shards if path.startswith("pipe:")), None)
    if command is not None and not config.allow_pipe:
        raise ConfigError(f"{command!r} runs a command; allow it by data.allow_pipe: true")
    if (
        table := next((path for _, path in shards if is_table(path) or is_columnar(path)), None)
    ) is not None:
        raise ConfigError(f"{table} is a table, which only data.reader: indexed reads")
    return shards


def _refuse_missing(shards: Sequence[Shard]) -> None:
    for _, path in shards:
        if not path.startswith("pipe:") and not is_remote(path) and not os.path.isfile(path):
            kind = "is a folder; name its shards" if os.path.isdir(path) else "is not there"
            raise DataError(f"the shard {path} {kind}")


def _line(shard: Shard) -> str:
    """A shard's name; without an index nothing tells what it holds."""
    name, path = shard
    return f"{path if path.startswith('pipe:') else named_shard(name, path)} -"


def _in_order_of(lines: Sequence[str], shards: list[Shard]) -> list[Shard]:
    refuse_other_shards(lines, [_line(shard) for shard in shards])
    rows: dict[str, list[Shard]] = {}
    for shard in shards:
        rows.setdefault(_line(shard), []).append(shard)
    return [rows[line].pop(0) for line in lines]


def _open(url: str) -> AbstractContextManager[Bytes]:
    if not url.startswith("pipe:"):
        try:
            return open_for_scan(url)
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
    return cast(AbstractContextManager[Bytes], webdataset.gopen(url))
