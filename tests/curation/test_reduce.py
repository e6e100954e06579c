"""A selection is a pure function of the scanned samples, in parts of any size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.curation.corpus import questions, write_corpus
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.curation.policy import Policy
from trainer.curation.reduce import Clustering, Reduction
from trainer.curation.repeats import find_repeats, read_repeats
from trainer.curation.rows import open_rows
from trainer.curation.scan import scan
from trainer.data.selection import read_shares
from trainer.data.shards import ShardSet
from trainer.errors import DataError
from trainer.programs.reduce import reduce_scan, write_shards


@pytest.fixture(scope="module")
def scanned(tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("reduce")
    spec = write_corpus(folder / "data")
    scan(spec, folder / "scan", questions(), Comm.solo())
    find_repeats(ShardSet.open(spec), folder / "scan", Comm.solo(), most_bits=4)
    return spec, folder / "scan"


def selected(shards: ShardSet, out: Path) -> list[int]:
    shares = np.concatenate([read_shares(out, name) for name in shards.names])
    return sorted(shards.ids[shares > 0].tolist())


def on_ranks(comm: Comm, spec: str, scan: Path, out: Path) -> None:
    policy = Policy(clusters=3, share=0.4, alpha=0.5, gate=0.2, duplicate_cosine=0.9999)
    reduce_scan(spec, scan, out, policy, comm)


def bytes_of(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.suffix in (".npy", ".json", ".md") and "clusters" not in path.parts
    }


def test_one_rank_two_and_four_write_the_same_bytes(scanned, tmp_path):
    on_ranks(Comm.solo(), *scanned, tmp_path / "one")
    for world_size in (2, 4):
        run_ranks(on_ranks, world_size, *scanned, tmp_path / str(world_size))
        assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / str(world_size))
    assert len(bytes_of(tmp_path / "one")) >= 9


def test_the_order_of_shards_and_the_size_of_parts_change_nothing(scanned, tmp_path):
    spec, scan = scanned
    clusters = Clustering(_labels(spec, scan, tmp_path / "labels"), np.arange(4))
    policy = Policy(clusters=4, share=0.4)
    found = []
    for n, (each, rows) in enumerate(
        [(spec, 1 << 20), (spec, 6), ("::".join(reversed(_listed(spec))), 5)]
    ):
        shards, out = ShardSet.open(each), tmp_path / str(n)
        reduction = Reduction(
            shards, scan, out, policy, Comm.solo(), clustering=clusters, rows_at_once=rows
        )
        reduction.run()
        found.append(selected(shards, out))
    assert found[0] == found[1] == found[2]
    counts = np.bincount(np.concatenate([_cluster_of(spec, scan)]), minlength=4)
    assert len(found[0]) == sum(max(1, round(0.4 * n)) for n in counts.tolist() if n)


@pytest.mark.parametrize("rule", ["uniform", "topscore", "score_weighted"])
def test_one_cluster_that_does_not_fit_into_memory_gives_the_same(scanned, tmp_path, rule):
    spec, scan = scanned
    shards, found = ShardSet.open(spec), []
    for rows in (1 << 20, 4, 1):
        out = tmp_path / str(rows)
        policy = Policy(rule=rule, share=0.4)
        Reduction(shards, scan, out, policy, Comm.solo(), rows_at_once=rows).run()
        found.append(selected(shards, out))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 7


def test_a_gate_drops_the_share_it_says_and_ties_stay(scanned, tmp_path):
    spec, scan = scanned
    shards = ShardSet.open(spec)
    scores = _usable_scores(shards, scan)
    for when in ("before", "after"):
        policy = Policy(share=1.0, gate=0.5, gate_when=when)
        figures = Reduction(shards, scan, tmp_path / when, policy, Comm.solo()).run()
        least = figures["gate"]["least_score"]
        assert figures["epoch"] == (scores >= least).sum()
        assert (scores < least).mean() == figures["gate"]["share_below"] <= 0.5
        assert (scores <= least).mean() > 0.5


def test_near_duplicates_and_bad_samples_are_never_selected(scanned, tmp_path):
    spec, scan = scanned
    shards = ShardSet.open(spec)
    policy = Policy(share=1.0, near_duplicates=False)
    figures = Reduction(shards, scan, tmp_path / "out", policy, Comm.solo()).run()
    repeats = np.concatenate([read_repeats(scan, name) for name in shards.names])
    kept = selected(shards, tmp_path / "out")
    assert repeats.sum() == 1
    assert figures["epoch"] == len(kept) == len(shards) - 3 - 1
    assert not set(kept) & set(shards.ids[repeats].tolist())


def test_balancing_keeps_what_any_of_its_concepts_draws(scanned, tmp_path):
    spec, scan = scanned
    shards = ShardSet.open(spec)
    policy = Policy(rule="balance", threshold=2.0, resample=True)
    figures = Reduction(shards, scan, tmp_path / "out", policy, Comm.solo()).run()
    counts = np.zeros(5)
    named = []
    for name in shards.names:
        rows, _ = open_rows(scan / "rows" / f"{name}.safetensors")
        for row in np.flatnonzero(rows.usable).tolist():
            (concept,) = rows.concepts(row).tolist()
            counts[concept] += 1
            named.append(concept)
    expected = sum(min(1.0, 2.0 / counts[concept]) for concept in named)
    assert sum(figures["kept"]) == pytest.approx(expected, rel=1e-3)
    assert figures["epoch"] == round(expected)


def test_written_shards_hold_the_selected_samples_as_they_were(scanned, tmp_path):
    spec, scan = scanned
    shards, out = ShardSet.open(spec), tmp_path / "out"
    Reduction(shards, scan, out, Policy(share=0.5), Comm.solo()).run()
    figures = write_shards(spec, out, tmp_path / "shards", Comm.solo())
    copied = ShardSet.open(f"{tmp_path}/shards/*.tar")
    assert figures == {"samples": len(copied), "unreadable": 0}
    assert sorted(copied.ids.tolist()) == selected(shards, out)
    place = {i: n for n, i in enumerate(shards.ids.tolist())}
    for n, sample_id in enumerate(copied.ids.tolist()):
        assert copied.read(n).fields == shards.read(place[sample_id]).fields


def test_a_scan_of_other_shards_is_refused(scanned, tmp_path):
    _, scan = scanned
    other = write_corpus(tmp_path / "data")
    Path(other.replace("{000..002}", "000")).write_bytes(b"")
    with pytest.raises(DataError):
        Reduction(
            ShardSet.open(other), scan, tmp_path / "out", Policy(share=1.0), Comm.solo()
        ).run()


def _listed(spec: str) -> list[str]:
    return [spec.replace("{000..002}", f"{n:03d}") for n in range(3)]


def _cluster_of(spec: str, scan: Path) -> np.ndarray:
    ids = [open_rows(scan / "rows" / f"{n:03d}.safetensors")[0] for n in range(3)]
    return np.concatenate([rows.ids[rows.usable] % 4 for rows in ids])


def _labels(spec: str, scan: Path, folder: Path) -> Path:
    """A clustering by id."""
    from safetensors.numpy import save_file

    (folder / "labels").mkdir(parents=True)
    for n in range(3):
        rows, _ = open_rows(scan / "rows" / f"{n:03d}.safetensors")
        ids = rows.ids[rows.usable][::-1].copy()
        columns = {
            "ids": ids,
            "clusters": (ids % 4)[:, None].copy(),
            "distances": np.ones((len(ids), 1), np.float32),
        }
        save_file(columns, folder / "labels" / f"{n:03d}.safetensors")
    return folder


def _usable_scores(shards: ShardSet, scan: Path) -> np.ndarray:
    found = [open_rows(scan / "rows" / f"{name}.safetensors")[0] for name in shards.names]
    return np.concatenate([rows.score[rows.usable].astype(np.float64) for rows in found])


def test_figures_are_plain_json(scanned, tmp_path):
    spec, scan = scanned
    out = tmp_path / "out"
    reduce_scan(spec, scan, out, Policy(share=0.5), Comm.solo())
    assert json.loads((out / "reduce.json").read_text())["random"] == 9
    assert (out / "reduce.png").stat().st_size > 0
