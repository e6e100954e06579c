"""The saves benchmark writes whole checkpoints both ways."""

from __future__ import annotations

from pathlib import Path

from trainer.bench.saves import measured, share_of


def test_both_ways_write_weights_and_two_moments(tmp_path: Path) -> None:
    share = share_of(3)
    assert sum(value.numel() for value in share["weights"].values()) == 2 * 1024 * 1464
    assert len(share["moments"]) == 2 * len(share["weights"])
    row = measured(1, rounds=2, folder=tmp_path)
    assert row["mebibytes"] == 3 * 4 * 1024 * 1464 / 2**20
    assert row["ratio"] == row["stall_beside"] / row["stall_waiting"]
    assert 0 < row["stall_beside"] <= row["written_beside"]
    assert list(tmp_path.iterdir()) == []
