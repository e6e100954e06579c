"""A caption's tokens as the classes of its image: a softmax over the vocabulary, soft targets.

SuperClass, arXiv 2411.03313; SuperCLIP, arXiv 2512.14480.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.losses.learned_prototypes import Statistics


def token_cross_entropy(
    statistics: Statistics, weights: Float[Tensor, "batch labels"], *, scale: float
) -> Float[Tensor, ""]:
    """-sum_c y_ic log softmax(s cos_i)_c in the mean over the batch of all ranks, in nats.

    y_i are the weights of sample i's tokens over their sum; a sample whose weights are all zero
    costs nothing and counts. Its softmax is over the negatives and the sample's own tokens, which
    are the whole vocabulary where nothing is drawn. Equal on all ranks.
    """
    logits = scale * statistics.cosines
    own = logits.masked_fill(~statistics.is_positive, -torch.inf)
    everything = torch.cat([statistics.log_negatives[:, None], own], dim=1).logsumexp(dim=1)
    weights = torch.where(statistics.is_positive, weights, 0.0).to(logits.dtype)
    total = weights.sum(dim=1)
    shares = weights / torch.where(total > 0, total, 1.0)[:, None]
    drawn = (shares * logits).sum(dim=1)
    rows = torch.where(total > 0, everything - drawn, 0.0)
    present = statistics.present
    return torch.where(present, rows, 0.0).sum() / present.sum().clamp_min(1)


def each_token_once(
    tokens: Int64[Tensor, "batch length"], left_out: Int64[Tensor, " specials"]
) -> Int64[Tensor, "batch length"]:
    """The tokens of each caption, ascending and each once, and -1 in the places that are over."""
    ordered = tokens.sort(dim=1).values
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(again | torch.isin(ordered, left_out), -1)
