"""Nearest rows against the whole matrix, with ties, ragged shapes and too small banks."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.comm import Comm
from trainer.evals import search
from trainer.evals.search import nearest, ordered_topk

sizes = st.integers(0, 40)


def naive(queries: torch.Tensor, bank: torch.Tensor, k: int) -> list[list[int]]:
    """Rows by (score descending, row ascending), in Python; -1 where there is none."""
    ranked = [
        sorted(range(len(bank)), key=lambda row: (-float(query @ bank[row]), row))[:k]
        for query in queries
    ]
    return [rows + [-1] * (k - len(rows)) for rows in ranked]


@settings(deadline=None, max_examples=40)
@given(n=sizes, m=sizes, k=st.integers(1, 7), levels=st.integers(1, 4), seed=st.integers(0, 999))
def test_equals_a_sort_of_all_scores(n: int, m: int, k: int, levels: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    # Few distinct values: most scores are tied.
    queries = torch.randint(-levels, levels, (n, 3), generator=draw).double()
    bank = torch.randint(-levels, levels, (m, 3), generator=draw).double()
    found = nearest(queries, bank, k=k, comm=Comm.solo())
    assert found.rows.tolist() == naive(queries, bank, k)
    expected = (queries @ bank.T).sort(dim=1, descending=True)[0][:, :k]
    assert torch.equal(found.scores[:, : min(k, m)], expected)
    assert torch.equal(found.scores == -torch.inf, found.rows == -1)


def test_crosses_blocks() -> None:
    draw = torch.Generator().manual_seed(0)
    queries = torch.randn(search.QUERY_BLOCK + 9, 5, generator=draw)
    bank = torch.randn(2 * search.BANK_BLOCK + 1, 5, generator=draw)
    bank[search.BANK_BLOCK + 3] = bank[4]  # equal rows in different blocks
    found = nearest(queries, bank, k=20, comm=Comm.solo())
    exact = (queries.double() @ bank.double().T).sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(found.scores.double(), exact[0][:, :20], rtol=0, atol=1e-5)
    positions = exact[1].argsort(dim=1).gather(1, found.rows)
    assert (positions - torch.arange(20)).abs().max() <= 1  # only near-ties may swap
    where = (found.rows[:, :-1] == 4).nonzero().tolist()
    assert where
    for row, column in where:
        assert found.rows[row, column + 1] == search.BANK_BLOCK + 3


def test_topk_orders_ties_by_column() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    values, columns = ordered_topk(scores, 2)
    assert columns.tolist() == [[1, 2], [0, 1]]
    assert values.tolist() == [[2.0, 2.0], [5.0, 5.0]]
