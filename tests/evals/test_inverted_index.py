"""The inverted index against the dense product of the same rows, and the share that is found."""

from __future__ import annotations

import pytest
import torch

from trainer.comm import Comm
from trainer.evals.inverted_index import (
    inverted_index,
    num_products,
    search_index,
    share_found,
)
from trainer.evals.search import nearest
from trainer.losses.lexical import largest_sparse, lexical_rows, threshold_sparse

SOLO = Comm.solo()


def rows(count: int, seed: int, words: int = 90) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return lexical_rows(2 * torch.randn(count, words, generator=draw).double())


@pytest.mark.parametrize("sparse", ["threshold", 7, 90])
def test_it_finds_what_the_dense_product_of_the_same_rows_finds(sparse: str | int) -> None:
    def kept(dense: torch.Tensor) -> torch.Tensor:
        return threshold_sparse(dense) if isinstance(sparse, str) else largest_sparse(dense, sparse)

    images, texts = kept(rows(40, 1)), kept(rows(9, 2))
    index = inverted_index(images)
    found = search_index(index, texts, k=6)
    wanted = nearest(texts, images, k=6, comm=SOLO)
    assert torch.equal(found.rows, wanted.rows)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=1e-12, atol=0)
    by_hand = ((texts != 0).double() @ (images != 0).double().T).sum()
    assert num_products(index, texts) == int(by_hand)
    assert int(index.starts[-1]) == int((images != 0).sum())


def test_with_all_words_it_is_the_dense_ranking_and_with_few_a_part_of_it() -> None:
    images, texts = rows(200, 3), rows(30, 4)
    dense = nearest(texts, images, k=10, comm=SOLO).rows
    shares = []
    for count in (3, 20, 90):
        index = inverted_index(largest_sparse(images, count))
        found = search_index(index, largest_sparse(texts, count), k=10)
        shares.append(share_found(found.rows, dense))
    assert shares[2] == 1.0
    assert 0 < shares[0] < shares[1] < 1


def test_rows_without_a_common_word_come_last_in_order_and_nothing_is_lost_at_the_edges() -> None:
    images = torch.zeros(4, 5)
    images[2, 1], images[3, 4] = 1.0, 0.5
    index = inverted_index(images)
    query = torch.tensor([[0.0, 2.0, 0, 0, 0], [0, 0, 0, 0, 0]])
    found = search_index(index, query, k=9)
    assert found.rows.tolist() == [[2, 0, 1, 3], [0, 1, 2, 3]]
    assert found.scores[0].tolist() == [2, 0, 0, 0]
    assert search_index(index, query[:0], k=2).rows.shape == (0, 2)
    assert search_index(inverted_index(torch.zeros(3, 5)), query, k=1).rows.tolist() == [[0], [0]]
