"""Fill an embedding store with a frozen teacher's vectors of the samples of a shard list."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32
from numpy.typing import NDArray
from torch import Tensor

from trainer.comm import Comm, agreed
from trainer.data.ahead import in_order
from trainer.data.decode import BadSample
from trainer.data.shards import DamagedSample, RawSample, ShardSet
from trainer.data.texts import TextSet
from trainer.errors import ConfigError, DataError, TrainerError
from trainer.hashing import key_of, uniform
from trainer.long_work import LongWork
from trainer.store import EmbeddingStore, Identity, StoreWriter
from trainer.store.shard_file import SUFFIX, encode, map_shard

CHECKED_SHARE = 1e-3
"""Of the samples that are computed a second time, alone, and compared."""
_SPAN = 64  # samples that are read at once
_TOLERANCE = {"float32": 1e-4, "float16": 1e-4, "bfloat16": 1e-3}
"""Of one minus the cosine between a stored vector and the one computed again."""


@runtime_checkable
class Teacher(Protocol):
    """Gives every sample a few vectors, each a function of that sample alone."""

    @property
    def identity(self) -> Identity:
        """What its vectors are."""
        ...

    @property
    def chunk(self) -> int | None:
        """Samples of a shard that are held and encoded together; all of them where None."""
        ...

    def read(self, sample: RawSample) -> Any:
        """What `encode` needs of a sample; BadSample where the sample lacks it."""
        ...

    def encode(self, items: Sequence[Any]) -> Float32[Tensor, "items vectors dim"]: ...

    def stand_by(self) -> None:
        """Nothing more to encode on this rank: help the others, where they need it to."""
        ...


class Embedded(NamedTuple):
    """What a call of `embed` has done, over all ranks."""

    shards: int
    """Shards of the data."""
    computed: int
    """Shards that were not in the store before."""
    skipped: int
    """Samples of the computed shards that the teacher can't read, hence without a vector."""
    checked: int
    """Samples that were computed a second time and agreed."""

    @property
    def already_done(self) -> bool:
        return self.computed == 0


def embed(
    spec: str | TextSet,
    out: Path | str,
    *,
    teacher: Teacher,
    comm: Comm,
    workers: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> Embedded:
    """Write the teacher's vectors of every sample of the shards, or text, into the store `out`.

    The shards that the store lacks are dealt to the ranks in turn. What is computed together is
    decided within a shard, so the bytes depend neither on the number of ranks or of `workers`,
    processes that read and decode ahead, nor on where an earlier build was killed. A thousandth of
    the samples is computed again and must agree. DataError on all ranks if one fails.
    """
    shards = _opened(spec)
    names = _plain_names(shards)
    sources = {name: (_digest(shards, row), shards.sizes[row]) for row, name in enumerate(names)}
    writer = StoreWriter.begin(Path(out), teacher.identity, sources)
    agreed(comm, writer.announce if comm.is_main else _nothing)
    todo = _agreed_list(comm, lambda: [row for row, n in enumerate(names) if not writer.has(n)])
    skipped, checked, own = [0], [0], todo[comm.rank :: comm.world_size]
    work = LongWork("embedding", total=sum(shards.sizes[row] for row in own), unit="samples")

    spans = _spans(shards, own)
    reader = _Reader(shards, teacher if not workers else _reader_of(teacher))

    def compute() -> None:
        read = in_order(reader, spans, workers=workers)
        for row in own:
            ids, vectors = _shard_vectors(shards, row, read, teacher, work)
            writer.write(names[row], ids, vectors)
            skipped.append(shards.sizes[row] - len(ids))
            checked.append(_check_again(writer.path(names[row]), shards, row, teacher))
            report(f"{names[row]}: {len(ids)} samples")

    with work:
        agreed(comm, lambda: _together(teacher, compute))
    agreed(comm, writer.finish if comm.is_main else _nothing)
    sums = comm.gather_json([sum(skipped), sum(checked)])
    return Embedded(len(names), len(todo), *(sum(column) for column in zip(*sums, strict=True)))


def verify(spec: str | TextSet, out: Path | str, *, teacher: Teacher, comm: Comm) -> int:
    """Compare a finished store with its teacher: checksums of all, a thousandth computed again.

    The number of samples that were computed. DataError where something differs.
    """
    store, shards = EmbeddingStore.open(out), _opened(spec)
    names = _plain_names(shards)
    checked = [0]

    def check() -> None:
        if comm.is_main:
            store.check()
            sources = {name: (_digest(shards, row), 0) for row, name in enumerate(names)}
            StoreWriter.begin(store.folder, teacher.identity, sources)  # refuses others
        for row in range(comm.rank, len(names), comm.world_size):
            path = store.folder / f"{names[row]}{SUFFIX}"
            checked.append(_check_again(path, shards, row, teacher))

    agreed(comm, lambda: _together(teacher, check))
    return sum(comm.gather_json(sum(checked)))


class Reader(Protocol):
    """The part of a teacher that reads, without its model: what reader processes are sent."""

    def read(self, sample: RawSample) -> Any: ...


@runtime_checkable
class ReadsApart(Protocol):
    """A teacher whose reading takes long enough to be done by processes of their own."""

    reader: Reader


class _Reader:
    """Ids and items of some samples in a row that can be read."""

    def __init__(self, shards: ShardSet | TextSet, reader: Reader) -> None:
        self._shards, self._reader = shards, reader

    def __call__(self, span: tuple[int, int]) -> list[tuple[int, Any]]:
        found: list[tuple[int, Any]] = []
        for index in range(*span):
            try:
                sample = self._shards.read(index)
                found.append((sample.sample_id, self._reader.read(sample)))
            except (BadSample, DamagedSample):
                continue
        return found


def _reader_of(teacher: Teacher) -> Reader:
    if not isinstance(teacher, ReadsApart):
        raise ConfigError(
            f"workers read images ahead, and {teacher.identity.teacher} reads none; leave them out"
        )
    return teacher.reader


def _spans(shards: ShardSet | TextSet, rows: Sequence[int]) -> list[tuple[int, int]]:
    """Samples to read at once, shard after shard."""
    starts = np.cumsum([0, *shards.sizes]).tolist()
    return [
        (begin, min(begin + _SPAN, starts[row + 1]))
        for row in rows
        for begin in range(starts[row], starts[row + 1], _SPAN)
    ]


def _chunks(
    read: Iterator[list[tuple[int, Any]]], samples: int, size: int | None
) -> Iterator[list[tuple[int, Any]]]:
    """What was read of one shard of so many samples, as it is encoded: `size` at a time."""
    held: list[tuple[int, Any]] = []
    for _ in range(0, samples, _SPAN):
        held += next(read)
        while size is not None and len(held) >= size:
            yield held[:size]
            held = held[size:]
    if held:
        yield held


def _agreed_list(comm: Comm, action: Callable[[], list[int]]) -> list[int]:
    """What the main rank's `action` returns."""
    found: list[int] = []
    agreed(comm, lambda: found.extend(action()) if comm.is_main else None)
    result: list[int] = comm.broadcast_json(found)
    return result


def _together(teacher: Teacher, compute: Callable[[], None]) -> None:
    """`compute`; then, also if it failed, help the ranks that have not finished."""
    try:
        compute()
    except (TrainerError, OSError):
        teacher.stand_by()
        raise
    teacher.stand_by()


def _nothing() -> None: ...


def _shard_vectors(
    shards: ShardSet | TextSet,
    shard: int,
    read: Iterator[list[tuple[int, Any]]],
    teacher: Teacher,
    work: LongWork,
) -> tuple[NDArray[np.int64], Tensor]:
    identity = teacher.identity
    ids: list[int] = []
    parts = [torch.empty(0, identity.vectors, identity.dim)]
    for chunk in _chunks(read, shards.sizes[shard], teacher.chunk):
        ids += [sample_id for sample_id, _ in chunk]
        parts.append(teacher.encode([item for _, item in chunk]))
        work.done(len(chunk))
    return np.array(ids, dtype=np.int64), torch.cat(parts)


def _check_again(path: Path, shards: ShardSet | TextSet, shard: int, teacher: Teacher) -> int:
    """Compute some samples of a written shard alone; DataError where the file says otherwise."""
    block = map_shard(path)
    if not len(block):
        return 0
    draws = uniform(torch.from_numpy(block.ids.copy()), key_of("checked again")).numpy()
    rows = np.flatnonzero((draws < CHECKED_SHARE) | (draws == draws.min()))
    first = sum(shards.sizes[:shard])
    index = {shards.name_of(row)[2]: row for row in range(first, first + shards.sizes[shard])}
    for row in rows.tolist():
        item = teacher.read(shards.read(index[int(block.ids[row])]))
        found = _distance(block.read(slice(row, row + 1)), teacher.encode([item]), teacher.identity)
        if not found <= _TOLERANCE[teacher.identity.compute]:
            raise DataError(
                f"{path}: the vectors of sample {block.ids[row]} (row {row}) are not those that "
                f"its teacher gives now (1 - cosine = {found:.2g}); delete the file"
            )
    return len(rows)


def _distance(stored: Tensor, fresh: Tensor, identity: Identity) -> float:
    """The largest of 1 - cosine over the vectors, both as they are stored."""
    values, scales = encode(fresh, identity.dtype)
    again = torch.from_numpy(values.astype(np.float32))
    if identity.dtype == "int8":
        again = again * torch.from_numpy(scales)[..., None]
    difference = (stored.double() - again.double()).norm(dim=-1)
    size = again.double().norm(dim=-1).clamp(min=1e-12)
    return float((difference / size).square().max() / 2)


def _opened(spec: str | TextSet) -> ShardSet | TextSet:
    return ShardSet.open(spec) if isinstance(spec, str) else spec


def _plain_names(shards: ShardSet | TextSet) -> list[str]:
    """The shards' names behind their set's, without folders: the names of their blocks."""
    names = list(shards.shards if isinstance(shards, TextSet) else shards.names)
    first: dict[str, int] = {}
    for row, name in enumerate(names):
        if first.setdefault(name, row) != row:
            raise DataError(
                f"{shards.shards[first[name]]} and {shards.shards[row]} have one name; a store "
                "keeps a block by name, so name their sets, as a=folder/*.tar::b=other/*.tar"
            )
    return names


def _digest(shards: ShardSet | TextSet, row: int) -> str:
    """Of the index, which changes with any byte of the shard, or of the texts."""
    if isinstance(shards, TextSet):
        return shards.digest(row)
    return shards.digests[row]
