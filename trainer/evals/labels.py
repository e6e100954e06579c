"""Class names to ids, and which classes count as right for a sample."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import torch
from jaxtyping import Int64
from torch import Tensor

from trainer.comm import Comm
from trainer.config import EvalConfig
from trainer.errors import DataError
from trainer.evals.context import Wanted
from trainer.evals.features import Share
from trainer.evals.samples import Record
from trainer.evals.scores import NO_ANSWER


def class_of(record: Record, target: str) -> str | None:
    """The sample's class: the value of key `target`; a list is one class of its own.

    None where the sample has none: no key, null, or an empty text or list.
    """
    value = record.values.get(target)
    if isinstance(value, list):
        value = " and ".join(str(item) for item in value)
    if value is None or isinstance(value, dict):
        return None
    return str(value).strip() or None


def class_wanted(config: EvalConfig, spec: str) -> Wanted:
    """That some sample of the shards has a class."""
    return Wanted(
        spec,
        f"a class under {config.target!r} (set target)",
        lambda record: class_of(record, config.target) is not None,
    )


def with_class(share: Share, target: str, *, spec: str, comm: Comm) -> Share:
    """The rows that have a class; a DataError, on every rank, where no rank has any."""
    rows = [i for i, record in enumerate(share.records) if class_of(record, target) is not None]
    if not comm.any(bool(rows)):
        keys = sorted({key for record in share.records[:1] for key in record.values})
        raise DataError(
            f"no sample of {spec} has a class under {target!r}; set `target` to a key of their "
            f"json{': ' + ', '.join(keys) if keys else ''}"
        )
    index = torch.tensor(rows, dtype=torch.int64, device=share.features.device)
    return Share(share.features[index], [share.records[i] for i in rows])


def class_names(share: Share, target: str, comm: Comm) -> list[str]:
    """The distinct classes over all ranks, sorted."""
    own = sorted({str(class_of(record, target)) for record in share.records})
    return sorted(set().union(*comm.gather_json(own)))


def class_ids(share: Share, target: str, names: Sequence[str]) -> Int64[Tensor, " n"]:
    """The class of each of this rank's rows as a position in `names`."""
    ids = {name: i for i, name in enumerate(names)}
    labels = [ids[str(class_of(record, target))] for record in share.records]
    return torch.tensor(labels, dtype=torch.int64, device=share.features.device)


def answers(share: Share, target: str, names: Sequence[str], comm: Comm) -> Int64[Tensor, "n most"]:
    """The classes that are right for each of this rank's rows, its own first.

    Besides its own class these are the classes of samples with the same picture (equal json key
    `pix`), anywhere in the set: a drawing that serves two names can't tell which one is meant.
    Filled up with NO_ANSWER.
    """
    ids = {name: i for i, name in enumerate(names)}
    own = [(class_of(record, "pix"), str(class_of(record, target))) for record in share.records]
    pictured = sorted({(picture, name) for picture, name in own if picture is not None})
    classes: dict[str | None, set[int]] = defaultdict(set)
    for picture, name in chain.from_iterable(comm.gather_json(pictured)):
        classes[picture].add(ids[name])
    rows = [[ids[name], *sorted(classes[picture] - {ids[name]})] for picture, name in own]
    return _padded(rows, comm).to(share.features.device)


def _padded(rows: list[list[int]], comm: Comm) -> Tensor:
    """As wide as the longest row of any rank."""
    width = max(comm.gather_json(max((len(row) for row in rows), default=1)))
    result = torch.full((len(rows), width), NO_ANSWER)
    for row, values in enumerate(rows):
        result[row, : len(values)] = torch.tensor(values)
    return result
