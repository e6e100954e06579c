"""The stream: exactly once per epoch, the same whatever reads it, and errors that end."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.streams import image_samples, open_stream, png, same, write_shards
from tests.data.tars import write_tar
from tests.fixtures import emoji
from trainer.config import AugmentConfig
from trainer.data.index import read_index, write_index
from trainer.data.shards import ShardSet
from trainer.errors import ConfigError, DataError


def ids_of(stream, batches: int) -> list[int]:
    return [i for _ in range(batches) for b in stream.take() for i in b.sample_id.tolist()]


def check_epochs(folder: Path, sizes: list[int], world_size: int, workers: int, seed: int) -> None:
    """Two epochs, in the middle of a global batch or not, hold every id twice."""
    spec = write_shards(folder, sizes)
    per_rank = random.Random(seed).randint(1, 9)
    global_batch, total = world_size * per_rank, sum(sizes)
    ids = ShardSet.open(spec).ids.tolist()
    by_rank = []
    for rank in range(world_size):
        stream = open_stream(
            spec,
            rank=rank,
            world_size=world_size,
            global_batch=global_batch,
            workers=workers,
            seed=seed,
        )
        assert stream.epoch_size == total
        by_rank.append(np.array(ids_of(stream, -(-2 * total // global_batch))))
        stream.close()
    run = np.stack([rows.reshape(-1, per_rank) for rows in by_rank], axis=1).reshape(-1)
    for epoch in range(2):
        assert Counter(run[epoch * total : (epoch + 1) * total].tolist()) == Counter(ids)


@pytest.mark.heavy
def test_every_id_once_per_epoch(tmp_path):
    draw = random.Random(0)
    for case in range(8):
        sizes = [draw.randint(0, 50) for _ in range(draw.randint(1, 20 if case < 1 else 4))]
        folder = tmp_path / str(case)
        folder.mkdir()
        check_epochs(folder, sizes if sum(sizes) else [1], 1 + case % 4, 0, seed=case)


@pytest.mark.heavy
def test_every_id_once_per_epoch_through_worker_processes(tmp_path):
    for workers, world_size in ((1, 2), (2, 1)):
        folder = tmp_path / str(workers)
        folder.mkdir()
        check_epochs(folder, [5, 0, 13, 1], world_size, workers, seed=3)


@pytest.mark.heavy
def test_batches_do_not_depend_on_workers_memory_or_restarts(tmp_path):
    """All augmentation is on: pixels, tokens and ids agree in every bit."""
    spec = emoji.write_shards(tmp_path, count=40, per_shard=9)
    runs = {}
    for workers in (0, 1, 2):
        stream = open_stream(
            spec, global_batch=6, micro_batch=3, workers=workers, augment=AugmentConfig()
        )
        runs[workers] = [stream.take() for _ in range(15)]
        for step in (9, 2):
            stream.seek(6 * step)
            assert same(stream.take(), runs[0][step])
            assert same(stream.take(), runs[0][step + 1])
        stream.close()
    kept = open_stream(spec, global_batch=6, micro_batch=3, augment=AugmentConfig(), cache_mib=1)
    runs["kept in memory"] = [kept.take() for _ in range(15)]
    for name in (1, 2, "kept in memory"):
        assert all(same(a, b) for a, b in zip(runs[0], runs[name], strict=True))
    epochs = torch.cat([b.images for step in runs[0] for b in step]).split(40)
    assert not torch.equal(epochs[0].sum(0), epochs[1].sum(0))


@pytest.mark.heavy
def test_world_size_changes_who_trains_not_what(tmp_path):
    spec = write_shards(tmp_path, [7, 12, 4])
    alone = open_stream(spec, global_batch=12, micro_batch=3)
    shared = [
        open_stream(spec, rank=rank, world_size=2, global_batch=12, micro_batch=3)
        for rank in range(2)
    ]
    for _ in range(4):
        assert same(alone.take(), [batch for stream in shared for batch in stream.take()])


def test_seek_to_a_count_that_is_no_multiple(tmp_path):
    spec = write_shards(tmp_path, [30])
    stream = open_stream(spec, global_batch=4)
    ids = ids_of(stream, 10)
    stream = open_stream(spec, global_batch=6)
    stream.seek(8)
    assert ids_of(stream, 3) == ids[8:26]


@pytest.mark.heavy
@pytest.mark.parametrize(("start", "count"), [(0, 24), (5, 17), (12, 1), (20, 30), (3, 0)])
def test_view_gives_the_samples_that_training_will_see(tmp_path, start, count):
    spec = write_shards(tmp_path, [11, 9])
    world_size, global_batch = 3, 12
    order = ids_of(open_stream(spec, global_batch=global_batch), 6)
    views = []
    for rank in range(world_size):
        stream = open_stream(
            spec, rank=rank, world_size=world_size, global_batch=global_batch, micro_batch=2
        )
        views.append(list(stream.view(start, count, purpose="episode")))
        training = Counter(i for _ in range(6) for b in stream.take() for i in b.sample_id.tolist())
        shown = Counter(i for b in views[-1] for i in b.sample_id.tolist() if i >= 0)
        assert shown <= training
        assert all(b.images.shape[0] == len(b.sample_id) == 2 for b in views[-1])
        assert all(b.images.isfinite().all() for b in views[-1])
    assert len({len(view) for view in views}) == 1
    seen = [i for view in views for b in view for i in b.sample_id.tolist() if i >= 0]
    assert Counter(seen) == Counter(order[start : start + count])


def test_a_view_and_training_may_alternate(tmp_path):
    spec = write_shards(tmp_path, [20])
    plain = open_stream(spec, global_batch=4)
    steps = [plain.take() for _ in range(4)]
    pixels = list(plain.view(0, 16, purpose="episode"))
    mixed = open_stream(spec, global_batch=4, workers=1)
    for step, batch in enumerate(mixed.view(0, 16, purpose="episode")):
        assert same([batch], [pixels[step]])
        assert same(mixed.take(), steps[step])
        assert torch.equal(batch.sample_id, steps[step][0].sample_id)
    mixed.close()
    flips = [torch.equal(p.images, s[0].images) for p, s in zip(pixels, steps, strict=True)]
    assert not all(flips)


def broken_shard(folder: Path, *, good: int, bad: int) -> str:
    samples = image_samples(good + bad)
    for number in range(good, good + bad):
        key = f"{number:05d}"
        kind = number % 3
        if kind == 0:
            samples[key]["png"] = b"\x89PNG no image"
        elif kind == 1:
            samples[key] = {"png": png(number), "json": b"{}"}
        else:
            samples[key] = {"txt": b"no image"}
    spec = write_tar(folder / "a.tar", samples)
    write_index(spec)
    return spec


def test_a_bad_sample_is_one_line_and_has_a_substitute(tmp_path):
    spec = broken_shard(tmp_path, good=40, bad=6)
    runs = {}
    for workers in (0, 2):
        stream = open_stream(
            spec,
            global_batch=46,
            micro_batch=23,
            workers=workers,
            bad_sample_budget=0.5,
            workdir=tmp_path / str(workers),
        )
        runs[workers] = stream.take()
        stream.close()
        lines = (tmp_path / str(workers) / "ledger/rank-0.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        due = {record["position"]: record for record in records}
        assert len(due) == 6 <= len(records)
        assert {r["key"] for r in records} == {f"{n:05d}" for n in range(40, 46)}
        assert all(r["epoch"] == 0 and r["shard"] == spec for r in records)
        reasons = " ".join(r["reason"] for r in records)
        for part in ("not a PNG", "no caption in txt (members: json, png)", "no image"):
            assert part in reasons
    assert same(runs[0], runs[2])
    counts = Counter(i for b in runs[0] for i in b.sample_id.tolist())
    good = set(ShardSet.open(spec).ids[:40].tolist())
    assert set(counts) == good
    assert sum(counts.values()) == 46


@pytest.mark.heavy
def test_a_run_that_goes_on_repeats_no_line_of_the_ledger(tmp_path):
    """However often it is stopped, on however many ranks; a torn line does not count."""
    spec = broken_shard(tmp_path, good=40, bad=6)

    def records(name: str) -> list[str]:
        files = sorted((tmp_path / name / "ledger").glob("*.jsonl"))
        return sorted(line for file in files for line in file.read_text().splitlines())

    def read(name: str, first: int, last: int, *, world_size: int = 1) -> None:
        for rank in range(world_size):
            stream = open_stream(
                spec,
                rank=rank,
                world_size=world_size,
                global_batch=12,
                bad_sample_budget=0.5,
                workdir=tmp_path / name,
            )
            stream.seek(12 * first)
            list(stream.view(12 * first, 24, purpose="episode"))
            ids_of(stream, last - first)
            stream.close()

    read("whole", 0, 12)
    read("resumed", 0, 7)
    with (tmp_path / "resumed/ledger/rank-0.jsonl").open("a") as file:
        file.write('{"shard": "torn')
    read("resumed", 2, 9)
    read("resumed", 5, 12, world_size=2)
    assert records("resumed") == records("whole")
    assert len(set(records("whole"))) == len(records("whole")) >= 12


def test_a_flipped_bit_in_one_sample_is_one_line(tmp_path):
    spec = write_shards(tmp_path, [30])
    path = spec.replace("{000..000}", "000")
    data = bytearray(Path(path).read_bytes())
    data[int(read_index(path).offset[0]) + 20] ^= 4
    Path(path).write_bytes(data)
    stream = open_stream(spec, global_batch=30, bad_sample_budget=0.1, workdir=tmp_path)
    assert len(ids_of(stream, 1)) == 30
    (line,) = (tmp_path / "ledger/rank-0.jsonl").read_text().splitlines()
    assert "crc32 expected" in json.loads(line)["reason"]


def test_the_budget_stops_the_run(tmp_path):
    spec = broken_shard(tmp_path, good=40, bad=6)
    stream = open_stream(spec, global_batch=10, bad_sample_budget=0.05, workdir=tmp_path)
    with pytest.raises(DataError, match=r"of 1\d\d samples read \(1\d\.\d%\) could not be used"):
        ids_of(stream, 12)
    assert stream.ledger.num_read >= 100


@pytest.mark.parametrize("workers", [0, 1])
def test_a_filter_that_rejects_everything_ends(tmp_path, workers):
    spec = write_shards(tmp_path, [12])
    stream = open_stream(spec, workers=workers, captions={"fields": ("nothing",)}, workdir=tmp_path)
    with pytest.raises(DataError, match=r"1000 samples in a row .*no caption in nothing") as caught:
        stream.take()
    assert "\n" not in str(caught.value)
    assert "members: png, txt" in str(caught.value)
    stream.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_cut_during_the_run_is_named(tmp_path, workers):
    spec = write_shards(tmp_path, [30, 30])
    stream = open_stream(spec, global_batch=4, workers=workers)
    stream.take()
    path = tmp_path / "001.tar"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=r"001.tar is truncated: its index expects .* found"):
        ids_of(stream, 15)
    stream.close()


def test_empty_shards_and_uneven_batches_are_refused(tmp_path):
    spec = write_shards(tmp_path, [0, 0])
    with pytest.raises(DataError, match="hold no sample"):
        open_stream(spec)
    with pytest.raises(ConfigError, match="not divisible"):
        open_stream(write_shards(tmp_path, [3]), global_batch=10, micro_batch=4)


def test_close_leaves_nothing(tmp_path):
    spec = write_shards(tmp_path, [40])
    before = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    stream = open_stream(spec, workers=2)
    stream.take()
    assert len(multiprocessing.active_children()) == 2
    assert stream.wait_seconds > 0
    stream.close()
    assert multiprocessing.active_children() == []
    if Path("/dev/shm").is_dir():
        mine = {name for name in os.listdir("/dev/shm") if f"_{os.getpid()}_" in name}
        assert not mine - before
