"""Class labels that the shards carry, by sample id: what clusters are compared with."""

from __future__ import annotations

import torch

from trainer.comm import Comm
from trainer.data.decode import BadSample
from trainer.data.fields import check_texts, json_of
from trainer.data.labels import ClusterLabels
from trainer.data.shards import DamagedSample, ShardSet


def class_labels(spec: str, key: str, comm: Comm) -> ClusterLabels:
    """Number the distinct values of a json key in sorted order; a sample without it is unknown.
    So is one that is damaged or whose json can't be read.

    The ranks share the reading; all get all labels.
    """
    shards = ShardSet.open(spec)
    mine = range(comm.rank, len(shards), comm.world_size)
    values = [_value(shards, index, key) for index in mine]
    names = sorted({v for part in comm.gather_json(values) for v in part if v is not None})
    number = {name: index for index, name in enumerate(names)}
    labels = torch.tensor([number.get(v, -1) if v is not None else -1 for v in values])
    ids = torch.from_numpy(shards.ids[comm.rank :: comm.world_size].copy())
    known = labels >= 0
    return ClusterLabels(
        comm.gather_rows(ids[known].to(comm.device)),
        comm.gather_rows(labels.long()[known].to(comm.device)),
    )


def _value(shards: ShardSet, index: int, key: str) -> str | None:
    try:
        value = json_of(shards.read(index).fields).get(key)
        check_texts(value, key)
    except (BadSample, DamagedSample):
        return None
    return None if value is None else str(value)
