"""The model of the head's bounds: bytes a logit by hand, and which of them decides."""

from __future__ import annotations

from unittest.mock import patch

import pytest

triton_logits = pytest.importorskip("trainer.kernels.triton_logits")
roofline = pytest.importorskip("trainer.bench.roofline")
Device, H100, Problem = roofline.Device, roofline.H100, roofline.Problem

WIDE = Problem(queries=32_768, rows=125_000, dim=512)


def test_bytes_of_a_logit_are_those_of_one_block_counted_by_hand() -> None:
    """A block of 4,224 queries: its probabilities are written and read twice, and the float32
    gradient of all rows is read and written once."""
    found, block = roofline.phases(WIDE), 4_224
    assert triton_logits.block_queries(2 * WIDE.rows) == block
    pairs = block * WIDE.rows
    probabilities, queries = 2 * pairs, 2 * block * WIDE.dim
    of_rows = 2 * 4 * WIDE.rows * WIDE.dim
    assert found["rows"].memory_bytes * pairs == pytest.approx(probabilities + of_rows)
    rows = 2 * WIDE.rows * WIDE.dim
    assert found["queries"].memory_bytes * pairs == pytest.approx(probabilities + rows)
    assert queries < rows, "left out where the other operand is a hundred times larger"
    assert found["sum"].memory_bytes < 0.05
    assert found["sum"].cache_bytes == pytest.approx(2 * 512 * 2 / 128)


@pytest.mark.parametrize("dim", [512, 768])
def test_both_stock_products_are_bound_by_products_and_no_longer_by_memory(dim: int) -> None:
    """With blocks of 1,536 queries the rows' gradient was bound by memory at 73 % of the peak."""
    problem = WIDE._replace(dim=dim)
    for name in ("queries", "rows"):
        assert roofline.phases(problem)[name].share_of_peak(H100) == pytest.approx(1.0)
    with patch.object(roofline, "block_queries", lambda _: 1_536):
        before = roofline.phases(problem)["rows"].share_of_peak(H100)
    assert before == pytest.approx(0.74 if dim == 512 else 0.85, abs=0.02)


def test_a_launch_of_larger_tiles_asks_less_of_the_cache() -> None:
    """What bounds the sum, if the second-level cache gives what is assumed of it."""
    found = roofline.phases(WIDE)["sum"]
    assert found.share_of_peak(H100) == pytest.approx(0.36, abs=0.01)
    without = H100._replace(cache=float("inf"))
    assert found.share_of_peak(without) == pytest.approx(1.0)
    assert 0.45 < roofline.share_of_peak(WIDE, H100) < roofline.share_of_peak(WIDE, without) <= 1.0
