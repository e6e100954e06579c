"""An inverted index of sparse vectors: for each word the rows that say it, as search engines have.

A query costs a product for every pair of one of its words and a row that says it too, whatever the
number of rows and words.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from trainer.evals.search import Neighbours, ordered_topk


class InvertedIndex(NamedTuple):
    """Postings in the order of the words, those of a word in the order of the rows."""

    starts: Int64[Tensor, " words_and_end"]
    """Where each word's postings begin, and the end of the last."""
    rows: Int64[Tensor, " postings"]
    values: Float[Tensor, " postings"]
    num_rows: int


def inverted_index(rows: Float[Tensor, "n words"]) -> InvertedIndex:
    """Of the coordinates that are not zero."""
    words, places = rows.T.nonzero(as_tuple=True)
    counts = torch.bincount(words, minlength=rows.shape[1])
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return InvertedIndex(starts, places, rows[places, words], len(rows))


def search_index(index: InvertedIndex, queries: Float[Tensor, "n words"], *, k: int) -> Neighbours:
    """The k rows of the largest products with each query; equals `nearest` of the same rows up to
    the rounding of sums. Rows that share no word with the query have a score of zero."""
    blank = queries.new_zeros(0, index.num_rows)
    scores = torch.stack([_scores(index, query) for query in queries]) if len(queries) else blank
    return Neighbours(*ordered_topk(scores, min(k, index.num_rows)))


def num_products(index: InvertedIndex, queries: Float[Tensor, "n words"]) -> int:
    """Products that a search makes; the dense one makes queries x rows x words."""
    counts = index.starts.diff()
    return int(((queries != 0) * counts).sum())


def share_found(found: Int64[Tensor, "n k"], wanted: Int64[Tensor, "n m"]) -> float:
    """Which share of the wanted rows is among the found ones, over all queries."""
    return float((found[:, :, None] == wanted[:, None, :]).any(dim=1).float().mean())


def _scores(index: InvertedIndex, query: Tensor) -> Tensor:
    words = query.nonzero().flatten()
    first, last = index.starts[words], index.starts[words + 1]
    counts = last - first
    before = counts.cumsum(0) - counts
    postings = torch.arange(int(counts.sum())) + (first - before).repeat_interleave(counts)
    products = index.values[postings] * query[words].repeat_interleave(counts)
    return query.new_zeros(index.num_rows).index_add_(0, index.rows[postings], products)
