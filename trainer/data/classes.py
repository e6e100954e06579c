"""Class labels that the shards carry, by sample id: what clusters are compared with."""

from __future__ import annotations

import sys
from itertools import chain

import torch

from trainer.comm import Comm
from trainer.data.captions import value_at
from trainer.data.decode import BadSample
from trainer.data.fields import check_texts, json_of
from trainer.data.labels import ClusterLabels
from trainer.data.shards import DamagedSample, ShardSet
from trainer.errors import DataError


def class_labels(spec: str, key: str, comm: Comm, *, budget: float | None = None) -> ClusterLabels:
    """Number the distinct values of a json key in sorted order; a sample without it is unknown.

    So is one that is damaged or whose json can't be read: the main rank says how many there are,
    and where they are more than `budget`, a share of all, DataError on all ranks. The ranks share
    the reading; all get all labels.
    """
    shards = ShardSet.open(spec)
    bad: list[str] = []
    values = [
        _value(shards, index, key, bad) for index in range(comm.rank, len(shards), comm.world_size)
    ]
    _report(list(chain.from_iterable(comm.gather_json(bad))), key, shards, comm, budget)
    names = sorted({v for part in comm.gather_json(values) for v in part if v is not None})
    number = {name: index for index, name in enumerate(names)}
    labels = torch.tensor([number.get(v, -1) if v is not None else -1 for v in values])
    ids = torch.from_numpy(shards.ids[comm.rank :: comm.world_size].copy())
    known = labels >= 0
    return ClusterLabels(
        comm.gather_rows(ids[known].to(comm.device)),
        comm.gather_rows(labels.long()[known].to(comm.device)),
    )


def _value(shards: ShardSet, index: int, key: str, bad: list[str]) -> str | None:
    try:
        value = value_at(json_of(shards.read(index).fields), key)
        check_texts(value, key)
    except (BadSample, DamagedSample) as error:
        shard, name, _ = shards.name_of(index)
        bad.append(str(error) if shard in str(error) else f"{shard} {name}: {error}")
        return None
    return None if value is None else str(value)


def _report(bad: list[str], key: str, shards: ShardSet, comm: Comm, budget: float | None) -> None:
    if not bad:
        return
    said = (
        f"{len(bad)} of {len(shards)} samples have no class under {key!r}, for they can't be read"
    )
    if budget is not None and len(bad) > budget * len(shards):
        raise DataError(
            f"{said}, more than data.bad_sample_budget = {budget:g}; the first: {bad[0]}"
        )
    if comm.is_main:
        sys.stderr.write(f"{said}; the first: {bad[0]}\n")
