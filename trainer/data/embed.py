"""Fill an embedding store with a teacher's vectors of the captions of a shard list."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.comm import Comm
from trainer.config import CaptionConfig
from trainer.data.captions import choose_caption
from trainer.data.decode import BadSample
from trainer.data.embeddings import StoreWriter
from trainer.data.index import HEADER_BYTES, index_path, read_summary, shard_stem
from trainer.data.remote import read_file
from trainer.data.shards import DamagedSample, ShardSet
from trainer.data.teacher import Teacher
from trainer.errors import DataError, TrainerError


class Embedded(NamedTuple):
    """What a call of `embed_captions` has done, over all ranks."""

    shards: int
    """Shards of the data."""
    computed: int
    """Shards that were not in the store before."""
    skipped: int
    """Samples of the computed shards that have no usable caption, hence no vector."""

    @property
    def already_done(self) -> bool:
        return self.computed == 0


def embed_captions(
    spec: str,
    out: Path | str,
    *,
    teacher: Teacher,
    comm: Comm,
    captions: CaptionConfig | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Embedded:
    """Write the teacher's vector of every sample's caption into the store `out`.

    Shard i of the list is computed by rank i modulo W, unless the store has it already: a build
    that was killed goes on, with the same bytes as if it had not been. Where a sample has several
    captions the one drawn for epoch 0 of seed 0 is read. DataError on all ranks if one fails.
    """
    captions = captions or CaptionConfig()
    shards = ShardSet.open(spec)
    names = _plain_names(shards)
    identity = teacher.identity(text=captions.model_dump_json())
    sources = {name: _digest(shard) for name, shard in zip(names, shards.shards, strict=True)}
    writer = StoreWriter.begin(Path(out), identity, sources)
    agreed(comm, writer.announce if comm.is_main else _nothing)
    todo = comm.broadcast_json([name for name in names if not writer.has(name)])
    nothing = torch.empty(0, identity.vectors, identity.dim)
    skipped: list[int] = []

    def compute() -> None:
        for row, name in enumerate(names):
            if name in todo and row % comm.world_size == comm.rank:
                ids, texts = read_captions(shards, row, captions)
                vectors = teacher.encode(texts) if texts else nothing
                writer.write(name, ids, vectors)
                skipped.append(shards.sizes[row] - len(ids))
                report(f"{name}: {len(ids)} vectors")

    agreed(comm, compute)
    agreed(comm, writer.finish if comm.is_main else _nothing)
    return Embedded(len(names), len(todo), sum(comm.gather_json(sum(skipped))))


def read_captions(
    shards: ShardSet, shard: int, captions: CaptionConfig
) -> tuple[NDArray[np.int64], list[str]]:
    """Ids and texts of the samples of one shard that have a usable caption, in their order."""
    first = sum(shards.sizes[:shard])
    ids: list[int] = []
    texts: list[str] = []
    for index in range(first, first + shards.sizes[shard]):
        try:
            sample = shards.read(index)
            text = choose_caption(
                sample.fields, sample_id=sample.sample_id, epoch=0, seed=0, config=captions
            )
        except (BadSample, DamagedSample):
            continue
        ids.append(sample.sample_id)
        texts.append(text)
    return np.array(ids, dtype=np.int64), texts


def agreed(comm: Comm, action: Callable[[], object]) -> None:
    """Run `action` on every rank; where it fails on one, DataError on all, with each reason.

    Without this the others would wait for the rank that failed.
    """
    failure = None
    try:
        action()
    except (TrainerError, OSError) as error:
        failure = f"rank {comm.rank}: {error}" if comm.world_size > 1 else str(error)
    if failures := [text for text in comm.gather_json(failure) if text]:
        raise DataError("; ".join(failures))


def _nothing() -> None: ...


def _plain_names(shards: ShardSet) -> list[str]:
    """The shards' names without folders, which are the names of their blocks."""
    names = [shard_stem(shard) for shard in shards.shards]
    for row, name in enumerate(names):
        if name in names[:row]:
            raise DataError(
                f"{shards.shards[names.index(name)]} and {shards.shards[row]} have one name; a "
                "store keeps a block by name, so give each folder a store of its own"
            )
    return names


def _digest(shard: str) -> str:
    """Of the index: it changes with any byte of the shard."""
    path = index_path(shard)
    return read_summary(read_file(path)[:HEADER_BYTES], path=path).digest.hex()
