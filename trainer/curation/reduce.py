"""Which samples of a scan to train on: a selection, made shard by shard in bounded memory.

Clusters, counts and quotas are sums over shards. Members of a cluster are then compared where they
meet: samples go through memory in parts of whole clusters, so it holds no more than a part however
many there are. The result depends on the samples alone, not on the order of shards, the number of
processes or where an earlier call was killed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64
from numpy.typing import NDArray
from safetensors.numpy import load_file

from trainer.comm import Comm, agreed
from trainer.concepts.balance import draw_probability, keep_probability
from trainer.concepts.count import COUNTS
from trainer.concepts.counts import Counts
from trainer.curation.cut import cut_after
from trainer.curation.policy import Policy, first_of_each, member_order
from trainer.curation.quota import kept_shares, merged_clusters, quotas
from trainer.curation.repeats import read_repeats
from trainer.curation.rows import SUFFIX, Rows, open_rows
from trainer.curation.scan import CONCEPTS, ROWS
from trainer.data.selection import finish_selection, write_shares
from trainer.data.shards import ShardSet
from trainer.errors import DataError
from trainer.hashing import key_of, uniform
from trainer.long_work import counted
from trainer.store.header import write_whole

ROWS_AT_ONCE = 1 << 24
"""Of 40 bytes each while they are sorted."""
_HALVES = 1 << 16
_PARTS = "parts"


class Clustering(NamedTuple):
    """The folder of a clustering of the scan's image vectors, and which clusters count as one."""

    folder: Path
    groups: NDArray[np.int64]
    """The group of each cluster."""


class Candidates(NamedTuple):
    """The samples of a shard that may be kept."""

    row: Int64[np.ndarray, " n"]
    ids: Int64[np.ndarray, " n"]
    score: Float64[np.ndarray, " n"]
    cluster: Int64[np.ndarray, " n"]
    distance: Float64[np.ndarray, " n"]
    """Squared, to the centroid."""


class Reduction:
    """One selection in the making. Every rank has one and calls the same."""

    def __init__(
        self,
        shards: ShardSet,
        scan: Path,
        out: Path,
        policy: Policy,
        comm: Comm,
        *,
        clustering: Clustering | None = None,
        distinct: Path | None = None,
        exactly: int | None = None,
        rows_at_once: int = ROWS_AT_ONCE,
    ) -> None:
        """`distinct` is a file with the sorted ids that are no duplicates of others. `exactly` so
        many are kept, instead of a share, where all samples are one cluster."""
        self.shards, self.scan, self.out, self.policy, self.comm = shards, scan, out, policy, comm
        self.clustering, self.rows_at_once, self.exactly = clustering, rows_at_once, exactly
        self.distinct = None if distinct is None else np.load(distinct, mmap_mode="r")
        self.num_clusters = 1 if clustering is None else int(clustering.groups.max()) + 1
        self.own = range(comm.rank, len(shards.shards), comm.world_size)
        self.least_score, self.realised_gate = -np.inf, 0.0

    def run(self) -> dict[str, Any]:
        """Write the selection; its figures, the same on every rank."""
        self.out.mkdir(parents=True, exist_ok=True)
        if self.policy.gate:
            self.least_score, self.realised_gate = self._gate()
        counts = self._counts()
        if not counts.sum():
            raise DataError(f"no sample of {self.scan} may be kept; look at its scan.md")
        kept = self._write(counts)
        about: dict[str, object] = {"policy": self.policy.model_dump(mode="json")}
        figures = {
            "samples": len(self.shards),
            "candidates": int(counts.sum()),
            "clusters": int((counts > 0).sum()),
            "selected": int(kept.sum()),
            "gate": {"least_score": float(self.least_score), "share_below": self.realised_gate}
            if self.policy.gate
            else None,
            "counts": counts.tolist(),
            "kept": kept.tolist(),
        }

        def finish() -> None:
            header = finish_selection(self.out, self.shards, about)
            figures["epoch"] = sum(entry.kept for entry in header.shards.values())

        agreed(self.comm, finish if self.comm.is_main else lambda: None)
        found: dict[str, Any] = self.comm.broadcast_json(figures)
        return found

    def _gate(self) -> tuple[float, float]:
        """The lowest score that passes, and the share of the samples below it.

        Scores are float16, of which there are few: counting each is exact.
        """
        table = torch.zeros(_HALVES, dtype=torch.int64, device=self.comm.device)

        def count() -> None:
            for row in self.own:
                rows = self._rows(row)
                bits = rows.score[rows.usable].view(np.uint16).astype(np.int64)
                table.add_(torch.from_numpy(np.bincount(bits, minlength=_HALVES)))

        agreed(self.comm, count)
        numbers = self.comm.sum(table).cpu().numpy()
        values = np.arange(_HALVES, dtype=np.uint16).view(np.float16).astype(np.float64)
        known = numbers > 0
        order = np.argsort(values[known], kind="stable")
        ascending, counts = values[known][order], numbers[known][order]
        below = np.cumsum(counts) - counts
        place = int(np.searchsorted(below, self.policy.gate * counts.sum(), side="right")) - 1
        return float(ascending[place]), float(below[place] / counts.sum())

    def _counts(self) -> NDArray[np.int64]:
        counts = torch.zeros(self.num_clusters, dtype=torch.int64, device=self.comm.device)

        def count() -> None:
            for row in counted(self.own, "counting", total=len(self.own), unit="shards"):
                found = np.bincount(self.candidates(row).cluster, minlength=self.num_clusters)
                counts.add_(torch.from_numpy(found))

        agreed(self.comm, count)
        return np.asarray(self.comm.sum(counts).cpu().numpy())

    def _write(self, counts: NDArray[np.int64]) -> NDArray[np.float64]:
        """The shares of all shards; how many of each cluster are kept, or on average."""
        policy = self.policy
        if policy.rule == "balance":
            draws = draw_probability(self._concept_counts(), policy.threshold or 1.0)
            return self._shares(lambda row, some: self._balanced(row, some, draws))
        if policy.resample:
            rates = kept_shares(counts, policy.share, alpha=policy.alpha)
            return self._shares(lambda row, some: rates[some.cluster])
        most = quotas(counts, policy.share, alpha=policy.alpha)
        most = most if self.exactly is None else np.array([self.exactly])
        if self.num_clusters == 1 and len(self.shards) > self.rows_at_once:
            return self._cut(int(most[0]))
        self._choose(most)
        return self._shares(self._chosen)

    def _cut(self, count: int) -> NDArray[np.float64]:
        """As `_choose`, of one cluster that does not fit into memory."""

        def columns() -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
            for row in self.own:
                some = self.candidates(row)
                yield self._order(some), some.ids

        cut = cut_after(columns, count, self.comm, rows_at_once=self.rows_at_once)
        return self._shares(
            lambda row, some: (
                np.ones(len(some.ids))
                if cut is None
                else cut.keeps(self._order(some), some.ids).astype(np.float64)
            )
        )

    def _order(self, some: Candidates) -> NDArray[np.float64]:
        return member_order(
            self.policy.rule, some.ids, some.score, some.distance, seed=self.policy.seed
        )

    def _choose(self, most: NDArray[np.int64]) -> None:
        """Write the chosen samples, numbers over all shards, of each part of the clusters."""
        folder = self.out / _PARTS
        agreed(self.comm, lambda: folder.mkdir(exist_ok=True))
        parts = self._num_parts
        own = range(self.comm.rank, parts, self.comm.world_size)

        def choose() -> None:
            for part in counted(own, "choosing", total=len(own), unit="parts"):
                numbers, some = self._members(part, parts)
                chosen = first_of_each(some.cluster, self._order(some), some.ids, most)
                data = io.BytesIO()
                np.save(data, np.sort(numbers[chosen]))
                write_whole(folder / f"{part}.npy", data.getvalue())

        agreed(self.comm, choose)

    @property
    def _num_parts(self) -> int:
        return min(self.num_clusters, -(-len(self.shards) // self.rows_at_once))

    def _members(self, part: int, parts: int) -> tuple[NDArray[np.int64], Candidates]:
        """All candidates of a part's clusters, and their numbers over all shards."""
        numbers, found, first = [], [], 0
        for row, size in enumerate(self.shards.sizes):
            some = self.candidates(row)
            mine = some.cluster % parts == part
            numbers.append(some.row[mine] + first)
            found.append(Candidates(*(column[mine] for column in some)))
            first += size
        columns = (np.concatenate(column) for column in zip(*found, strict=True))
        return np.concatenate(numbers), Candidates(*columns)

    def _chosen(self, row: int, some: Candidates) -> NDArray[np.float64]:
        first = sum(self.shards.sizes[:row])
        shares = np.zeros(self.shards.sizes[row])
        for part in range(self._num_parts):
            numbers = np.load(self.out / _PARTS / f"{part}.npy", mmap_mode="r")
            begin, end = np.searchsorted(numbers, [first, first + len(shares)])
            shares[numbers[begin:end] - first] = 1.0
        return np.asarray(shares[some.row])

    def _balanced(
        self, row: int, some: Candidates, draws: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """How probable it is that one of the caption's concepts keeps a sample; or whether."""
        rows = self._rows(row)
        rates = np.array(
            [keep_probability(tuple(rows.concepts(n).tolist()), draws) for n in some.row]
        )
        if self.policy.resample:
            return rates
        hashes = uniform(torch.from_numpy(some.ids), key_of(self.policy.seed, "select")).numpy()
        return np.asarray(hashes < rates, np.float64)

    def _shares(
        self, share: Callable[[int, Candidates], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """Write every shard's; the sums of each cluster's."""
        kept = torch.zeros(self.num_clusters, dtype=torch.float64, device=self.comm.device)

        def write() -> None:
            for row in counted(self.own, "writing", total=len(self.own), unit="shards"):
                some = self.candidates(row)
                found = share(row, some)
                if self.policy.gate_when == "after":
                    found = np.where(some.score >= self.least_score, found, 0.0)
                whole = np.zeros(self.shards.sizes[row])
                whole[some.row] = found
                write_shares(self.out, self.shards.names[row], whole)
                sums = np.bincount(some.cluster, found, minlength=self.num_clusters)
                kept.add_(torch.from_numpy(sums))

        agreed(self.comm, write)
        agreed(self.comm, self._clean if self.comm.is_main else lambda: None)
        return np.asarray(self.comm.sum(kept).cpu().numpy())

    def _clean(self) -> None:
        for path in (self.out / _PARTS).glob("*.npy"):
            path.unlink()
        if (self.out / _PARTS).is_dir():
            (self.out / _PARTS).rmdir()

    def candidates(self, row: int) -> Candidates:
        """The samples of a shard that may be kept, with their cluster."""
        rows = self._rows(row)
        allowed = rows.usable
        if not self.policy.near_duplicates:
            allowed &= ~read_repeats(self.scan, self.shards.names[row])
        if self.distinct is not None:
            places = np.minimum(np.searchsorted(self.distinct, rows.ids), len(self.distinct) - 1)
            allowed &= np.asarray(self.distinct[places] == rows.ids)
        if self.policy.gate_when == "before":
            allowed &= rows.score.astype(np.float64) >= self.least_score
        chosen = np.flatnonzero(allowed)
        ids = rows.ids[chosen]
        cluster, distance = self._clusters(row, ids)
        return Candidates(chosen, ids, rows.score[chosen].astype(np.float64), cluster, distance)

    def _clusters(
        self, row: int, ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The nearest cluster of samples of a shard, joined by id, and the squared distance."""
        if self.clustering is None:
            return np.zeros(len(ids), np.int64), np.zeros(len(ids))
        path = self.clustering.folder / "labels" / f"{self.shards.names[row]}{SUFFIX}"
        if not path.exists():
            raise DataError(f"{path} is missing; cluster the vectors of this scan")
        found = load_file(path)
        order = np.argsort(found["ids"], kind="stable")
        places = order[np.minimum(np.searchsorted(found["ids"][order], ids), len(order) - 1)]
        if not (found["ids"][places] == ids).all():
            raise DataError(f"{path} lacks samples of the scan; cluster its vectors anew")
        nearest = found["clusters"][places, 0]
        return self.clustering.groups[nearest], found["distances"][places, 0].astype(np.float64)

    def _rows(self, row: int) -> Rows:
        path = self.scan / ROWS / f"{self.shards.names[row]}{SUFFIX}"
        rows, header = open_rows(path, ("ids", "status", "score", "hit_starts", "hits"))
        if header.source != self.shards.digests[row]:
            raise DataError(f"{path} is of another shard than {self.shards.shards[row]}; scan anew")
        return rows

    def _concept_counts(self) -> NDArray[np.int64]:
        path = self.scan / CONCEPTS / COUNTS
        if not path.exists():
            raise DataError(f"{self.scan} counted no concepts; scan with --bank to balance by them")
        return np.asarray(Counts.open(path)[0].any_text)


def groups_of(centroids: NDArray[np.float32], merge_cosine: float | None) -> NDArray[np.int64]:
    """Each cluster by itself, or with those that lie near."""
    if merge_cosine is None:
        return np.arange(len(centroids))
    return merged_clusters(centroids.astype(np.float64), merge_cosine)
