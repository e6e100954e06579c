"""Class labels that the shards carry, by sample id: what clusters are compared with."""

from __future__ import annotations

import sys
from array import array
from itertools import chain

import torch

from trainer.addresses import without_secrets
from trainer.comm import Comm
from trainer.data.captions import value_at
from trainer.data.decode import BadSample
from trainer.data.fields import check_texts, json_of
from trainer.data.labels import ClusterLabels
from trainer.data.shards import DamagedSample, ShardSet
from trainer.errors import DataError


def class_labels(
    spec: str | ShardSet, key: str, comm: Comm, *, budget: float | None = None
) -> ClusterLabels:
    """Number the distinct values of a json key in sorted order; a sample without it is unknown."""
    return named_classes(spec, key, comm, budget=budget)[0]


def named_classes(
    spec: str | ShardSet, key: str, comm: Comm, *, budget: float | None = None
) -> tuple[ClusterLabels, list[str]]:
    """Labels by the distinct values of a json key, and those values as texts, in sorted order.
    A sample without the key is unknown.

    So is one that is damaged or whose json can't be read: the main rank says how many there are,
    and where they are more than `budget`, a share of all, DataError on all ranks. The ranks share
    the reading; all get all labels.
    """
    shards = ShardSet.open(spec) if isinstance(spec, str) else spec
    bad: list[str] = []
    own: dict[str, int] = {}
    ids, codes = array("q"), array("q")
    for index in range(*comm.row_range(len(shards))):
        value = _value(shards, index, key, bad)
        if value is not None:
            ids.append(shards.name_of(index)[2])
            codes.append(own.setdefault(value, len(own)))
    _report(list(chain.from_iterable(comm.gather_json(bad))), key, shards, comm, budget)
    names = sorted(set(chain.from_iterable(comm.gather_json(list(own)))))
    number = {name: place for place, name in enumerate(names)}
    number_of_code = torch.tensor([number[name] for name in own], dtype=torch.int64)
    labels = number_of_code[torch.tensor(codes, dtype=torch.int64)]
    found = ClusterLabels(
        comm.gather_rows(torch.tensor(ids, dtype=torch.int64).to(comm.device)),
        comm.gather_rows(labels.to(comm.device)),
    )
    return found, names


def _value(shards: ShardSet, index: int, key: str, bad: list[str]) -> str | None:
    """The value of one sample, out of its json alone."""
    try:
        value = value_at(json_of(shards.read_json(index).fields), key)
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
        sys.stderr.write(without_secrets(f"{said}; the first: {bad[0]}\n"))
