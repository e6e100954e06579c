"""SimCLR: each view of an image finds its other view (arXiv 2002.05709)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.comm import Comm


def nt_xent(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"],
    comm: Comm,
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """Each row finds its twin among all other rows of both views and all ranks (equation 1).

    For one rank: the mean over both views of `cross_entropy` of a row's cosines with the 2N - 1
    others over the temperature, where the target is its twin. Rows are unit vectors, equally many
    on every rank. The mean over this rank's rows, in nats; every row carries gradient as a query
    and as everybody's key. Equal views would be told apart for nothing: ln(2N - 1) is chance.
    """
    everyones = comm.all_gather(first), comm.all_gather(second)
    one = _one_way(first, *everyones, comm=comm, temperature=temperature)
    other = _one_way(second, *reversed(everyones), comm=comm, temperature=temperature)
    return (one + other) / 2


def _one_way(
    queries: Tensor, own_view: Tensor, other_view: Tensor, *, comm: Comm, temperature: float
) -> Tensor:
    own = torch.arange(len(queries), device=queries.device) + comm.rank * len(queries)
    others = queries @ other_view.T / temperature
    siblings = (queries @ own_view.T / temperature).scatter(1, own[:, None], -torch.inf)
    return cross_entropy(torch.cat([others, siblings], dim=1), own)
