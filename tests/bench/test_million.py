"""The way to a million clusters, at a thousandth of its size."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.bench.million import Million, component_of, make_store, run


def test_the_way_to_a_million(tmp_path: Path) -> None:
    case = Million(
        points=3000, dim=16, clusters=300, components=150, memory_gib=8, threads=1, iterations=1
    )
    (row,) = run(tmp_path, case)
    assert 0.5 < row["purity"] <= 1.0
    assert row["nmi"] > 0.5
    assert row["search_recall"] > 0.8
    assert row["labelled"] == 3000
    assert row["peak_bytes"] < 8 << 30
    store = make_store(tmp_path / "store", case)
    assert len(store) == 3000
    rows = store.rows(torch.arange(3000))
    truth = component_of(torch.arange(3000), case)
    same = truth[:, None] == truth[None]
    cosine = rows @ rows.T
    assert cosine[same].mean() > 0.6 > 0.2 > cosine[~same].mean()
