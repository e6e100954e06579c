"""Evaluation samples in blocks of one size, as many on every rank.

Blocks are consecutive samples, and a rank's blocks are consecutive too: what the ranks make of
their shares stacks up, in rank order, to the order of the shards. The blocks are the same for any
number of ranks, so a model says exactly the same of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from trainer.comm import Comm
from trainer.config import IMAGE_FIELDS, DataConfig
from trainer.data.ahead import in_order
from trainer.data.decode import BadSample
from trainer.data.fields import check_texts, find_image, json_of, text_of
from trainer.data.pixels import Pixels
from trainer.data.prepare import InsteadOfImages
from trainer.data.shards import DamagedSample, ShardSet
from trainer.errors import DataError, TrainerError
from trainer.hashing import hash_bits, key_of
from trainer.long_work import counted

BLOCK = 64
_FEW_BLOCKS = 32  # read here: reader processes take seconds to start
_LONGEST_TEXT = 64 * 1024  # bytes of a member that may be a text and is read as one
FILLER = -1
"""Sample id of rows that only fill a block up."""


class Record(NamedTuple):
    """What a sample says besides its image: its json, and its members that are texts."""

    sample_id: int
    values: dict[str, Any]
    picture: str = ""
    """Digest of the image's bytes: samples of equal digest show the same picture."""


class Block(NamedTuple):
    """BLOCK rows, of which `usable` count; the others are repeats or could not be decoded."""

    images: UInt8[Tensor, "block 3 size size"] | Float32[Tensor, "block dim"]
    sample_id: Int64[Tensor, " block"]
    usable: Int64[Tensor, " rows"]
    """Rows to keep, in order."""
    records: list[Record]
    """One per usable row."""


def select(ids: Int64[Tensor, " n"], limit: int | None) -> Int64[Tensor, " chosen"]:
    """Ascending positions of all samples, or of `limit` of them that a hash of the ids picks."""
    positions = torch.arange(ids.shape[0])
    if limit is None or limit >= ids.shape[0]:
        return positions
    order = hash_bits(ids, key_of("evaluation subset")).argsort(stable=True)
    return positions[order[:limit]].sort()[0]


def own_positions(count: int, comm: Comm) -> Int64[Tensor, "blocks block"]:
    """Which of `count` items this rank handles, block by block; -1 where a row only fills up.

    Every rank gets equally many blocks; ranks beyond the end get blocks of nothing but fillers.
    """
    num_blocks = -(-count // BLOCK)
    per_rank = -(-num_blocks // comm.world_size)
    first = comm.rank * per_rank * BLOCK
    positions = torch.arange(first, first + per_rank * BLOCK).view(per_rank, BLOCK)
    return positions.where(positions < count, -1)


def read_blocks(
    spec: str,
    *,
    size: int,
    limit: int | None,
    data: DataConfig,
    comm: Comm,
    pixels: Pixels | None = None,
    stored: InsteadOfImages | None = None,
) -> Iterator[Block]:
    """This rank's blocks of a shard spec, images `size` pixels wide, arranged as `pixels` says, or
    what is `stored` of them.

    Collective: every rank must exhaust it. Unusable samples are left out against the budget;
    damage found by one rank is raised by all, after the last block, so that nobody waits for a
    rank that is gone. A DataError too where there is no sample at all.
    """
    shards = ShardSet.open(spec)
    whole = limit is None or limit >= len(shards)
    chosen = torch.arange(len(shards)) if whole else select(torch.as_tensor(shards.ids), limit)
    if not len(chosen):
        raise DataError(f"no sample in {spec}; an evaluation needs at least one")
    reader = _Reader(shards, pixels or Pixels(size, background=data.background), data, stored)
    own = own_positions(len(chosen), comm)
    tasks = torch.where(own >= 0, chosen[own.clamp(min=0)], FILLER).tolist()
    workers = data.workers if len(tasks) > _FEW_BLOCKS else 0
    told = _Told([], [])
    for block, bad, damage in counted(
        in_order(reader.block, tasks, workers=workers),
        "evaluating",
        total=own.numel(),
        unit="images",
        size=lambda found: BLOCK,
    ):
        told.bad.extend(bad)
        told.damage.extend(damage)
        yield block
    told.check(spec, len(chosen), data, comm)


class _Told(NamedTuple):
    """What went wrong."""

    bad: list[str]
    damage: list[str]

    def check(self, spec: str, count: int, data: DataConfig, comm: Comm) -> None:
        """Raise on every rank what any rank has met."""
        everyone = comm.gather_json([self.damage[:1], self.bad])
        damage, bad = (
            list(chain.from_iterable(found[kind] for found in everyone)) for kind in (0, 1)
        )
        if damage:
            raise DataError(damage[0])
        budget = data.bad_sample_budget
        if len(bad) > budget * count:
            raise DataError(
                f"{len(bad)} of {count} samples of {spec} can't be used, over the budget of "
                f"{budget:.2%} (data.bad_sample_budget); the first: {bad[0]}"
            )


class _Reader:
    """Decodes blocks, here or in a reader process."""

    def __init__(
        self,
        shards: ShardSet,
        pixels: Pixels,
        data: DataConfig,
        stored: InsteadOfImages | None = None,
    ) -> None:
        self._shards, self._arranged, self._data = shards, pixels, data
        self._stored = stored
        self._told = _Told([], [])

    def block(self, indexes: list[int]) -> tuple[Block, list[str], list[str]]:
        """The samples at these indexes of the shard set, with what was bad and what damaged;
        FILLER repeats the row before."""
        self._told = _Told([], [])
        images = self._nothing(len(indexes))
        ids = torch.full((len(indexes),), FILLER)
        usable: list[int] = []
        records: list[Record] = []
        for row, index in enumerate(indexes):
            found = self._sample(index) if index != FILLER else None
            if found is None:
                images[row] = images[row - 1] if row else 0
                continue
            images[row], record = found
            ids[row] = record.sample_id
            usable.append(row)
            records.append(record)
        block = Block(images, ids, torch.tensor(usable, dtype=torch.int64), records)
        return block, *self._told

    def _sample(self, index: int) -> tuple[Tensor, Record] | None:
        if self._told.damage:
            return None
        try:
            raw = self._shards.read(index)
        except DamagedSample as error:
            self._told.bad.append(str(error))
            return None
        except TrainerError as error:
            self._told.damage.append(str(error))
            return None
        try:
            image = find_image(raw.fields, self._data.images)
            record = Record(raw.sample_id, values_of(raw.fields), _digest(image))
            if self._stored is not None:
                return self._stored.whole(raw.sample_id), record
            return self._pixels(image), record
        except BadSample as error:
            self._told.bad.append(f"{raw.shard} {raw.key}: {error.reason}")
            return None

    def _nothing(self, rows: int) -> Tensor:
        if self._stored is not None:
            return torch.zeros(rows, self._stored.dim)
        size = self._arranged.size
        return torch.zeros((rows, 3, size, size), dtype=torch.uint8)

    def _pixels(self, image: bytes) -> Tensor:
        return self._arranged.decode(image, max_pixels=self._data.max_pixels)


def _digest(image: bytes) -> str:
    return hashlib.blake2b(image, digest_size=16).hexdigest()


def values_of(fields: dict[str, bytes]) -> dict[str, Any]:
    """The sample's json and, by their names, its members that are texts; BadSample where its json,
    `txt` or `cls` is none.

    What is called `outputs.txt` is the `txt` as well where no other member could be.
    """
    values = json_of(fields)
    check_texts(values, "json")
    for name in fields.keys() - {"json", *IMAGE_FIELDS}:
        strict = name in ("txt", "cls")
        if strict or len(fields[name]) <= _LONGEST_TEXT:
            with nullcontext() if strict else suppress(BadSample):
                values[name] = text_of(fields, name)
    texts = [name for name in values if name in fields and name.endswith(".txt")]
    if "txt" not in fields and len(texts) == 1:
        values["txt"] = values[texts[0]]
    return values
