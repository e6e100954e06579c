"""The model of the head's bounds: bytes a logit by hand, and which of them decides."""

from __future__ import annotations

from unittest.mock import patch

import pytest

triton_logits = pytest.importorskip("trainer.kernels.triton_logits")
roofline = pytest.importorskip("trainer.bench.roofline")
H100, Problem = roofline.H100, roofline.Problem

WIDE = Problem(queries=32_768, rows=125_000, dim=512)


def test_bytes_of_a_logit_are_those_of_one_block_counted_by_hand() -> None:
    """A block of 4,224 queries that is computed again: its probabilities are written and read
    twice, and the float32 gradient of all rows is read and written once."""
    found, block = roofline.phases(WIDE, keep=False), 4_224
    assert triton_logits.block_queries(2 * WIDE.rows) == block
    pairs = block * WIDE.rows
    probabilities, queries = 2 * pairs, 2 * block * WIDE.dim
    of_rows = 2 * 4 * WIDE.rows * WIDE.dim
    assert found["rows"].memory_bytes * pairs == pytest.approx(probabilities + of_rows)
    rows = 2 * WIDE.rows * WIDE.dim
    assert found["queries"].memory_bytes * pairs == pytest.approx(probabilities + rows)
    assert queries < rows, "left out where the other operand is a hundred times larger"
    assert found["sum"].memory_bytes < 0.05


def test_bytes_of_a_logit_that_is_kept_counted_by_hand() -> None:
    """Written once and read by two products, each of which reads an operand and writes a gradient
    once: 6 bytes and a little. On the way to a tile, queries stay and rows come once a tile."""
    found = roofline.phases(WIDE)
    pairs = WIDE.queries * WIDE.rows
    numbers = WIDE.dim * (WIDE.queries + WIDE.rows)
    assert found["sum"].memory_bytes * pairs == pytest.approx(2 * pairs + 2 * numbers)
    for name in ("queries", "rows"):
        assert found[name].memory_bytes * pairs == pytest.approx(2 * pairs + (2 + 4) * numbers)
    assert sum(phase.memory_bytes for phase in found.values()) < 6.3
    tile = WIDE.rows * 128
    assert found["sum"].cache_bytes * tile == pytest.approx(2 * tile + 2 * 512 * WIDE.rows)
    # 64 queries and 32 rows, 16 numbers each, are read for 64 x 32 x 16 multiplications.
    assert found["sum"].shared_bytes == pytest.approx(2 * (64 + 32) * 512 / (64 * 32))


@pytest.mark.parametrize("dim", [512, 768])
def test_stock_products_are_bound_by_products_and_not_by_memory(dim: int) -> None:
    """With blocks of 1,536 queries the rows' gradient was bound by memory at 73 % of the peak."""
    problem = WIDE._replace(dim=dim)
    for name, keep in [("queries", True), ("rows", True), ("queries", False), ("rows", False)]:
        found = roofline.phases(problem, keep=keep)[name]
        assert found.share_of_peak(H100) == pytest.approx(1.0)
    with patch.object(roofline, "block_queries", lambda _: 1_536):
        before = roofline.phases(problem, keep=False)["rows"].share_of_peak(H100)
    assert before == pytest.approx(0.74 if dim == 512 else 0.85, abs=0.02)


def test_the_head_may_reach_seven_tenths_of_the_peak_and_the_kernel_a_half() -> None:
    """At the size of a million prototypes on eight ranks, if the second-level cache gives what is
    assumed of it. Computed again, it would reach under half."""
    kernel = roofline.phases(WIDE)["sum"].share_of_peak(H100)
    assert kernel == pytest.approx(0.57, abs=0.01)
    assert roofline.phases(WIDE, keep=False)["sum"].share_of_peak(H100) >= 0.66
    assert roofline.share_of_peak(WIDE, H100) == pytest.approx(0.80, abs=0.01)
    assert roofline.share_of_peak(WIDE, H100, stock=0.7) == pytest.approx(0.65, abs=0.01)
    assert roofline.share_of_peak(WIDE, H100, keep=False) < 0.5


def test_what_bounds_the_kernel_is_the_cache_then_shared_memory() -> None:
    found = roofline.phases(WIDE)["sum"]
    assert found.seconds(H100) == found.cache_bytes / H100.cache
    faster = H100._replace(cache=float("inf"))
    assert found.seconds(faster) == found.shared_bytes / H100.shared
    assert found.share_of_peak(faster._replace(shared=float("inf"))) == pytest.approx(1.0)


def test_a_width_without_room_for_its_queries_takes_tiles_of_both() -> None:
    """768 numbers: what was a third of the peak stays one, for the kernel."""
    found = roofline.phases(WIDE._replace(dim=768))["sum"]
    assert found.cache_bytes == pytest.approx(2 * 768 * 2 / 128 + 2)
    assert found.share_of_peak(H100) == pytest.approx(0.33, abs=0.01)
