"""Several sets of shards: their names, who they are, and that others are not taken for them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.streams import image_samples, open_stream, same
from tests.data.tars import make_samples, write_tar
from trainer.cluster.problem import KMeansConfig
from trainer.comm import Comm
from trainer.config import DataConfig, RunConfig, parse_run
from trainer.data.index import ids_in_set, sample_id, write_index
from trainer.data.labels import ClusterLabels
from trainer.data.sets import names_by_folder
from trainer.data.shards import ShardSet
from trainer.errors import DataError
from trainer.hashing import hash_bits, key_of
from trainer.programs.cluster import ClusterJob, cluster_store
from trainer.run import refuse_other_data
from trainer.store import EmbeddingStore
from trainer.teachers.existing_vectors import VectorFiles
from trainer.teachers.fill import embed
from trainer.types import Batch


def downloads(folder: Path, *names: str, shards: int = 2, each: int = 6) -> dict[str, str]:
    """Sets whose shards and keys are numbered alike, as a download tool does; other pictures."""
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for shard in range(shards):
            samples = image_samples(each, first=100 * place + each * shard)
            renamed = {f"{shard * each + n:09d}": v for n, v in enumerate(samples.values())}
            write_index(write_tar(folder / name / f"{shard:05d}.tar", renamed))
    return {name: f"{folder}/{name}/{{00000..{shards - 1:05d}}}.tar" for name in names}


def test_one_key_takes_a_text_a_list_or_sets_by_name() -> None:
    def read(train: object) -> str:
        return DataConfig.model_validate({"train": train}).train

    assert read("a.tar::b=c.tar") == "a.tar::b=c.tar"
    assert read(["a/*.tar", "b.tar::c.tar"]) == "a/*.tar::b.tar::c.tar"
    named = {"cc3m": "cc3m/{0..3}.tar", "cc12m": ["x.tar", "y.tar::z.tar"]}
    assert read(named) == "cc3m=cc3m/{0..3}.tar::cc12m=x.tar::cc12m=y.tar::cc12m=z.tar"
    assert read(read(named)) == read(named)
    assert read({"home": "~/a.tar"}) == f"home={Path.home()}/a.tar"
    assert read("https://h/a.tar?b=c") == "https://h/a.tar?b=c"
    for wrong in ({}, [], {"a b": "x"}, {"": "x"}, {"a": 1}, {"a": {"b": "x"}}, {"a": "b=x"}, [1]):
        with pytest.raises(ValueError, match="train"):
            read(wrong)


def test_a_sample_without_a_set_has_the_id_that_it_always_had() -> None:
    digest = blake2b(b"00000/000000007", digest_size=8).digest()
    plain = int.from_bytes(digest, "little") >> 1
    assert sample_id("/data/00000.tar", "000000007") == plain
    ids = np.array([plain, 0, 2**63 - 1, 1])
    named = ids_in_set(ids, "cc3m")
    bits = hash_bits(torch.from_numpy(ids), key_of("set", "cc3m"))
    assert named.tolist() == [(value % 2**64) >> 1 for value in bits.tolist()]
    assert named[0] == sample_id("/data/00000.tar", "000000007", "cc3m")
    assert ids_in_set(ids, "").tolist() == ids.tolist()
    many = np.arange(100_000)
    everything = np.concatenate([many, *(ids_in_set(many, name) for name in ("a", "b"))])
    assert len(np.unique(everything)) == 300_000
    assert everything.min() >= 0


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/d/cc3m/0.tar", "/d/cc12m/0.tar", "/d/cc3m/1.tar"], ["cc3m", "cc12m", "cc3m"]),
        (["/d/cc3m/train/0.tar", "/d/cc12m/train/0.tar"], ["cc3m", "cc12m"]),
        (["s3://b/x/y/0.tar?v=1", "s3://b/z/0.tar"], ["x-y", "z"]),
        (["s3://one/d/0.tar", "/mnt/d/0.tar"], ["s3-one", "mnt"]),
        (["/d/0.tar", "/d/more/0.tar"], None),
        (["/d/0.tar", "/d/0.tar?v=2"], None),
        (["/d/a b/0.tar", "/d/a-b/0.tar"], None),
    ],
)
def test_folders_are_called_after_what_tells_them_apart(
    paths: list[str], names: list[str] | None
) -> None:
    assert names_by_folder(paths) == names


def test_downloads_with_equal_names_are_trained_on_together(tmp_path: Path) -> None:
    """By the names of their folders, or by given ones, which come to the same here."""
    specs = downloads(tmp_path, "cc3m", "cc12m")
    plain = ShardSet.open("::".join(specs.values()))
    assert plain.sets == ("cc3m", "cc3m", "cc12m", "cc12m")
    named = DataConfig.model_validate({"train": specs}).train
    streams = [
        open_stream(spec, global_batch=8, workers=workers, **reader)
        for spec, workers, reader in (
            ("::".join(specs.values()), 0, {}),
            (named, 0, {}),
            (named, 1, {}),
            (named, 0, {"reader": "webdataset", "epoch_samples": 24}),
        )
    ]
    taken = [[stream.take() for _ in range(6)] for stream in streams]
    for stream in streams:
        stream.close()
    assert all(same(a, b) and same(a, c) for a, b, c in zip(*taken[:3], strict=True))
    seen = Counter(i for step in taken[0] for batch in step for i in batch.sample_id.tolist())
    assert seen == Counter(plain.ids.tolist() * 2)
    assert len(seen) == 24
    streamed = {i for step in taken[3] for batch in step for i in batch.sample_id.tolist()}
    assert streamed <= set(seen)
    assert len(streamed & set(ShardSet.open(f"cc12m={specs['cc12m']}").ids.tolist())) > 3
    for index in (0, 13):
        sample = plain.read(index)
        name = plain.sets[plain.locate(index)[0]]
        assert sample.sample_id == sample_id(sample.shard, sample.key, name) == plain.ids[index]
    # alone, and where no two ids meet, nothing is named
    assert ShardSet.open(specs["cc3m"]).sets == ("", "")
    (tmp_path / "other").mkdir()
    write_index(write_tar(tmp_path / "other/00000.tar", make_samples(3)))
    assert not any(ShardSet.open(f"{specs['cc3m']}::{tmp_path}/other/00000.tar").sets)


def test_mixed_sets_come_by_their_weights_whoever_reads_them(tmp_path: Path) -> None:
    """Exact counts over an epoch, on one rank and several, with workers and without, and from
    the middle on; what a sample's copies show differs."""
    specs = downloads(tmp_path, "a", "b")
    spec = DataConfig.model_validate({"train": specs}).train
    own = {name: ShardSet.open(f"{name}={specs[name]}").ids.tolist() for name in specs}
    options = {"weights": {"a": 2, "b": 0.5}, "global_batch": 12}
    whole: list[torch.Tensor] = []
    for world_size, workers in ((1, 0), (1, 2), (2, 0), (2, 2), (4, 0), (4, 2)):
        steps: list[list[Batch]] = [[] for _ in range(5)]
        for rank in range(world_size):
            stream = open_stream(spec, rank=rank, world_size=world_size, workers=workers, **options)
            assert stream.epoch_size == 24 + 6
            for step in steps:
                step += stream.take()
            stream.close()
        images = torch.cat([batch.images for step in steps for batch in step])
        ids = torch.cat([batch.sample_id for step in steps for batch in step]).tolist()
        for epoch in range(2):
            counts = Counter(ids[30 * epoch : 30 * epoch + 30])
            assert [counts[i] for i in own["a"]] == [2] * 12
            assert sorted(counts[i] for i in own["b"]) == [0] * 6 + [1] * 6
        assert Counter(ids)[own["b"][0]] == 1
        whole = whole or [images]
        assert torch.equal(images, whole[0])
    stream = open_stream(spec, **options)
    stream.seek(36)
    assert torch.equal(torch.cat([b.images for _ in range(2) for b in stream.take()]), images[36:])
    copies = [[images[r] for r in range(30) if ids[r] == number] for number in own["a"]]
    assert not all(torch.equal(first, second) for first, second in copies)
    for wrong in ({"c": 1.0}, {"a": 0.0}, {"a": -1.0}):
        with pytest.raises(ValueError, match="weights"):
            open_stream(spec, weights=wrong)
    with pytest.raises(ValueError, match=r"train has no set with a name; write train: \{name"):
        open_stream(specs["a"], weights={"a": 2.0})
    with pytest.raises(ValueError, match="weights is not read where reader is webdataset"):
        open_stream(spec, weights={"a": 2.0}, reader="webdataset", epoch_samples=8)


def test_sets_that_can_not_be_told_apart_are_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = downloads(tmp_path, "a", "a/b")
    with pytest.raises(DataError, match=r"6 samples have the same .* name the sets"):
        ShardSet.open("::".join(specs.values()))
    assert len(ShardSet.open(f"one={specs['a']}::two={specs['a/b']}")) == 24
    with pytest.raises(DataError, match="name the sets"):
        ShardSet.open(f"one={specs['a']}::one={specs['a/b']}")
    (tmp_path / "x=1").mkdir()
    shutil.copy(tmp_path / "a/00000.tar", tmp_path / "x=1/0.tar")
    write_index(str(tmp_path / "x=1/0.tar"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"could be the set x or a folder's name; write \./x=1"):
        ShardSet.open("x=1/0.tar")
    assert len(ShardSet.open("./x=1/0.tar")) == len(ShardSet.open(f"{tmp_path}/x=1/0.tar")) == 6


def test_the_same_shards_elsewhere_come_in_the_order_that_they_had(tmp_path: Path) -> None:
    specs = downloads(tmp_path, "a")
    folder = tmp_path / "a"
    for number in range(2, 12):
        write_index(write_tar(folder / f"{number}.tar", image_samples(2, first=40 + number)))
    spec = f"{specs['a']}::{folder}/{{2..11}}.tar"
    first = ShardSet.open(spec)
    shutil.copytree(folder, tmp_path / "b")
    globbed = ShardSet.open(f"{tmp_path}/b/*.tar")
    assert globbed.ids.tolist() != first.ids.tolist()
    moved = ShardSet.open(f"{tmp_path}/b/*.tar", before=first.lines)
    assert moved.ids.tolist() == first.ids.tolist()
    assert [moved.read(n).fields for n in range(len(moved))] == [
        first.read(n).fields for n in range(len(first))
    ]
    other = write_tar(tmp_path / "b/11.tar", image_samples(2, first=7))
    write_index(other)
    for changed, message in (
        (f"{tmp_path}/b/*.tar", "not the 12 that the run began with: 1 changed, as 11;"),
        (f"{folder}/{{2..11}}.tar", "2 are missing, as 00000"),
        (f"{spec}::{tmp_path}/b/*=*.tar", "no shard matches"),
        (f"set={folder}/*.tar", "12 are missing, as 00000; 12 are new, as set=00000"),
    ):
        with pytest.raises(DataError, match=message):
            ShardSet.open(changed, before=first.lines)


def test_a_stream_of_commands_and_names_knows_its_shards_again(tmp_path: Path) -> None:
    specs = downloads(tmp_path, "a")
    web = {"reader": "webdataset", "epoch_samples": 12, "global_batch": 8}
    first = open_stream(specs["a"], **web)
    moved = open_stream(
        f"{tmp_path}/a/*1.tar::{tmp_path}/a/*0.tar", before=first.shard_lines, **web
    )
    assert same(first.take(), moved.take())
    with pytest.raises(DataError, match="1 are missing"):
        open_stream(f"{tmp_path}/a/*0.tar", before=first.shard_lines, **web)


@pytest.mark.heavy
def test_what_was_made_of_another_download_is_refused(tmp_path: Path) -> None:
    """Vectors, and clusters of them, of shards that have the names and keys of the run's."""
    specs = downloads(tmp_path, "one", "two")
    for number in range(12):
        path = tmp_path / f"files/{number:09d}.pth"
        path.parent.mkdir(exist_ok=True)
        torch.save(torch.randn(1, 4, generator=torch.Generator().manual_seed(number)), path)
    teacher = VectorFiles(tmp_path / "files", name="files", vectors=1, dim=4)
    for name, spec in (("plain", specs["one"]), ("named", f"one={specs['one']}")):
        embed(spec, tmp_path / name, teacher=teacher, comm=Comm.solo())
        job = ClusterJob(kmeans=KMeansConfig(clusters=2, iterations=2))
        cluster_store(tmp_path / name, tmp_path / f"{name}-labels", job, Comm.solo(), say=print)
    assert list(EmbeddingStore.open(tmp_path / "named").header.shards) == ["one=00000", "one=00001"]

    def refused(spec: str, **folders: str) -> bool:
        recipe = {"name": "mlcd", "labels": f"{tmp_path}/{folders['labels']}"}
        config = parse_run(RUN.format(folder=tmp_path, recipe=json.dumps(recipe)))
        try:
            refuse_other_data(config, ShardSet.open(spec).lines)
        except DataError as error:
            return "was made of another" in str(error)
        return False

    for folder in ("plain", "plain-labels"):
        assert not refused(specs["one"], labels=folder)
        assert refused(specs["two"], labels=folder)
        assert not refused(f"two={specs['two']}", labels=folder)  # and there is nothing to join
    for folder in ("named", "named-labels"):
        assert not refused(f"one={specs['one']}::two={specs['two']}", labels=folder)
        assert refused(f"one={specs['two']}", labels=folder)
    both = ShardSet.open("::".join(specs.values()))
    known = ClusterLabels.open(tmp_path / "named-labels").of(torch.from_numpy(both.ids)) >= 0
    assert known.tolist() == [True] * 12 + [False] * 12
    plain = ClusterLabels.open(tmp_path / "plain-labels").of(torch.from_numpy(both.ids))
    assert not bool((plain >= 0).any())


RUN = """
workdir: {folder}/run
steps: 2
global_batch: 4
recipe: {recipe}
data: {{train: nothing.tar}}
"""


def test_the_recipe_that_reads_the_labels_takes_sets_by_name() -> None:
    config = parse_run(
        RUN.format(folder="/x", recipe='{"name": "mlcd", "labels": "/l"}'),
        ["data.train={a: [x.tar, y.tar], b: z.tar}"],
    )
    assert isinstance(config, RunConfig)
    assert config.data.train == "a=x.tar::a=y.tar::b=z.tar"
