"""Supervised contrast: samples of one class are near, all others of the batch apart.

Khosla et al., arXiv 2004.11362, equation 2 (the sum over positives outside of the logarithm).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.comm import Comm


def supervised_contrast(
    features: Float[Tensor, "rows dim"],
    labels: Int64[Tensor, " rows"],
    comm: Comm,
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """Mean over samples i with a class of -mean_p log(exp(s_ip) / sum_a exp(s_ia)), in nats.

    s = cosine / temperature; p runs over the other samples of i's class in the global batch, a over
    all others that have a class. Rows are unit vectors, equally many on every rank; a label below
    zero counts nowhere, nor does a sample that is alone in its class as i. The mean over ranks is
    that of the global batch. Sends rows * dim numbers a rank each way; the largest tensor is own
    rows x all rows.
    """
    every, theirs = comm.all_gather(features), comm.all_gather(labels)
    own = torch.arange(len(labels), device=labels.device)
    itself = torch.zeros(len(labels), len(theirs), dtype=torch.bool, device=labels.device)
    itself[own, own + comm.rank * len(labels)] = True
    others = (theirs >= 0) & ~itself
    positives = (labels[:, None] == theirs) & others
    scores = (features @ every.T / temperature).masked_fill(~others, -torch.inf)
    count = positives.sum(dim=1)
    counted = count > 0
    largest = torch.where(others.any(dim=1), scores.detach().amax(dim=1), 0.0)
    safe = torch.where(others, scores, torch.zeros_like(scores))
    total = torch.where(others, (safe - largest[:, None]).exp(), 0.0).sum(dim=1)
    partition = total.clamp_min(torch.finfo(total.dtype).tiny).log() + largest
    mean = (safe * positives).sum(dim=1) / count.clamp_min(1)
    summed = torch.where(counted, partition - mean, 0.0).sum()
    whole = comm.sum(counted.sum().to(summed.dtype)).clamp_min(1)
    return summed * comm.world_size / whole
