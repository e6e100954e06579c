"""What a number must beat to mean anything: the nearest training image on 16 x 16 pixels.

The floor depends on the shards alone, so a process works it out once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

import torch
import torch.nn.functional as F
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from trainer.comm import Comm
from trainer.config import DataConfig
from trainer.errors import DataError
from trainer.evals.features import Share
from trainer.evals.labels import answers, class_ids, class_names, with_class
from trainer.evals.samples import Record, read_blocks
from trainer.evals.scores import NO_ANSWER, chance, tally
from trainer.evals.search import nearest
from trainer.stop import Check, go_on

SIZE = 16
"""Width and height of the pictures that are compared."""
LARGEST_BANK = 50_000
"""A larger training set is represented by this many samples, chosen by hash of their id."""


@lru_cache(maxsize=64)
def pixel_floor(
    test: str,
    bank: str,
    *,
    target: str,
    limit: int | None,
    bank_limit: int | None,
    data: DataConfig,
    comm: Comm,
    check: Check = go_on,
) -> Mapping[str, float]:
    """Accuracy, in percent, of naming a test picture after its nearest in the bank.

    `pixel_1nn` and `pixel_1nn_mean_per_class`; `pixel_5nn`: one of the five nearest is right.
    Near is a high correlation of RGB pixels. Empty where no bank sample has a class: a training
    set need not know the classes of a test.
    """
    queries = with_class(_pixels(test, limit, data, comm, check), target, spec=test, comm=comm)
    try:
        shown = _pixels(bank, bank_limit, data, comm, check)
        pictures = with_class(shown, target, spec=bank, comm=comm)
    except DataError:
        return {}
    names = sorted({*class_names(queries, target, comm), *class_names(pictures, target, comm)})
    labels = comm.gather_rows(class_ids(pictures, target, names))
    rows = nearest_pictures(queries.features, pictures.features, comm=comm)
    ranked = labels[rows.clamp(min=0)].where(rows >= 0, -2)
    right = answers(queries, target, names, comm)
    figures = tally(ranked, right, num_classes=len(names), comm=comm)
    return MappingProxyType(
        {
            "pixel_1nn": figures["top1"],
            "pixel_5nn": figures["top5"],
            "pixel_1nn_mean_per_class": figures["mean_per_class"],
        }
    )


def chances(right: Int64[Tensor, "n m"], num_classes: int, comm: Comm) -> dict[str, float]:
    """Floors of guessing, and the sizes that they depend on."""
    num_right = (right != NO_ANSWER).sum(dim=1)
    samples = int(comm.sum(torch.tensor(right.shape[0], device=right.device)))

    def guessing(guesses: int) -> float:
        return chance(num_right, num_choices=num_classes, num_guesses=guesses, comm=comm)

    top5 = {"chance_top5": guessing(5)} if num_classes >= 5 else {}
    return {"chance": guessing(1), **top5, "classes": float(num_classes), "samples": float(samples)}


def nearest_pictures(
    queries: Float64[Tensor, "n dim"], bank: Float64[Tensor, "local dim"], *, comm: Comm
) -> Int64[Tensor, "n 5"]:
    """Global rows of the five bank pictures whose pixels correlate most with the query's.

    Cosine after each picture's own mean is taken off. A floor should be the best that such plain
    means reach: on drawings of a vendor outside the bank this finds 10.1 % of 1,530 concepts
    where Euclidean distance finds 6.9 %.
    """
    centred = (
        F.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1) for rows in (queries, bank)
    )
    return nearest(*centred, k=5, comm=comm).rows


def _pixels(spec: str, limit: int | None, data: DataConfig, comm: Comm, check: Check) -> Share:
    """This rank's share of the pictures, as rows of pixel values 0..255."""
    rows: list[UInt8[Tensor, "n dim"]] = []
    records: list[Record] = []
    for block in read_blocks(spec, size=SIZE, limit=limit, data=data, comm=comm):
        check()
        rows.append(block.images[block.usable].flatten(1))
        records += block.records
    return Share(torch.cat(rows).to(comm.device, torch.float64), records)
