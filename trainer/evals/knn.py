"""k nearest neighbours on frozen image features.

The vote is weighted as in DINO (Caron et al., arXiv 2104.14294, appendix B; after Wu et al.,
arXiv 1805.01978, eq. 8): a neighbour at cosine s counts exp(s / 0.07).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from trainer.config import EvalConfig
from trainer.evals.context import EvalContext
from trainer.evals.scores import tally
from trainer.evals.search import Neighbours, nearest, ordered_topk
from trainer.evals.splits import floors, load_splits
from trainer.evals.splits import wanted as wanted
from trainer.recipe import Encode

NEIGHBOURS = 20
TEMPERATURE = 0.07
VOTE_BLOCK = 1024
"""Rows whose votes, [rows, classes], are held at once."""


def run(config: EvalConfig, encode: Encode, context: EvalContext) -> dict[str, float]:
    """Accuracy of 20 weighted neighbours (`top1`, `top5`, `mean_per_class`) and of the `nearest`.

    The bank is the evaluation's `train` shards, each rank scanning its own share.
    """
    comm = context.comm
    splits = load_splits(config, encode, context)
    queries, bank = (F.normalize(rows, dim=1) for rows in (splits.test, splits.train))
    found = nearest(queries, bank, k=NEIGHBOURS, comm=comm)
    labels = comm.gather_rows(splits.train_labels)
    ranked = vote(found, labels, num_classes=splits.num_learnt)
    figures = tally(ranked, splits.answers, num_classes=splits.num_classes, comm=comm)
    closest = labels[found.rows[:, :1]]
    single = tally(closest, splits.answers, num_classes=splits.num_classes, comm=comm)
    return {**figures, "nearest": single["top1"], **floors(config, splits, context)}


def vote(
    found: Neighbours, labels: Int64[Tensor, " bank"], *, num_classes: int
) -> Int64[Tensor, "n best"]:
    """Up to five classes per row by the sum of exp(score / TEMPERATURE) of its neighbours.

    Equal sums go to the lower class. Only what a neighbour is can be a guess: where the neighbours
    are of fewer classes, the rest is -1.
    """
    blocks = zip(found.scores.split(VOTE_BLOCK), found.rows.split(VOTE_BLOCK), strict=True)
    return torch.cat([_voted(scores, rows, labels, num_classes) for scores, rows in blocks])


def _voted(scores: Tensor, rows: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    votes = scores.new_zeros((scores.shape[0], num_classes), dtype=torch.float64)
    weights = (scores.double() / TEMPERATURE).exp()
    each = torch.arange(scores.shape[0], device=scores.device)
    # One neighbour at a time: no two of them then add to one cell at once, in an order of luck.
    for neighbour in range(scores.shape[1]):
        classes = labels[rows[:, neighbour].clamp(min=0)]
        votes[each, classes] += weights[:, neighbour]
    sums, ranked = ordered_topk(votes, min(5, num_classes))
    return ranked.where(sums > 0, -1)
