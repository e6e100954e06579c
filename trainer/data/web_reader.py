"""`data.reader: webdataset`: shards without an index, as an endless stream of random shards.

Weaker than the indexed reader, by the nature of streams:
- Every worker of every rank draws shards with replacement, so a sample may come twice in an epoch
  or not at all; an epoch is `data.epoch_samples` samples, whatever the shards hold.
- Batches depend on the number of workers and ranks. `seek` opens shards anew, drawn by a seed
  that contains the position: a resumed run sees other samples than an uninterrupted one.
- `view` shows other samples than training will, under their right ids.
- Bytes have no checksum: a shard cut between two members is short in silence. Compressed tars
  are expanded.
- `pipe:` runs a shell command and is refused unless `data.allow_pipe` is true.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import webdataset
from braceexpand import braceexpand
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trainer.config import DataConfig
from trainer.data import feed
from trainer.data.decode import BadSample
from trainer.data.feed import (
    MAX_REJECTS,
    Failure,
    Plan,
    Prepare,
    RawBatch,
    next_batch,
    nothing_usable,
)
from trainer.data.ledger import Rejected
from trainer.data.remote import expand_shards, open_for_scan
from trainer.data.shards import RawSample, sample_id
from trainer.data.tar import Bytes
from trainer.data.workers import loader_options
from trainer.errors import ConfigError, DataError
from trainer.hashing import key_of, permutation


class WebFeed:
    """Batches of plans, of which only the number of rows, the purpose and the start count."""

    def __init__(self, config: DataConfig, prepare: Prepare, *, pin_memory: bool) -> None:
        if config.epoch_samples is None:
            raise ConfigError(
                "data.reader: webdataset needs data.epoch_samples, the number of samples that "
                "count as an epoch (without an index nobody can know it)"
            )
        self.epoch_size = config.epoch_samples
        self._shards = _expand(config)
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


class WebSamples(IterableDataset[RawBatch | Failure]):
    """Raw batches of one plan from a number on, without end."""

    def __init__(
        self, shards: list[str], config: DataConfig, prepare: Prepare, plan: Plan, number: int
    ) -> None:
        super().__init__()
        self._shards_without_sample = 0
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
        self, samples: Iterator[RawSample], positions: tuple[int, ...], rejected: list[Rejected]
    ) -> RawBatch:
        rows = [self._usable(samples, position, rejected) for position in positions]
        return self.prepare.batch(
            [sample for sample, _ in rows],
            ids=[sample_id for _, sample_id in rows],
            # Not the epoch: a sample that comes twice in one is to be seen in two views.
            epochs=positions,
            rejected=rejected,
        )

    def _usable(
        self, samples: Iterator[RawSample], position: int, rejected: list[Rejected]
    ) -> tuple[Any, int]:
        for _ in range(MAX_REJECTS):
            raw = next(samples)
            try:
                return self.prepare.sample(raw, position, self.plan), raw.sample_id
            except BadSample as error:
                reason = f"{error} (members: {', '.join(sorted(raw.fields))})"
                epoch = position // cast(int, self.config.epoch_samples)
                rejected.append(Rejected(raw.shard, raw.key, reason, epoch, position))
        raise nothing_usable(rejected)

    def _raw_samples(self, worker: int) -> Iterator[RawSample]:
        """An endless stream of samples of shards drawn with replacement."""
        # Nothing of webdataset's decoding or opening is used except, where allowed, its pipes.
        webdataset.utils.enforce_security = not self.config.allow_pipe
        start = self.plan.first + self.number * self.plan.rows
        rank = self.plan.share.rank
        seed = key_of(self.prepare.seed, self.plan.purpose, self.plan.base, start, rank, worker)
        urls = webdataset.ResampledShards(
            self.shards, seed=seed, worker_seed=lambda: worker, deterministic=True
        )
        files = webdataset.tariterators.tar_file_expander(self._opened(iter(urls)))
        try:
            for sample in webdataset.tariterators.group_by_keys(files):
                self._shards_without_sample = 0
                yield _raw(sample)
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise DataError(f"webdataset can't read on: {error}") from error

    def _opened(self, urls: Iterator[dict[str, str]]) -> Iterator[dict[str, Any]]:
        for entry in urls:
            self._shards_without_sample += 1
            if self._shards_without_sample > MAX_REJECTS:
                raise DataError(f"{MAX_REJECTS} shards in a row held no sample: {entry['url']}")
            with _open(entry["url"]) as stream:
                yield {"url": entry["url"], "stream": stream}


def read_once(config: DataConfig, *, seed: int) -> Iterator[RawSample]:
    """Every sample of every shard once, in an order of the shards that follows from the seed.

    DataError where a shard can't be read on.
    """
    webdataset.utils.enforce_security = not config.allow_pipe
    shards = _expand(config)
    for row in permutation(len(shards), key_of(seed, "read once")).tolist():
        try:
            with _open(shards[row]) as stream:
                entry = [{"url": shards[row], "stream": stream}]
                files = webdataset.tariterators.tar_file_expander(iter(entry))
                yield from map(_raw, webdataset.tariterators.group_by_keys(files))
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise DataError(f"webdataset can't read {shards[row]}: {error}") from error


def _expand(config: DataConfig) -> list[str]:
    """The shards of the list; `pipe:` commands only where they are allowed."""
    shards: list[str] = []
    for part in config.train.split("::"):
        if not part.strip().startswith("pipe:"):
            shards += expand_shards(part)
        elif config.allow_pipe:
            shards += braceexpand(part.strip())
        else:
            raise ConfigError(f"{part.strip()!r} runs a command; allow it by data.allow_pipe: true")
    return shards


def _open(url: str) -> AbstractContextManager[Bytes]:
    if not url.startswith("pipe:"):
        return open_for_scan(url)
    return cast(AbstractContextManager[Bytes], webdataset.gopen(url))


def _raw(sample: dict[str, Any]) -> RawSample:
    key, shard = sample["__key__"], sample["__url__"]
    fields = {name: data for name, data in sample.items() if not name.startswith("__")}
    return RawSample(sample_id(shard, key), shard, key, fields)
