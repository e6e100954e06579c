"""The ledger keeps every rejected sample, and their numbers by shard where they are many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.data.ledger import Ledger, Rejected


def rejected(count: int, *, first: int = 0) -> list[Rejected]:
    return [Rejected(f"s{n % 3}.tar", f"k{n}", "bad", 0, n) for n in range(first, first + count)]


def lines(folder: Path) -> list[str]:
    return (folder / "ledger/rank-1.jsonl").read_text().splitlines()


def test_behind_the_last_line_samples_are_counted_by_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.ledger.MOST_LINES", 10)
    monkeypatch.setattr("trainer.data.ledger._COUNTED_BETWEEN_WRITES", 6)
    counts = tmp_path / "ledger/rank-1.counts.json"
    ledger = Ledger(tmp_path, rank=1, budget=1.0)
    ledger.put(num_read=8, rejected=rejected(8))
    assert len(lines(tmp_path)) == 8
    ledger.put(num_read=8, rejected=rejected(8, first=8))
    assert len(lines(tmp_path)) == 10
    assert json.loads(counts.read_text()) == {"s0.tar": 2, "s1.tar": 2, "s2.tar": 2}
    ledger.put(num_read=1, rejected=rejected(1, first=16))
    ledger.close()
    assert json.loads(counts.read_text()) == {"s0.tar": 2, "s1.tar": 3, "s2.tar": 2}
    # what goes on counts on; lines that are there already are neither written nor counted
    again = Ledger(tmp_path, rank=1, budget=1.0)
    again.put(num_read=10, rejected=rejected(10))
    again.put(num_read=3, rejected=rejected(3, first=17))
    again.close()
    assert len(lines(tmp_path)) == 10
    assert json.loads(counts.read_text()) == {"s0.tar": 3, "s1.tar": 4, "s2.tar": 3}
    assert again.num_rejected == 13
