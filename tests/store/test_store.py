"""The embedding store: vectors come back by id, whole or not at all, whoever wrote them."""

import ctypes
import hashlib
import json
import mmap
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fixtures.emoji import read_pairs, write_shards
from tests.ranks import run_ranks
from trainer.comm import Comm
from trainer.config import CaptionConfig
from trainer.data.captions import choose_caption
from trainer.data.shards import RawSample, ShardSet
from trainer.errors import DataError
from trainer.store import EmbeddingStore, Identity, StoreWriter
from trainer.store.header import BUILDING, HEADER
from trainer.teachers.fill import embed

# Not a fork of this process: threads of a group that another test has left would not come along.
_builds = multiprocessing.get_context("forkserver")
DIM = 6
SOURCES = {"a": ("1", 4), "b": ("2", 4), "c": ("3", 4)}


def identity(**changes: object) -> Identity:
    values = {"teacher": "t", "model": "m", "tokenizer": "k", "reads": "txt", "pooling": "mean"}
    return Identity(**{**values, "dim": DIM, **changes})


class HashTeacher:
    """A vector per text from its SHA-256: exact in float16, different for every text."""

    def __init__(self, seconds: float = 0.0, poison: str = "", field: str = "txt") -> None:
        self.seconds, self.poison = seconds, poison
        self.captions = CaptionConfig(fields=(field,))
        self.chunk = None

    @property
    def identity(self) -> Identity:
        return identity(reads=self.captions.fields[0])

    def read(self, sample: RawSample) -> str:
        return choose_caption(sample.fields, sample_id=0, epoch=0, seed=0, config=self.captions)

    def encode(self, texts: list[str]) -> torch.Tensor:
        time.sleep(self.seconds)
        return torch.stack([self._vector(text) for text in texts])[:, None]

    def stand_by(self) -> None:
        """No rank needs another."""

    def _vector(self, text: str) -> torch.Tensor:
        digest = hashlib.sha256(text.encode()).digest()[:DIM]
        return torch.tensor(list(digest)) / (0 if text == self.poison else 256)


def build(comm: Comm, spec: str, out: str, seconds: float = 0.0, poison: str = "") -> list[object]:
    try:
        done = embed(spec, out, teacher=HashTeacher(seconds, poison), comm=comm)
    except DataError as error:
        return [str(error)]
    assert done.checked >= done.computed // comm.world_size
    return list(done[:3])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), count=90, per_shard=20)


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("store") / "whole"
    assert build(Comm.solo(), spec, str(out)) == [5, 5, 0]
    return out


def small_store(folder: Path, counts: dict[str, int], vectors: int = 1) -> dict[int, torch.Tensor]:
    """A store of random vectors; what it holds, by id."""
    generator = torch.Generator().manual_seed(0)
    named = dict.fromkeys(counts, ("x", 9))
    writer = StoreWriter.begin(folder, identity(vectors=vectors), named)
    writer.announce()
    held: dict[int, torch.Tensor] = {}
    for number, (name, count) in enumerate(counts.items()):
        ids = np.array([10**12 * (7 - number) - row for row in range(count)], dtype=np.int64)
        values = torch.randn(count, vectors, DIM, generator=generator)
        writer.write(name, ids, values)
        held |= dict(zip(ids.tolist(), values, strict=True))
    writer.finish()
    return held


def test_every_caption_has_its_vector(spec, whole):
    store = EmbeddingStore.open(whole)
    shards = ShardSet.open(spec)
    assert len(store) == len(shards) == 90
    assert (store.dim, store.num_vectors) == (DIM, 1)
    assert store.ids.dtype == np.int64
    assert sorted(store.ids) == sorted(shards.ids)
    order = torch.from_numpy(shards.ids)[torch.randperm(90)]
    place = {int(name): row for row, name in enumerate(shards.ids)}
    names = [shards.read(place[int(name)]).fields["txt"].decode() for name in order]
    assert torch.equal(store.rows(order), HashTeacher().encode(names)[:, 0])
    assert names[0] in {record["name"] for record in read_pairs(90)}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(1, 3), st.randoms())
def test_any_selection_of_ids_gives_their_vectors(tmp_path_factory, counts, vectors, random):
    folder = tmp_path_factory.mktemp("any")
    held = small_store(folder, {f"s{row}": count for row, count in enumerate(counts)}, vectors)
    store = EmbeddingStore.open(folder)
    assert len(store) == sum(counts)
    wanted = random.choices(list(held), k=9) if held else []
    found = store.vectors(torch.tensor(wanted, dtype=torch.int64))
    assert found.shape == (len(wanted), vectors, DIM)
    for name, row in zip(wanted, found, strict=True):
        assert torch.equal(row, held[name].half().float())
    if vectors > 1:
        with pytest.raises(DataError, match=f"{vectors} vectors per sample"):
            store.rows(torch.tensor(wanted, dtype=torch.int64))


@pytest.mark.parametrize("counts", [{"a": 4}, {"a": 0}])
def test_unknown_ids_are_counted(tmp_path, counts):
    held = small_store(tmp_path, counts)
    store = EmbeddingStore.open(tmp_path)
    known = next(iter(held), -5)
    with pytest.raises(DataError, match=rf"{3 - bool(held)} of 3 sample ids have no vector"):
        store.rows(torch.tensor([5, known, 2**62]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 70_000.0])
def test_a_vector_that_float16_can_not_hold_is_named_and_nothing_is_written(tmp_path, bad):
    writer = StoreWriter.begin(tmp_path, identity(), {"a": ("1", 9)})
    writer.announce()
    vectors = torch.zeros(3, 1, DIM)
    vectors[1, 0, 2] = bad
    with pytest.raises(DataError, match=r"1 of 3 vectors of shard a .* sample 22 \(row 1\)"):
        writer.write("a", np.array([11, 22, 33]), vectors)
    assert not writer.has("a")
    assert sorted(contents(tmp_path)) == [BUILDING]


def test_files_of_another_size_are_named_with_both_sizes(tmp_path):
    small_store(tmp_path, {"a": 4, "b": 3})
    for name, size in (("a", 4096 + 4 * (DIM * 2 + 8)), ("b", 4096 + 3 * (DIM * 2 + 8))):
        path = tmp_path / f"{name}.vectors"
        data = path.read_bytes()
        assert len(data) == size
        for damaged in (data[:-1], data[:4096], data + b"\0" * 8):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=rf"should hold {size} .* {len(damaged)};"):
                EmbeddingStore.open(tmp_path)
        for damaged in (b"", data[:9], b"X" + data[1:]):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match="is no file of a store"):
                EmbeddingStore.open(tmp_path)
        path.write_bytes(data[:12] + b"[" + data[13:])
        with pytest.raises(DataError, match="damaged header"):
            EmbeddingStore.open(tmp_path)
        path.unlink()
        with pytest.raises(DataError, match=rf"{name}.vectors is missing"):
            EmbeddingStore.open(tmp_path)
        path.write_bytes(data)
    assert len(EmbeddingStore.open(tmp_path)) == 7


def test_one_changed_byte_is_found(tmp_path):
    small_store(tmp_path, {"a": 4, "b": 3})
    EmbeddingStore.open(tmp_path).check()
    path = tmp_path / "b.vectors"
    data = bytearray(path.read_bytes())
    data[4096 + 7] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"b.vectors is damaged: checksum"):
        EmbeddingStore.open(tmp_path).check()


def test_a_file_of_another_store_or_other_data_is_refused_by_name(tmp_path):
    for folder, changes in (("one", {}), ("two", {"layer": 3}), ("three", {})):
        source = "2" if folder == "three" else "1"
        writer = StoreWriter.begin(tmp_path / folder, identity(**changes), {"a": (source, 9)})
        writer.announce()
        writer.write("a", np.array([1]), torch.ones(1, 1, DIM))
        writer.finish()
    data = (tmp_path / "two" / "a.vectors").read_bytes()
    (tmp_path / "one" / "a.vectors").write_bytes(data)
    with pytest.raises(DataError, match=r"a.vectors holds vectors with layer 3, not -1"):
        EmbeddingStore.open(tmp_path / "one")
    with pytest.raises(DataError, match=r"a.vectors holds vectors with layer 3, not -1"):
        StoreWriter.begin(tmp_path / "one", identity(), {"a": ("1", 9)}).has("a")
    data = (tmp_path / "three" / "a.vectors").read_bytes()
    (tmp_path / "one" / "a.vectors").write_bytes(data)
    with pytest.raises(DataError, match="shard a has changed"):
        EmbeddingStore.open(tmp_path / "one")


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(1, 6))
def test_blocks_of_all_ranks_give_every_row_once(tmp_path_factory, counts, world_size):
    folder = tmp_path_factory.mktemp("blocks")
    held = small_store(folder, {f"s{row}": count for row, count in enumerate(counts)}, 2)
    store = EmbeddingStore.open(folder)
    share = -(-sum(counts) // world_size)
    ids = []
    for rank in range(world_size):
        blocks = list(store.blocks(rank, world_size))
        assert sum(map(len, blocks)) <= share
        for block in blocks:
            assert block.values.shape == (len(block), 2, DIM)
            assert not block.values.flags.owndata
            for name, row in zip(block.ids.tolist(), block.read(slice(0, 99)), strict=True):
                assert torch.equal(row, held[name].half().float())
            assert torch.equal(block.read(slice(1, 3), [1]), block.read(slice(1, 3))[:, 1:])
            ids += block.ids.tolist()
    assert ids == store.ids.tolist()


def test_int8_keeps_every_value_to_half_a_step(tmp_path):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 3, 40, generator=generator) * torch.tensor([1e-3, 1.0, 1e4])[:, None]
    values[2, 1] = 0
    writer = StoreWriter.begin(tmp_path, identity(dtype="int8", vectors=3, dim=40), {"a": ("1", 5)})
    writer.announce()
    writer.write("a", np.arange(5), values)
    writer.finish()
    store = EmbeddingStore.open(tmp_path)
    step = values.abs().amax(2, keepdim=True) / 127
    error = (store.vectors(torch.arange(5)) - values).abs()
    assert (error <= step * 0.501).all()
    assert torch.equal(store.vectors(torch.tensor([4, 0]), [2, 0]), store_reference(store, [4, 0]))
    assert (tmp_path / "a.vectors").stat().st_size == 4096 + 5 * (3 * 40 + 3 * 4 + 8)


def store_reference(store: EmbeddingStore, rows: list[int]) -> torch.Tensor:
    return store.vectors(torch.arange(len(store)))[rows][:, [2, 0]]


def pages_in_memory(path: Path) -> set[int]:
    """Numbers of the pages of a file that the kernel holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    size = path.stat().st_size
    held = ctypes.create_string_buffer(-(-size // 4096))
    with path.open("rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    assert libc.mincore(address, size, held) == 0
    libc.munmap(address, size)
    return {page for page, flag in enumerate(held.raw) if flag & 1}


def forget_pages(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_six_vectors_of_eleven_are_read_without_the_other_five(tmp_path):
    """By the kernel's own account of the pages it has read from the disk."""
    per_page, rows, vectors = 2048, 40, 11  # a vector is one page
    writer = StoreWriter.begin(
        tmp_path, identity(vectors=vectors, dim=per_page), {"a": ("1", rows)}
    )
    writer.announce()
    values = torch.randn(rows, vectors, per_page, generator=torch.Generator().manual_seed(0))
    writer.write("a", np.arange(rows), values)
    writer.finish()
    path = tmp_path / "a.vectors"
    store = EmbeddingStore.open(tmp_path)
    assert len(store.ids) == rows
    ids, which = [31, 2, 17, 5], [8, 0, 3, 5, 6, 10]
    forget_pages(path)
    if (before := pages_in_memory(path)) and len(before) > vectors * rows / 2:
        pytest.skip("this file system keeps every page in memory")
    found = store.vectors(torch.tensor(ids), which)
    wanted = {1 + row * vectors + vector for row in ids for vector in which}
    assert pages_in_memory(path) - before == wanted
    assert torch.equal(found, values[ids][:, which].half().float())
    own = torch.tensor([which, which[::-1], [1] * 6, which])
    each = torch.stack([values[i][chosen] for i, chosen in zip(ids, own.tolist(), strict=True)])
    assert torch.equal(store.vectors(torch.tensor(ids), own), each.half().float())


def test_a_store_that_is_not_there_or_not_ready_says_so(tmp_path):
    with pytest.raises(DataError, match="no embedding store"):
        EmbeddingStore.open(tmp_path / "none")
    writer = StoreWriter.begin(tmp_path, identity(), SOURCES)
    writer.announce()
    writer.write("b", np.array([1]), torch.ones(1, 1, DIM))
    with pytest.raises(DataError, match=r"unfinished \(1 of 3 shards\)"):
        EmbeddingStore.open(tmp_path)
    with pytest.raises(DataError, match="lacks shard a"):
        writer.finish()


@pytest.mark.parametrize(
    "header", [b"{}", b"", b"[", b'{"format": "other"}', b'{"shards": {"../x": 1}}']
)
def test_a_header_that_is_none_is_refused(tmp_path, header):
    (tmp_path / HEADER).write_bytes(header)
    with pytest.raises(DataError, match="is no header of a store"):
        EmbeddingStore.open(tmp_path)


def test_a_header_can_not_point_out_of_its_folder(tmp_path):
    small_store(tmp_path, {"a": 2})
    header = json.loads((tmp_path / HEADER).read_text())
    for name in ("../a", "/etc/a", "b/c", ".hidden", ""):
        header["shards"] = {name: {"source": "1", "rows": 2}}
        (tmp_path / HEADER).write_text(json.dumps(header))
        with pytest.raises(DataError, match="is no header of a store"):
            EmbeddingStore.open(tmp_path)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "changes", [{"model": "n"}, {"tokenizer": "x"}, {"prompts": "a {}"}, {"dim": 5}, {"layer": 3}]
)
def test_other_vectors_are_never_mixed_in(tmp_path, changes, finished):
    writer = StoreWriter.begin(tmp_path, identity(), {"a": ("1", 9)})
    writer.announce()
    writer.write("a", np.array([1]), torch.ones(1, 1, DIM))
    if finished:
        writer.finish()
    (key, value), *_ = changes.items()
    with pytest.raises(DataError, match=f"holds vectors with {key} .*, not {value!r}"):
        StoreWriter.begin(tmp_path, identity(**changes), {"a": ("1", 9)})
    with pytest.raises(DataError, match="shard a has changed"):
        StoreWriter.begin(tmp_path, identity(), {"a": ("2", 9)})
    (tmp_path / (HEADER if finished else BUILDING)).unlink()
    with pytest.raises(DataError, match="without a header"):
        StoreWriter.begin(tmp_path, identity(), {"a": ("1", 9)})


def test_a_store_grows_by_the_shards_it_lacks(spec, whole, tmp_path):
    first = spec.replace("..000004}", "..000001}")
    assert first != spec
    assert build(Comm.solo(), first, str(tmp_path)) == [2, 2, 0]
    assert len(EmbeddingStore.open(tmp_path)) == 40
    assert build(Comm.solo(), spec, str(tmp_path)) == [5, 3, 0]
    assert contents(tmp_path) == contents(whole)
    assert build(Comm.solo(), first, str(tmp_path)) == [2, 0, 0]
    assert build(Comm.solo(), spec, str(tmp_path)) == [5, 0, 0]
    assert contents(tmp_path) == contents(whole)


def test_samples_without_a_caption_are_counted_and_left_out(spec, tmp_path):
    teacher = HashTeacher(field="alias")
    assert embed(spec, tmp_path, teacher=teacher, comm=Comm.solo()) == (5, 5, 90, 0)
    assert len(EmbeddingStore.open(tmp_path)) == 0


def several(comm: Comm, spec: str, out: str, poison: str) -> list[list[object]]:
    return [
        build(comm, spec, f"{out}/ranks"),
        build(comm, spec, f"{out}/ranks"),
        build(comm, spec, f"{out}/poisoned", poison=poison),
    ]


def test_three_ranks_write_what_one_writes_and_fail_together(spec, whole, tmp_path):
    poison = read_pairs(90)[30]["name"]
    results = run_ranks(several, 3, spec, str(tmp_path), poison)
    for done, again, failed in results:
        assert done == [5, 5, 0]
        assert again == [5, 0, 0]
        assert len(failed) == 1
        assert "rank 1: 1 of 20 vectors of shard emoji-000001 are not finite" in failed[0]
    assert contents(tmp_path / "ranks") == contents(whole)
    assert build(Comm.solo(), spec, str(tmp_path / "poisoned")) == [5, 2, 0]
    assert contents(tmp_path / "poisoned") == contents(whole)


@pytest.mark.heavy
def test_a_build_that_is_killed_at_any_moment_ends_with_the_same_bytes(tmp_path):
    """A process of its own, killed within milliseconds after it has written something more."""
    spec = write_shards(tmp_path / "shards", count=60, per_shard=5)
    assert build(Comm.solo(), spec, str(tmp_path / "whole"))[1] == 12
    out, moments, kills = tmp_path / "store", random.Random(0), 0
    for _ in range(30):
        before = len(list(out.glob("*.vectors*")))
        process = _builds.Process(target=build, args=(Comm.solo(), spec, str(out), 0.002))
        process.start()
        while process.is_alive() and len(list(out.glob("*.vectors*"))) <= before:
            time.sleep(0.0005)
        time.sleep(moments.uniform(0.0, 0.012))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if (out / HEADER).exists():
            break
    assert kills >= 3
    build(Comm.solo(), spec, str(out))
    assert contents(out) == contents(tmp_path / "whole")


def test_a_store_of_more_files_than_descriptors_is_read_whole(tmp_path: Path) -> None:
    """Under a limit of 200 descriptors, as a process with a thousand would of LAION's shards."""
    count = 300
    store = tmp_path / "store"
    sources = {f"s{n:03d}": (str(n), 2) for n in range(count)}
    writer = StoreWriter.begin(store, identity(), sources)
    writer.announce()
    for number in range(count):
        ids = np.array([2 * number, 2 * number + 1])
        writer.write(f"s{number:03d}", ids, torch.full((2, 1, DIM), float(number)))
    writer.finish()
    code = f"""
import resource, torch
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from trainer.store import EmbeddingStore
store = EmbeddingStore.open({str(store)!r})
assert store.ids.tolist() == list(range({2 * count}))
rows = store.rows(torch.arange({2 * count}))
assert rows[:, 0].tolist() == [n // 2 for n in range({2 * count})]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
