"""Components, precision, imports and plans of a store."""

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fixtures.emoji import write_shards
from tests.ranks import free_port, run_ranks
from tests.store.test_store import HashTeacher, build, contents, identity
from trainer.comm import Comm
from trainer.data.shards import ShardSet
from trainer.errors import ConfigError, DataError
from trainer.programs.embed import project_store, stored_as
from trainer.store import EmbeddingStore, StoreWriter
from trainer.store.size import plan_rows, store_bytes
from trainer.teachers.existing_vectors import VectorFiles
from trainer.teachers.fill import embed, verify
from trainer.teachers.pca import ProjectedTeacher, fit_pca, load_pca

# Not a fork of this process: a group that another test has left here would be taken for their own.
_ranks = multiprocessing.get_context("forkserver")
DIM = 12


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), count=70, per_shard=9)


@pytest.fixture(scope="module")
def source(spec, tmp_path_factory) -> Path:
    """Two vectors a sample, along axes of falling variance and off the origin."""
    folder = tmp_path_factory.mktemp("source")
    shards = ShardSet.open(spec)
    generator = torch.Generator().manual_seed(0)
    turn, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))
    names = [Path(shard).name.removesuffix(".tar") for shard in shards.shards]
    named = {name: ("x", size) for name, size in zip(names, shards.sizes, strict=True)}
    writer = StoreWriter.begin(folder, identity(vectors=2, dim=DIM), named)
    writer.announce()
    start = 0
    for name, size in zip(names, shards.sizes, strict=True):
        noise = torch.randn(size, 2, DIM, generator=generator) * 0.6 ** torch.arange(DIM)
        writer.write(name, shards.ids[start : start + size], noise @ turn + 0.5)
        start += size
    writer.finish()
    return folder


def components(comm: Comm, folder: Path) -> list[np.ndarray]:
    return [value.numpy() for value in fit_pca(EmbeddingStore.open(folder), 4, comm)]


def test_components_are_those_of_the_whole_matrix_on_any_number_of_ranks(source):
    store = EmbeddingStore.open(source)
    rows = store.vectors(torch.from_numpy(store.ids.copy())).flatten(0, 1).double()
    centred = rows - rows.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    for found in [components(Comm.solo(), source), *run_ranks(components, 3, source)]:
        mean, own, variance, total = (torch.from_numpy(np.asarray(value)) for value in found)
        assert torch.allclose(mean.double(), rows.mean(0), atol=1e-6)
        assert torch.allclose(variance.double(), values[:4] ** 2 / len(rows), rtol=1e-5)
        assert torch.allclose(
            (own.double() @ directions[:4].T).abs(), torch.eye(4).double(), atol=1e-5
        )
        assert (own.gather(1, own.abs().argmax(1, keepdim=True)) > 0).all()
        assert float(total) == pytest.approx(float(values.square().sum() / len(rows)), rel=1e-5)


def test_a_projected_store_holds_the_projections(source, spec, tmp_path):
    out = tmp_path / "out"
    done = project_store(
        spec, source, out, 4, Comm.solo(), dtype="float16", report=lambda line: None
    )
    assert done.skipped == 0
    store, before = EmbeddingStore.open(out), EmbeddingStore.open(source)
    pca, digest = load_pca(out / "pca.safetensors")
    assert (store.dim, store.num_vectors, store.identity.projection) == (4, 2, digest)
    ids = torch.from_numpy(store.ids.copy())
    exact = (before.vectors(ids) - pca.mean) @ pca.directions.T
    assert (store.vectors(ids) - exact).abs().max() < 2e-3
    assert 0.8 < pca.kept_share < 1
    again = project_store(
        spec, source, out, 4, Comm.solo(), dtype="float16", report=lambda line: None
    )
    assert again.already_done
    with pytest.raises(DataError, match="with projection"):
        embed(spec, out, teacher=stored_as(_Other(4), dtype="float16"), comm=Comm.solo())


class _Other(HashTeacher):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @property
    def identity(self):
        return identity(vectors=2, dim=self.dim)


def test_components_of_other_dimensions_are_refused(source, tmp_path):
    pca = fit_pca(EmbeddingStore.open(source), 3, Comm.solo())
    digest = pca.save(tmp_path / "pca")
    assert load_pca(tmp_path / "pca")[1] == digest
    with pytest.raises(ConfigError, match="of 12 dimensions, but t gives 6"):
        ProjectedTeacher(HashTeacher(), pca, digest)
    with pytest.raises(ConfigError, match="choose 1 to 12"):
        fit_pca(EmbeddingStore.open(source), 13, Comm.solo())
    (tmp_path / "pca").write_bytes(b"no")
    with pytest.raises(DataError, match="holds no principal components"):
        load_pca(tmp_path / "pca")


def test_int8_stores_are_computed_twice_and_agree(spec, tmp_path):
    teacher = stored_as(HashTeacher(), dtype="int8")
    done = embed(spec, tmp_path, teacher=teacher, comm=Comm.solo())
    assert done.checked >= 8
    assert verify(spec, tmp_path, teacher=teacher, comm=Comm.solo()) == done.checked
    with pytest.raises(DataError, match="with dtype 'int8', not 'float16'"):
        verify(spec, tmp_path, teacher=HashTeacher(), comm=Comm.solo())


class Drifted(HashTeacher):
    """Says that it is the same, and gives other vectors."""

    def _vector(self, text: str) -> torch.Tensor:
        return super()._vector(text) + torch.tensor([0.05, 0, 0, 0, 0, 0])


def test_vectors_that_their_teacher_does_not_give_any_more_are_found(spec, tmp_path):
    assert build(Comm.solo(), spec, str(tmp_path))[1] == 8
    assert verify(spec, tmp_path, teacher=HashTeacher(), comm=Comm.solo()) >= 8
    with pytest.raises(DataError, match="are not those that its teacher gives now"):
        verify(spec, tmp_path, teacher=Drifted(), comm=Comm.solo())


class Fatal(HashTeacher):
    """Kills its process, for real, when it is asked for a shard too many."""

    def __init__(self, shards: int) -> None:
        super().__init__()
        self.shards = shards

    def encode(self, texts: list[str]) -> torch.Tensor:
        if len(texts) > 1:  # not a sample that is computed again
            self.shards -= 1
            if self.shards < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(texts)


def build_until_killed(
    rank: int, world_size: int, port: int, spec: str, out: str, shards: int
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    comm = Comm.from_environment(timeout_seconds=100.0)
    embed(spec, out, teacher=Fatal(99 if rank else shards), comm=comm)


def run_until_one_dies(world_size: int, *arguments: object) -> None:
    """As a launcher does: the death of one rank is the death of all."""
    port = free_port()
    ranks = [
        _ranks.Process(target=build_until_killed, args=(rank, world_size, port, *arguments))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        ranks[0].join(timeout=100)
        assert ranks[0].exitcode == -signal.SIGKILL
    finally:
        for process in ranks:
            process.kill()
            process.join()


def test_a_build_killed_on_four_ranks_and_on_two_is_finished_by_one(spec, tmp_path):
    build(Comm.solo(), spec, str(tmp_path / "whole"))
    out = tmp_path / "store"
    done = [0]
    for world_size, shards in ((4, 1), (2, 0)):
        run_until_one_dies(world_size, spec, str(out), shards)
        done.append(len(list(out.glob("*.vectors"))))
    assert done == sorted(done)
    assert 0 < done[1] < 8
    assert build(Comm.solo(), spec, str(out)) == [8, 8 - done[-1], 0]
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.heavy
def test_files_of_one_image_each_are_imported(spec, tmp_path):
    shards = ShardSet.open(spec)
    generator = torch.Generator().manual_seed(0)
    held = {}
    for index in range(len(shards)):
        sample = shards.read(index)
        if index == 5:
            continue
        folders = [sample.key[:5], "emoji-000001", ""]
        folder = tmp_path / "files" / folders[index % 3 if "000001" in sample.shard else 0]
        folder.mkdir(parents=True, exist_ok=True)
        value = torch.randn(11, 8, generator=generator).half()
        torch.save(value, folder / f"{sample.key}.pth")
        held[sample.sample_id] = value.float()
    teacher = VectorFiles(tmp_path / "files", name="facets", vectors=11, dim=8)
    done = embed(spec, tmp_path / "store", teacher=teacher, comm=Comm.solo())
    assert done.skipped == 1
    store = EmbeddingStore.open(tmp_path / "store")
    found = store.vectors(torch.from_numpy(store.ids.copy()))
    assert torch.equal(found, torch.stack([held[int(name)] for name in store.ids]))
    sample = shards.read(0)
    wrong = tmp_path / "files" / sample.key[:5] / f"{sample.key}.pth"
    torch.save(torch.zeros(11, 9), wrong)
    with pytest.raises(DataError, match=r"holds \(11, 9\), not \(11, 8\)"):
        teacher.read(sample)
    torch.save({"a": Path("x")}, wrong)
    with pytest.raises(DataError, match="holds no tensor"):
        teacher.read(sample)
    with pytest.raises(DataError, match="no folder"):
        VectorFiles(tmp_path / "none", name="facets")


def test_the_plan_is_what_is_written(spec, tmp_path):
    flame = identity(vectors=11, dim=5120)
    row = plan_rows(flame)[0]
    assert row["bytes_per_sample"] == 112_640 + 8
    assert row["CC3M_GB"] == pytest.approx(327, rel=0.01)
    assert row["LAION-400M_GB"] == pytest.approx(46_600, rel=0.01)
    assert [row["dim"] for row in plan_rows(flame)] == [5120, 5120, 256, 256]
    build(Comm.solo(), spec, str(tmp_path))
    written = sum(path.stat().st_size for path in tmp_path.glob("*.vectors"))
    assert written == store_bytes(identity(), 70) + 7 * 4096
