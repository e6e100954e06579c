"""The nearest rows of a bank that is split over ranks, without any queries x bank matrix.

Classes of a zero-shot classifier, texts of a retrieval set, training images of kNN and pixels of
the floor are all banks: every evaluation ranks by this one function.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.comm import Comm

QUERY_BLOCK = 256
BANK_BLOCK = 2048
"""Products are always of this shape, filled up with zeros, so that how the rows are split over
ranks can't choose another matrix kernel, hence another rounding."""


class Neighbours(NamedTuple):
    """Best first; equal scores go to the lower row."""

    scores: Float[Tensor, "n k"]
    """Inner products; -inf where the bank has fewer than k rows."""
    rows: Int64[Tensor, "n k"]
    """Global rows of the bank; -1 where it has fewer than k."""


def nearest(
    queries: Float[Tensor, "n dim"], bank: Float[Tensor, "local dim"], *, k: int, comm: Comm
) -> Neighbours:
    """The k bank rows of highest inner product with each of this rank's queries.

    Equals `(queries @ whole_bank.T).topk(k)`. Queries and bank are this rank's contiguous shares,
    stacked in rank order; their sizes may differ between ranks and be zero. Every rank scans its
    own share for all queries, then the k best of each rank are merged. Holds one block of
    products and the gathered queries.
    """
    sizes = comm.gather_json([queries.shape[0], bank.shape[0]])
    first_query = sum(size[0] for size in sizes[: comm.rank])
    first_row = sum(size[1] for size in sizes[: comm.rank])
    blocks = comm.gather_rows(queries).split(QUERY_BLOCK)
    found = [_merged(_scanned(block, bank, k, first_row), comm) for block in blocks]
    own = slice(first_query, first_query + queries.shape[0])
    return Neighbours(
        torch.cat([part.scores for part in found])[own],
        torch.cat([part.rows for part in found])[own],
    )


def ordered_topk(scores: Float[Tensor, "n m"], k: int) -> tuple[Tensor, Tensor]:
    """`scores.topk(k)` as (values, columns), where equal values go to the lower column.

    `torch.topk` leaves open which of several equal values it takes, and in which order.
    """
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if scores.shape[1] > k:
        undecided = values[:, k - 1] == values[:, k]
        values, columns = values[:, :k], columns[:, :k]
        columns[undecided] = scores[undecided].sort(dim=1, descending=True, stable=True)[1][:, :k]
    columns = columns.sort(dim=1)[0]
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _scanned(queries: Tensor, bank: Tensor, k: int, first_row: int) -> Neighbours:
    """The best of this rank's share, by global row."""
    count = queries.shape[0]
    best = Neighbours(
        queries.new_full((count, k), -torch.inf),
        torch.full((count, k), -1, dtype=torch.int64, device=queries.device),
    )
    padded = _padded(queries, QUERY_BLOCK)
    for start in range(0, bank.shape[0], BANK_BLOCK):
        block = bank[start : start + BANK_BLOCK]
        products = (padded @ _padded(block, BANK_BLOCK).T)[:count, : block.shape[0]]
        scores, columns = ordered_topk(products, min(k, block.shape[0]))
        rows = columns + (first_row + start)
        best = _best(torch.cat([best.scores, scores], 1), torch.cat([best.rows, rows], 1), k)
    return best


def _merged(local: Neighbours, comm: Comm) -> Neighbours:
    """The best of all ranks' best. Ranks hold ascending rows, so a stable sort keeps the order."""
    count, k = local.scores.shape
    if comm.world_size == 1:
        return local
    scores, rows = (
        comm.all_gather(part).view(comm.world_size, count, k).permute(1, 0, 2).reshape(count, -1)
        for part in local
    )
    return _best(scores, rows, k)


def _best(scores: Tensor, rows: Tensor, k: int) -> Neighbours:
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return Neighbours(scores[:, :k], rows.gather(1, order)[:, :k])


def _padded(rows: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, count - rows.shape[0]))
