"""Pretraining noise of an exact amount: some samples get the texts and labels of others.

Within each group of shards the samples of the set S = {id: hash < share} are put into the order of
another hash, and each gets what the one before it has. So exactly |S| samples are moved, none onto
itself, no caption is lost or doubled, and nothing is written. Swapping random pairs instead, as
public code does, moves fewer than it says, because some are hit twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.config import DataConfig, NoiseConfig
from trainer.data.fields import member_of
from trainer.data.shards import RawSample, ShardSet
from trainer.hashing import hash_bits, key_of, uniform

_GROUPS_KEPT = 64


class NoisyShards(ShardSet):
    """A shard set whose samples have their own images and, where S says so, others' texts."""

    noise: NoiseConfig
    images: tuple[str, ...]

    @classmethod
    def over(cls, shards: ShardSet, noise: NoiseConfig, images: Sequence[str]) -> NoisyShards:
        """A view of `shards`; `images` are the members that stay (`data.images`)."""
        view = cls(**shards.__getstate__())  # type: ignore[arg-type]
        view.noise, view.images = noise, tuple(images)
        view._sources = OrderedDict()
        return view

    def read(self, index: int) -> RawSample:
        """As `ShardSet.read`; DamagedSample also where the sample that gives its texts is one."""
        own = super().read(index)
        source = self.source_of(index)
        if source == index:
            return own
        other = super().read(source)
        return own._replace(fields=self._image(own.fields) | self._texts(other.fields))

    def read_json(self, index: int) -> RawSample:
        """The json of the sample that gives its texts, under this one's id and name."""
        shard, key, sample_id = self.name_of(index)
        other = super().read_json(self.source_of(index))
        return other._replace(shard=shard, key=key, sample_id=sample_id)

    def source_of(self, index: int) -> int:
        """The sample whose texts sample `index` has: itself where it is not moved."""
        group = self.locate(index)[0] // self.noise.group_shards
        if group not in self._sources:
            if len(self._sources) >= _GROUPS_KEPT:
                self._sources.popitem(last=False)
            self._sources[group] = self._shifted(group)
        self._sources.move_to_end(group)
        return self._sources[group].get(index, index)

    def _shifted(self, group: int) -> dict[int, int]:
        """Of the moved samples of a group; empty where S has a single one, which can't move."""
        size, (seed, share) = self.noise.group_shards, (self.noise.seed, self.noise.share)
        rows = range(group * size, min((group + 1) * size, len(self.shards)))
        first = sum(self.sizes[: rows.start])
        ids = torch.from_numpy(np.concatenate([self._index(row).ids for row in rows]))
        chosen = (uniform(ids, key_of(seed, "noise")) < share).nonzero().flatten()
        bits = hash_bits(ids[chosen], key_of(seed, "noise order"))
        places: NDArray[np.int64] = (chosen[bits.argsort(stable=True)] + first).numpy()
        if len(places) < 2:
            return {}
        return dict(zip(places.tolist(), np.roll(places, 1).tolist(), strict=True))

    def _image(self, fields: dict[str, bytes]) -> dict[str, bytes]:
        member = member_of(fields, *self.images)
        return {} if member is None else {member: fields[member]}

    def _texts(self, fields: dict[str, bytes]) -> dict[str, bytes]:
        member = member_of(fields, *self.images)
        return {name: data for name, data in fields.items() if name != member}

    _sources: OrderedDict[int, dict[int, int]]

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "noise": self.noise, "images": self.images}

    def __setstate__(self, state: dict[str, object]) -> None:
        noise, images = state.pop("noise"), state.pop("images")
        super().__setstate__(state)
        assert isinstance(noise, NoiseConfig)
        assert isinstance(images, tuple)
        self.noise, self.images, self._sources = noise, images, OrderedDict()


def trained_on(data: DataConfig) -> ShardSet:
    """The training shards as a run reads them: with noise where it asks for any."""
    shards = ShardSet.open(data.train)
    return NoisyShards.over(shards, data.noise, data.images) if data.noise.share else shards
